"""The closure of some programs: every file they need, and nothing else, ready to be packed as a root file
system.

A container's image is no more than this: programs, the ELF interpreter and the shared libraries they ask
for, for Python the standard library, and a handful of small files that the C library reads. All of it is
taken from the machine on which the closure is made; nothing is downloaded, nothing is installed, no
rights are needed.

Where things go. The tree has the merged layout that distributions have now (``/bin``, ``/lib``,
``/lib64`` are links into ``/usr``). Libraries go to the directory of libc and of the dynamic loader,
which the loader searches by itself: so the image needs no ``ld.so.cache``, and what was found on the host
through somebody's home directory is found too. Only where a library was found relative to the program
(``$ORIGIN``), and under ``/usr``, it stays at that place.
"""

from __future__ import annotations

import errno
import os
import posixpath
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from labkernel.image import Progress, elf
from labkernel.image import python as pythons

_DIRECTORIES = {
    **dict.fromkeys(("/dev", "/etc", "/home", "/proc", "/run", "/sys", "/var"), 0o755),
    **dict.fromkeys(("/usr", "/usr/bin", "/usr/lib", "/usr/lib64", "/usr/sbin"), 0o755),
    **dict.fromkeys(("/tmp", "/var/tmp"), 0o1777),
    "/root": 0o700,
}
_MERGED = {"/bin": "usr/bin", "/lib": "usr/lib", "/lib64": "usr/lib64", "/sbin": "usr/sbin"}

_FILES = {
    # Who there is. Not the host's list: no name of a user of this machine goes into an image.
    "/etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    "/etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    # Names without a resolver: without it, socket.getfqdn() waits for a name server that never answers.
    "/etc/hosts": "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n",
    "/etc/hostname": "localhost\n",
    "/etc/resolv.conf": "",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\nservices: files\n",
}

# glibc opens these by name (dlopen), so no ELF header tells of them. Before glibc 2.34 nsswitch.conf's
# "files" and "dns" were libraries; pthread_exit() and the unwinding of C++ need libgcc_s.
OPENED_BY_LIBC = ("libnss_files.so.2", "libnss_dns.so.2", "libgcc_s.so.1")

# The terminals that people sit at. curses and readline look here.
_TERMINALS = ("dumb", "linux", "screen", "tmux-256color", "vt100", "xterm", "xterm-256color")


class ClosureError(ValueError):
    """The programs cannot be brought into one tree: something is missing, or two files want one place."""


@dataclass(frozen=True)
class Entry:
    """One path of the image."""

    path: str  # as it is inside: absolute
    kind: Literal["file", "directory", "symlink"]
    mode: int  # permission bits
    why: str  # for people: what it is there for
    source: Path | None = None  # a file's content is that of this file of the host …
    content: bytes = b""  # … or this
    target: str = ""  # what a symlink says

    @property
    def size(self) -> int:
        """Apparent size in bytes; 0 for all but files."""
        return self.source.stat().st_size if self.source else len(self.content)


@dataclass
class Closure:
    """The paths of an image, sorted; parents stand before what is in them."""

    _entries: dict[str, Entry] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Entry]:
        return iter(sorted(self._entries.values(), key=lambda entry: entry.path.split("/")))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, path: object) -> bool:
        return path in self._entries

    def __getitem__(self, path: str) -> Entry:
        return self._entries[path]

    @property
    def size(self) -> int:
        """Apparent size of all files, in bytes."""
        return sum(entry.size for entry in self)

    def directory(self, path: str, mode: int = 0o755, why: str = "holds the rest") -> None:
        """Add a directory and those above it, if they are not there yet."""
        if path != "/" and path not in self._entries:
            self.directory(posixpath.dirname(path))
            self._add(Entry(path, "directory", mode, why))

    def file(self, path: str, source: Path | bytes, why: str, mode: int | None = None) -> None:
        """Add a file: a file of the host (executable inside if it is so there) or bytes.

        Raises ClosureError if another file is at *path* already.
        """
        if isinstance(source, bytes):
            self._add(Entry(path, "file", mode or 0o644, why, content=source))
        else:
            # Only whether it can be executed is kept: the rest of the mode is the host's taste (umask,
            # set-user-ID).
            executable = source.stat().st_mode & 0o111
            self._add(Entry(path, "file", mode or (0o755 if executable else 0o644), why, source=source))

    def symlink(self, path: str, to: str, why: str, *, absolute: bool = False) -> None:
        """Add a link at *path* to the path *to*; it is relative, to hold outside too, unless *absolute*."""
        target = to if absolute else posixpath.relpath(to, posixpath.dirname(path))
        self._add(Entry(path, "symlink", 0o777, why, target=target))

    def _add(self, entry: Entry) -> None:
        self.directory(posixpath.dirname(entry.path))
        there = self._entries.setdefault(entry.path, entry)
        if not _same(there, entry):
            raise ClosureError(
                f"{entry.path}: two different things want this place: {_origin(there)} ({there.why}) "
                f"and {_origin(entry)} ({entry.why}). Leave one of the programs out."
            )


