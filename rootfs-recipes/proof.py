"""The proof that a root file system runs Python: the same program in every one of them, which is to print "proved"."""

import asyncio
import ctypes
import hashlib
import http.server
import json
import socket
import sqlite3
import ssl
import threading
import urllib.request

assert json.loads(json.dumps({"a": [1, None, "ü"]})) == {"a": [1, None, "ü"]}

context = ssl.create_default_context()
assert context.check_hostname and ssl.RAND_bytes(8) != ssl.RAND_bytes(8)

with sqlite3.connect(":memory:") as database:
    assert database.execute("select sum(value) from json_each('[1, 2, 39]')").fetchone() == (42,)

assert ctypes.c_int.from_buffer(bytearray(b"\1\0\0\0")).value in (1, 1 << 24)
callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(lambda number: number * 2)  # libffi makes code for it
assert callback(21) == 42

assert hashlib.sha256(b"").hexdigest().startswith("e3b0c44298fc1c14")
assert hashlib.new("sha3_256", b"").digest_size == 32


async def both():
    """Two tasks that wait at the same time."""
    return await asyncio.gather(asyncio.sleep(0.01, "one"), asyncio.to_thread(lambda: "two"))


assert asyncio.run(both()) == ["one", "two"]


class Hello(http.server.BaseHTTPRequestHandler):
    """Answers every question alike."""

    def do_GET(self):
        """Answer."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *_):
        """Say nothing."""


# HTTPServer asks for its own full name: that takes the codec "idna", which no import shows.
server = http.server.HTTPServer(("127.0.0.1", 0), Hello)
threading.Thread(target=server.serve_forever, daemon=True).start()
with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/", timeout=10) as answer:
    assert answer.read() == b"hello"
server.shutdown()
assert socket.getfqdn("127.0.0.1")

print("proved")
