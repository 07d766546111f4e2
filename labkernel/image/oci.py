"""OCI image layouts: an image as a directory of files that are named by what is in them.

    oci-layout              {"imageLayoutVersion": "1.0.0"}
    index.json              which images there are, by tag
    blobs/sha256/<64 hex>   everything else: manifests, configurations, layers

A *descriptor* points to a blob by its digest and size. The index points to manifests, a manifest to a
configuration and to layers, and the configuration names what the layers are unpacked (`rootfs.diff_ids`). So
whoever trusts one digest can check all the rest, and each read here does: size and digest are compared while the
bytes go by, and the read fails if they are not what the descriptor says.

Sources: https://github.com/opencontainers/image-spec/blob/main/image-layout.md, and manifest.md, config.md,
descriptor.md beside it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import platform
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from labkernel.image.pack import Compression, Digester, compressor
from labkernel.image.tarball import Tarball

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYERS: Mapping[Compression, str] = {
    "none": "application/vnd.oci.image.layer.v1.tar",
    "gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
}
"""The media type of a layer, by how it is compressed."""

DOCKER = {
    "application/vnd.docker.distribution.manifest.list.v2+json": INDEX,
    "application/vnd.docker.distribution.manifest.v2+json": MANIFEST,
    "application/vnd.docker.container.image.v1+json": CONFIG,
    "application/vnd.docker.image.rootfs.diff.tar": LAYERS["none"],
    "application/vnd.docker.image.rootfs.diff.tar.gzip": LAYERS["gzip"],
}
"""Docker's own names, from before there was a standard, and what they are called now."""

REF_NAME = "org.opencontainers.image.ref.name"
"""The annotation of a descriptor in index.json that is its tag."""

IMAGE_NAME = "io.containerd.image.name"
"""The annotation beside it in archives of Docker: the whole name."""

MOST_JSON = 4 << 20
"""Bytes of a manifest or configuration: registries take no more than 4 MiB (distribution-spec)."""

MOST_LAYERS = 1000
"""Docker stops at 127, overlay at 500."""

_ZSTD_WINDOW = 128 << 20
_CHUNK = 1 << 20
_DIGITS = {"sha256": 64, "sha512": 128}
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


class BadImage(ValueError):
    """Not an image, or not what its own digests and sizes say; the text names the blob and what is wrong."""


def architecture() -> str:
    """This machine's architecture, by the name that Go has for it."""
    return _ARCHITECTURES.get(platform.machine(), platform.machine())


@dataclass(frozen=True)
class Descriptor:
    """A pointer to a blob: what it is, which it is, how big it is."""

    media_type: str
    digest: str
    size: int  # bytes
    annotations: Mapping[str, str] | None = None
    platform: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, given: Any) -> Descriptor:
        """Check a descriptor of a JSON text. Raises BadImage."""
        if not isinstance(given, dict):
            raise BadImage(f"a descriptor is expected, and this is {given!r:.60}")
        kind, digest, size = given.get("mediaType"), given.get("digest"), given.get("size")
        if not isinstance(kind, str):
            raise BadImage(f"a descriptor without a mediaType: {given!r:.100}")
        check_digest(digest)
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise BadImage(f"{digest}: the size {size!r:.40} is no number of bytes")
        annotations, system = given.get("annotations") or {}, given.get("platform") or {}
        if not isinstance(annotations, dict) or not all(isinstance(one, str) for one in annotations.values()):
            raise BadImage(f"{digest}: its annotations are {annotations!r:.40}, and no texts")
        if not isinstance(system, dict):
            raise BadImage(f"{digest}: its platform is {system!r:.40}")
        return cls(DOCKER.get(kind, kind), cast(str, digest), size, annotations or None, system or None)

    def as_json(self) -> dict[str, Any]:
        """As it stands in a manifest or an index."""
        found: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.annotations:
            found["annotations"] = dict(self.annotations)
        if self.platform:
            found["platform"] = dict(self.platform)
        return found


@dataclass(frozen=True)
class Layer:
    """A layer: the blob, and the digest of the tarball in it, before compression."""

    blob: Descriptor
    diff_id: str


@dataclass(frozen=True)
class Image:
    """What a manifest and its configuration say."""

    manifest: Descriptor
    config: Descriptor
    layers: tuple[Layer, ...]  # the lowest first
    settings: Mapping[str, Any]
    """The configuration, read: `config` (Cmd, Env, …), `history`, `architecture`, …"""


