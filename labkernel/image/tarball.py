"""Reading a tarball, header by header: the format behind every image.

A tar archive is a row of records of 512 bytes: a header, then the file's content padded to full records,
then the next header; two records of zeros end it. What a header has no room for stands in a record before
it ("pax" extended headers, or GNU's long names). Sources: POSIX.1-2017, pax, "ustar Interchange Format"
and "pax Extended Header" (https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html), tar(5).

The reader is strict, because archives come from strangers. Python's own ``tarfile`` takes a damaged
header in the middle of an archive for its end, and reads an extended header of any size into memory; here
both are errors.
"""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

RECORD = 512
_MAX_EXTENDED = 1 << 20  # bytes of an extended header: a path has at most 4096 (PATH_MAX)
_ZSTD_WINDOW = 128 << 20  # bytes of memory that a zstd archive may ask for; zstd(1) itself has this limit

KINDS = {
    b"0": "file", b"\0": "file", b"7": "file", b"1": "hardlink", b"2": "symlink", b"3": "character device",
    b"4": "block device", b"5": "directory", b"6": "fifo",
}  # fmt: skip


class BadTarball(ValueError):
    """The bytes are not those of a well-formed tar archive."""


@dataclass(frozen=True)
class Member:
    """One entry of an archive, as its headers describe it: nothing is checked yet but the form."""

    name: str
    kind: str  # one of KINDS
    mode: int
    uid: int
    gid: int
    size: int  # bytes of content that follow
    mtime: float  # seconds since 1970
    linkname: str
    device: tuple[int, int]  # major, minor


class Tarball:
    """The members of one archive, in order; ``read`` gives the content of the member reached last."""

    def __init__(self, stream: BinaryIO, source: BinaryIO) -> None:
        self.stream = stream  # of the archive
        self.source = (
            source  # the file it comes from, compressed or not: how far it is read tells the progress
        )
        self.position = 0  # bytes read of the uncompressed archive
        self.limit: int | None = None  # how many there may be
        self._left = 0  # bytes of the current member's content that are not read yet
        self._padding = 0
        self._global: dict[str, str] = {}

    def __iter__(self) -> Iterator[Member]:
        extended: dict[str, str] = {}
        while True:
            self._skip()
            header = self._exactly(RECORD, "a header")
            if not any(header):
                if any(self._exactly(RECORD, "the second of the two zero records that end an archive")):
                    raise BadTarball("a record of zeros, and then no end")
                self._drain()
                return
            _check(header)
            kind, size = header[156:157], _number(header[124:136], "size")
            if kind in b"xgLK":
                if size > _MAX_EXTENDED:
                    raise BadTarball(f"an extended header of {size} bytes: over the limit of {_MAX_EXTENDED}")
                self._begin(size)
                content = self.read(size)
                if kind == b"x":
                    extended |= _pax(content)
                elif kind == b"g":
                    self._global |= _pax(content)
                else:
                    extended["path" if kind == b"L" else "linkpath"] = _text(content)
                continue
            member = _member(header, size, self._global | extended)
            extended = {}
            self._begin(member.size)
            yield member

    def read(self, size: int) -> bytes:
        """Up to *size* bytes of the current member's content, empty at its end; BadTarball if it is cut
        short.
        """
        wanted = min(size, self._left)
        self._left -= wanted
        return self._exactly(wanted, "content")

    def _begin(self, size: int) -> None:
        self._left = size
        self._padding = -size % RECORD

    def _skip(self) -> None:
        while self._left:
            self.read(1 << 20)
        self._exactly(self._padding, "padding")
        self._padding = 0

    def _exactly(self, size: int, what: str) -> bytes:
        data = self._some(size)
        if len(data) < size:
            raise BadTarball(f"the archive is cut short: it ends within {what}, after {self.position} bytes")
        return data

    def _drain(self) -> None:
        """Read on to the end of the file: only there are the checksums of gzip and zstd compared."""
        while data := self._some(1 << 20):
            if data.count(0) != len(data):
                raise BadTarball("there is data after the end of the archive")

    def _some(self, size: int) -> bytes:
        try:
            data = self.stream.read(size) if size else b""
        except _damage() as error:
            raise BadTarball(f"the compressed data is damaged or cut short: {error}") from error
        self.position += len(data)
        if self.limit is not None and self.position > self.limit:
            raise BadTarball(
                f"it unpacks to more than the {self.limit} bytes that its size and the limits allow (a bomb?)"
            )
        return data


