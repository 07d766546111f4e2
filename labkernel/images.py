"""Root file systems, ready to be mounted: an image of the store, unpacked once for the ids that containers get."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from labkernel import children, state
from labkernel.image import Progress


class NoSuchImage(LookupError):
    """There is no image of that name."""

    def __str__(self) -> str:
        return str(self.args[0])


STANDARD = "python"


def rootfs(image: str = STANDARD, *, progress: Progress | None = None) -> Path:
    """The unpacked root file system of `image`, or `image` itself where it is a directory.

    The standard image is built when it is missing or out of date. Raises NoSuchImage.
    """
    if "/" in image:
        if not os.path.isdir(image):
            raise NoSuchImage(f"{image} is not a directory")
        return Path(image)
    if (known := _known.get((image, state.home()))) and known.is_dir():
        return (
            known  # whether it is up to date is looked at once a process: that takes longer than a container
        )
    if image != STANDARD:
        raise NoSuchImage(f"no image {image!r}; there is: {STANDARD}")
    from labkernel.image.store import build_rootfs

    built = build_rootfs(image, progress=progress)
    base = children.launcher().facts["container_map"]
    owner, count = base["outside"], base["count"]
    # The owner is part of the name: root's containers and an ordinary user's see different ids on disk.
    place = state.home() / "rootfs" / f"{image}-{built.digest.removeprefix('sha256:')[:16]}-{owner}-{count}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with state.locked(place.parent):  # two processes may want it at the same moment
        if not place.is_dir():
            _remove_earlier(place.parent.glob(f"{image}-*-{owner}-{count}"))
            children.in_child(_unpack, built.tarball, place, owner, count)
    _known[image, state.home()] = place
    return place


def _remove_earlier(places: Iterable[Path]) -> None:
    """Remove what an earlier build of the image was unpacked to, unless a container may be standing on it."""
    if any(record["state"] in ("created", "running", "paused") for record in state.records()):
        return
    for place in places:
        children.in_child(shutil.rmtree, place, ignore_errors=True)


_known: dict[tuple[str, Path], Path] = {}


def _unpack(tarball: Path, place: Path, owner_base: int, owner_count: int) -> None:
    from labkernel.image.unpack import unpack

    unpack(tarball, place, same_owner=owner_count > 1, owner_base=owner_base)
