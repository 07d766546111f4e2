"""The last diet that packages allow: dpkg is told file by file what not to unpack."""

from __future__ import annotations

import shutil
from pathlib import Path

from from_packages import install

from labkernel.image import Progress
from labkernel.image.recipes import Recipe

EXCLUDES = {
    "/usr/share/doc/*": "documentation",
    "/usr/share/info/*": "documentation",
    "/usr/share/man/*": "documentation",
    "/usr/share/lintian/*": "for who makes packages",
    "/usr/share/bug/*": "for who reports bugs",
    "/usr/share/bash-completion/*": "for who sits at a shell",
    "/usr/share/locale/*": "what programs say in other languages",
    "/usr/lib/locale/*": "the same of the C library; C.UTF-8 is built in",
    "/usr/share/i18n/*": "the sources of these",
    "/usr/lib/*-linux-gnu*/gconv/*": "encodings other than UTF-8",
    "/usr/share/zoneinfo/*": "time zones; the container has UTC",
}
"""What dpkg leaves out, and why it can."""

INCLUDES = ("/usr/share/doc/*/copyright",)
"""The licences ask that they themselves be kept."""


REMOVED = {
    "usr/lib/python3*/lib2to3": "a converter from Python 2",
    "usr/lib/python3*/pydoc_data": "the text of help()",
    "usr/lib/python3*/distutils": "installs packages",
    "usr/lib/python3*/test": "what is there of Python's own tests",
    "usr/lib/python3*/turtle*": "windows",
}
"""What goes afterwards: left out by dpkg, it would be missed by the package's own script, which compiles each file."""


def build(root: Path, recipe: Recipe, tell: Progress) -> list[Path]:
    """Install, and remove what could not be left out."""
    used = install(
        root,
        recipe,
        tell,
        variant="minbase",
        packages=("python3",),
        excludes=tuple(EXCLUDES),
        includes=INCLUDES,
    )
    for pattern in REMOVED:
        for path in root.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return used
