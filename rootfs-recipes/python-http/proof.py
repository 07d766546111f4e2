"""The proof of python-http: the server is started as its reader would start it, and visited over the network.

Written for an image that holds nothing else: the client is http.client, which http.server itself imports.
"""

import http.client
import os
import socket
import sys
import time
from email.utils import formatdate

os.mkdir("/tmp/site")
os.mkdir("/tmp/site/größe")
with open("/tmp/site/page.html", "w", encoding="utf-8") as file:
    file.write("<p>hello, wörld</p>")
with open("/etc/hosts", "a", encoding="ascii") as file:
    file.write("127.0.0.1 xn--bcher-kva.test\n")  # bücher.test, as a name server has it

server = os.fork()
if server == 0:
    os.execv(sys.executable, ["python3", "-m", "http.server", "--directory", "/tmp/site", "8000"])


def get(path, host="localhost", method="GET", **headers):
    """An answer: its status, its headers, its content."""
    connection = http.client.HTTPConnection(host, 8000, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()


for _ in range(100):
    try:
        socket.create_connection(("localhost", 8000)).close()
        break
    except ConnectionRefusedError:
        time.sleep(0.1)

status, headers, content = get("/page.html")
assert (status, content) == (200, "<p>hello, wörld</p>"), (status, content)
assert headers["Content-Type"] == "text/html" and headers["Server"].startswith("SimpleHTTP/")
later = formatdate(time.time() + 60, usegmt=True)
assert get("/page.html", **{"If-Modified-Since": later})[0] == 304
assert get("/page.html", method="HEAD")[2] == ""
status, headers, content = get("/")
assert status == 200 and "page.html" in content and "größe/" in content, content
assert get("/gr%C3%B6%C3%9Fe")[1]["Location"] == "/gr%C3%B6%C3%9Fe/"
status, headers, content = get("/nothing")
assert status == 404 and "File not found" in content, content
assert get("/", method="POST")[0] == 501

# A name that is not ASCII: the client turns it into the one that name servers know, by the codec "idna".
assert get("/page.html", "bücher.test")[0] == 200
assert socket.gethostbyname("bücher.test") == "127.0.0.1"
assert socket.getfqdn("bücher.test") == "localhost"  # the first name of that address in /etc/hosts

# What it lacks of a whole Python; and it says so by its name, not by a crash.
NAMES = ("ssl", "sqlite3", "ctypes", "json", "asyncio", "decimal", "subprocess", "hashlib", "zlib")
for name in NAMES:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name)

os.kill(server, 9)
os.waitpid(server, 0)
print("proved")
