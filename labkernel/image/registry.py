"""Pulling an image from a registry: three kinds of GET, and a digest for each answer.

    GET /v2/NAME/manifests/TAG-or-DIGEST    the manifest, or an index of several
    GET /v2/NAME/blobs/DIGEST               the configuration, and each layer
    401, and where to get a token           GET that, and ask again with it

Only the first may be asked for by a name that means something else tomorrow, a tag. All that follows is named by
digests, which are checked while the bytes come in; so `NAME@sha256:…` is the same image for ever, whoever serves it.

Of the clients for Python that are kept, `oras` checks no digest of what it downloads, waits without a timeout, and
sleeps for minutes when a server is not there; `python-dxf` takes and stores credentials in a file. Both are for
pushing too. What is left of the protocol is this module, on `requests`, which JupyterLab brings anyway.

Source: https://github.com/opencontainers/distribution-spec/blob/main/spec.md, "Pull";
https://distribution.github.io/distribution/spec/auth/token/
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests

from labkernel.image import Progress
from labkernel.image.oci import (
    DOCKER,
    INDEX,
    MANIFEST,
    MOST_JSON,
    MOST_LAYERS,
    BadImage,
    Descriptor,
    Image,
    Layout,
    check_digest,
    from_json,
)
from labkernel.image.tarball import LIMITS

TIMEOUT = (10.0, 30.0)
"""Seconds to connect, and without a byte."""

TRIES = 4
"""How often a request is made that fails for a reason that may pass."""

WAIT = 0.5
"""Seconds before the second try; before each further one twice as long."""

LONGEST_WAIT = 10.0
"""Seconds, also where the server asks for more."""

REDIRECTS = 5
_PASSING = (429, 500, 502, 503, 504)
_CHUNK = 1 << 16


class RegistryError(OSError):
    """The registry said no, or nothing; the text says what was asked of whom."""


@dataclass(frozen=True)
class Reference:
    """The name of an image in a registry: HOST[:PORT]/NAME[:TAG][@DIGEST]."""

    host: str
    name: str
    tag: str
    digest: str | None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference. There is no default for the registry. Raises ValueError."""
        rest, at, digest = text.partition("@")
        if at:
            check_digest(digest)
        host, _, path = rest.partition("/")
        name, colon, tag = path.partition(":")
        good_host = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[a-zA-Z0-9.-]+)(:\d{1,5})?", host)
        if not good_host or not ("." in host or ":" in host or host == "localhost"):
            raise ValueError(
                f"image {text!r}: begin with the registry, as in HOST/NAME:TAG or HOST:PORT/NAME:TAG"
            )
        if not re.fullmatch(r"[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*", name):
            raise ValueError(
                f"image {text!r}: {name!r} is no name: small letters and digits, with . _ - / between"
            )
        if colon and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", tag):
            raise ValueError(f"image {text!r}: {tag!r} is no tag")
        return cls(host, name, tag or "latest", digest or None)

    def pinned(self, digest: str) -> str:
        """The name of this very image, for ever."""
        return f"{self.host}/{self.name}@{digest}"


def pull(
    text: str, layout: Layout, *, credentials: tuple[str, str] | None = None, progress: Progress | None = None
) -> tuple[Image, str]:  # fmt: skip
    """Fetch an image into a layout, for this machine's platform; returns it, and its reference with the digest.

    What the layout has already is not fetched again. `credentials`, a user's name and password, are kept in memory
    only, and sent only to the registry and to where it says that tokens are given.
    Raises ValueError for a reference that can't be meant, RegistryError, and BadImage for wrong digests.
    """
    reference = Reference.parse(text)
    with _Client(reference, credentials) as client:
        top = client.manifest(layout, reference.digest or reference.tag, reference.digest)
        blob = top
        for _ in range(4):
            if blob.media_type != INDEX:
                break
            blob = client.chosen(layout, blob)
        manifest = from_json(layout.bytes(blob), f"manifest {blob.digest}")
        wanted = [Descriptor.read(manifest.get("config"))]
        layers = manifest.get("layers")
        if not isinstance(layers, list) or len(layers) > MOST_LAYERS:
            raise BadImage(f"manifest {blob.digest}: its layers are no list of at most {MOST_LAYERS}")
        wanted += [Descriptor.read(one) for one in layers]
        total = sum(one.size for one in wanted)
        if total > LIMITS.bytes:
            raise BadImage(f"the image has {total} bytes, over the limit of {LIMITS.bytes}")
        done = 0
        for one in wanted:
            client.blob(layout, one, done, total, progress)
            done += one.size
    image = layout.read_image(blob)
    layout.tag(reference.tag, image.manifest)
    return image, reference.pinned(top.digest)