def _same(one: Entry, other: Entry) -> bool:
    if (one.kind, one.target) != (other.kind, other.target):
        return False
    if one.source and other.source:
        return one.source.samefile(other.source) or one.source.read_bytes() == other.source.read_bytes()
    return one.content == other.content and one.source == other.source


def _origin(entry: Entry) -> str:
    return str(entry.source or entry.target or "a file of our own")


def closure(
    programs: Iterable[str | Path], *, libraries: Iterable[Path] = (), progress: Progress | None = None
) -> Closure:
    """The closure of *programs*: names (found by ``PATH``) or paths of programs of this machine.

    *libraries*: those that the programs open by name while they run (dlopen(3)): no ELF header tells of them.

    A Python interpreter brings its standard library, and is found at ``/usr/bin/python3`` inside. The
    names ``python3`` and ``python`` mean the Python that is running now (out of its virtual environment):
    what ``PATH`` finds is often a script.

    Raises FileNotFoundError for a program that is not there, ClosureError for a library that is not there.
    """
    builder = _Builder(Closure())
    builder.base()
    waiting = [_on_path(program) for program in programs]
    done: set[Path] = set()
    while waiting:
        program = waiting.pop(0)
        if program not in done:
            done.add(program)
            if progress:
                progress(f"closure: {program.name}", len(done) - 1, len(done) + len(waiting))
            waiting += builder.program(program)
    for library in libraries:
        builder.opened(library)
    if progress:
        progress("closure", len(done), len(done))
    return builder.closure


