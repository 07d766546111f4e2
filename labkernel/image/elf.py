"""What the dynamic loader would load for a program, found by reading ELF files; no program is run.

``ldd`` answers the same question by *starting* the program under its own interpreter, which nobody should
do with a program he does not trust. Here the files are only read. The rules are those of ld.so(8)
(https://man7.org/linux/man-pages/man8/ld.so.8.html): for each ``DT_NEEDED`` name the ``DT_RPATH`` of the
object and of those that loaded it (unless the object has a ``DT_RUNPATH``), then its ``DT_RUNPATH``, then
``/etc/ld.so.cache``, then the default directories. ``LD_LIBRARY_PATH`` is left out on purpose: the answer
shall not depend on who asks.

Every function takes the root directory in which paths are resolved, so the question can be asked of a
rootfs too.
"""

from __future__ import annotations

import errno
import functools
import os
import posixpath
import stat
import struct
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

HOST = Path("/")

_MAX_LINKS = 40  # the kernel's own limit before ELOOP, path_resolution(7)


def resolve(path: str, root: Path = HOST) -> str:
    """The real path of *path* once *root* is ``/``: symbolic links are followed as a process chrooted
    there would.

    The last components need not exist. Raises OSError(ELOOP) if there is no end of links.
    """
    todo = deque(path.split("/"))
    done = "/"
    links = 0
    while todo:
        part = todo.popleft()
        if part in ("", ".", "/"):
            continue
        if part == "..":
            done = posixpath.dirname(done)
            continue
        here = posixpath.join(done, part)
        try:
            target = (root / here[1:]).readlink()
        except OSError:  # no link, or nothing there at all
            done = here
            continue
        links += 1
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, f"{path} in {root}: more than {_MAX_LINKS} symbolic links to follow")
        if target.is_absolute():
            done = "/"
        todo.extendleft(reversed(target.parts))
    return done


@dataclass(frozen=True)
class Elf:
    """The few facts of an ELF file that decide what is loaded with it (elf(5))."""

    machine: tuple[str, int]  # e_machine and the word size: a library of another machine is passed over
    interpreter: str | None  # PT_INTERP: the program the kernel starts in place of this one
    needed: tuple[str, ...]  # DT_NEEDED
    rpath: tuple[str, ...]  # DT_RPATH; empty where there is a DT_RUNPATH, which overrules it
    runpath: tuple[str, ...]  # DT_RUNPATH


@functools.lru_cache(maxsize=4096)
def _read_elf(path: Path, mtime_ns: int, size: int) -> Elf | None:
    from elftools.common.exceptions import ELFError
    from elftools.elf.dynamic import DynamicSegment
    from elftools.elf.elffile import ELFFile
    from elftools.elf.segments import InterpSegment

    with path.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            return None
        file.seek(0)
        try:
            elf = ELFFile(file)
            interpreter: str | None = None
            tags: dict[str, list[str]] = {"DT_NEEDED": [], "DT_RPATH": [], "DT_RUNPATH": []}
            for segment in elf.iter_segments():
                if isinstance(segment, InterpSegment):
                    interpreter = segment.get_interp_name()
                elif isinstance(segment, DynamicSegment):
                    for tag in segment.iter_tags():
                        if tag.entry.d_tag in tags:
                            # pyelftools names the text after the tag: DT_NEEDED is in .needed
                            text: str = getattr(tag, tag.entry.d_tag[3:].lower())
                            tags[tag.entry.d_tag].append(text)
        except (ELFError, ValueError, KeyError, UnicodeError) as error:
            raise ValueError(
                f"{path}: begins as an ELF file does, but cannot be read as one: {error}"
            ) from error
        runpath = _split(tags["DT_RUNPATH"])
        return Elf(
            machine=(elf["e_machine"], elf.elfclass),
            interpreter=interpreter,
            needed=tuple(tags["DT_NEEDED"]),
            rpath=() if runpath else _split(tags["DT_RPATH"]),
            runpath=runpath,
        )


def _split(values: list[str]) -> tuple[str, ...]:
    return tuple(entry for value in values for entry in value.split(":") if entry)


