"""Reading a tarball, header by header: the format behind every image.

A tar archive is a row of records of 512 bytes: a header, then the file's content padded to full records,
then the next header; two records of zeros end it. What a header has no room for stands in a record before
it ("pax" extended headers, or GNU's long names). Sources: POSIX.1-2017, pax, "ustar Interchange Format"
and "pax Extended Header" (https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html), tar(5).

The reader is strict, because archives come from strangers. Python's own ``tarfile`` takes a damaged
header in the middle of an archive for its end, and reads an extended header of any size into memory; here
both are errors. Where two programs could understand an archive differently (the same key twice, a name with
something behind its zero byte), it is refused: one of them would examine what the other does not unpack.
"""

from __future__ import annotations

import functools
import gzip
import io
import os
import queue
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

RECORD = 512
_MAX_EXTENDED = 1 << 20  # bytes of an extended header: a path has at most 4096 (PATH_MAX)
_MAX_RECORDS = 1000  # in one pax header; honest ones have a handful, or some dozens of extended attributes
_MAX_NAMES = 64 << 20  # bytes of all names and links of an archive, which some readers keep in memory
OTHERS = {b"\xfd7zXZ\0": "xz", b"BZh91AY&SY": "bzip2"}
"""How files begin that are compressed by other programs, as those may have left them."""

_ZSTD_WINDOW = 128 << 20  # bytes of memory that a zstd archive may ask for; zstd(1) itself has this limit
_BLOCK = 1 << 18  # bytes
_BLOCKS = 8  # that are decompressed ahead

KINDS = {
    b"0": "file", b"\0": "file", b"7": "file", b"1": "hardlink", b"2": "symlink", b"3": "character device",
    b"4": "block device", b"5": "directory", b"6": "fifo",
}  # fmt: skip


class BadTarball(ValueError):
    """The bytes are not those of a well-formed tar archive."""


@dataclass(frozen=True)
class Limits:
    """What an archive may cost. Who unpacks something big on purpose raises them."""

    bytes: int = 4 << 30  # of the uncompressed archive
    entries: int = 200_000  # directories that no entry describes are counted as well
    ratio: int = 200  # uncompressed to compressed; software is at 3 to 10, a bomb at 1000 and more
    depth: int = 100  # directories in one another

    def allowed(self, compressed: int) -> int:
        """How many bytes an archive of *compressed* bytes may unpack to."""
        return min(self.bytes, self.ratio * compressed + (1 << 20))


LIMITS = Limits()
"""What is allowed where nothing else is said: one archive, or all layers of an image together."""


class Member(NamedTuple):
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
        self.position = 0  # bytes of the uncompressed archive that have come out of the stream
        self.limit: int | None = None  # how many there may be
        self._block = b""  # what has come and is not used yet, from _at on
        self._at = 0
        self._left = 0  # bytes of the current member's content that are not read yet
        self._padding = 0
        self._names = 0  # bytes of names up to here
        self._global: dict[str, str] = {}

    def __iter__(self) -> Iterator[Member]:
        extended: dict[str, str] = {}
        before: set[bytes] = set()  # the kinds of extended headers that stand before the next member
        while True:
            self._skip()
            header = self._exactly(RECORD, "a header")
            if not any(header):
                if any(self._exactly(RECORD, "the second of the two zero records that end an archive")):
                    raise BadTarball("a record of zeros, and then no end")
                if before - {b"g"}:
                    raise BadTarball("an extended header, and then no entry that it could belong to")
                self._drain()
                return
            _check(header)
            kind, size = header[156:157], _number(header[124:136], "size")
            if kind in b"xgLK":
                if kind in before:
                    raise BadTarball(f"two extended headers of the type {kind!r} before one entry")
                before.add(kind)
                self._extend(kind, size, extended)
                continue
            member = _member(header, size, self._global | extended if before or self._global else {})
            if before:
                extended = {}
                before.clear()
            self._names += len(member.name) + len(member.linkname)
            if self._names > _MAX_NAMES:
                raise BadTarball(f"names of more than {_MAX_NAMES} bytes together")
            self._begin(member.size)
            yield member

    def _extend(self, kind: bytes, size: int, extended: dict[str, str]) -> None:
        """Read an extended header, which says more of the next member (or, of the kind "g", of all that follow)."""
        if size > _MAX_EXTENDED:
            raise BadTarball(f"an extended header of {size} bytes: over the limit of {_MAX_EXTENDED}")
        self._begin(size)
        content = self.read(size)
        long_name = {b"L": "path", b"K": "linkpath"}.get(kind)
        found = {long_name: _long_name(content)} if long_name else _pax(content)
        if kind == b"g":
            if found.keys() & {"path", "linkpath", "size"}:
                raise BadTarball("a global pax header gives all entries the same name or size")
            self._global |= found
        elif found.keys() & extended.keys():
            raise BadTarball("two extended headers say different things of one entry")
        else:
            extended |= found

    def read(self, size: int) -> bytes:
        """Up to *size* bytes of the current member's content, empty at its end; BadTarball if it is cut
        short.
        """
        wanted = min(size, self._left)
        self._left -= wanted
        return self._exactly(wanted, "content")

    def pieces(self) -> Iterator[bytes]:
        """All of the current member's content, in pieces as they come; BadTarball if it is cut short."""
        while self._left:
            data = self._some(self._left) or self._exactly(1, "content")
            self._left -= len(data)
            yield data

    def _begin(self, size: int) -> None:
        self._left = size
        self._padding = -size % RECORD

    def _skip(self) -> None:
        for _ in self.pieces():
            pass
        self._exactly(self._padding, "padding")
        self._padding = 0

    def _exactly(self, size: int, what: str) -> bytes:
        data = self._some(size)
        if len(data) == size:
            return data
        parts, missing = [data], size - len(data)
        while data and missing:
            data = self._some(missing)
            parts.append(data)
            missing -= len(data)
        if missing:
            raise BadTarball(f"the archive is cut short: it ends within {what}, after {self.position} bytes")
        return b"".join(parts)

    def _drain(self) -> None:
        """Read on to the end of the file: only there are the checksums of gzip and zstd compared."""
        while data := self._some(_BLOCK):
            if data.count(0) != len(data):
                raise BadTarball("there is data after the end of the archive")

    def _some(self, most: int) -> bytes:
        """At most so many bytes, those that are there; empty at the end of the archive."""
        if self._at == len(self._block) and most:
            self._fetch()
        data = self._block[self._at : self._at + most]
        self._at += len(data)
        return data

    def _fetch(self) -> None:
        try:
            self._block, self._at = self.stream.read(_BLOCK), 0
        except _damage() as error:
            raise BadTarball(f"the compressed data is damaged or cut short: {error}") from error
        self.position += len(self._block)
        if self.limit is not None and self.position > self.limit:
            raise BadTarball(
                f"it unpacks to more than the {self.limit} bytes that its size and the limits allow (a bomb?)"
            )