def check_digest(digest: object) -> str:
    """The digest, if it is well formed. Raises BadImage: it becomes a part of a path, so nothing else may."""
    algorithm, _, digits = digest.partition(":") if isinstance(digest, str) else ("", "", "")
    if (
        algorithm not in _DIGITS
        or not re.fullmatch(r"[0-9a-f]+", digits)
        or len(digits) != _DIGITS[algorithm]
    ):
        raise BadImage(
            f"{digest!r:.100} is no digest: sha256 or sha512, a colon, and the digits in hexadecimal"
        )
    return cast(str, digest)


def to_json(value: Any) -> bytes:
    """JSON, always the same bytes for the same value: the keys in order, no blanks."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def from_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises BadImage for anything else, also for one that is nested too deeply to be read."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadImage(f"{what} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadImage(f"{what} is no JSON object")
    return value


class Layout:
    """An image layout on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path) -> Layout:
        """A new layout in an empty or missing directory, or the one that is there. Raises FileExistsError, BadImage."""
        if (path / "oci-layout").exists():
            return cls.open(path)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{path} is there already, and neither empty nor an OCI image layout")
        (path / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
        _write_whole(path / "index.json", to_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": []}))
        _write_whole(path / "oci-layout", to_json({"imageLayoutVersion": "1.0.0"}))
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Layout:
        """The layout in a directory. Raises BadImage if there is none of a version that we know."""
        if not (path / "oci-layout").is_file():
            raise BadImage(f"{path} is no OCI image layout: there is no file oci-layout")
        for directory in (path / "blobs", path / "blobs/sha256", path / "blobs/sha512"):
            if directory.is_symlink():  # what is written here would go elsewhere
                raise BadImage(f"{directory} is a symbolic link, and no directory of this layout")
        version = from_json(read_small(path / "oci-layout"), "oci-layout").get("imageLayoutVersion")
        if not isinstance(version, str) or not version.startswith("1."):
            raise BadImage(f"{path}: an image layout of version {version!r:.20}; this reads 1.x")
        return cls(path)

    # ------------------------------------------------------------------ blobs

    def place(self, digest: str) -> Path:
        """Where the blob of that digest is, or would be. Raises BadImage for what is no digest."""
        algorithm, _, digits = check_digest(digest).partition(":")
        return self.path / "blobs" / algorithm / digits

    def add(self, data: bytes, media_type: str) -> Descriptor:
        """Write a blob; nothing is written where it is there already: same content, same name."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if not self.place(digest).exists():
            _write_whole(self.place(digest), data)
        return Descriptor(media_type, digest, len(data))

    @contextlib.contextmanager
    def adding(self, media_type: str, wanted: Descriptor | None = None) -> Iterator[_Adding]:
        """Write a blob piece by piece: `write` to what this yields, and after the block `blob` is its descriptor.

        Raises BadImage, and nothing is written, if it is not the `wanted` one.
        """
        directory = self.path / "blobs" / (wanted.digest.partition(":")[0] if wanted else "sha256")
        directory.mkdir(exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=directory, prefix=".new-")
        temporary = Path(name)
        try:
            with open(descriptor, "wb") as file:
                sink = _Adding(file, media_type, wanted)
                yield sink
            sink.compare()
            temporary.chmod(0o644)
            temporary.replace(self.place(sink.blob.digest))
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def reading(self, blob: Descriptor) -> Iterator[BinaryIO]:
        """Read a blob as a stream that raises BadImage, at its end at the latest, if it is not what `blob` says."""
        with _open(self.place(blob.digest), f"blob {blob.digest}") as file:
            status = os.fstat(file.fileno())
            if status.st_size != blob.size:
                raise BadImage(
                    f"blob {blob.digest} has {status.st_size} bytes, and not the {blob.size} it should"
                )
            checked = Checked(file, blob)
            yield cast(BinaryIO, checked)
            checked.read_on()

    def bytes(self, blob: Descriptor) -> bytes:
        """All of a small blob, checked."""
        if blob.size > MOST_JSON:
            raise BadImage(f"blob {blob.digest}: {blob.size} bytes, over the limit of {MOST_JSON} for JSON")
        with self.reading(blob) as file:
            return file.read()

    def check(self, blob: Descriptor) -> None:
        """Read a blob of any size to its end. Raises BadImage if it is not what `blob` says."""
        with self.reading(blob):
            pass  # what nobody reads is read when the block ends

    # ------------------------------------------------------------------ images

    def index(self) -> list[Descriptor]:
        """What index.json points to."""
        return _manifests(from_json(read_small(self.path / "index.json"), "index.json"), "index.json")

    def tags(self) -> dict[str, Descriptor]:
        """The images that have a tag."""
        return {
            name: blob
            for blob in self.index()
            if (name := (blob.annotations or {}).get(REF_NAME)) is not None
        }

    def tag(self, name: str, manifest: Descriptor) -> None:
        """Give an image a tag; another one loses it. Nothing but index.json is written."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,254}", name):
            raise ValueError(f"tag {name!r}: use letters, digits and . _ - / : @ + (at most 255)")
        self.index()  # checked
        index = from_json(read_small(self.path / "index.json"), "index.json")
        # What others have written of theirs stays word for word.
        others = [one for one in index["manifests"] if (one.get("annotations") or {}).get(REF_NAME) != name]
        named = Descriptor(
            manifest.media_type, manifest.digest, manifest.size, {REF_NAME: name}, manifest.platform
        )
        manifests = [*others, named.as_json()]
        manifests.sort(key=lambda one: ((one.get("annotations") or {}).get(REF_NAME, ""), one["digest"]))
        index |= {"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}
        _write_whole(self.path / "index.json", to_json(index))

    def image(self, tag: str | None = None) -> Image:
        """The image with a tag, or the only one; of several platforms, this machine's. Raises BadImage, LookupError."""
        found = self.index()
        if tag is not None:
            found = [one for one in found if tag == one.digest or _is_called(one, tag)]
        if not found:
            there = ", ".join(sorted({*self.tags(), *_full_names(self.index())})) or "none"
            raise LookupError(f"no image{f' {tag!r}' if tag else ''} in this layout; tags: {there}")
        if len({one.digest for one in found}) > 1:
            ours = [one for one in found if _is_ours(one)]
            if len({one.digest for one in ours}) != 1:
                names = _full_names(found) or {
                    (one.annotations or {}).get(REF_NAME, one.digest) for one in found
                }
                raise LookupError(f"several images are there; choose a tag: {', '.join(sorted(names))}")
            found = ours
        return self.read_image(found[0])

    def read_image(self, blob: Descriptor) -> Image:
        """The image behind a manifest, or behind an index of manifests for several platforms. Raises BadImage."""
        for _ in range(4):  # an index may point to an index, but not for ever
            if blob.media_type != INDEX:
                break
            blob = self.choose(blob)
        if blob.media_type != MANIFEST:
            raise BadImage(f"{blob.digest} is a {blob.media_type!r:.80}, and no image's manifest")
        manifest = from_json(self.bytes(blob), f"manifest {blob.digest}")
        config = Descriptor.read(manifest.get("config"))
        if config.media_type != CONFIG:
            raise BadImage(
                f"{blob.digest}: a {config.media_type!r:.80}: it is no container's image, but an artifact"
            )
        blobs = [
            Descriptor.read(one) for one in _list(manifest.get("layers"), f"manifest {blob.digest}: layers")
        ]
        settings = from_json(self.bytes(config), f"configuration {config.digest}")
        return Image(blob, config, _layers(blobs, settings, config.digest), settings)

    def choose(self, index: Descriptor) -> Descriptor:
        """Of the manifests that an index names, the first one for this machine's platform. Raises BadImage."""
        there = _manifests(from_json(self.bytes(index), f"index {index.digest}"), index.digest)
        ours = [one for one in there if _is_ours(one)]
        if not ours:
            has = ", ".join(sorted({str((one.platform or {}).get("architecture")) for one in there}))
            raise BadImage(f"no image for linux/{architecture()} in it; there is: {has or 'nothing'}")
        return ours[0]

    @contextlib.contextmanager
    def tarball(self, layer: Layer, most: int) -> Iterator[Tarball]:
        """Read a layer's tarball: the blob and what is in it are both checked against their digests.

        `most` is how many bytes it may unpack to.
        """
        compression = next((name for name, kind in LAYERS.items() if kind == layer.blob.media_type), None)
        if compression is None:
            raise BadImage(f"layer {layer.blob.digest} is a {layer.blob.media_type!r:.80}, and no tarball")
        with self.reading(layer.blob) as file, decompressed(file, compression) as stream:
            plain = Checked(
                stream, Descriptor(LAYERS["none"], layer.diff_id, most), "unpacked layer", exact=False
            )
            archive = Tarball(cast(BinaryIO, io.BufferedReader(plain, _CHUNK)), file)
            archive.limit = most
            yield archive
            plain.read_on()

    def add_layer(self, tarball: Path, compression: Compression = "gzip") -> Layer:
        """Write a tarball (plain, or compressed by gzip or zstd) as a layer, compressed as is said here."""
        with tarball.open("rb") as file, decompressed(file, compression_of(file)) as stream:
            return self.add_layer_from(stream, compression)

    def add_layer_from(self, stream: BinaryIO, compression: Compression = "gzip") -> Layer:
        """Write what comes out of a stream, a plain tarball, as a layer."""
        plain = hashlib.sha256()
        with self.adding(LAYERS[compression]) as sink, compressor(sink, compression) as compressed:
            while data := stream.read(_CHUNK):
                plain.update(data)
                compressed.write(data)
        return Layer(sink.blob, f"sha256:{plain.hexdigest()}")

    def add_image(
        self,
        layers: Sequence[Layer],
        settings: Mapping[str, Any] | None = None,
        *,
        created: str,
        history: Sequence[str],
        tag: str | None = None,
    ) -> Image:
        """Write the configuration and the manifest of an image of these layers, the lowest first, and tag it.

        `settings`: Cmd, Entrypoint, Env, User, WorkingDir, as the specification's config.md has them. `created`: a
        date as RFC 3339 has it. `history`: a line a layer, of how it was made.
        """
        content = {
            "created": created,
            "architecture": architecture(),
            "os": "linux",
            "config": dict(settings or {}),
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            "history": [{"created": created, "created_by": line} for line in history],
        }
        config = self.add(to_json(content), CONFIG)
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.as_json(),
            "layers": [layer.blob.as_json() for layer in layers],
        }
        blob = self.add(to_json(manifest), MANIFEST)
        ours = {"architecture": architecture(), "os": "linux"}
        blob = Descriptor(blob.media_type, blob.digest, blob.size, None, ours)
        if tag is not None:
            self.tag(tag, blob)
        return Image(blob, config, tuple(layers), content)


# ---------------------------------------------------------------------- streams


class _Adding(Digester):
    """Where a new blob is written to."""

    def __init__(self, file: BinaryIO, media_type: str, wanted: Descriptor | None = None) -> None:
        super().__init__(file)
        self.media_type = media_type
        self.wanted = wanted
        self.algorithm = wanted.digest.partition(":")[0] if wanted else "sha256"
        self.hash = hashlib.new(self.algorithm)
        self.size = 0

    def write(self, data: ReadableBuffer, /) -> int:
        """Write *data*; returns how many bytes were taken."""
        written = super().write(data)
        self.size += written
        if self.wanted and self.size > self.wanted.size:
            raise BadImage(f"blob {self.wanted.digest} has more than {self.wanted.size} bytes")
        return written

    def compare(self) -> None:
        """Raise BadImage if something else was written than is wanted."""
        if self.wanted and (self.blob.digest, self.size) != (self.wanted.digest, self.wanted.size):
            raise BadImage(
                f"blob {self.wanted.digest} of {self.wanted.size} bytes is not what its name says: "
                f"{self.size} bytes came, with the digest {self.blob.digest}"
            )

    @property
    def blob(self) -> Descriptor:
        """What has been written."""
        return Descriptor(self.media_type, f"{self.algorithm}:{self.hash.hexdigest()}", self.size)


class Checked(io.RawIOBase):
    """Passes on what is read, counts and hashes it, and raises BadImage at the end if it is not what it should be.

    `exact`: the size must be the descriptor's; otherwise that is only the most that may come.
    """

    def __init__(self, file: BinaryIO, blob: Descriptor, what: str = "blob", *, exact: bool = True) -> None:
        self.file = file
        self.blob = blob
        self.what = what
        self.exact = exact
        self.seen = 0
        self.hash = hashlib.new(blob.digest.partition(":")[0])

    def readable(self) -> bool:
        """Say that it is a file to read from, as io.RawIOBase wants it."""
        return True

    def tell(self) -> int:
        """How many bytes have been read: that is the progress."""
        return self.seen

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Read into *buffer*; returns how many bytes were read, 0 at the end."""
        view = memoryview(buffer).cast("B")
        data = self.file.read(len(view))
        view[: len(data)] = data
        self.seen += len(data)
        self.hash.update(data)
        if self.seen > self.blob.size:
            bomb = "" if self.exact else " (a bomb?)"
            raise BadImage(f"{self.what} {self.blob.digest} has more than {self.blob.size} bytes{bomb}")
        if not data and len(view):
            self._compare()
        return len(data)

    def read_on(self) -> None:
        """Read what nobody has asked for, up to the end: only there the digest can be compared."""
        while self.read(_CHUNK):
            pass

    def _compare(self) -> None:
        if self.exact and self.seen != self.blob.size:
            raise BadImage(f"{self.what} {self.blob.digest} ends after {self.seen} bytes of {self.blob.size}")
        found = self.hash.hexdigest()
        if found != self.blob.digest.partition(":")[2]:
            raise BadImage(
                f"{self.what} {self.blob.digest} is not what its name says: the digest of its bytes is {found}"
            )


def compression_of(file: BinaryIO) -> Compression:
    """How a file is compressed, by its first bytes; it is at its start again afterwards."""
    magic = file.read(4)
    file.seek(0)
    return "zstd" if magic == b"\x28\xb5\x2f\xfd" else "gzip" if magic[:2] == b"\x1f\x8b" else "none"


@contextlib.contextmanager
def decompressed(file: BinaryIO, compression: Compression) -> Iterator[BinaryIO]:
    """What is in a stream; damage is found by whoever reads, as an error of the decompressor."""
    if compression == "gzip":
        with gzip.open(file) as stream:
            yield cast(BinaryIO, stream)
    elif compression == "zstd":
        import zstandard

        decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        yield cast(BinaryIO, decompressor.stream_reader(file, read_across_frames=True, closefd=False))
    else:
        yield file


# ---------------------------------------------------------------------- reading JSON


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > MOST_LAYERS:
        raise BadImage(f"{what}: a list of at most {MOST_LAYERS} entries is expected")
    return value


def _manifests(content: Mapping[str, Any], what: str) -> list[Descriptor]:
    return [Descriptor.read(one) for one in _list(content.get("manifests"), f"{what}: manifests")]


def _full_names(blobs: Sequence[Descriptor]) -> set[str]:
    """The names that Docker, since 25, gives what it saves: there the tag alone is the same for several."""
    return {name for blob in blobs if (name := (blob.annotations or {}).get(IMAGE_NAME))}


def _is_called(blob: Descriptor, tag: str) -> bool:
    said = blob.annotations or {}
    name = said.get(IMAGE_NAME, "")
    return tag == said.get(REF_NAME) or tag == name or (":" in tag and name.endswith(f"/{tag}"))


def _is_ours(blob: Descriptor) -> bool:
    """Whether a descriptor in an index is for this machine; one that names no platform may be."""
    wanted = {"os": "linux", "architecture": architecture()}
    return all((blob.platform or {}).get(key, value) == value for key, value in wanted.items())


def _layers(blobs: Sequence[Descriptor], settings: Mapping[str, Any], digest: str) -> tuple[Layer, ...]:
    rootfs = settings.get("rootfs")
    diff_ids = _list(
        rootfs.get("diff_ids") if isinstance(rootfs, dict) else None, f"{digest}: rootfs.diff_ids"
    )
    if len(diff_ids) != len(blobs):
        raise BadImage(f"the manifest has {len(blobs)} layers, and its configuration {len(diff_ids)}")
    made_for = settings.get("os", "linux"), settings.get("architecture", architecture())
    if made_for != ("linux", architecture()):
        raise BadImage(
            f"the image is for {made_for[0]}/{made_for[1]}, and this machine is linux/{architecture()}"
        )
    return tuple(Layer(blob, check_digest(diff_id)) for blob, diff_id in zip(blobs, diff_ids, strict=True))


@contextlib.contextmanager
def _open(path: Path, what: str) -> Iterator[BinaryIO]:
    """Open a file of a layout. That may come from a stranger: no link is followed, and nothing waits at a fifo."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BadImage(f"{what} is missing") from None
    except OSError as error:
        raise BadImage(f"{what} cannot be read: {error.strerror}") from error
    with open(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BadImage(f"{what} is no file")
        yield cast(BinaryIO, file)


def read_small(path: Path) -> bytes:
    """A file of JSON. Raises BadImage if it is none that one would read into memory, or not there."""
    with _open(path, path.name) as file:
        data = io.BufferedReader(cast(io.RawIOBase, file)).read(MOST_JSON + 1)
    if len(data) > MOST_JSON:
        raise BadImage(f"{path.name} has more than {MOST_JSON} bytes")
    return data


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file at once: who reads at the same time sees the old one or the new one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
