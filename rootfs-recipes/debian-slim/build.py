"""The usual diet: the packages that are needed, without what they merely recommend, and nothing to read."""

from __future__ import annotations

from pathlib import Path

from from_packages import install

from labkernel.image import Progress
from labkernel.image.recipes import Recipe

# What Docker's images named "slim" leave out. The licences ask that they themselves be kept.
EXCLUDES = (
    "/usr/share/doc/*", "/usr/share/info/*", "/usr/share/lintian/*", "/usr/share/linda/*",
    "/usr/share/locale/*", "/usr/share/man/*", "/usr/share/groff/*",
)  # fmt: skip
INCLUDES = ("/usr/share/doc/*/copyright",)


def build(root: Path, recipe: Recipe, tell: Progress) -> list[Path]:
    """Install."""
    packages = ("python3", "ca-certificates", "netbase")
    return install(
        root, recipe, tell, variant="minbase", packages=packages, excludes=EXCLUDES, includes=INCLUDES
    )