def _damage() -> tuple[type[Exception], ...]:
    """What decompressors raise; zstandard's own exception only where that was imported to decompress."""
    zstandard = sys.modules.get("zstandard")
    return (EOFError, OSError, zlib.error, *([zstandard.ZstdError] if zstandard else []))


def _check(header: bytes) -> None:
    """The sum of all bytes, with the sum's own field taken as blanks."""
    if sum(header) - sum(header[148:156]) + 8 * 32 != _number(header[148:156], "checksum"):
        raise BadTarball("a header's checksum is wrong: this is no tar archive, or a damaged one")


@functools.lru_cache(256)
def _number(data: bytes, what: str) -> int:
    """An octal number, or one in base 256 where the top bit is set (an extension of GNU tar for big
    values).
    """
    digits = data.rstrip(b"\0 ")
    if not digits.isdigit():
        if data[0] & 0x80:
            value = int.from_bytes(bytes([data[0] & 0x7F]) + data[1:], "big")
            if data[0] & 0x40:
                raise BadTarball(f"a header's {what} is negative")
            return value
        digits = data.split(b"\0")[0].strip(b" ") or b"0"
    try:
        if digits.isdigit():  # int() itself would take signs and underscores
            return int(digits, 8)
    except ValueError:
        pass
    raise BadTarball(f"a header's {what} is not an octal number: {digits!r}")


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _long_name(data: bytes) -> str:
    name, _, rest = data.partition(b"\0")
    if rest.strip(b"\0"):
        raise BadTarball("a long name with something behind the zero byte that ends it")
    return _text(name)


_KEPT = {"path", "linkpath", "size", "uid", "gid", "mtime"}
"""What of a pax header is used. Others (names of owners, times of access, extended attributes) are passed over."""

_SPARSE = ("GNU.sparse.", "SCHILY.realsize", "SUN.holesdata")