def read_elf(path: Path) -> Elf | None:
    """The facts of the ELF file *path*, or None where it is a file of another kind.

    Raises OSError where it cannot be read, ValueError where it is a broken ELF file.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        return None
    return _read_elf(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=8)
def ld_so_cache(root: Path = HOST) -> dict[str, tuple[str, ...]]:
    """``/etc/ld.so.cache`` as {soname: paths}; empty where there is none.

    The layout is that of glibc's ``sysdeps/generic/dl-cache.h``: a 48 byte header, then entries of 24
    bytes (flags, offset of the name, offset of the path, unused, hardware capabilities). Entries for
    certain processors only (``glibc-hwcaps``) are left out: what we pack must start on every machine of
    the architecture.
    """
    try:
        data = (root / "etc/ld.so.cache").read_bytes()
    except OSError:
        return {}
    start = data.find(b"glibc-ld.so.cache1.1")  # an older table may stand before it
    if start < 0:
        return {}
    table = memoryview(data)[start:]
    (count,) = struct.unpack_from("=I", table, 20)
    found: dict[str, list[str]] = {}

    def text(offset: int) -> str:
        return os.fsdecode(data[start + offset : data.index(b"\0", start + offset)])

    for number in range(count):
        _flags, name, path, _unused, capabilities = struct.unpack_from("=iIIIQ", table, 48 + 24 * number)
        if capabilities == 0:
            found.setdefault(text(name), []).append(text(path))
    return {name: tuple(paths) for name, paths in found.items()}


@functools.lru_cache(maxsize=8)
def default_directories(root: Path = HOST) -> tuple[str, ...]:
    """Where the loaders of the distributions look by themselves: multiarch first (Debian), lib64
    (Fedora), lib.
    """
    multiarch = sorted(f"/usr/lib/{path.name}" for path in (root / "usr/lib").glob("*-linux-*"))
    short = (directory.removeprefix("/usr") for directory in multiarch)
    return (*short, *multiarch, "/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib")


@dataclass(frozen=True)
class Loaded:
    """One object as the loader has it in memory."""

    name: str  # as it was asked for: the soname, or the program's path
    path: str  # real path in the root
    elf: Elf
    by: Loaded | None = None  # who needed it
    found: str = (
        ""  # the RPATH or RUNPATH entry, as written in the file, that led to it; empty: cache or default
    )
    owner: Loaded | None = None  # in whose file that entry is written: $ORIGIN is this one's directory


@dataclass(frozen=True)
class Missing:
    """A file that a program needs and that is not there."""

    name: str
    needed_by: str
    kind: str  # "interpreter" or "library"

    def __str__(self) -> str:
        if self.kind == "interpreter":
            return (
                f"{self.needed_by} needs its ELF interpreter {self.name}, which is not there: "
                'the kernel answers "No such file or directory", though the program itself exists'
            )
        return (
            f"{self.needed_by} needs the shared library {self.name}, "
            "which is in none of the places where the loader looks"
        )


@dataclass
class Loader:
    """Follows ``DT_NEEDED`` in one root, as ld.so does for one process: a soname is loaded once."""

    root: Path = HOST
    missing: list[Missing] = field(default_factory=list)
    loaded: dict[str, Loaded] = field(default_factory=dict)

    def load(self, path: str, by: Loaded | None = None) -> list[Loaded]:
        """Load the object at *path* (resolved) and all it needs; returns the objects that are new,
        breadth first.

        *by* is the program that opens it by ``dlopen``, None for the program itself. What is not found is
        added to ``missing``. Raises ValueError where *path* is no ELF file.
        """
        elf = read_elf(self.root / path[1:])
        if elf is None:
            raise ValueError(f"{path}: not an ELF file")
        first = Loaded(path, path, elf, by)
        new = [first]
        queue = deque([first])
        while queue:
            current = queue.popleft()
            for name in current.elf.needed:
                if name in self.loaded:
                    continue
                library = self._find(name, current)
                if library is None:
                    self.missing.append(Missing(name, current.path, "library"))
                    continue
                self.loaded[name] = library
                new.append(library)
                queue.append(library)
        return new

    def _find(self, name: str, by: Loaded) -> Loaded | None:
        if "/" in name:  # such a name is a path already
            return self._open(name, name, by)
        for owner, entry in self._search_path(by):
            origin = posixpath.dirname(owner.path)
            directory = entry.replace("${ORIGIN}", origin).replace("$ORIGIN", origin)
            library = self._open(name, f"{directory}/{name}", by, entry, owner)
            if library:
                return library
        candidates = [
            *ld_so_cache(self.root).get(name, ()),
            *(f"{d}/{name}" for d in default_directories(self.root)),
        ]
        return next(filter(None, (self._open(name, path, by) for path in candidates)), None)

    @staticmethod
    def _search_path(by: Loaded) -> list[tuple[Loaded, str]]:
        """RPATH of the object and of its loaders, unless it has a RUNPATH, which is for its own needs
        only.
        """
        if by.elf.runpath:
            return [(by, entry) for entry in by.elf.runpath]
        chain: list[tuple[Loaded, str]] = []
        owner: Loaded | None = by
        while owner is not None:
            chain += [(owner, entry) for entry in owner.elf.rpath]
            owner = owner.by
        return chain

    def _open(
        self, name: str, path: str, by: Loaded, entry: str = "", owner: Loaded | None = None
    ) -> Loaded | None:
        real = resolve(path, self.root)
        try:
            elf = read_elf(self.root / real[1:])
        except OSError:
            return None
        if elf is None or elf.machine != by.elf.machine:
            return None
        return Loaded(name, real, elf, by, entry, owner)


def missing(program: str | Path, rootfs: Path = HOST) -> list[Missing]:
    """What *program* (a path as it is inside *rootfs*) needs and *rootfs* lacks; an empty list if it can
    start.

    This explains the program that is there and yet "No such file or directory": execve(2) gives ENOENT
    also when the file's *interpreter* is what does not exist. Raises FileNotFoundError if the program
    itself is missing, ValueError if it is neither an ELF file nor a script.
    """
    path = resolve(str(program), rootfs)
    file = rootfs / path[1:]
    if not file.exists():
        raise FileNotFoundError(errno.ENOENT, f"{program} is not in {rootfs}")
    script = shebang(file)
    if script:
        if not (rootfs / resolve(script[0], rootfs)[1:]).exists():
            return [Missing(script[0], path, "interpreter")]
        return missing(script[0], rootfs)
    loader = Loader(rootfs)
    interpreter = loader.load(path)[0].elf.interpreter
    if interpreter and not (rootfs / resolve(interpreter, rootfs)[1:]).exists():
        loader.missing.insert(0, Missing(interpreter, path, "interpreter"))
    return loader.missing


def shebang(path: Path) -> list[str]:
    """The words after ``#!`` in the first line of *path*; an empty list if it is no script (execve(2))."""
    with path.open("rb") as file:
        line = file.readline(256)
    return os.fsdecode(line[2:]).split() if line.startswith(b"#!") else []
