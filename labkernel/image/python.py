"""A Python of the host: where its parts are, which of them a container wants, and its byte code.

The parts are found by reading directories, as CPython's own ``Modules/getpath.py`` does at start; the
interpreter is started for one thing only, to compile its standard library (byte code is good for one
version of Python only).
"""

from __future__ import annotations

import errno
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# Left out of the standard library: what a container does not run. Directories, then files.
_NO_DIRECTORIES = {
    "test": "the tests of Python itself, 120 MB with their byte code",
    "tests": "the same, within packages",
    "idlelib": "an editor with windows",
    "tkinter": "windows, and Tcl/Tk with them",
    "turtledemo": "windows",
    "ensurepip": "a copy of pip: nothing is installed in a container's root",
    "lib2to3": "a converter from Python 2, removed from Python 3.13",
    "site-packages": "packages of the host's user, not of Python",
    "dist-packages": "the same, under Debian's name",
    "__pycache__": "byte code with the host's times and paths in it: we compile our own",
}
_NO_FILES = re.compile(
    r"turtle\.py|sitecustomize\.py|usercustomize\.py|EXTERNALLY-MANAGED"  # windows; settings of the host
    r"|.*\.(exe|a|o)"  # launchers for Windows, libraries for linking
    r"|(_test|_ctypes_test|_xxtest|xxlimited|_tkinter|nis\.).*\.so"  # for tests; Tk; NIS, Kerberos
)
_NAMES_PREFIX = re.compile(r"_sysconfigdata_.*\.py|_sysconfig_vars.*\.json|build-details\.json")

PREFIX = "/usr"  # sys.prefix inside, whatever it was on the host


@dataclass(frozen=True)
class Python:
    """One Python installation (no virtual environment: the installation under it)."""

    executable: Path  # the real file
    prefix: Path
    version: str  # "3.11"; "3.13t" for a free-threaded one
    library: Path  # the standard library: prefix/lib/python3.11, or prefix/lib64/… on some distributions

    def inside(self, file: Path) -> str:
        """Where *file* of the standard library goes in the image."""
        return f"{PREFIX}/{file.relative_to(self.prefix)}"

    def files(self) -> Iterator[Path]:
        """The files of the standard library that a container wants, sorted."""
        for directory, names, files in os.walk(self.library):
            names[:] = sorted(n for n in names if n not in _NO_DIRECTORIES and not n.startswith("config-"))
            wanted = (Path(directory, name) for name in sorted(files) if not _NO_FILES.fullmatch(name))
            yield from (path for path in wanted if path.is_file())  # a link may lead to what is not installed

    def relocated(self, file: Path) -> bytes | None:
        """The content of *file* with the host's prefix exchanged, for the few text files that name it;
        else None.

        CPython computes ``sys.prefix`` from where the interpreter lies, so it needs no such list;
        ``sysconfig`` shows these values, and they would carry somebody's home directory into the image.
        """
        if not _NAMES_PREFIX.fullmatch(file.name) or str(self.prefix) == PREFIX:
            return None
        return file.read_bytes().replace(os.fsencode(self.prefix), PREFIX.encode())


def find(executable: Path) -> Python | None:
    """The installation to which *executable* belongs, through a virtual environment and links; None if
    there is none.
    """
    base = _out_of_venv(executable).resolve()
    named = re.fullmatch(r"python(?:3(\.\d+t?)?)?", base.name)
    if not named:
        return None
    pattern = f"python3{named[1]}" if named[1] else "python3.*"
    for lib in ("lib", "lib64"):
        homes = sorted((base.parent.parent / lib).glob(f"{pattern}/os.py"))
        if len(homes) == 1:
            library = homes[0].parent
            return Python(base, base.parent.parent, library.name.removeprefix("python"), library)
    return None


def running() -> Path:
    """The interpreter that runs this program, out of its virtual environment."""
    return _out_of_venv(Path(sys.executable)).resolve()


def _out_of_venv(executable: Path) -> Path:
    """Follow ``pyvenv.cfg`` (https://docs.python.org/3/library/site.html) as long as there is one."""
    config = executable.parent.parent / "pyvenv.cfg"
    if not config.is_file():
        return executable
    lines = (line.partition("=") for line in config.read_text().splitlines())
    settings = {key.strip(): value.strip() for key, _, value in lines}
    home = Path(settings["home"])
    for candidate in (settings.get("executable"), home / executable.name, home / "python3"):
        if candidate and Path(candidate).exists():
            return _out_of_venv(Path(candidate))
    raise FileNotFoundError(errno.ENOENT, f"{config} says that its Python is in {home}, but there is none")


# Runs in the interpreter whose library it is. A fresh one, with one fixed order of work and a fixed hash
# seed (before 3.11, byte code has sets in the order of their hashes): then the bits are the same each
# time. "Unchecked hash" files (PEP 552) hold no time of the source.
_COMPILE = """
import importlib.util, marshal, pickle, sys, warnings
warnings.simplefilter("ignore")
compiled = {}
for path, source in pickle.load(sys.stdin.buffer).items():
    try:
        code = compile(source, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        continue  # templates that only look like modules
    header = importlib.util.MAGIC_NUMBER + b"\\1\\0\\0\\0" + importlib.util.source_hash(source)
    compiled[importlib.util.cache_from_source(path)] = header + marshal.dumps(code)
pickle.dump(compiled, sys.stdout.buffer)
"""


def compiled(python: Python, sources: Mapping[str, bytes]) -> dict[str, bytes]:
    """The byte code of *sources*, {path inside: content of the module}, as {path of the .pyc inside: its
    content}.

    Raises subprocess.CalledProcessError with the interpreter's own words if it fails.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [python.executable, "-s", "-S", "-B", "-c", _COMPILE],
        input=pickle.dumps(dict(sources), protocol=4),
        env=environment | {"PYTHONHASHSEED": "0"},
        capture_output=True,
    )
    if done.returncode:
        sys.stderr.write(done.stderr.decode(errors="replace"))
        done.check_returncode()
    result: dict[str, bytes] = pickle.loads(done.stdout)
    return result
