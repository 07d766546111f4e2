"""The store: images that are built once and found again, under ``labkernel.state.home() / "images"``.

An image is two files: ``NAME.tar.zst``, and ``NAME.json`` with its digest and with what it was built
from. It is built anew when one of those files of the host has changed, as make(1) would: by time and
size.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from labkernel import state
from labkernel.image import Progress
from labkernel.image import python as pythons
from labkernel.image.closure import Closure, closure
from labkernel.image.pack import pack

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
    files: int


def build_rootfs(name: str = "python", *, progress: Progress | None = None) -> Image:
    """The lab's standard root file system: the Python that is running, a shell and a few tools; built if
    need be.

    Takes a few seconds the first time, a few milliseconds as long as nothing it was made from has changed.
    Needs no rights and no network. Raises closure.ClosureError if a library is missing on this machine.
    """
    return build(name, [str(pythons.running()), *filter(None, map(shutil.which, TOOLS))], progress=progress)


def build(name: str, programs: Sequence[str], *, progress: Progress | None = None) -> Image:
    """The image *name*, which is the closure of *programs* (paths): from the store, or built if need be."""
    directory = state.home() / "images"
    directory.mkdir(parents=True, exist_ok=True)
    tarball, record = directory / f"{name}.tar.zst", directory / f"{name}.json"
    wanted = list(programs)
    with _locked(directory):  # two notebooks may want it at the same moment
        image = _stored(name, tarball, record, wanted)
        if image is None:
            content = closure(wanted, progress=progress)
            digest = pack(content, tarball, progress=progress)
            files = sum(entry.kind == "file" for entry in content)
            image = Image(name, tarball, digest, content.size, tarball.stat().st_size, files)
            _record(image, record, wanted, content)
    return image


def _stored(name: str, tarball: Path, record: Path, programs: list[str]) -> Image | None:
    """The image in the store, if it is whole and what it was built from is as it was."""
    try:
        known = json.loads(record.read_text())
        fresh = (
            known["programs"] == programs
            and tarball.stat().st_size == known["zstd_bytes"]
            and all(_stamp(path) == stamp for path, stamp in known["inputs"].items())
        )
        if fresh:
            return Image(name, tarball, known["digest"], known["bytes"], known["zstd_bytes"], known["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # not built yet, cut short, or written by another version: built anew
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
        "inputs": {path: _stamp(path) for path in sorted(sources | ours)},
    }
    temporary = record.with_suffix(".json.new")
    temporary.write_text(json.dumps(facts, indent=1))
    temporary.replace(record)


def _stamp(path: str) -> list[int]:
    status = os.stat(path)  # a thousand of them: a Path each would double the time
    return [status.st_mtime_ns, status.st_size]


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory for this process alone; the kernel lets go when the process ends, however it
    ends.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