def _damage() -> tuple[type[Exception], ...]:
    """What decompressors raise; zstandard's own exception only where that was imported to decompress."""
    zstandard = sys.modules.get("zstandard")
    return (EOFError, OSError, zlib.error, *([zstandard.ZstdError] if zstandard else []))


def _check(header: bytes) -> None:
    """The sum of all bytes, with the sum's own field taken as blanks."""
    if sum(header) - sum(header[148:156]) + 8 * 32 != _number(header[148:156], "checksum"):
        raise BadTarball("a header's checksum is wrong: this is no tar archive, or a damaged one")


def _number(data: bytes, what: str) -> int:
    """An octal number, or one in base 256 where the top bit is set (an extension of GNU tar for big
    values).
    """
    if data[0] & 0x80:
        value = int.from_bytes(bytes([data[0] & 0x7F]) + data[1:], "big")
        if data[0] & 0x40:
            raise BadTarball(f"a header's {what} is negative")
        return value
    digits = data.split(b"\0")[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise BadTarball(f"a header's {what} is not an octal number: {digits!r}")
    return int(digits or b"0", 8)


def _text(data: bytes) -> str:
    return data.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict[str, str]:
    """Records of the form "LENGTH KEY=VALUE\\n", where the length counts the whole record."""
    records: dict[str, str] = {}
    at = 0
    while at < len(data):
        digits, blank, _ = data[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() and blank else 0
        record = data[at : at + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if len(record) != length or length < 5 or not record.endswith(b"\n") or not equals or b"\0" in value:
            raise BadTarball("a pax extended header is malformed")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        at += length
    return records


def _member(header: bytes, size: int, extended: dict[str, str]) -> Member:
    def number(key: str, start: int, end: int) -> int:
        if key not in extended:
            return _number(header[start:end], key)
        if not (extended[key].isascii() and extended[key].isdigit()):
            raise BadTarball(f"a pax header's {key} is not a number: {extended[key]!r}")
        return int(extended[key])

    name = _text(header[0:100])
    if header[257:263] == b"ustar\0" and header[345] != 0:
        name = f"{_text(header[345:500])}/{name}"
    name = extended.get("path", name)
    kind = header[156:157]
    if kind not in KINDS:
        raise BadTarball(f"{name!r}: an entry of the unknown type {kind!r}")
    if any(key.startswith("GNU.sparse.") for key in extended) or kind == b"S":
        raise BadTarball(f"{name!r}: a sparse file, which can claim any size at no cost")
    size = number("size", 124, 136)
    mtime = extended.get("mtime", "")
    try:
        seconds = float(mtime) if mtime else float(_number(header[136:148], "mtime"))
    except ValueError:
        raise BadTarball(f"{name!r}: a pax header's mtime is not a number: {mtime!r}") from None
    is_directory = kind in b"\x000" and name.endswith("/")  # so it was before POSIX gave directories a type
    return Member(
        name=name,
        kind="directory" if is_directory else KINDS[kind],
        mode=_number(header[100:108], "mode"),
        uid=number("uid", 108, 116),
        gid=number("gid", 116, 124),
        size=size,
        mtime=seconds,
        linkname=extended.get("linkpath", _text(header[157:257])),
        device=(_number(header[329:337], "major number"), _number(header[337:345], "minor number")),
    )


@contextmanager
def open_tarball(path: Path) -> Iterator[Tarball]:
    """Open the tarball *path*, compressed by zstd or gzip or not at all (its first bytes tell), for one
    pass.
    """
    with path.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic == b"\x28\xb5\x2f\xfd":
            import zstandard

            decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
            raw = decompressor.stream_reader(file, read_across_frames=True)
            yield Tarball(cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, raw), 1 << 20)), file)
        elif magic[:2] == b"\x1f\x8b":
            with gzip.open(file) as unzipped:
                yield Tarball(cast(BinaryIO, unzipped), file)
        else:
            yield Tarball(file, file)
