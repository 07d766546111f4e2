"""The library of python-closure in one archive: a thousand files less, and each as small as deflate makes it.

Lost: docstrings and assertions; what modules look for in files beside their own (venv has its scripts there).
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import zipped_library

from labkernel.image import Progress, elf
from labkernel.image import python as pythons
from labkernel.image.recipes import BuildError, Recipe


def build(root: Path, recipe: Recipe, tell: Progress) -> list[Path]:
    """Take the closure apart, and put it together again; returns the files of this machine that were compiled."""
    for path in recipe.image("python-closure").iterdir():
        path.rename(root / path.name)
    (library,) = root.glob("usr/lib*/python3.*")
    host = host_python(library.name)
    files = [path.relative_to(library).with_suffix(".py") for path in sorted(library.rglob("*.pyc"))]
    archive = library.with_name(f"{library.name.replace('.', '')}.zip")
    tell("compile the library", 0, 1)
    content = zipped_library.byte_code(host.executable, host.library, files, f"/{archive.relative_to(root)}")
    for path in library.iterdir():
        if path.name != "lib-dynload":  # the kernel maps these from files; and Python looks for the directory
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    zipped_library.write_zip(content, archive, zipfile.ZIP_DEFLATED)
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink() and elf.read_elf(path):
            recipe.run("strip", "--strip-unneeded", "--remove-section=.comment", path)
    return [Path(zipped_library.__file__), *(host.library / file for file in files)]


def host_python(series: str) -> pythons.Python:
    """The Python of this machine that the closure was made from. Raises BuildError if it is of another series now."""
    executable = Path("/usr/bin/python3")
    host = pythons.find(executable if executable.exists() else pythons.running())
    if not host or host.library.name != series:
        raise BuildError(
            f"the image python-closure holds {series}, and that is not this machine's Python any more"
        )
    return host
