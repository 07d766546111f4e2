"""Root file systems, ready to be mounted: an image of the store, unpacked once for the ids that containers get."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from labkernel import children, state
from labkernel.image import Progress, store
from labkernel.image.tarball import LIMITS, Limits


class NoSuchImage(LookupError):
    """There is no image of that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class ProofFailed(RuntimeError):
    """A program that an image has to run does not run in it."""


STANDARD = "python"

ANY_SIZE = Limits(bytes=1 << 62, entries=1 << 62, ratio=1 << 40)
"""For what is in the store: it was packed here, or looked at when it was imported."""

MOUNT_POINTS = ("proc", "sys", "dev")
"""Where `walls.build` mounts something, in every container."""


def rootfs(image: str = STANDARD, *, progress: Progress | None = None) -> Path:
    """The unpacked root file system of `image`, or `image` itself where it is a directory.

    The standard image is built when it is missing or out of date; others are taken as they are in the store.
    Raises NoSuchImage.
    """
    if "/" in image:
        if not os.path.isdir(image):
            raise NoSuchImage(f"{image} is not a directory")
        return Path(image)
    # Whether it is up to date is looked at once a process: that takes longer than a container.
    if (known := _known.get((image, state.home()))) and os.path.isdir(known):
        return known
    built = stored(image, progress=progress)
    place = unpacked(image, built.tarball, built.digest, progress=progress)
    if image == STANDARD:
        _known[image, state.home()] = place
    return place


def stored(image: str = STANDARD, *, progress: Progress | None = None) -> store.Image:
    """An image of the store; the standard one is built when it is missing or out of date. Raises NoSuchImage."""
    return store.build_rootfs(image, progress=progress) if image == STANDARD else _stored(image)


def unpacked(
    image: str, tarball: Path, digest: str, *, limits: Limits = ANY_SIZE, progress: Progress | None = None
) -> Path:  # fmt: skip
    """Where `tarball`, which has this digest, is unpacked for the ids that containers get; unpacked now if need be.

    Raises what `image.unpack` raises for an archive that it refuses: nothing is left of it then.
    """
    base = children.launcher().facts["container_map"]
    owner, count = base["outside"], base["count"]
    # The owner is part of the name: root's containers and an ordinary user's see different ids on disk.
    place = state.home() / "rootfs" / f"{image}-{digest.removeprefix('sha256:')[:16]}-{owner}-{count}"
    place.parent.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        # An ordinary user is root inside, so a set-user-ID program of the image would be one of the user's own, for
        # everybody on this machine who can reach it. (Root's containers have ids that nobody has.)
        place.parent.chmod(0o700)
    with state.locked(place.parent):  # two processes may want it at the same moment
        if not place.is_dir():
            _remove_earlier(place.parent.glob(f"{image}-{'[0-9a-f]' * 16}-{owner}-{count}"))
            if progress:
                progress(f"unpack {image}", 0, 1)
            unpack_for_containers(tarball, place, limits)
    return place


def unpack_for_containers(tarball: Path, place: Path, limits: Limits = LIMITS) -> None:
    """Unpack a tarball as the new directory `place`, for the ids that containers get.

    Raises what `image.unpack` raises for an archive that it refuses: nothing is left of it then.
    """
    base = children.launcher().facts["container_map"]
    children.in_child(_unpack, tarball, place, base["outside"], base["count"], limits)


def prove(name: str, *, progress: Progress | None = None) -> None:
    """Run a recipe's proof in a container of its image, unless it has been proved already. Raises ProofFailed."""
    from labkernel.container import Container
    from labkernel.image import recipes

    recipe = recipes.find(name)
    command = recipes.proof_command(recipe)
    of = f"{_stored(recipe.name).digest} {hashlib.sha256(repr(command).encode()).hexdigest()[:16]}"
    if (store.read_record(recipe.name) or {}).get("proved") == of:
        return
    rootfs(recipe.name, progress=progress)
    if progress:
        progress(f"prove {recipe.name}", 0, 1)
    try:
        done = Container(recipe.name, command).run(timeout=PROVED_WITHIN)
    except TimeoutError:
        raise ProofFailed(
            f"image {recipe.name}: its proof was still running after {PROVED_WITHIN:.0f} s"
        ) from None
    except OSError as error:
        raise ProofFailed(
            f"image {recipe.name} is built, but not proved: {error.strerror or error}"
        ) from error
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip() or "it said nothing"
        raise ProofFailed(f"image {recipe.name}: its proof ended with exit status {done.returncode}: {said}")
    store.note(recipe.name, proved=of)


PROVED_WITHIN = 120.0
"""Seconds that a proof may take; most take less than one."""


def remove(name: str) -> None:
    """Remove an image from the store, and what it was unpacked to, unless a container may be standing on it."""
    store.forget(name)
    _remove_earlier((state.home() / "rootfs").glob(f"{name}-{'[0-9a-f]' * 16}-*"))


def _stored(name: str) -> store.Image:
    """An image of the store. Raises NoSuchImage with what there is, and with what can be made."""
    image = store.whole(name)
    if image is None:
        from labkernel.image import recipes

        there = ", ".join(dict.fromkeys([STANDARD, *(one.name for one in store.stored())]))
        make = (
            f"; labkernel build {name} makes it" if (recipes.FOLDER / name / "recipe.toml").is_file() else ""
        )
        raise NoSuchImage(f"no image {name!r}; there is: {there}{make}")
    return image


def _remove_earlier(places: Iterable[Path]) -> None:
    """Remove what an earlier build of the image was unpacked to, unless a container may be standing on it."""
    if any(record["state"] in ("created", "running", "paused") for record in state.records()):
        return
    for place in places:
        children.in_child(shutil.rmtree, place, ignore_errors=True)


_known: dict[tuple[str, Path], Path] = {}


def _unpack(tarball: Path, place: Path, owner_base: int, owner_count: int, limits: Limits) -> None:
    from labkernel.cleanup import remove_tree
    from labkernel.image.unpack import UnsafeArchive, unpack

    # What is in the store was packed here, or imported and examined: its set-user-ID programs are meant.
    unpack(
        tarball, place, same_owner=owner_count > 1, owner_base=owner_base, owner_count=owner_count, allow_setuid=True,
        limits=limits,
    )  # fmt: skip
    try:
        for name in MOUNT_POINTS:
            if not os.path.lexists(place / name):  # an image of a single program has none of them
                (place / name).mkdir()
                os.chown(place / name, owner_base, owner_base)
            elif (place / name).is_symlink() or not (place / name).is_dir():
                raise UnsafeArchive(name, "it is no directory, and a container has one mounted there")
    except BaseException:
        remove_tree(str(place))
        raise
