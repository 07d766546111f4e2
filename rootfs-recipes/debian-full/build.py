"""Everything: the packages of packages.txt and their documentation. The others are held to this weight."""

from __future__ import annotations

from pathlib import Path

from from_packages import install

from labkernel.image import Progress
from labkernel.image.recipes import Recipe


def build(root: Path, recipe: Recipe, tell: Progress) -> list[Path]:
    """Install."""
    lines = (recipe.folder / "packages.txt").read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    return install(root, recipe, tell, variant="minbase", packages=packages)