class _Client:
    """A conversation with one registry about one name."""

    def __init__(self, reference: Reference, credentials: tuple[str, str] | None) -> None:
        self.credentials = credentials
        self.authorization: str | None = None
        self.host = reference.host
        self.base = (
            f"{'http' if _is_loopback(reference.host) else 'https'}://{reference.host}/v2/{reference.name}"
        )
        self.session = requests.Session()
        self.session.auth = lambda request: request  # else passwords from ~/.netrc are sent

    def __enter__(self) -> _Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()

    def manifest(self, layout: Layout, name: str, digest: str | None) -> Descriptor:
        """Fetch a manifest or an index, by tag or by digest."""
        accept = {
            "Accept": ", ".join([INDEX, MANIFEST, *(kind for kind, ours in DOCKER.items() if "json" in ours)])
        }
        with self.get(f"{self.base}/manifests/{name}", accept) as response:
            data = _small(response, f"manifest {name}")
            said = response.headers.get("Content-Type", "").partition(";")[0].strip()
        algorithm = (digest or "sha256:").partition(":")[0]
        found = f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"
        if digest is not None and found != digest:
            raise BadImage(f"manifest {digest}: the registry sent something else, with the digest {found}")
        kind = from_json(data, f"manifest {name}").get("mediaType", said)
        blob = layout.add(data, DOCKER.get(kind, kind) if isinstance(kind, str) else "")
        if blob.media_type not in (INDEX, MANIFEST):
            raise BadImage(f"manifest {name} is a {kind!r:.80}, which this does not read")
        return blob

    def chosen(self, layout: Layout, index: Descriptor) -> Descriptor:
        """Fetch the manifest for this machine's platform that an index names."""
        one = layout.choose(index)
        return self.manifest(layout, one.digest, one.digest)

    def blob(
        self, layout: Layout, blob: Descriptor, before: int, total: int, progress: Progress | None
    ) -> None:  # fmt: skip
        """Fetch a blob into the layout, checked on the way; a connection that breaks is taken up where it broke."""
        if layout.place(blob.digest).is_file():
            layout.check(blob)
            return
        with layout.adding(blob.media_type, blob) as sink:
            for attempt in range(TRIES):
                try:
                    for chunk in self._pieces(f"{self.base}/blobs/{blob.digest}", sink.size):
                        sink.write(chunk)
                        if progress:
                            progress("pull", before + sink.size, total)
                except (requests.ConnectionError, requests.Timeout) as error:
                    if sink.size >= blob.size:
                        break  # all has come, but for the end of the message
                    if attempt + 1 == TRIES:
                        raise RegistryError(
                            f"blob {blob.digest}: the connection to {self.host} broke {TRIES} times: {_reason(error)}"
                        ) from None
                    time.sleep(WAIT * 2**attempt)
                    continue
                if sink.size >= blob.size:
                    break
                if attempt + 1 == TRIES:
                    raise BadImage(f"blob {blob.digest} ends after {sink.size} bytes of {blob.size}")

    def _pieces(self, url: str, start: int) -> Iterator[bytes]:
        """The content from byte *start* on, also where the server cannot begin in the middle."""
        # "identity": a proxy that compresses would change the bytes.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with self.get(url, headers) as response:
            skip = start if response.status_code != 206 else 0
            try:
                for chunk in response.iter_content(_CHUNK):
                    yield chunk[skip:]
                    skip = max(0, skip - len(chunk))
            except requests.exceptions.ChunkedEncodingError as error:
                raise requests.ConnectionError(error) from error

    def get(self, url: str, headers: dict[str, str]) -> Any:
        """A GET, with a token where one is asked for, tried again where that may help. Raises RegistryError."""
        for attempt in range(TRIES):
            try:
                response = self._follow(url, headers)
                # Where the registry has sent us to has no say in where the password goes.
                # (requests writes the name of a host in small letters.)
                place = urlsplit(response.url).netloc.lower()
                asks = response.status_code == 401 and place == self.host.lower()
                if asks and self._authorize(response):
                    response.close()
                    response = self._follow(url, headers)
            except (requests.ConnectionError, requests.Timeout) as error:
                if attempt + 1 == TRIES:
                    raise RegistryError(f"{self.host} does not answer: {_reason(error)}") from None
                time.sleep(WAIT * 2**attempt)
                continue
            except requests.RequestException as error:
                raise RegistryError(f"{self.host}: {_reason(error)}") from None
            if response.status_code in (200, 206):
                return response
            response.close()
            if response.status_code not in _PASSING or attempt + 1 == TRIES:
                raise RegistryError(f"GET {url}: {response.status_code} {response.reason}{_advice(response)}")
            asked = response.headers.get("Retry-After", "")
            wait = float(asked) if asked.isdigit() else WAIT * 2**attempt
            time.sleep(min(wait, LONGEST_WAIT))
        raise AssertionError("the last try returns or raises")

    def _follow(self, url: str, headers: dict[str, str]) -> Any:
        """A GET and its redirects: to https or to this machine only, and the authorization stays with the registry."""
        for _ in range(REDIRECTS):
            parts = urlsplit(url)
            if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(parts.netloc)):
                raise RegistryError(f"{self.host} sends us to {url:.100}: only https is followed")
            sent = dict(headers)
            if self.authorization and parts.netloc == self.host:
                sent["Authorization"] = self.authorization
            response = self.session.get(
                url, headers=sent, stream=True, timeout=TIMEOUT, allow_redirects=False
            )
            if not response.is_redirect:
                return response
            response.close()
            url = urljoin(url, response.headers["Location"])
        raise RegistryError(f"{self.host} redirects more than {REDIRECTS} times")

    def _authorize(self, response: Any) -> bool:
        """Get what a 401 asks for: a token, or nothing more than the password. False where there is no way."""
        scheme, _, rest = response.headers.get("WWW-Authenticate", "").partition(" ")
        given = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        if scheme.lower() == "basic":
            before = self.authorization
            self.authorization = _basic(*self.credentials) if self.credentials else None
            return self.authorization not in (None, before)
        if scheme.lower() != "bearer" or "realm" not in given:
            return False
        realm = urlsplit(given["realm"])
        if realm.scheme != "https" and not (realm.scheme == "http" and _is_loopback(realm.netloc)):
            raise RegistryError(
                f"{self.host} wants us to get a token at {given['realm']:.100}: only https is used"
            )
        asked = {key: given[key] for key in ("service", "scope") if key in given}
        # No redirect is followed: the password is for this place.
        answer = self.session.get(
            given["realm"], params=asked, auth=self.credentials, timeout=TIMEOUT, allow_redirects=False,
            stream=True,
        )  # fmt: skip
        with answer:
            if answer.status_code != 200:
                raise RegistryError(f"{realm.netloc} gives no token: {answer.status_code} {answer.reason}")
            content = from_json(_small(answer, "the token"), "the token")
        token = content.get("token") or content.get("access_token")
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise RegistryError(f"{realm.netloc} gives no token that could be sent")
        self.authorization = f"Bearer {token}"
        return True


