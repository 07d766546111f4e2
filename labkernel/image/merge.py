"""Layers laid over each other: one tarball of what is seen from above.

A layer adds, replaces and hides. Hiding is done by empty files with reserved names, *whiteouts*: ``.wh.NAME``
hides what the layers below have as NAME, and ``.wh..wh..opq`` in a directory all that they have in it. Nothing is
unpacked here. The headers are read from the top layer down, and of each layer what nobody above has taken the
place of is kept; then the layers are read once more, from the bottom up, and what is kept is copied into one
tarball, which needs no whiteouts. A whiteout is so only ever a name in a table: it deletes nothing, anywhere.

The names are checked as text: no absolute ones, none with ``..``. Whatever else a hostile archive may do
(links that lead out, entries that go through a link, devices) is refused when the tarball is unpacked, by the strict
unpacker; `labkernel import` does that before it keeps an image.

Source: https://github.com/opencontainers/image-spec/blob/main/layer.md
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

from labkernel.image import Progress
from labkernel.image.layer import OPAQUE, WHITEOUT
from labkernel.image.pack import Compression, Digester, compressor, new_archive, written_at_once
from labkernel.image.tarball import LIMITS, BadTarball, Limits, Member, Tarball
from labkernel.image.unpack import UnsafeArchive, brief, components, examined

Opener: TypeAlias = Callable[[int], AbstractContextManager[Tarball]]
"""Opens a layer; it may unpack to so many bytes."""

_TYPES = {
    "file": tarfile.REGTYPE, "directory": tarfile.DIRTYPE, "symlink": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE,
    "character device": tarfile.CHRTYPE, "block device": tarfile.BLKTYPE, "fifo": tarfile.FIFOTYPE,
}  # fmt: skip


@dataclass(frozen=True)
class Merged:
    """What came out."""

    digest: str  # of the tarball, compressed as it is
    files: int
    bytes: int  # of content
    hidden: int  # entries that a layer above has replaced or deleted


@dataclass
class _Above:
    """What the layers above the one that is looked at have done to it."""

    kinds: dict[str, str] = field(default_factory=dict)  # what is seen: its path, and its kind
    whiteouts: set[str] = field(default_factory=set)
    opaque: set[str] = field(default_factory=set)

    def hides(self, path: str, kind: str) -> bool:
        """Whether an entry of this layer is not to be seen."""
        if path in self.whiteouts or path in self.kinds:
            return True  # of two directories the upper one's mode and owner count, and both their contents
        return any(
            parent in self.whiteouts
            or parent in self.opaque
            or self.kinds.get(parent, "directory") != "directory"
            for parent in _parents(path)
        )


@dataclass
class _Plan:
    """What is taken of one layer: the numbers of its entries, and the paths under which links are kept."""

    keep: dict[int, str] = field(default_factory=dict)  # number: path
    links: dict[int, str] = field(default_factory=dict)  # number of a hard link: what it is a name of
    promoted: dict[int, int] = field(
        default_factory=dict
    )  # number of a file that is gone: of the link that lives on


def merge(
    layers: Sequence[Opener],
    destination: Path,
    *,
    compression: Compression = "zstd",
    limits: Limits = LIMITS,
    progress: Progress | None = None,
) -> Merged:
    """Lay layers over each other, the lowest first, and write what is seen as a tarball to *destination*.

    Owners, modes, times and links are kept as the layers have them. The same layers give the same bits. The file
    appears at once and whole, or not at all.

    Raises UnsafeArchive for damaged archives, for names that lead out, whiteouts that can't be meant, and for more than
    *limits* allow; what the layers' own reader raises, for wrong digests.
    """
    above = _Above()
    plans: list[_Plan] = []
    hidden = entries = read = 0
    for number, layer in reversed(list(enumerate(layers))):
        if progress:
            progress("read the layers", len(layers) - number - 1, 2 * len(layers))
        # What is hidden costs time as well: one layer may stand in an image a thousand times.
        members, size_read = _members(layer, limits, limits.bytes - read, limits.entries - entries)
        read += size_read
        entries += len(members)
        plans.insert(0, _plan(members, above))
        hidden += len(members) - len(plans[0].keep)
    files = size = 0
    with written_at_once(destination) as file:
        digester = Digester(file)
        with compressor(digester, compression) as compressed, new_archive(compressed) as out:
            for number, (layer, plan) in enumerate(zip(layers, plans, strict=True)):
                if progress:
                    progress("merge the layers", len(layers) + number, 2 * len(layers))
                try:
                    with layer(limits.bytes) as archive:
                        for index, member in enumerate(archive):
                            if info := _info(index, member, plan):
                                out.addfile(info, cast(BinaryIO, archive) if info.isreg() else None)
                                files += info.isreg()
                                size += info.size
                except BadTarball as error:
                    raise UnsafeArchive("", str(error)) from error
    return Merged(f"sha256:{digester.hash.hexdigest()}", files, size, hidden)


def _members(layer: Opener, limits: Limits, most: int, entries: int) -> tuple[list[Member], int]:
    """The entries of a layer, at most so many, and how many bytes it unpacks to, at most so many."""
    members = []
    try:
        with layer(most) as archive:
            for member in archive:
                members.append(member)
                if len(members) > entries:
                    raise UnsafeArchive(member.name, f"more than {limits.entries} entries")
                if len(examined(member)) > limits.depth:
                    raise UnsafeArchive(member.name, f"deeper than {limits.depth} directories")
        return members, archive.position
    except BadTarball as error:
        raise UnsafeArchive("", str(error)) from error


def _plan(members: Sequence[Member], above: _Above) -> _Plan:
    """What is seen of a layer; afterwards *above* knows what it hides from those below."""
    plan = _Plan()
    own: dict[str, int] = {}  # each path of this layer, and the number of its entry
    seen: dict[str, str] = {}
    whiteouts: set[str] = set()
    opaque: set[str] = set()
    for number, member in enumerate(members):
        *parents, name = components(member.name, member) or [""]
        if any(parent.startswith(WHITEOUT) for parent in parents):
            raise UnsafeArchive(member.name, "something in a directory with the name of a whiteout")
        path = "/".join([*parents, name])
        if name.startswith(WHITEOUT):
            _check_whiteout(name, member)
            if name == OPAQUE:
                opaque.add("/".join(parents))
            else:
                whiteouts.add("/".join([*parents, name.removeprefix(WHITEOUT)]))
            continue
        if path in own and (member.kind, members[own[path]].kind) != ("directory", "directory"):
            raise UnsafeArchive(member.name, "there is such an entry already, and it would be replaced")
        own[path] = number
        if not above.hides(path, member.kind):
            plan.keep[number] = path
            seen[path] = member.kind
        elif member.kind != "directory":
            opaque.add(
                path
            )  # nobody sees it, and yet it has replaced a directory below, with all that was in it
    _follow_links(members, own, plan, above)
    above.kinds |= seen
    above.whiteouts |= whiteouts
    above.opaque |= opaque
    return plan


def _follow_links(members: Sequence[Member], own: dict[str, int], plan: _Plan, above: _Above) -> None:
    """A hard link is a second name of a file: it lives on when the first one is hidden, with the content."""
    # Of each hard link the name under which the content stands, and the number of that entry in this layer.
    origins: dict[int, tuple[str, int | None]] = {}
    for number, member in enumerate(members):
        if member.kind != "hardlink":
            continue
        target = "/".join(components(member.linkname, member))
        first = own.get(target)
        if first is not None and first >= number:
            raise UnsafeArchive(member.name, f"a hard link to {brief(target)}, which comes after it")
        if first is not None:
            target, first = origins.get(first, (target, first))
        origins[number] = target, first
        if number not in plan.keep:
            continue
        if first is None and above.hides(target, "file"):
            raise UnsafeArchive(
                member.name,
                f"a hard link to {brief(target)} of a layer below, which another layer has replaced",
            )
        if first is None or first in plan.keep:
            plan.links[number] = target
        elif first in plan.promoted:
            plan.links[number] = plan.keep[plan.promoted[first]]
        else:
            plan.promoted[first] = number
    # The content comes where the file stood, before whatever may link to it.
    for first, number in plan.promoted.items():
        plan.keep[first] = plan.keep[number]
    for number in plan.promoted.values():
        plan.keep.pop(number)


def _info(number: int, member: Member, plan: _Plan) -> tarfile.TarInfo | None:
    """The entry as it is written; None where it is hidden, or a whiteout."""
    path = plan.keep.get(number)
    if path is None:
        return None
    return header(member, path, member.linkname if member.kind == "symlink" else plan.links.get(number, ""))


def header(member: Member, path: str, linkname: str) -> tarfile.TarInfo:
    """A member's header, to be written under this path and with this target of a link."""
    info = tarfile.TarInfo(path or ".")
    info.type = _TYPES[member.kind]
    info.mode, info.uid, info.gid, info.mtime = member.mode & 0o7777, member.uid, member.gid, member.mtime
    info.size = member.size if member.kind == "file" else 0
    info.devmajor, info.devminor = member.device if "device" in member.kind else (0, 0)
    info.linkname = linkname
    if member.mtime == int(member.mtime):
        info.mtime = int(member.mtime)
    return info


def _check_whiteout(name: str, member: Member) -> None:
    if member.kind != "file" or member.size:
        raise UnsafeArchive(member.name, "a whiteout that is no empty file")
    if name != OPAQUE and name.removeprefix(WHITEOUT) in ("", ".", ".."):
        raise UnsafeArchive(member.name, "a whiteout of nothing, or of a directory it is in")
    if name != OPAQUE and name.startswith(WHITEOUT * 2):
        raise UnsafeArchive(member.name, "a mark that no layer has (of aufs, perhaps)")


def _parents(path: str) -> list[str]:
    """Every directory above a path, the root ("") included."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts))] if path else []
