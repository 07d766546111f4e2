"""Packing: a closure or a directory becomes a tarball, and twice the same bits.

What makes the bits of a tarball differ from run to run is known well
(https://reproducible-builds.org/docs/archives/): the order of the entries, times, owners, and what the
compressor notes down. Here entries are sorted, every time is one fixed number, everything belongs to 0:0
without names, and the compressors' settings are fixed. A newer compressor library may still write other
bits; the lock file of the project holds its version.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, cast

from labkernel.image import Progress
from labkernel.image.closure import Closure

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

Compression = Literal["zstd", "gzip", "none"]

# 1980-01-01 UTC: the first day that a zip archive can express, so a rootfs can be zipped from inside.
# SOURCE_DATE_EPOCH overrules it (https://reproducible-builds.org/specs/source-date-epoch/).
_EPOCH = 315532800

_ZSTD_LEVEL = 9
_GZIP_LEVEL = 6


def epoch() -> int:
    """The time of every file of an image, in seconds since 1970."""
    return int(os.environ.get("SOURCE_DATE_EPOCH", _EPOCH))


class Digester(io.RawIOBase):
    """Passes bytes on to a file and hashes them on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash = hashlib.sha256()

    def writable(self) -> bool:
        """Say that it is a file to write to, as io.RawIOBase wants it."""
        return True

    def write(self, data: Buffer, /) -> int:
        """Write *data*; returns how many bytes were taken."""
        self.hash.update(data)
        return self.file.write(data)


def pack(
    source: Closure | Path,
    destination: Path,
    *,
    compression: Compression = "zstd",
    same_owner: bool = False,
    progress: Progress | None = None,
) -> str:
    """Write *source*, a closure or the tree under a directory, as a tarball to *destination*; returns its
    digest.

    The digest is that of the file, compressed as it is: "sha256:" and 64 digits. The file appears at once
    and whole, or not at all. Set-user-ID bits and modes of a directory tree are kept; owners only if
    *same_owner* is said: as the ids that the caller, root of the machine or of a user namespace, sees.
    Raises ValueError for a socket, a pipe or a device in the tree, which have no place in an image.
    """
    mtime = epoch()
    members: Iterator[tuple[tarfile.TarInfo, str | Path | bytes | None]]
    members = _of_closure(source) if isinstance(source, Closure) else _of_directory(source, same_owner)
    if isinstance(source, Closure):
        total = source.size
    else:  # a walk of its own, only where somebody looks
        total = sum(info.size for info, _ in _of_directory(source)) if progress else 0
    done = 0
    with written_at_once(destination) as file:
        digester = Digester(file)
        with compressor(digester, compression) as compressed, new_archive(compressed) as tar:
            for info, content in members:
                info.mtime = mtime
                if isinstance(content, bytes):
                    tar.addfile(info, io.BytesIO(content))
                elif content is None:
                    tar.addfile(info)
                else:
                    with open(content, "rb", buffering=0) as data:
                        tar.addfile(info, data)
                done += info.size
                if progress and info.size:
                    progress("pack", done, total)
    return f"sha256:{digester.hash.hexdigest()}"