def _small(response: Any, what: str) -> bytes:
    """The content of an answer that is JSON. Raises BadImage if there is more of it than one would read."""
    data = b""
    try:
        for chunk in response.iter_content(_CHUNK):
            data += chunk
            if len(data) > MOST_JSON:
                raise BadImage(f"{what}: more than {MOST_JSON} bytes")
    except requests.RequestException as error:
        raise RegistryError(f"{what} from {urlsplit(response.url).netloc}: {_reason(error)}") from None
    return data


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _is_loopback(host: str) -> bool:
    """Whether a host, with a port or without, is this machine: only there is plain http spoken."""
    name = urlsplit(f"//{host}").hostname
    return name in ("localhost", "::1") or bool(re.fullmatch(r"127\.\d+\.\d+\.\d+", name or ""))


def _advice(response: Any) -> str:
    if response.status_code in (401, 403):
        return " (it wants a user's name and password, or others: labkernel pull --username)"
    return " (there is no image of that name or tag)" if response.status_code == 404 else ""


def _reason(error: Exception) -> str:
    """The innermost reason of an exception that wraps others."""
    inner: Any = error
    for _ in range(8):
        deeper = inner.__cause__ or inner.__context__ or getattr(inner, "reason", None)
        if not isinstance(deeper, Exception):
            break
        inner = deeper
    return getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
