"""Pulling: from a real registry here, and from servers that lie, break off, redirect and ask for passwords."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from labkernel.image import registry
from labkernel.image.oci import BadImage, Image, Layout
from labkernel.image.registry import Reference, RegistryError
from tests.helpers import environment, own_home
from tests.others import cli, program, run
from tests.test_oci import layout_of, tar

TOKEN, USER, PASSWORD = "a.token", "ada", "correct-horse"


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory, images_too=False) as place:
        yield place


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "WAIT", 0.01)
    monkeypatch.setattr(registry, "LONGEST_WAIT", 0.05)


# ---------------------------------------------------------------------- a server that does what a test wants


class Server:
    """A registry for the images of a layout; `before` may answer a request itself, and says so."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.before: Callable[[Any], bool] = lambda request: False
        self.host = ""

    def answer(self, request: Any) -> None:
        self.asked.append(request.path)
        self.headers.append(dict(request.headers))
        if self.before(request):
            return
        name = request.path.rpartition("/")[2]
        tags = self.layout.tags()
        digest = tags[name].digest if name in tags else name
        if not digest.startswith("sha256:") or not self.layout.place(digest).exists():
            request.reply(404)
            return
        kind = tags[name].media_type if name in tags else "application/vnd.oci.image.manifest.v1+json"
        request.reply(200, self.layout.place(digest).read_bytes(), {"Content-Type": kind})


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Server, Image]]:
    layout, image = layout_of(
        tmp_path / "served", tar(("a", "1" * 200_000), ("b", os.urandom(300_000).hex()))
    )
    server = Server(layout)

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(key, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def do_GET(self) -> None:
            server.answer(self)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server.host = f"127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield server, image
        http.shutdown()
        thread.join()


def pull(server: Server, place: Path, what: str = "shop:latest", **settings: Any) -> tuple[Image, str]:
    return registry.pull(f"{server.host}/{what}", Layout.create(place / "pulled"), **settings)


def test_by_tag_and_by_digest(served: tuple[Server, Image], tmp_path: Path) -> None:
    server, image = served
    steps: list[tuple[int, int]] = []
    found, pinned = pull(server, tmp_path, progress=lambda what, done, total: steps.append((done, total)))
    assert found.manifest.digest == image.manifest.digest
    assert pinned == f"{server.host}/shop@{image.manifest.digest}"
    assert (
        steps == sorted(steps)
        and steps[-1][0] == steps[-1][1] == image.config.size + image.layers[0].blob.size
    )
    assert len(server.asked) == 3
    again, _ = registry.pull(pinned, Layout.create(tmp_path / "pulled"))
    assert again.manifest.digest == found.manifest.digest
    assert len(server.asked) == 4, "blobs that are there are not fetched again"


def test_the_wrong_manifest_for_a_digest(served: tuple[Server, Image], tmp_path: Path) -> None:
    server, _ = served
    wanted = f"sha256:{hashlib.sha256(b'another').hexdigest()}"
    server.before = lambda request: bool(
        "manifests" in request.path
        and not request.reply(200, server.layout.bytes(server.layout.tags()["latest"]))
    )
    with pytest.raises(BadImage, match="the registry sent something else"):
        pull(server, tmp_path, f"shop@{wanted}")
    assert not list((tmp_path / "pulled/blobs/sha256").iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is not what its name says"),
        (lambda data: data + b"x", "has more than"),
        (lambda data: data[:-1], "ends after"),
        (lambda data: b"", "ends after"),
    ],
)
def test_wrong_blobs_are_not_kept(
    served: tuple[Server, Image], tmp_path: Path, change: Callable[[bytes], bytes], said: str
) -> None:
    server, image = served
    blob = image.layers[0].blob.digest

    def before(request: Any) -> bool:
        if not request.path.endswith(blob):
            return False
        request.reply(200, change(server.layout.place(blob).read_bytes()))
        return True

    server.before = before
    with pytest.raises(BadImage, match=said):
        pull(server, tmp_path)
    names = [path.name for path in (tmp_path / "pulled/blobs/sha256").iterdir()]
    assert blob.partition(":")[2] not in names and not [name for name in names if name.startswith(".new")]
    assert server.asked.count(f"/v2/shop/blobs/{blob}") <= registry.TRIES


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_is_taken_up_again(
    served: tuple[Server, Image], tmp_path: Path, ranges: bool
) -> None:
    server, image = served
    blob = image.layers[0].blob
    seen: list[int] = []

    def before(request: Any) -> bool:
        if not request.path.endswith(blob.digest):
            return False
        data = server.layout.place(blob.digest).read_bytes()
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        seen.append(start)
        start = start if ranges else 0
        if len(seen) < 3:  # promises all, and sends a part
            request.send_response(206 if start else 200)
            request.send_header("Content-Length", str(len(data) - start))
            request.end_headers()
            request.wfile.write(data[start : start + 150_000])
            request.wfile.flush()
            request.connection.shutdown(socket.SHUT_RDWR)
        else:
            request.reply(206 if start else 200, data[start:])
        return True

    server.before = before
    found, _ = pull(server, tmp_path)
    assert found.layers == image.layers
    assert len(seen) == 3 and seen[0] == 0 < seen[1] <= seen[2]


