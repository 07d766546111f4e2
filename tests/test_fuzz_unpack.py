"""Archives that nobody would think of, made by hypothesis: whatever is in them, nothing happens outside.

Each is a list of entries with names, links, sizes and extended headers that mean harm or nothing, then perhaps some
bytes changed and an end cut off, before or after compressing. It goes to the unpacker, or as a layer through the
merger to the unpacker. What must hold: all around the target stays as it is (content, inode, times, mode, number of
links), only the documented exceptions come, it ends, and memory stays bounded.

A bounded time in every run of the tests, always the same archives; to look for longer, and for others:

    LABKERNEL_FUZZ_SECONDS=600 LABKERNEL_FUZZ_SEED=1 make ARGS="-k fuzz" test
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from labkernel.image import exchange
from labkernel.image.merge import merge
from labkernel.image.tarball import Limits
from labkernel.image.unpack import UnsafeArchive, unpack
from tests.helpers import peak_memory
from tests.test_unpack import END, bits, extended, header, record

SECONDS = float(os.environ.get("LABKERNEL_FUZZ_SECONDS", "15"))
SEED = int(os.environ.get("LABKERNEL_FUZZ_SEED", "0"))
LIMITS = Limits(bytes=1 << 20, entries=40, depth=8)
MOST_MEMORY = 64 << 10
"""KiB that one archive may need: zstd's window, and the blocks that are read ahead."""

HANGS = 120
"""Seconds: far more than any of these small archives takes on a machine with other things to do."""

# ---------------------------------------------------------------------- making archives


@dataclass(frozen=True)
class Names:
    """What entries are called, and what links lead to. *outside* is the path of what must stay as it is.

    Most are good and few, so that entries meet, and an archive gets to its third entry.
    """

    outside: str

    def __post_init__(self) -> None:
        good = ["a", "b", "c", "a/b", "b/a", "a/b/c", "c/b", "./a", "a/", "b//a", "a/canary", "b/new", "A"]
        out = [
            "..",
            "../..",
            "../outside",
            "a/../../outside/canary",
            "../canary",
            "b/../..",
            "a/..",
            "c/../../..",
        ]
        absolute = [f"{self.outside}/canary", f"{self.outside}/new", f"{self.outside}/a", self.outside, "/"]
        odd = [".", "", "/a", ".wh.a", "a/.wh.b", "a/.wh..wh..opq", ".wh.", ".wh..wh.plnk", "é", "\udce9", "a\n",
               "a\x9b", "n" * 255, "n" * 256, "d/" * 20 + "f"]  # fmt: skip
        object.__setattr__(self, "any", st.sampled_from([*good * 20, *out, *absolute, *odd]))
        object.__setattr__(self, "links", st.sampled_from([*good * 2, *absolute * 4, *out, *odd]))

    any: st.SearchStrategy[str] = field(init=False)
    links: st.SearchStrategy[str] = field(init=False)


KINDS = st.sampled_from(
    [*[b"0", b"0", b"5", b"2", b"2", b"1"] * 10, b"\0", b"7", b"3", b"4", b"6", b"S", b"Z"]
)
MODES = st.sampled_from(
    [*[b"0000755"] * 80, b"0000000", b"0001777", b"0004755", b"0002755", b"0100644", bits(1 << 50, 8), b"zzz"]
)
NUMBERS = st.one_of(
    st.sampled_from(
        ["0", "1", "7", "-1", "600", "4294967295", "1e300", "nan", "inf", "", "9" * 5000, "0x1", "1_0"]
    ),
    st.integers(0, 2000).map(str),
)
SIZES = st.one_of(
    st.none(),  # the true one
    st.integers(0, 2000),
    st.sampled_from([b"\xff" * 12, bits(1 << 80, 12), b"7" * 12, b"-1", b"          8", b"1\x002"]),
)


@st.composite
def extended_headers(draw: st.DrawFn, names: Names) -> bytes:
    kind = draw(st.sampled_from([b"x", b"x", b"x", b"g", b"L", b"K"]))
    if kind in b"LK":
        return extended(kind, os.fsencode(draw(names.links)) + draw(st.sampled_from([b"", b"\0", b"\0/x"])))
    key = st.sampled_from(
        [
            "path",
            "linkpath",
            "size",
            "uid",
            "gid",
            "mtime",
            "comment",
            "GNU.sparse.size",
            "SCHILY.xattr.user.x",
        ]
    )
    records = draw(st.lists(st.tuples(key, st.one_of(names.any, names.links, NUMBERS)), max_size=3))
    data = b"".join(record(key, value) for key, value in records)
    return extended(kind, draw(st.sampled_from([data, data, data, data[:-1], b"\xff" + data])))


@st.composite
def entries(draw: st.DrawFn, names: Names) -> bytes:
    rare = draw(st.integers(0, 15))
    kind = draw(KINDS)
    content = draw(st.sampled_from([b"", b"x", b"y" * 600])) if kind in b"0\x007" else b""
    size = draw(SIZES) if rare == 1 else None
    before = b"".join(draw(st.lists(extended_headers(names), max_size=2))) if rare in (2, 3) else b""
    return (
        before
        + header(
            os.fsencode(draw(names.any))[:100],
            kind,
            size=len(content) if size is None else size,
            link=os.fsencode(draw(names.links if kind == b"2" else names.any))[:100]
            if kind in b"12"
            else b"",
            mode=draw(MODES),
            device=draw(st.sampled_from([0, 1, 1 << 20, 1 << 40])) if kind in b"34" else 0,
        )
        + content
        + bytes(-len(content) % 512)
    )


