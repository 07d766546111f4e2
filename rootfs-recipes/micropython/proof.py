"""The proof for MicroPython: of what ../proof.py asks of a Python, what is there, and what is not."""

import asyncio
import hashlib
import json
import socket
import sys

import tls

assert sys.implementation.name == "micropython"
assert json.loads(json.dumps({"a": [1, None]})) == {"a": [1, None]}
assert hashlib.sha256(b"").digest()[:4] == b"\xe3\xb0\xc4\x42"
assert tls.SSLContext(tls.PROTOCOL_TLS_CLIENT)


async def both():
    """Two tasks that wait at the same time."""

    async def after(milliseconds, value):
        await asyncio.sleep_ms(milliseconds)
        return value

    return await asyncio.gather(after(10, "one"), after(5, "two"))


assert asyncio.run(both()) == ["one", "two"]

# A server: with sockets, by hand.
server = socket.socket()
server.bind(socket.getaddrinfo("127.0.0.1", 8080)[0][-1])
server.listen(1)
client = socket.socket()
client.connect(socket.getaddrinfo("127.0.0.1", 8080)[0][-1])
there, _ = server.accept()
there.send(b"HTTP/1.0 200 OK\r\n\r\nhello")
there.close()
answer = b""
while data := client.recv(100):
    answer += data
assert answer.endswith(b"hello")

# What is lost: a database, calls into C libraries, a web server, names in other scripts, certificates that are looked
# up. In place of ssl and ctypes it has "tls" and "ffi", of its own make.
NAMES = (
    "sqlite3",
    "ctypes",
    "http.server",
    "ssl",
    "unicodedata",
    "decimal",
    "subprocess",
    "threading",
    "pathlib",
)
lost = []
for name in NAMES:
    try:
        __import__(name)
    except ImportError:
        lost.append(name)
assert tuple(lost) == NAMES, lost

print("proved")