def test_the_end_of_a_message_is_lost_and_all_of_the_blob_is_there(
    served: tuple[Server, Image], tmp_path: Path
) -> None:
    """The last chunk, an empty one, says that it was the last; to ask for more than all is 416."""
    server, image = served

    def before(request: Any) -> bool:
        if not request.path.endswith(image.layers[0].blob.digest):
            return False
        if "Range" in request.headers:
            request.reply(416)
            return True
        data = server.layout.bytes(image.layers[0].blob)
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        request.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        request.wfile.flush()
        request.connection.shutdown(socket.SHUT_RDWR)
        return True

    server.before = before
    found, _ = pull(server, tmp_path)
    assert found.layers == image.layers


def test_a_manifest_that_is_cut_short(served: tuple[Server, Image], tmp_path: Path) -> None:
    server, _ = served
    server.before = lambda request: not request.reply(200, b'{"mediaType"', {"Content-Length": "1000"})
    with pytest.raises(RegistryError, match=f"manifest latest from {server.host}: "):
        pull(server, tmp_path)


@pytest.mark.parametrize("kind", [b"[]", b"{}"])
def test_a_media_type_that_is_no_text(served: tuple[Server, Image], tmp_path: Path, kind: bytes) -> None:
    server, _ = served
    server.before = lambda request: not request.reply(200, b'{"mediaType": %b}' % kind)
    with pytest.raises(BadImage, match=r"manifest latest is a .*, which this does not read"):
        pull(server, tmp_path)


def test_it_does_not_try_for_ever(served: tuple[Server, Image], tmp_path: Path) -> None:
    server, _ = served
    server.before = lambda request: not request.reply(503, b"", {"Retry-After": "100000"})
    begin = time.monotonic()
    with pytest.raises(RegistryError, match="503"):
        pull(server, tmp_path)
    assert len(server.asked) == registry.TRIES and time.monotonic() - begin < 10
    with pytest.raises(RegistryError, match="does not answer: Connection refused"):
        registry.pull("127.0.0.1:1/x", Layout.create(tmp_path / "none"))


def test_what_is_not_there(served: tuple[Server, Image], tmp_path: Path) -> None:
    server, _ = served
    with pytest.raises(RegistryError, match=r"404 Not Found \(there is no image of that name or tag\)"):
        pull(server, tmp_path, "shop:nothing")
    assert len(server.asked) == 1, "that will not change by asking again"


# ---------------------------------------------------------------------- passwords


def guarded(server: Server, scheme: str) -> None:
    """Let the server want a token, or a password."""
    password = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    def before(request: Any) -> bool:
        given = request.headers.get("Authorization")
        if request.path.startswith("/token"):
            good = given in (None, password)
            request.reply(
                200 if good else 401, json.dumps({"token": TOKEN if given else "anonymous"}).encode()
            )
            return True
        if given == (password if scheme == "Basic" else f"Bearer {TOKEN}"):
            return False
        realm = f'realm="http://{server.host}/token",service="s",scope="repository:shop:pull"'
        request.reply(
            401, b"", {"WWW-Authenticate": 'Basic realm="x"' if scheme == "Basic" else f"Bearer {realm}"}
        )
        return True

    server.before = before


