"""Hostile archives, one test a kind: each refused with its reason, and nothing written outside."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard
from notebook_tools import ROOT

from labkernel.image.closure import closure
from labkernel.image.pack import pack
from labkernel.image.tarball import Limits
from labkernel.image.unpack import UnsafeArchive, unpack

END = bytes(1024)


def header(
    name: str | bytes,
    kind: bytes = b"0",
    *,
    size: int | bytes = 0,
    link: str | bytes = "",
    mode: int | bytes = 0o644,
    uid: int | bytes = 0,
    mtime: bytes = b"00000000000",
    prefix: str = "",
    device: int = 0,
) -> bytes:
    """One header record, byte by byte, with a right checksum: also such as no honest program writes."""
    number = size if isinstance(size, bytes) else b"%011o" % size
    record = bytearray(512)
    for start, field in (
        (0, name if isinstance(name, bytes) else os.fsencode(name)),
        (100, mode if isinstance(mode, bytes) else b"%07o" % mode),
        (108, uid if isinstance(uid, bytes) else b"%07o" % uid),
        (116, uid if isinstance(uid, bytes) else b"%07o" % uid),
        (124, number),
        (136, mtime),
        (148, b" " * 8),
        (156, kind),
        (157, link if isinstance(link, bytes) else link.encode()),
        (257, b"ustar\x0000"),
        (329, (b"%07o" % device) if device < 1 << 21 else (device | 1 << 63).to_bytes(8, "big")),
        (345, prefix.encode()),
    ):
        record[start : start + len(field)] = field
    record[148:156] = b"%06o\0 " % sum(record)
    return bytes(record)


def file(name: str | bytes, content: bytes = b"x", mode: int = 0o644) -> bytes:
    return header(name, size=len(content), mode=mode) + content + bytes(-len(content) % 512)


def pax(kind: bytes = b"x", /, **records: str) -> bytes:
    return extended(kind, b"".join(record(key.replace("__", "."), value) for key, value in records.items()))


def record(key: str, value: str) -> bytes:
    """One record of a pax header: its own length comes first."""
    body = f" {key}={value}\n".encode("utf-8", "surrogateescape")
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length += 1
    return str(length).encode() + body


def extended(kind: bytes, data: bytes) -> bytes:
    return header("extended", kind, size=len(data)) + data + bytes(-len(data) % 512)


def bits(value: int, size: int) -> bytes:
    """A number in base 256, as GNU tar writes what is too big for octal digits."""
    return (value | 1 << (8 * size - 1)).to_bytes(size, "big")


@dataclass
class Place:
    """A directory to unpack in, with something beside it that must stay as it is."""

    path: Path

    def __post_init__(self) -> None:
        self.path.mkdir()
        (self.path / "outside").mkdir()
        (self.path / "outside/canary").write_text("alive")

    def unpack(self, data: bytes, **options: object) -> Path:
        (self.path / "archive").write_bytes(data)
        unpack(self.path / "archive", self.path / "root", **options)  # type: ignore[arg-type]
        return self.path / "root"

    def refused(self, data: bytes, **options: object) -> UnsafeArchive:
        before = self.state()
        with pytest.raises(UnsafeArchive) as caught:
            self.unpack(data, **options)
        (self.path / "archive").unlink()
        assert self.state() == before, "something was left, or written outside"
        return caught.value

    def state(self) -> list[tuple[str, int, bytes]]:
        return [
            (str(path), path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
            for path in sorted(self.path.rglob("*"))
        ]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "place")


OUT = "../outside/canary"
HOSTILE = {
    "absolute path": (file("/tmp/evil"), "/tmp/evil", "is absolute"),
    "absolute path in the prefix field": (header("evil", prefix="/tmp"), "/tmp/evil", "is absolute"),
    "absolute path in a pax header": (pax(path="/tmp/evil") + file("good"), "/tmp/evil", "is absolute"),
    "climbing path": (file(OUT, b"dead"), OUT, "component .."),
    "climbing path from within": (file(f"a/b/../../{OUT}"), f"a/b/../../{OUT}", "component .."),
    "climbing directory": (header("../new", b"5", mode=0o755), "../new", "component .."),
    "climbing name from GNU": (
        header("long", b"L", size=17) + OUT.encode() + bytes(495) + file("good"), OUT, "component ..",
    ),
    "symlink that leads out": (header("a/l", b"2", link="../../outside"), "a/l", "leads out"),
    "symlink that leads out and back": (header("l", b"2", link="../place/root"), "l", "leads out"),
    "symlink that leads out through an earlier symlink": (
        header("d/d/up", b"2", link="../..") + header("l", b"2", link="d/d/up/../x"), "l", "leads out",
    ),
    "symlink that leads out through a later symlink": (
        header("l", b"2", link="d/d/up/../x") + header("d/d/up", b"2", link="../.."), "l", "leads out",
    ),
    "symlink that leads out through two others": (
        header("l", b"2", link="m/n") + header("m", b"2", link="d") + header("d/n", b"2", link="e/../../..")
        + header("d/e", b"5", mode=0o755), "l", "leads out",
    ),
    "symlink with an escape sequence": (header("l", b"2", link="a\x1b[2J"), "l", "impossible"),
    "symlink with an endless target": (pax(linkpath="t" * 5000) + header("l", b"2"), "l", "impossible"),
    "symlink without a target": (header("l", b"2"), "l", "without a target"),
    "through an earlier symlink": (
        header("l", b"2", link="/tmp") + file("l/evil"), "l/evil", "leads through 'l'",
    ),
    "through an earlier relative symlink": (
        header("d", b"5", mode=0o755) + header("l", b"2", link="d") + file("l/x"), "l/x", "leads through 'l'",
    ),
    "through an earlier symlink, directory": (
        header("l", b"2", link="/tmp") + header("l/new", b"5", mode=0o755), "l/new", "leads through 'l'",
    ),
    "into an earlier symlink": (
        header("l", b"2", link="/tmp/evil") + file("l"), "l", "already",
    ),
    "symlink turned directory": (
        header("l", b"2", link="/tmp") + header("l", b"5", mode=0o777), "l", "already, and it is no",
    ),
    "directory turned symlink": (
        header("d", b"5", mode=0o755) + header("d", b"2", link="/tmp") + file("d/evil"), "d", "already",
    ),
    "hard link to an absolute path": (header("h", b"1", link="/etc/passwd"), "h", "is absolute"),
    "hard link that climbs": (header("h", b"1", link=OUT), "h", "component .."),
    "hard link through an earlier symlink": (
        header("l", b"2", link="/etc") + header("h", b"1", link="l/passwd"), "h", "leads through 'l'",
    ),
    "hard link to a symlink": (
        header("l", b"2", link="/etc/passwd") + header("h", b"1", link="l"), "h", "no file that came before",
    ),
    "hard link to itself": (header("h", b"1", link="h"), "h", "no file that came before"),
    "hard link to the root": (header("h", b"1", link="."), "h", "no file that came before"),
    "hard link that a pax header leads out": (
        pax(linkpath="/etc/passwd") + header("h", b"1", link="first"), "h", "is absolute",
    ),
    "hard link that GNU leads out": (
        extended(b"K", b"../outside/canary\0") + header("h", b"1", link="first"), "h", "component ..",
    ),
    "hard link to a device": (
        header("null", b"3") + header("h", b"1", link="null"), "null", "a character device",
    ),
    "hard link to nothing": (header("h", b"1", link="x") + file("x"), "h", "no file that came before"),
    "hard link to a directory": (
        header("d", b"5", mode=0o755) + header("h", b"1", link="d"), "h", "no file that came before",
    ),
    "hard link with content": (file("a") + header("h", b"1", link="a", size=9) + bytes(512), "h", "9 bytes"),
    "character device": (header("null", b"3"), "null", "a character device"),
    "block device": (header("disk", b"4"), "disk", "a block device"),
    "fifo": (header("pipe", b"6"), "pipe", "a fifo"),
    "set-user-ID": (file("su", mode=0o4755), "su", "set-user-ID"),
    "set-group-ID": (file("wall", mode=0o2755), "wall", "set-user-ID or set-group-ID"),
    "set-group-ID directory": (header("d", b"5", mode=0o2777), "d", "set-user-ID or set-group-ID"),
    "twice the same file": (file("a") + file("a"), "a", "already"),
    "twice the same file, spelled otherwise": (file("a") + file("./a"), "./a", "already"),
    "file below a file": (file("a") + file("a/b"), "a/b", "leads through 'a'"),
    "file in the place of the root": (file("."), ".", "already"),
    "empty name": (file(""), "", "an empty path"),
    "newline in a name": (file("a\nb"), "a\nb", "control characters"),
    "escape sequence in a name": (file("a\x1b[2Jb"), "a\x1b[2Jb", "control characters"),
    "control character of eight bits in a name": (file("a\x9b2Jb"), "a\x9b2Jb", "control characters"),
    "escape sequence in an absolute path": (file("/\x1b[2J"), "/\x1b[2J", "control characters"),
    "zero byte in a long name": (extended(b"L", b"good\0/../evil\0") + file("a"), "", "behind the zero byte"),
    "zero byte in a pax path": (pax(path="good\0/../evil") + file("a"), "", "a zero byte in the path"),
    "name too long, in bytes": (pax(path="ü" * 128) + file("a"), "ü" * 128, "longer than the kernel"),
    "name too long": (pax(path="n" * 256) + file("a"), "n" * 256, "longer than the kernel"),
    "path too long": (pax(path="d/" * 2100 + "f") + file("a"), "d/" * 2100 + "f", "longer than the kernel"),
    "too deep": (pax(path="d/" * 150 + "f") + file("a"), "d/" * 150 + "f", "deeper than"),
    "time that is none": (pax(mtime="nan") + file("a"), "a", "no time of a file"),
    "time in the far future": (pax(mtime="1e300") + file("a"), "a", "no time of a file"),
    "owner -1": (pax(uid="4294967295") + file("a"), "a", "is no user"),
    "owner without end": (pax(uid="9" * 5000) + file("a"), "", "uid is not a number"),
    "owner in base 256": (header("a", uid=bits(1 << 60, 8)), "a", "is no user"),
    "sparse file of star": (pax(SCHILY__realsize="99999999999") + file("a"), "", "sparse file"),
    "sparse file of GNU": (header("s", b"S", size=512) + bytes(512), "", "unknown type b'S'"),
    "sparse file in a pax header": (pax(GNU__sparse__realsize="99999999999") + file("a"), "", "sparse file"),
    "unknown type": (header("w", b"w"), "", "unknown type b'w'"),
    "oversized pax header": (header("p", b"x", size=1 << 30), "", "over the limit"),
    "oversized name of GNU": (header("p", b"L", size=1 << 30), "", "over the limit"),
    "two pax headers": (pax(path="a") + pax(path="b") + file("c"), "", "two extended headers of the type b'x'"),
    "two global headers": (pax(b"g") + pax(b"g") + file("c"), "", "two extended headers of the type b'g'"),
    "two long names": (
        extended(b"L", b"a\0") + extended(b"L", b"b\0") + file("c"), "", "two extended headers of the type b'L'",
    ),
    "pax header and long name": (
        pax(path="a") + extended(b"L", b"b\0") + file("c"), "", "say different things of one entry",
    ),
    "the same key twice": (
        extended(b"x", record("path", "a") + record("path", "b")) + file("c"), "", "says 'path' twice",
    ),
    "one name for all entries": (pax(b"g", path="a") + file("c"), "", "gives all entries the same name"),
    "one size for all entries": (pax(b"g", size="9") + file("c"), "", "gives all entries the same name or size"),
    "pax header of many records": (
        extended(b"x", b"".join(record(f"k{n}", "") for n in range(1001))) + file("a"), "", "more than 1000 records",
    ),
    "pax header of nothing": (pax(path="a"), "", "no entry that it could belong to"),
    "pax size that is another": (pax(size="1") + file("a", b"x" * 513), "", "not an octal number|checksum"),
    "pax size of a directory": (pax(size="9") + header("d", b"5") + bytes(512), "d", "with 9 bytes of content"),
    "pax size without end": (pax(size="9" * 5000) + file("a"), "", "size is not a number"),
    "negative size": (header("n", size=b"\xff" * 12), "", "negative"),
    "size that is no number": (header("n", size=b"99999999999"), "", "not an octal number"),
    "underscores in a number": (header("n", size=b"0_0_0_0_1\0\0"), "", "not an octal number"),
    "size of the universe": (header("n", size=b"\x80" + b"\xff" * 11), "", "cut short"),
    "pax size that is no number": (pax(size="-1") + file("a"), "", "not a number"),
    "pax header cut short": (header("p", b"x", size=9) + b"99 path=a".ljust(512, b"\0"), "", "malformed"),
    "pax header of nonsense": (header("p", b"x", size=5) + b"hello".ljust(512, b"\0"), "", "malformed"),
    "pax record without a value": (
        header("p", b"x", size=9) + b"9 abcdef\n".ljust(512, b"\0"), "", "malformed",
    ),
    "wrong checksum": (b"X" + file("a")[1:], "", "checksum"),
    "wrong checksum in the middle": (file("a") + b"X" + file("b")[1:], "", "checksum"),
    "one zero record, then more": (file("a") + bytes(512) + file("b"), "", "and then no end"),
    "data after the end": (file("a") + END + file("/etc/evil"), "", "after the end"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_refused(place: Place, kind: str) -> None:
    data, entry, reason = HOSTILE[kind]
    error = place.refused(file("first", b"honest") + data + END)
    assert any(words in error.reason for words in reason.split("|"))
    assert error.entry == entry
    # It can be printed: no control characters, no half characters, no book.
    assert str(error).isprintable() and len(str(error)) < 1000


def test_honest_odds_and_ends_are_accepted(place: Place) -> None:
    long = "d/" * 60 + "f" * 200
    root = place.unpack(
        header("./", b"5", mode=0o750)
        + header("pax_global_header", b"g", size=13) + b"13 comment=x\n".ljust(512, b"\0")
        + file("./sub/implied", b"made")
        + header("sub/", b"5", mode=0o555)
        + header("sub", b"5", mode=0o500)
        + header("old-style-directory/", b"\0", mode=0o755)
        + header("abs", b"2", link="/usr/bin/env")
        + header("sub/up", b"2", link="../abs")
        + pax(path=long, mtime="1.5") + file("short", b"long")
        + header("././@LongLink", b"L", size=150) + b"n" * 149 + bytes(363) + file("short", b"gnu")
        + header("hard", b"1", link="./sub/implied")
        + file(b"latin-\xe9")
        + END + bytes(8192)
    )  # fmt: skip
    assert (root / "sub/implied").read_text() == "made"
    assert (root / "hard").samefile(root / "sub/implied")
    assert (root / "sub/up").readlink() == Path("../abs")
    assert (root / "abs").readlink() == Path("/usr/bin/env")
    assert (root / long).read_text() == "long" and (root / long).stat().st_mtime == 1.5
    assert (root / ("n" * 149)).read_text() == "gnu"
    assert os.path.lexists(os.fsencode(root) + b"/latin-\xe9")
    modes = [stat.S_IMODE((root / name).stat().st_mode) for name in (".", "sub", "old-style-directory", "d")]
    assert modes == [0o750, 0o500, 0o755, 0o755]


def test_odd_modes_and_absolute_links_that_come_back(place: Place) -> None:
    """Honest programs write the kind of the file into the mode as well; anything else up there means nothing."""
    root = place.unpack(
        header("kind", mode=0o100640) + header("bits", mode=bits(1 << 50 | 0o600, 8))
        + header("abs", b"2", link="/usr") + header("usr/lib/x", b"2", link="../../abs/../etc")
        + header("a", b"2", link="b") + header("b", b"2", link="a/x")  # in a circle: led nowhere, not out
        + pax(b"g", comment="archive of a repository") + END
    )  # fmt: skip
    assert [stat.S_IMODE((root / name).stat().st_mode) for name in ("kind", "bits")] == [0o640, 0o600]


def test_the_umask_has_no_say(place: Place) -> None:
    before = os.umask(0o077)
    try:
        root = place.unpack(file("d/f", mode=0o666) + END)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (root, root / "d", root / "d/f")] == [0o755, 0o755, 0o666]


def test_what_was_asked_for_is_kept(place: Place) -> None:
    root = place.unpack(
        file("su", mode=0o4755) + header("pipe", b"6", mode=0o622) + END,
        allow_setuid=True,
        allow_devices=True,
    )
    assert stat.S_IMODE((root / "su").stat().st_mode) == 0o4755
    assert stat.S_ISFIFO((root / "pipe").stat().st_mode)
    assert stat.S_IMODE((root / "pipe").stat().st_mode) == 0o622


def good() -> bytes:
    return file("a", os.urandom(3000)) + header("d", b"5", mode=0o755) + file("d/b", b"y" * 600) + END


def squeeze(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


@pytest.mark.parametrize("compress", [bytes, gzip.compress, squeeze], ids=["none", "gzip", "zstd"])
def test_truncated_anywhere(place: Place, compress: Callable[[bytes], bytes]) -> None:
    whole = compress(good())
    last = len(whole)
    for length in sorted({0, 1, 3, 100, *range(512, last, 331), *range(last - 9, last)}):
        place.refused(whole[:length])


@pytest.mark.parametrize("compress", [bytes, gzip.compress, squeeze], ids=["none", "gzip", "zstd"])
def test_something_after_the_end(place: Place, compress: Callable[[bytes], bytes]) -> None:
    place.refused(compress(good()) + b"something")
    place.refused(compress(good()) + compress(good()))
    place.unpack(compress(good()) + compress(bytes(4096)))  # zeros may be there, in a frame of their own too


@pytest.mark.parametrize("compress", [gzip.compress, squeeze], ids=["gzip", "zstd"])
def test_damaged_on_the_way(place: Place, compress: Callable[[bytes], bytes]) -> None:
    whole = compress(good())
    for position in (len(whole) // 3, len(whole) // 2, len(whole) - 6):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        place.refused(bytes(damaged))


@pytest.mark.parametrize("compress", [gzip.compress, squeeze], ids=["gzip", "zstd"])
def test_compression_bomb(place: Place, compress: Callable[[bytes], bytes]) -> None:
    start = time.perf_counter()
    bomb = compress(header("zeros", size=100 << 20) + bytes(100 << 20) + END)
    made = time.perf_counter()
    assert "a bomb" in place.refused(bomb).reason
    assert time.perf_counter() - made < made - start, "it was unpacked all the same"


@pytest.mark.parametrize(
    "part",
    [
        lambda: b"".join(pax(b"x", **{f"k{n}": "v" * (1 << 19)}) for n in range(300)),
        lambda: b"".join(pax(b"g", **{f"k{n}": "v" * (1 << 19)}) + header(f"f{n}") for n in range(300)),
        lambda: b"".join(pax(path=f"{n}/" + "n" * 900_000) + header("f") for n in range(170)),
        lambda: b"".join(pax(linkpath=f"{n}" + "n" * 900_000) + header(f"f{n}", b"2") for n in range(170)),
    ],
    ids=["headers without an entry", "global headers", "long names", "long links"],
)
def test_bomb_of_headers(tmp_path: Path, part: Callable[[], bytes]) -> None:
    """An archive of headers that say more and more: memory stays bounded, whoever reads it."""
    noise = file("noise", os.urandom(1 << 20))  # so that it is no compression bomb
    (tmp_path / "bomb").write_bytes(squeeze(noise + part() + END))
    done = subprocess.run(
        [sys.executable, "-c", READERS, tmp_path / "bomb", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 110 << 10  # KiB


READERS = """
import functools, sys
from pathlib import Path
import zstandard
from labkernel.image import exchange, merge, unpack, weigh
from labkernel.image.tarball import LIMITS, BadTarball
from tests.helpers import peak_memory
bomb, place = Path(sys.argv[1]), Path(sys.argv[2])
before = peak_memory()
for read in (
    lambda: unpack.unpack(bomb, place / "root"),
    lambda: merge.merge([functools.partial(exchange._plain, bomb, LIMITS)], place / "merged"),
    lambda: exchange._kind(bomb, LIMITS),
    lambda: weigh.weigh(bomb),
):
    try:
        read()
    except (BadTarball, unpack.UnsafeArchive):
        pass
