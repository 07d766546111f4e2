"""MicroPython: the language without the library. Its own proof says what is there, and what is lost."""

from __future__ import annotations

from pathlib import Path

from labkernel.image import Progress
from labkernel.image.closure import closure
from labkernel.image.pack import pack
from labkernel.image.recipes import Recipe
from labkernel.image.unpack import unpack


def build(root: Path, recipe: Recipe, tell: Progress) -> list[Path]:
    """The closure of one program."""
    content = closure(["micropython"], progress=tell)
    pack(content, recipe.work / "closure.tar", compression="none", progress=tell)
    unpack(recipe.work / "closure.tar", root)
    return [Path(closure.__code__.co_filename), *sorted({entry.source for entry in content if entry.source})]
