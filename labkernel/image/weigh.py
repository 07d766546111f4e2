"""Weighing: which files an image is made of, and how big each is.

The size is the apparent one: bytes of content, as ``du --apparent-size`` counts files; not blocks on a
disk, which differ from one file system to the next. A file under several names (hard links) is counted
once, links and directories weigh nothing.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from labkernel.image.closure import Closure
from labkernel.image.tarball import open_tarball


@dataclass(frozen=True)
class Weight:
    """One file of an image."""

    path: str  # as it is inside: absolute
    bytes: int


def weigh(image: Path | Closure) -> list[Weight]:
    """The files of a tarball, of the tree under a directory or of a closure, sorted by path.

    Raises OSError if it cannot be read, tarball.BadTarball (a ValueError) if it is no tar archive.
    """
    if isinstance(image, Closure):
        weights = [Weight(entry.path, entry.size) for entry in image if entry.kind == "file"]
    elif image.is_dir():
        weights = list(_of_directory(image))
    else:
        with open_tarball(image) as tarball:
            files = ((posixpath.normpath(f"/{m.name}"), m.size) for m in tarball if m.kind == "file")
            weights = [Weight(name, size) for name, size in files]
    return sorted(weights, key=lambda weight: weight.path)


def _of_directory(root: Path) -> Iterator[Weight]:
    seen: set[tuple[int, int]] = set()
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        status = path.stat()
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            yield Weight(f"/{path.relative_to(root)}", status.st_size)


def by_directory(weights: Iterable[Weight], depth: int = 2) -> dict[str, int]:
    """Bytes under each directory of the first *depth* levels, heaviest first; a file nearer the root is
    under its own.
    """
    totals: Counter[str] = Counter()
    for weight in weights:
        parts = weight.path.split("/")[1:-1]
        totals["/" + "/".join(parts[:depth])] += weight.bytes
    return dict(totals.most_common())