def repaired(data: bytearray, position: int) -> None:
    """Give the record around a position a right checksum, so that what lies behind the check is reached."""
    start = position - position % 512
    if start + 512 <= len(data):
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, "gzip": functools.partial(gzip.compress, mtime=0), "zstd": zstandard.compress,
}  # fmt: skip


@st.composite
def archives(draw: st.DrawFn, names: Names) -> bytes:
    data = bytearray(b"".join(draw(st.lists(entries(names), min_size=2, max_size=5))))
    how = draw(st.integers(0, 15))
    data += draw(st.sampled_from([b"", bytes(512), END + b"x", END * 3])) if how == 1 else END
    change = st.tuples(st.integers(0, 1 << 16), st.integers(0, 255), st.booleans())
    if how in (2, 3, 4):
        for position, value, repair in draw(st.lists(change, max_size=4)):
            data[position % len(data)] = value
            if repair:
                repaired(data, position % len(data))
    compress = draw(st.sampled_from(["", "", "gzip", "zstd"]))
    packed = bytearray(COMPRESS[compress](bytes(data)))
    if compress and how in (5, 6):
        for position, value, _ in draw(st.lists(change, max_size=2)):
            packed[position % len(packed)] = value
    cut = draw(st.integers(0, len(packed))) if how == 7 else 0
    return bytes(packed[: len(packed) - cut])


# ---------------------------------------------------------------------- what must hold


@dataclass
class Fuzzed:
    """A directory with a target, and things around it."""

    path: Path
    tried: int = 0
    accepted: int = 0
    reasons: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        (self.path / "outside/a/b").mkdir(parents=True)
        (self.path / "work").mkdir()
        for name in ("outside/canary", "canary", "a"):
            (self.path / name).write_text("alive")
        (self.path / "outside/b").symlink_to("canary")

    def around(self) -> list[tuple[object, ...]]:
        """All that an archive could do to what is there, but reading it."""
        found: list[tuple[object, ...]] = []
        for path in (self.path, *sorted(self.path.rglob("*"))):
            status = path.lstat()
            kept = (
                status.st_mode,
                status.st_ino,
                status.st_nlink,
                status.st_uid,
                status.st_gid,
                status.st_size,
            )
            times = (
                (status.st_mtime_ns, status.st_ctime_ns)
                if path not in (self.path, self.path / "work")
                else ()
            )
            found.append((str(path), *kept, *times, path.read_bytes() if path.is_file() else b""))
        return found

    def attempt(self, layers: list[bytes], merged: bool, setuid: bool, devices: bool) -> None:
        """Unpack what hypothesis has made: it is refused or unpacked, and nothing else happens anywhere."""
        work, root = self.path / "work", self.path / "work/root"
        before = self.around()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on (man 5 proc)
        memory = peak_memory()
        self.tried += 1
        for number, data in enumerate(layers):
            (work / f"layer-{number}").write_bytes(data)
        try:
            with no_hang():
                source = work / "layer-0"
                if merged:
                    openers = [
                        functools.partial(exchange._plain, work / f"layer-{n}", LIMITS)
                        for n in range(len(layers))
                    ]
                    source = work / "merged"
                    merge(openers, source, limits=LIMITS, compression="none")
                unpack(source, root, allow_setuid=setuid, allow_devices=devices, limits=LIMITS)
            self.accepted += 1
            self.inside(root, setuid, devices)
        except UnsafeArchive as error:
            assert str(error).isprintable() and len(str(error)) < 1000
            assert not root.exists()
            self.reasons.add(error.reason[:20])
        except PermissionError:
            assert devices and os.geteuid() != 0  # making them is for root of the machine
        for name in os.listdir(work):
            assert name.startswith(("layer-", "merged")), f"{name} was left"
            (work / name).unlink()
        assert self.around() == before
        assert peak_memory() - memory < MOST_MEMORY

    def inside(self, root: Path, setuid: bool, devices: bool) -> None:
        """Nothing is there that was not asked for; afterwards nothing is there at all."""
        root.chmod(0o700)
        for _, directories, files, descriptor in os.fwalk(root):
            for name in (*directories, *files):
                status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                assert setuid or not status.st_mode & (stat.S_ISUID | stat.S_ISGID)
                kind = stat.S_IFMT(status.st_mode)
                assert devices or kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
                if kind == stat.S_IFDIR:
                    os.chmod(name, 0o700, dir_fd=descriptor)
        shutil.rmtree(root)


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"it still runs after {HANGS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(("merged", "share"), [(False, 0.6), (True, 0.4)], ids=["unpack", "merge"])
def test_fuzz(merged: bool, share: float) -> None:
    with tempfile.TemporaryDirectory(prefix="lk-") as directory:  # a short path: it stands in headers
        fuzz(Fuzzed(Path(directory)), merged, time.monotonic() + SECONDS * share)


def fuzz(place: Fuzzed, merged: bool, end: float) -> None:
    """Make archives, and try them, until that time."""
    few = settings(
        max_examples=100,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    layers = st.lists(archives(Names(str(place.path / "outside"))), min_size=1, max_size=3 if merged else 1)
    number = 0
    while number == 0 or time.monotonic() < end:  # hypothesis itself knows no bound but a number of examples

        @seed(1000 * SEED + number)
        @few
        @given(layers=layers, setuid=st.booleans(), devices=st.booleans())
        def some(layers: list[bytes], setuid: bool, devices: bool) -> None:
            place.attempt(layers, merged, setuid, devices)

        some()
        number += 1
    print(f"{place.tried} archives, {place.accepted} accepted, refused for {len(place.reasons)} reasons")
    # The archives are not all nonsense, nor all harmless: they get to many places of the code.
    assert 0 < place.accepted < place.tried
    assert len(place.reasons) >= 5
