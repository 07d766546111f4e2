"""The store: images that are built once and found again, under ``labkernel.state.home() / "images"``.

An image is two files: ``NAME.tar.zst``, and ``NAME.json`` with its digest and with what it was built
from. It is built anew when one of those files of the host has changed, as make(1) would: by time and
size.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from labkernel import state
from labkernel.image import Progress
from labkernel.image import python as pythons
from labkernel.image.closure import Closure, closure
from labkernel.image.pack import gzip_size, pack

# What a student wants at hand inside. Those that the host has are taken.
TOOLS = (
    *(
        "sh",
        "cat",
        "chmod",
        "cp",
        "df",
        "echo",
        "env",
        "false",
        "grep",
        "head",
        "hostname",
        "id",
        "kill",
        "ln",
    ),
    *("ls", "mkdir", "mount", "mv", "ps", "rm", "sleep", "tail", "touch", "true", "umount", "uname"),
    *("uptime", "wc"),
)


@dataclass(frozen=True)
class Image:
    """A root file system in the store."""

    name: str
    tarball: Path
    digest: str  # of the tarball: "sha256:…"
    bytes: int  # apparent size of what is in it
    zstd_bytes: int  # size of the tarball
    files: int  # regular ones; one of several names counts once
    gzip_bytes: int | None = None  # what it would be with gzip; None where nobody has asked yet


def stored() -> list[Image]:
    """The images that are there, by their names; their gzip_bytes are found out where they are not known yet."""
    found = []
    for record in sorted((state.home() / "images").glob("*.json")):
        image = whole(record.stem)
        if image and image.gzip_bytes is None:
            image = replace(image, gzip_bytes=gzip_size(image.tarball))
            note(image.name, gzip_bytes=image.gzip_bytes)
        found += [image] if image else []
    return found


def whole(name: str) -> Image | None:
    """The image of that name, if it is there and its tarball has not been cut short."""
    tarball, _ = _places(name)
    known = read_record(name)
    with contextlib.suppress(OSError, KeyError, TypeError):
        if known and tarball.stat().st_size == known["zstd_bytes"]:
            sizes = (known["bytes"], known["zstd_bytes"], known["files"], known.get("gzip_bytes"))
            return Image(name, tarball, known["digest"], *sizes)
    return None


def read_record(name: str) -> dict[str, Any] | None:
    """What is written down of an image; None where there is none, or nothing that can be read."""
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(_places(name)[1].read_text())
        return known if isinstance(known, dict) else None
    return None


def keep(image: Image, made: Path, facts: Mapping[str, Any]) -> None:
    """Put an image into the store: the tarball *made* (it is moved), and what there is to remember of it."""
    directory = image.tarball.parent
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {"bytes": image.bytes, "zstd_bytes": image.zstd_bytes, "gzip_bytes": image.gzip_bytes}
    with state.locked(directory):
        made.replace(image.tarball)
        _write(
            _places(image.name)[1],
            {"name": image.name, "digest": image.digest, **sizes, "files": image.files, **facts},
        )


def note(name: str, **facts: Any) -> None:
    """Write down something more of an image that is there."""
    with state.locked(state.home() / "images"):
        if known := read_record(name):
            _write(_places(name)[1], known | facts)


def forget(name: str) -> None:
    """Remove an image, if it is there."""
    with state.locked(state.home() / "images"):
        for place in reversed(_places(name)):
            place.unlink(missing_ok=True)


def _places(name: str) -> tuple[Path, Path]:
    directory = state.home() / "images"
    return directory / f"{name}.tar.zst", directory / f"{name}.json"


def _write(record: Path, facts: Mapping[str, Any]) -> None:
    temporary = record.with_suffix(".json.new")
    temporary.write_text(json.dumps(facts, indent=1))
    temporary.replace(record)


def build_rootfs(name: str = "python", *, again: bool = False, progress: Progress | None = None) -> Image:
    """The lab's standard root file system: the Python that is running, a shell and a few tools; built if
    need be (or in any case: *again*).

    Takes a few seconds the first time, a few milliseconds as long as nothing it was made from has changed.
    Needs no rights and no network. Raises closure.ClosureError if a library is missing on this machine.
    """
    programs = [str(pythons.running()), *filter(None, map(shutil.which, TOOLS))]
    return build(name, programs, again=again, progress=progress)


def build(
    name: str, programs: Sequence[str], *, again: bool = False, progress: Progress | None = None
) -> Image:  # fmt: skip
    """The image *name*, which is the closure of *programs* (paths): from the store, or built if need be."""
    tarball, record = _places(name)
    tarball.parent.mkdir(parents=True, exist_ok=True)
    wanted = list(programs)
    with state.locked(tarball.parent):  # two notebooks may want it at the same moment
        image = None if again else _unchanged(name, wanted)
        if image is None:
            content = closure(wanted, progress=progress)
            digest = pack(content, tarball, progress=progress)
            files = sum(entry.kind == "file" for entry in content)
            image = Image(name, tarball, digest, content.size, tarball.stat().st_size, files)
            _record(image, record, wanted, content)
    return image


def _unchanged(name: str, programs: list[str]) -> Image | None:
    """The image in the store, if it is whole and what it was built from is as it was."""
    known = read_record(name) or {}
    try:
        if known["programs"] == programs and all(
            stamp(path) == then for path, then in known["inputs"].items()
        ):
            return whole(name)
    except (OSError, KeyError, AttributeError):
        pass  # not built yet, or written by another version: built anew
    return None


def _record(image: Image, record: Path, programs: list[str], content: Closure) -> None:
    sources = {str(entry.source) for entry in content if entry.source}
    ours = {str(path) for path in Path(__file__).parent.glob("*.py")}  # the rules have changed
    facts = {
        "name": image.name,
        "digest": image.digest,
        "bytes": image.bytes,
        "zstd_bytes": image.zstd_bytes,
        "files": image.files,
        "programs": programs,
        "inputs": {path: stamp(path) for path in sorted(sources | ours)},
    }
    _write(record, facts)


def stamp(path: str) -> list[int]:
    """What tells whether a file has changed: its time of change, in nanoseconds, and its size in bytes."""
    status = os.stat(path)  # a thousand of them: a Path each would double the time
    return [status.st_mtime_ns, status.st_size]