class _Out:
    """A stream that knows how much was written to it: all that tarfile asks of a file.

    Its own mode for streams ("w|") collects small pieces by copying all that it has, over and over.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.position = 0

    def write(self, data: bytes) -> None:
        """Write all of *data*."""
        self.position += len(data)
        self.stream.write(data)

    def tell(self) -> int:
        """How much has been written."""
        return self.position


@contextlib.contextmanager
def new_archive(stream: BinaryIO) -> Iterator[tarfile.TarFile]:
    """An archive to be written to a stream; one and the same everywhere for the same entries."""
    with tarfile.TarFile(
        mode="w", fileobj=cast(BinaryIO, _Out(stream)), format=tarfile.PAX_FORMAT, encoding="utf-8",
        errors="surrogateescape", copybufsize=1 << 20,
    ) as tar:  # fmt: skip
        yield tar


def gzip_size(tarball: Path, *, progress: Progress | None = None) -> int:
    """Bytes that a tarball of ours, compressed by zstd, would have if it were compressed by gzip."""
    import zstandard

    size, whole = 0, tarball.stat().st_size
    compressor = zlib.compressobj(_GZIP_LEVEL, wbits=zlib.MAX_WBITS | 16)  # 16: with gzip's header and end
    with tarball.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as archive:
        while data := archive.read(1 << 20):
            size += len(compressor.compress(data))
            if progress:
                progress("weigh as gzip", file.tell(), whole)
    return size + len(compressor.flush())


def _of_closure(closure: Closure) -> Iterator[tuple[tarfile.TarInfo, str | Path | bytes | None]]:
    for entry in closure:
        info = tarfile.TarInfo(entry.path.lstrip("/"))
        info.mode = entry.mode
        if entry.kind == "directory":
            info.type = tarfile.DIRTYPE
            yield info, None
        elif entry.kind == "symlink":
            info.type, info.linkname = tarfile.SYMTYPE, entry.target
            yield info, None
        else:
            info.size = entry.size
            yield info, entry.source or entry.content


def _of_directory(root: Path, same_owner: bool = False) -> Iterator[tuple[tarfile.TarInfo, str | None]]:
    first_link: dict[tuple[int, int], str] = {}
    for path, name in _walk(str(root), ""):
        info = tarfile.TarInfo(name)
        status = os.lstat(path)
        info.mode = stat.S_IMODE(status.st_mode)
        if same_owner:
            info.uid, info.gid = status.st_uid, status.st_gid
        inode = (status.st_dev, status.st_ino)
        if stat.S_ISDIR(status.st_mode):
            info.type = tarfile.DIRTYPE
            yield info, None
        elif stat.S_ISLNK(status.st_mode):
            info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
            yield info, None
        elif not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: neither file, directory nor symbolic link; an image holds only these")
        elif status.st_nlink > 1 and first_link.setdefault(inode, name) != name:
            info.type, info.linkname = tarfile.LNKTYPE, first_link[inode]
            yield info, None
        else:
            info.size = status.st_size
            yield info, path


def _walk(directory: str, below: str) -> Iterator[tuple[str, str]]:
    """The path of everything under a directory, sorted, and its name: what comes after the directory's own path."""
    with os.scandir(directory) as found:
        entries = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in found)
    for name, is_directory in entries:
        yield (path := f"{directory}/{name}"), f"{below}{name}"
        if is_directory:
            yield from _walk(path, f"{below}{name}/")


@contextlib.contextmanager
def compressor(file: io.RawIOBase, compression: Compression) -> Iterator[BinaryIO]:
    """What is written to the stream that this yields arrives in *file* compressed; twice the same bits."""
    if compression == "none":
        yield cast(BinaryIO, file)
    elif compression == "gzip":
        # No name and no time in the header, whatever file it goes to.
        with gzip.GzipFile(
            filename="", mode="wb", compresslevel=_GZIP_LEVEL, fileobj=cast(BinaryIO, file), mtime=0
        ) as out:
            yield cast(BinaryIO, out)
    else:
        import zstandard

        # Two threads: with one or more, zstd cuts the data into the same jobs and the bits are the same.
        compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, threads=2, write_checksum=True)
        with compressor.stream_writer(cast(BinaryIO, file), closefd=False) as writer:
            yield cast(BinaryIO, writer)


@contextlib.contextmanager
def written_at_once(destination: Path) -> Iterator[BinaryIO]:
    """A file to write to, which becomes *destination* when the block ends well, and is gone otherwise."""
    descriptor, name = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name}.")
    temporary = Path(name)
    try:
        with open(descriptor, "wb") as file:
            yield file
        temporary.chmod(0o644)
        temporary.replace(destination)
    finally:
        temporary.unlink(missing_ok=True)