def _pax(data: bytes) -> dict[str, str]:
    """Records of the form "LENGTH KEY=VALUE\\n", where the length counts the whole record."""
    records: dict[str, str] = {}
    seen: set[bytes] = set()
    at = 0
    while at < len(data):
        digits, blank, _ = data[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() and blank else 0
        record = data[at : at + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if len(record) != length or length < 5 or not record.endswith(b"\n") or not equals or b"\0" in key:
            raise BadTarball("a pax extended header is malformed")
        name = key.decode("utf-8", "replace")
        if name.startswith(_SPARSE):
            raise BadTarball("a sparse file, which can claim any size at no cost")
        if key in seen:
            raise BadTarball(f"a pax extended header says {name!r:.40} twice")
        seen.add(key)
        if len(seen) > _MAX_RECORDS:
            raise BadTarball(f"a pax extended header of more than {_MAX_RECORDS} records")
        if name in _KEPT:
            if b"\0" in value:
                raise BadTarball(f"a pax extended header is malformed: a zero byte in the {name}")
            records[name] = value.decode("utf-8", "surrogateescape")
        at += length
    return records


def _member(header: bytes, size: int, extended: dict[str, str]) -> Member:
    def number(key: str, in_header: int) -> int:
        if key not in extended:
            return in_header
        text = extended[key]
        if not (text.isascii() and text.isdigit() and len(text) <= 20):
            raise BadTarball(f"a pax header's {key} is not a number: {text!r:.40}")
        return int(text)

    name = _text(header[0:100])
    if header[257:263] == b"ustar\0" and header[345] != 0:
        name = f"{_text(header[345:500])}/{name}"
    name = extended.get("path", name)
    kind = KINDS.get(header[156:157])
    if kind is None:
        raise BadTarball(f"{name!r:.200}: an entry of the unknown type {header[156:157]!r}")
    if kind == "file" and name.endswith("/") and header[156:157] != b"7":
        kind = "directory"  # so it was before POSIX gave directories a type
    device = (0, 0)
    if kind in ("character device", "block device"):
        device = _number(header[329:337], "major number"), _number(header[337:345], "minor number")
    mtime = extended.get("mtime", "")
    try:
        seconds = float(mtime) if mtime else float(_number(header[136:148], "mtime"))
    except ValueError:
        raise BadTarball(f"{name!r:.200}: a pax header's mtime is not a number: {mtime!r:.40}") from None
    return Member(
        name=name,
        kind=kind,
        mode=_number(header[100:108], "mode") & 0o7777,
        uid=number("uid", _number(header[108:116], "uid")),
        gid=number("gid", _number(header[116:124], "gid")),
        size=number("size", size),
        mtime=seconds,
        linkname=extended.get("linkpath") or _text(header[157:257]),
        device=device,
    )


class _Followed(io.RawIOBase):
    """A file of zstd frames, and behind it one frame more, of zeros.

    The decompressor takes a last frame that lacks its end (a checksum, mostly) for a whole one. With something behind
    it, it takes that for the end and finds it wrong. Zeros are no harm: they may follow every archive.
    """

    def __init__(self, file: BinaryIO, more: bytes) -> None:
        self.file = file
        self.more = more

    def readable(self) -> bool:
        """Say that it is a file to read from, as io.RawIOBase wants it."""
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Read into *buffer*; returns how many bytes were read, 0 at the end."""
        view = memoryview(buffer).cast("B")
        data = self.file.read(len(view))
        if not data:
            data, self.more = self.more[: len(view)], self.more[len(view) :]
        view[: len(data)] = data
        return len(data)


class _Ahead(io.RawIOBase):
    """Reads a stream in a thread, some blocks ahead: decompressing and writing files go on at the same time."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.blocks: queue.Queue[bytes | Exception] = queue.Queue(_BLOCKS)
        self.stopped = False
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        try:
            while not self.stopped and (block := self.stream.read(_BLOCK)):
                self.blocks.put(block)
            self.blocks.put(b"")
        except Exception as error:  # it is raised where the block is asked for
            self.blocks.put(error)

    def read(self, size: int = -1, /) -> bytes:
        """The next block, whatever *size* says; empty at the end. Raises what the stream raises."""
        block = self.blocks.get()
        if isinstance(block, Exception) or not block:
            self.blocks.put(block)  # so it is for ever
        if isinstance(block, Exception):
            raise block
        return block

    def close(self) -> None:
        """Stop reading, and wait until the thread has ended."""
        if not self.closed:
            self.stopped = True
            while not self.blocks.empty():  # then there is room for what the thread is about to put there
                self.blocks.get()
            self.thread.join()
        super().close()


@contextmanager
def open_tarball(path: Path, limits: Limits | None = None) -> Iterator[Tarball]:
    """Open the tarball *path*, compressed by zstd or gzip or not at all (its first bytes tell), for one
    pass. With *limits*, reading more than they allow raises BadTarball, as do other compressions.
    """
    with path.open("rb") as file, ExitStack() as stack:
        magic = file.read(10)
        file.seek(0)
        for begin, program in OTHERS.items():
            if magic.startswith(begin):
                raise BadTarball(
                    f"{path.name} is compressed by {program}: decompress it first ({program} -dk FILE)"
                )
        stream: BinaryIO = file
        if magic.startswith(b"\x28\xb5\x2f\xfd"):
            import zstandard

            decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
            followed = _Followed(file, zstandard.compress(bytes(RECORD)))
            stream = cast(
                BinaryIO, decompressor.stream_reader(cast(BinaryIO, followed), read_across_frames=True)
            )
        elif magic.startswith(b"\x1f\x8b"):
            stream = cast(BinaryIO, stack.enter_context(gzip.open(file)))
        if stream is not file:
            stream = cast(BinaryIO, stack.enter_context(_Ahead(stream)))
        archive = Tarball(stream, file)
        archive.limit = limits.allowed(os.fstat(file.fileno()).st_size) if limits else None
        yield archive