@pytest.mark.parametrize("scheme", ["Basic", "Bearer"])
def test_passwords(served: tuple[Server, Image], tmp_path: Path, scheme: str, home: Path) -> None:
    server, image = served
    guarded(server, scheme)
    with pytest.raises(RegistryError, match="401 Unauthorized"):
        pull(server, tmp_path)
    found, _ = pull(server, tmp_path, credentials=(USER, PASSWORD))
    assert found.manifest.digest == image.manifest.digest
    if scheme == "Bearer":
        assert "/token?service=s&scope=repository%3Ashop%3Apull" in server.asked
    for path in [*tmp_path.rglob("*"), *home.rglob("*")]:  # nowhere on the disk
        if path.is_file() and path.stat().st_size < 1 << 20:
            data = path.read_bytes()
            assert PASSWORD.encode() not in data and TOKEN.encode() not in data


def test_netrc_is_not_asked(served: tuple[Server, Image], tmp_path: Path) -> None:
    server, _ = served
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")
    with environment(NETRC=str(tmp_path / "netrc")):
        pull(server, tmp_path)
    assert not any("Authorization" in headers for headers in server.headers)


def test_redirects_lose_the_authorization_and_never_lead_to_plain_http(
    served: tuple[Server, Image], tmp_path: Path
) -> None:
    server, image = served
    port = server.host.rpartition(":")[2]
    guarded(server, "Basic")
    guard = server.before

    def before(request: Any) -> bool:
        if request.path.startswith("/elsewhere/"):
            assert "Authorization" not in request.headers
            return False
        if not guard(request):
            if "/blobs/" not in request.path:
                return False
            to = f"http://localhost:{port}/elsewhere/{request.path.rpartition('/')[2]}"
            request.reply(307, b"", {"Location": to})
        return True

    server.before = before
    found, _ = pull(server, tmp_path, credentials=(USER, PASSWORD))
    assert found.layers == image.layers
    assert any(path.startswith("/elsewhere/") for path in server.asked)
    server.before = lambda request: not request.reply(302, b"", {"Location": "http://192.0.2.1/x"})
    with pytest.raises(RegistryError, match="only https is followed"):
        pull(server, tmp_path / "two")
    server.before = lambda request: not request.reply(302, b"", {"Location": "/v2/round"})
    with pytest.raises(RegistryError, match="redirects more than"):
        pull(server, tmp_path / "three")
    server.before = lambda request: (
        not request.reply(401, b"", {"WWW-Authenticate": 'Bearer realm="http://192.0.2.1/token"'})
    )
    with pytest.raises(RegistryError, match="only https is used"):
        pull(server, tmp_path / "four", credentials=(USER, PASSWORD))


def test_the_password_is_not_for_where_a_redirect_leads(served: tuple[Server, Image], tmp_path: Path) -> None:
    """What is there wants a token, too, and names itself as the place that gives one for a password."""
    server, _ = served
    elsewhere = f"localhost:{server.host.rpartition(':')[2]}"
    guarded(server, "Bearer")
    guard = server.before
    given: list[str | None] = []

    def before(request: Any) -> bool:
        if request.headers["Host"] == elsewhere:
            given.append(request.headers.get("Authorization"))
            request.reply(401, b"", {"WWW-Authenticate": f'Bearer realm="http://{elsewhere}/token"'})
            return True
        if not guard(request):
            if "/blobs/" not in request.path:
                return False
            request.reply(307, b"", {"Location": f"http://{elsewhere}{request.path}"})
        return True

    server.before = before
    with pytest.raises(RegistryError, match="401 Unauthorized"):
        pull(server, tmp_path, credentials=(USER, PASSWORD))
    assert given == [None]


