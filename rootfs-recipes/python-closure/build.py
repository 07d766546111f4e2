"""A Python of this machine, and the files that it needs. No package is installed, nothing is downloaded.

For a pyenv's or conda's Python copy this folder, name yours in PYTHON, and `labkernel build ./your-folder`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from labkernel.image import Progress, elf
from labkernel.image import python as pythons
from labkernel.image.closure import OPENED_BY_LIBC, Closure, closure
from labkernel.image.pack import pack
from labkernel.image.recipes import BuildError, Recipe, proof_command
from labkernel.image.unpack import unpack

PYTHON = "/usr/bin/python3"
"""The distribution's; where there is none, the one that is running."""

TRIMMED = {
    "pydoc_data": "the text of help()",
    "distutils": "installs packages",
    "lib-dynload/_codecs_[chjkit]*": "encodings of East Asia before Unicode",
    "lib-dynload/_dbm.*": "databases of the eighties, and the only one who needs libdb",
    "config-*": "for who links against Python",
}
"""Patterns in the standard library, with the reasons: more than `labkernel.image.python` leaves out anyway."""


def build(root: Path, recipe: Recipe, tell: Progress) -> list[Path]:
    """Fill *root* with the closure; returns the files of this machine that it came from."""
    executable = Path(PYTHON) if Path(PYTHON).exists() else pythons.running()
    opened = opened_by_name(executable, recipe)
    content = closure([executable], libraries=opened, progress=tell)
    materialise(content, root, recipe, tell)
    library = next(root.glob("usr/lib*/python3.*"))
    for pattern in TRIMMED:
        for path in library.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    byte_code_only(library)
    remove_unneeded(root, content, keep={*OPENED_BY_LIBC, *(path.name for path in opened)})
    return sorted({entry.source for entry in content if entry.source} | {Path(closure.__code__.co_filename)})


def opened_by_name(executable: Path, recipe: Recipe) -> list[Path]:
    """The libraries that the proof's program opens: those that a header names, and those that only a run shows.

    An empty list where there is no strace. Raises BuildError if the program fails on this machine.
    """
    if not shutil.which("strace"):
        print("no strace here: libraries that are opened by name only are not looked for")
        return []
    trace = recipe.work / "trace"
    command = [
        "strace",
        "-f",
        "-qq",
        "-e",
        "trace=open,openat",
        "-o",
        str(trace),
        str(executable),
        "-I",
        "-S",
        "-B",
    ]
    done = subprocess.run([*command, *proof_command(recipe)[1:]], stdin=subprocess.DEVNULL)
    if done.returncode:
        raise BuildError(
            f"{executable} does not run the proof on this machine either (exit status {done.returncode})"
        )
    found = re.findall(
        r'open(?:at)?\((?:AT_FDCWD, )?"([^"]+\.so(?:\.[\d.]+)?)", .*\) = \d', trace.read_text()
    )
    home = pythons.find(executable)
    assert home
    # Extension modules come with the standard library.
    return sorted({Path(name) for name in found if not Path(name).is_relative_to(home.library)})


def materialise(content: Closure, root: Path, recipe: Recipe, tell: Progress) -> None:
    """Write the closure's files to the empty directory *root*."""
    tarball = recipe.work / "closure.tar"
    pack(content, tarball, compression="none", progress=tell)
    unpack(tarball, root)
    tarball.unlink()


def byte_code_only(library: Path) -> None:
    """Put the byte code where Python looks for it when there is no source: in the source's own place (PEP 3147)."""
    for cached in sorted(library.rglob("__pycache__/*.pyc")):
        source = cached.parent.parent / f"{cached.name.split('.')[0]}.py"
        source.unlink()
        cached.rename(source.with_suffix(".pyc"))
    for directory in sorted(library.rglob("__pycache__")):
        directory.rmdir()


def remove_unneeded(root: Path, content: Closure, keep: set[str]) -> None:
    """Remove the shared libraries that nobody names any more, now that modules are gone."""
    libraries = [root / entry.path[1:] for entry in content if entry.why.startswith("a library of ")]
    while True:
        files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
        needed = {name for path in files if (found := elf.read_elf(path)) for name in found.needed} | keep
        unneeded = [path for path in libraries if path.exists() and path.name not in needed]
        if not unneeded:
            return
        for path in unneeded:
            print(f"not needed any more: {path.relative_to(root)}")
            path.unlink()
