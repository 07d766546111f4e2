"""The tarball of buildroot-python, with musl as its C library."""

from __future__ import annotations

from pathlib import Path

from from_buildroot import make_image

from labkernel.image import Progress
from labkernel.image.recipes import Recipe

DEFCONFIG = "labkernel_python_musl_defconfig"


def build(root: Path, recipe: Recipe, tell: Progress) -> list[Path]:
    """Build; returns the files beside this folder that it was made from."""
    return make_image(root, recipe, tell, DEFCONFIG)
