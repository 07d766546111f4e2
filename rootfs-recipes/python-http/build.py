"""A web server in the least space: what is not compiled in need not be trimmed away.

Every step makes it smaller, and `labkernel images` shows what it comes to: compiled for size, functions that nobody
calls left out by the linker, no docstrings in C or in Python, byte code only, no module that no request needs.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import static_cpython as static

from labkernel.image import Progress
from labkernel.image.recipes import Recipe


def build(root: Path, recipe: Recipe, tell: Progress) -> list[Path]:
    """Fetch, compile, and put together."""
    modules = static.chosen(recipe.folder / "modules.txt")
    source = static.Sources(recipe, tell).unpack(f"python{static.python_version()}")
    static.freeze_only(static.FROZEN, source)
    compiler = static.Compiler(recipe, tell, static.SMALL, static.SMALL_LINK)
    python = static.compile_cpython(source, compiler, modules["compiled"], "--without-doc-strings")
    files = static.imported(python, modules["imported"])
    # Stored, not deflated: that is a megabyte more when unpacked, but less as a tarball, whose own compressor sees all
    # files at once; and the interpreter does without zlib.
    static.fill(root, python, files, zipfile.ZIP_STORED)
    return static.inputs()