def _on_path(program: str | Path) -> Path:
    if str(program) in ("python3", "python"):
        return pythons.running()
    found = shutil.which(program, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if not found:
        raise FileNotFoundError(errno.ENOENT, f"{program}: no such program in PATH or /usr/sbin")
    return Path(found).absolute()


def merged(path: str) -> str:
    """*path* in the merged layout: ``/lib64/x`` is ``/usr/lib64/x``."""
    first, _, rest = path.lstrip("/").partition("/")
    return f"/{_MERGED[f'/{first}']}/{rest}" if rest and f"/{first}" in _MERGED else path


def _is_system(path: str) -> bool:
    return merged(path).startswith("/usr/")


@dataclass
class _Builder:
    closure: Closure
    programs: dict[tuple[int, int], str] = field(default_factory=dict)  # (device, inode): where it went
    places: dict[str, str] = field(default_factory=dict)  # real path of a program or library: where it went
    terminals: bool = False
    first: elf.Loaded | None = None  # the first program that has an ELF interpreter

    def base(self) -> None:
        for path, mode in _DIRECTORIES.items():
            self.closure.directory(path, mode, "every root file system has it")
        for path, target in _MERGED.items():
            self.closure.symlink(path, f"/{target}", "the merged layout")
        for path, text in _FILES.items():
            self.closure.file(path, text.encode(), "the C library reads it")

    def program(self, path: Path) -> list[Path]:
        """Add one program with all it needs; returns the programs that it needs in turn."""
        home = pythons.find(path)
        if home:
            self.python(home)
            return []
        real = path.resolve()
        name, target = (merged(str(p)) if _is_system(str(p)) else f"/usr/bin/{p.name}" for p in (path, real))
        # Tools that are one program under many names (uutils, busybox) may be hard links to one file.
        status = real.stat()
        target = self.programs.setdefault((status.st_dev, status.st_ino), target)
        self.closure.file(target, real, f"the program {path.name}")
        if name != target:
            self.closure.symlink(name, target, f"the program {path.name}")
        words = elf.shebang(real)
        if words:
            return [_on_path(word) for word in words[: 2 if words[0].endswith("/env") else 1]]
        self.libraries(elf.Loader(), str(real), target)
        return []

    def python(self, home: pythons.Python) -> None:
        executable = f"/usr/bin/python{home.version}"
        self.closure.file(executable, home.executable, "the Python interpreter")
        for name in ("python3", "python"):
            # Absolute: started as /bin/python3, CPython looks for its library from where this link leads,
            # and in "/bin" it would find none (Modules/getpath.py stops short of the root directory).
            self.closure.symlink(f"/usr/bin/{name}", executable, "the Python interpreter", absolute=True)
        loader = elf.Loader()
        main = self.libraries(loader, str(home.executable), executable)
        sources: dict[str, bytes] = {}
        for file in home.files():
            inside = home.inside(file)
            content = home.relocated(file)
            self.closure.file(inside, content or file, "the standard library")
            if file.suffix == ".py":
                sources[inside] = content or file.read_bytes()
            elif file.suffix == ".so":
                self.libraries(loader, str(file.resolve()), inside, by=main)
        for path, code in pythons.compiled(home, sources).items():
            self.closure.file(path, code, "byte code of the standard library")

    def libraries(
        self, loader: elf.Loader, path: str, inside: str, by: elf.Loaded | None = None
    ) -> elf.Loaded:
        """Add the interpreter and the libraries of the ELF file *path*, which is at *inside* in the image."""
        first, *needed = loader.load(path, by)
        if loader.missing:
            raise ClosureError("; ".join(map(str, loader.missing)))
        program = by or first
        if program.elf.interpreter is None:
            return first  # linked statically
        interpreter = elf.resolve(program.elf.interpreter)
        # The loader and libc come from one build and lie in one directory, which the loader searches by
        # itself.
        directory = merged(posixpath.dirname(interpreter))
        if by is None:
            self.first = self.first or program
            self.interpreter(program.elf.interpreter, interpreter, directory)
            needed += self.opened_by_libc(loader, first)
        self.places[first.path] = inside
        for library in needed:
            self.places[library.path] = place = self._place(library, directory)
            needed_by = library.by.path if library.by else path
            self.closure.file(place, Path(library.path), f"a library of {needed_by}")
            if library.name.startswith("libtinfo") and not self.terminals:
                self.terminfo()
        return first

    def opened(self, path: Path) -> None:
        """Add a library that a program opens by name, and what it needs in turn."""
        if self.first is None or self.first.elf.interpreter is None:
            raise ClosureError(f"{path}: a library is there to be opened, and no program that could open one")
        real = path.resolve()
        if str(real) in self.places:
            return
        directory = merged(posixpath.dirname(elf.resolve(self.first.elf.interpreter)))
        inside = merged(str(path)) if _is_system(str(path)) else f"{directory}/{path.name}"
        self.closure.file(inside, real, "a library that is opened by name")
        self.libraries(elf.Loader(), str(real), inside, by=self.first)

    def interpreter(self, asked: str, real: str, directory: str) -> None:
        """The ELF interpreter has to be at the very path written in the program: execve(2) goes there."""
        place = f"{directory}/{posixpath.basename(asked)}"
        self.closure.file(place, Path(real), "the ELF interpreter (dynamic loader)")
        if merged(asked) != place:
            self.closure.symlink(merged(asked), place, "the ELF interpreter (dynamic loader)")

    @staticmethod
    def opened_by_libc(loader: elf.Loader, program: elf.Loaded) -> list[elf.Loaded]:
        libc = next((loaded for name, loaded in loader.loaded.items() if name.startswith("libc.so")), None)
        beside = [Path(libc.path).with_name(name) for name in OPENED_BY_LIBC] if libc else []
        return [new for path in beside if path.exists() for new in loader.load(str(path.resolve()), program)]

    def _place(self, library: elf.Loaded, directory: str) -> str:
        name = posixpath.basename(library.name)
        if library.owner and "ORIGIN" in library.found:
            origin = posixpath.dirname(self.places[library.owner.path])
            entry = library.found.replace("${ORIGIN}", origin).replace("$ORIGIN", origin)
            return merged(posixpath.normpath(f"{entry}/{name}"))
        if library.found and _is_system(library.found):
            return merged(posixpath.normpath(f"{library.found}/{name}"))
        return f"{directory}/{name}"

    def terminfo(self) -> None:
        self.terminals = True
        for name in _TERMINALS:
            for home in ("/etc/terminfo", "/lib/terminfo", "/usr/share/terminfo"):
                file = Path(home, name[0], name)
                if file.is_file():
                    self.closure.file(f"/usr/share/terminfo/{name[0]}/{name}", file, "what a terminal can do")
                    break