def test_a_registry_in_capitals_gets_the_password(served: tuple[Server, Image], tmp_path: Path) -> None:
    server, image = served
    guarded(server, "Bearer")
    text = f"LOCALHOST:{server.host.rpartition(':')[2]}/shop"
    found, _ = registry.pull(text, Layout.create(tmp_path / "pulled"), credentials=(USER, PASSWORD))
    assert found.manifest.digest == image.manifest.digest


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("host.example/a/b:1", ("host.example", "a/b", "1", None)),
        ("localhost/a", ("localhost", "a", "latest", None)),
        ("[::1]:5000/a", ("[::1]:5000", "a", "latest", None)),
        (f"h:5000/a:t@sha256:{'0' * 64}", ("h:5000", "a", "t", f"sha256:{'0' * 64}")),
    ],
)
def test_references(text: str, parts: tuple[str, ...]) -> None:
    found = Reference.parse(text)
    assert (found.host, found.name, found.tag, found.digest) == parts


@pytest.mark.parametrize(
    "text",
    ["", "busybox", "library/busybox", "host.example/", "host.example/A", "host.example/a/../b", "host.example/a:",
     "host.example/a:-x", "host.example/a@sha256:12", "host.example/a?x=1", "user@host.example/a", "h:123456/a",
     "host.example/a b", "host.example/a\n"],
)  # fmt: skip
def test_references_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(ValueError):
        Reference.parse(text)


def test_plain_http_is_for_this_machine_only() -> None:
    for host, plain in (("localhost:5000", True), ("127.0.0.1", True), ("[::1]:80", True), ("127.evil.example", False),
                        ("localhost.example", False), ("10.0.0.1", False), ("127.0.0.1.example", False)):  # fmt: skip
        assert registry._is_loopback(host) is plain, host


# ---------------------------------------------------------------------- the real one, and the command line


@pytest.fixture
def debian_registry(tmp_path: Path) -> Iterator[str]:
    server = program("docker-registry")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    config = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(tmp_path / "store")}},
        "http": {"addr": host},
    }
    (tmp_path / "config.yml").write_text(json.dumps(config))
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen([server, "serve", str(tmp_path / "config.yml")], stdout=log, stderr=log)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://{host}/v2/", timeout=1).close()
                break
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        yield host
    finally:
        process.terminate()
        process.wait()


def test_debians_registry(debian_registry: str, tmp_path: Path) -> None:
    """An image goes there by skopeo and comes back by us, in OCI's and in Docker's form."""
    _, image = layout_of(tmp_path / "l", tar(("hello", "hello")), tar(("more", "more")))
    skopeo = program("skopeo")
    for form in ("oci", "v2s2"):
        to = f"docker://{debian_registry}/lab/{form}:1"
        run(
            skopeo,
            "--insecure-policy",
            "copy",
            "--dest-tls-verify=false",
            "--format",
            form,
            f"oci:{tmp_path}/l:latest",
            to,
        )
        told = json.loads(cli("pull", f"{debian_registry}/lab/{form}:1", f"from-{form}", "--json").stdout)
        assert (told["files"], told["bytes"]) == (2, 9)
        assert told["pinned"].startswith(f"{debian_registry}/lab/{form}@sha256:")
        again = json.loads(cli("pull", told["pinned"], "again", "--json").stdout)
        assert again["digest"] == told["digest"]
        if form == "oci":
            assert told["pinned"].endswith(image.manifest.digest)
    assert cli("pull", f"{debian_registry}/lab/none", status=125).stderr.count("404") == 1


def test_an_interrupted_pull_leaves_nothing(served: tuple[Server, Image], home: Path) -> None:
    server, image = served
    started, ended = threading.Event(), threading.Event()

    def before(request: Any) -> bool:
        if not request.path.endswith(image.layers[0].blob.digest):
            return False
        request.send_response(200)
        request.send_header("Content-Length", str(image.layers[0].blob.size))
        request.end_headers()
        request.wfile.write(b"x" * 1000)
        request.wfile.flush()
        started.set()
        ended.wait(60)
        return True

    server.before = before
    command = [sys.executable, "-m", "labkernel", "pull", f"{server.host}/shop:latest"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert started.wait(60)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    ended.set()
    assert list((home / "builds").iterdir()) == []
    assert not (home / "images").exists() or not list((home / "images").glob("shop*"))