print(peak_memory() - before)
"""


def test_bomb_of_implied_directories(place: Place) -> None:
    """One entry, a hundred directories: they are counted."""
    many = b"".join(pax(path=f"{n}/" + "d/" * 90 + "f") + header("f") for n in range(20)) + END
    assert place.refused(many, limits=Limits(entries=1000)).reason == "more than 1000 entries"


def test_bomb_of_symlinks(place: Place) -> None:
    """Each leads through the one before, twice: the steps double every time."""
    links = b"".join(header(f"l{n}", b"2", link=f"l{n - 1}/" * 18 + "..") for n in range(1, 400))
    begin = time.process_time()
    with contextlib.suppress(UnsafeArchive):
        place.unpack(header("l0", b"2", link="d/../" * 15) + header("d", b"5", mode=0o755) + links + END)
    assert time.process_time() - begin < 10


def test_bomb_of_bytes(place: Place) -> None:
    assert "limits allow" in place.refused(good(), limits=Limits(bytes=4096)).reason


def test_bomb_of_entries(place: Place) -> None:
    many = b"".join(header(f"f{number}") for number in range(101)) + END
    assert place.refused(many, limits=Limits(entries=100)).reason == "more than 100 entries"


def test_no_archive_at_all(place: Place) -> None:
    for data in (b"", b"hello", b"\x28\xb5\x2f\xfd", b"\x1f\x8b\x08\x00", os.urandom(2000)):
        place.refused(data)


@pytest.mark.parametrize(("program", "compress"), [("xz", lzma.compress), ("bzip2", bz2.compress)])
def test_another_compression_is_named(place: Place, program: str, compress: Callable[[bytes], bytes]) -> None:
    assert f"is compressed by {program}: decompress it first" in place.refused(compress(good())).reason


def test_what_is_there_is_not_touched(place: Place) -> None:
    (place.path / "root").mkdir()
    (place.path / "root/mine").write_text("mine")
    with pytest.raises(FileExistsError, match="is there already"):
        place.unpack(good())
    assert (place.path / "root/mine").read_text() == "mine"
    (place.path / "root/mine").unlink()
    assert (place.unpack(good()) / "d/b").exists()  # an empty directory is a place to unpack in


def test_a_link_in_the_place_of_the_destination_is_not_followed(place: Place) -> None:
    (place.path / "empty").mkdir()
    (place.path / "root").symlink_to("empty")
    with pytest.raises(FileExistsError):
        place.unpack(good())


def test_a_path_longer_than_one_call_takes_is_removed_again(place: Place) -> None:
    """Two entries, and the second stands in a directory that is too far down to be named from the top."""
    long = "/".join(["d" * 250] * 16)
    place.refused(pax(path=f"{long}/f") + file("f") + header("x/y", b"6") + END)


def test_nobody_gets_in_before_all_is_there(place: Place) -> None:
    """Modes are given from the leaves to the root, and the root was made for us alone."""
    seen = []

    def look(*_: object) -> None:
        (temporary,) = place.path.glob(".labkernel-root-*")
        seen.append(stat.S_IMODE(temporary.stat().st_mode))

    place.unpack(header(".", b"5", mode=0o777) + file("a") + END, progress=look)
    assert seen == [0o700] * 2
    assert stat.S_IMODE((place.path / "root").stat().st_mode) == 0o777


def test_an_interrupt_leaves_nothing(place: Place) -> None:
    def interrupt(_what: str, done: int, _total: int) -> None:
        if done > 4000:
            raise KeyboardInterrupt

    before = place.state()
    with pytest.raises(KeyboardInterrupt):
        place.unpack(good(), progress=interrupt)
    (place.path / "archive").unlink()
    assert place.state() == before


def test_progress_is_told_to_the_end(place: Place) -> None:
    told: list[tuple[str, int, int]] = []
    place.unpack(squeeze(good()), progress=lambda *step: told.append(step))
    assert told[-1] == ("unpack", (size := (place.path / "archive").stat().st_size), size)


def test_a_tree_that_forbids_its_owner_everything(place: Place) -> None:
    closed = header(".", b"5", mode=0) + header("-d", b"5", mode=0) + file("-d/f", mode=0) + END
    root = place.unpack(closed)
    assert stat.S_IMODE(root.stat().st_mode) == 0
    root.chmod(0o700)
    assert stat.S_IMODE((root / "-d").stat().st_mode) == 0
    (root / "-d").chmod(0o700)


def test_no_descriptor_stays_open(place: Place) -> None:
    before = os.listdir("/proc/self/fd")
    place.refused(file("a/b/c/d") + header("h", b"1", link="x/y/z") + END)
    place.unpack(good())
    assert os.listdir("/proc/self/fd") == before


OWNED = header("root", uid=0) + header("somebody", uid=1000) + header("link", b"2", link="x", uid=1000) + END

AS_NOBODY = """
import os, sys
from pathlib import Path
from labkernel.image.unpack import unpack
if os.geteuid() == 0 and sys.argv[3] == "nobody":
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(unpack(Path(sys.argv[1]), Path(sys.argv[2]), same_owner=True))
"""


def owners(root: Path) -> dict[str, int]:
    return {path.name: path.lstat().st_uid for path in root.iterdir()}


def test_everything_belongs_to_the_caller(place: Place) -> None:
    assert set(owners(place.unpack(OWNED)).values()) == {os.geteuid()}


def test_owners_are_kept_by_root(place: Place) -> None:
    if os.geteuid():
        pytest.skip("only root gives files away; in a user namespace the next test does it")
    assert owners(place.unpack(OWNED, same_owner=True)) == {"root": 0, "somebody": 1000, "link": 1000}


def test_owners_are_moved_to_the_range_of_a_namespace(place: Place) -> None:
    if os.geteuid():
        pytest.skip("only root gives files away")
    root = place.unpack(file("implied/x") + OWNED, same_owner=True, owner_base=200_000)
    moved = {"implied": 200_000, "root": 200_000, "somebody": 201_000, "link": 201_000}
    assert owners(root) == moved
    assert (root.stat().st_uid, root.stat().st_gid) == (200_000, 200_000)


def test_owners_that_the_namespace_does_not_map_fall_to_the_caller(place: Place) -> None:
    (place.path / "archive").write_bytes(OWNED)
    paths = [str(place.path / "archive"), str(place.path / "root")]
    done = subprocess.run(
        ["unshare", "-Ur", sys.executable, "-c", AS_NOBODY, *paths, ""], capture_output=True, text=True
    )
    if "unshare" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr}")
    assert "reowned=2" in done.stdout, done.stderr
    assert set(owners(place.path / "root").values()) == {os.geteuid()}


def test_owners_beyond_the_range_fall_to_its_nobody(place: Place) -> None:
    """Else they would be somebody else on this machine, whose programs these were, with all that they may do."""
    if os.geteuid():
        pytest.skip("only root gives files away")
    (place.path / "archive").write_bytes(
        header("far", mode=0o6755, uid=70_000) + header("dir", b"5", mode=0o2755, uid=65_536)
        + header("link", b"2", link="far", uid=65_536) + header("last", mode=0o4755, uid=65_535) + END
    )  # fmt: skip
    root = place.path / "root"
    done = unpack(
        place.path / "archive",
        root,
        same_owner=True,
        owner_base=200_000,
        owner_count=65_536,
        allow_setuid=True,
    )
    nobody = 200_000 + 65_534
    assert owners(root) == {"far": nobody, "dir": nobody, "link": nobody, "last": nobody + 1}
    assert (root / "far").stat().st_gid == nobody
    modes = [stat.S_IMODE((root / name).stat().st_mode) for name in ("far", "dir", "last")]
    assert modes == [0o755, 0o755, 0o4755]
    assert done.reowned == 3


def test_a_user_is_told_that_he_cannot_give_files_away(place: Place) -> None:
    (place.path / "archive").write_bytes(OWNED)
    place.path.chmod(0o777)
    for directory in place.path.parents[:3]:
        if directory.owner() == place.path.owner():
            directory.chmod(0o755)
    before = sorted(place.path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(place.path / "archive"), str(place.path / "root"), "nobody"],
        capture_output=True,
        text=True,
    )
    assert "PermissionError" in done.stderr and "same_owner=False" in done.stderr
    assert sorted(place.path.iterdir()) == before


def test_an_image_of_ours_passes_its_own_customs(tmp_path: Path) -> None:
    pack(closure(["sh"]), tmp_path / "t.tar.zst")
    assert unpack(tmp_path / "t.tar.zst", tmp_path / "root").entries > 20
