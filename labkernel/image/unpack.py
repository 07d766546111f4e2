"""Unpacking a tarball that a stranger may have made.

An archive is a list of orders to a process that often runs with high rights: "write this there". A
hostile one says ``../../etc/passwd``, or first plants a link ``x -> /etc`` and then writes ``x/passwd``,
or unpacks to more than the disk holds. Looking at the names is not enough, because a name's meaning
depends on the links that are there already. So every directory is entered one component at a time, by a
descriptor of the one above it and with O_NOFOLLOW (open(2)), and everything is made relative to such a
descriptor and newly (O_EXCL): no link is ever followed, whoever made it.

A symbolic link's *target* is only text, and ``/usr/bin/x`` is right in a root file system: it will be
looked up when that is the root. Such links are made, never followed.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from labkernel.image import Progress
from labkernel.image.tarball import LIMITS, BadTarball, Limits, Member, Tarball, open_tarball

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_LINKS = 40  # that the kernel follows in one path, path_resolution(7)
_IMPLIED = Member("a directory", "directory", 0o755, 0, 0, 0, 0.0, "", (0, 0))
_FAR_FUTURE = 1 << 33  # the year 2242: later times are no times of files


class UnsafeArchive(ValueError):
    """The archive was refused: ``entry`` names the entry at fault (empty: all of it), ``reason`` says why."""

    def __init__(self, entry: str, reason: str) -> None:
        super().__init__(f"{entry[:200]!r}: {reason}" if entry else reason)
        self.entry = entry
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnsafeArchive], tuple[str, str]]:
        """Say how it is made again on the other end of a pipe: images are unpacked in children."""
        return UnsafeArchive, (self.entry, self.reason)


def brief(text: str) -> str:
    """A name of a stranger, to be shown: cut short, and as Python writes it where a terminal would obey it."""
    text = text if len(text) <= 200 else f"{text[:199]}…"
    return text if text.isprintable() else repr(text)


_CONTROL = re.compile("[\0-\x1f\x7f-\x9f]")


def components(path: str, member: Member) -> list[str]:
    """The components of *path*, a name or the target of a hard link in an entry of an archive; [] for the root.

    Raises UnsafeArchive for all but honest relative paths.
    """
    if _CONTROL.search(path):
        raise UnsafeArchive(member.name, "control characters in a path")
    if path.startswith("/"):
        raise UnsafeArchive(member.name, f"the path {brief(path)} is absolute")
    if not path:
        raise UnsafeArchive(member.name, "an empty path")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise UnsafeArchive(member.name, f"the path {brief(path)} has a component ..")
    # A character has at most four bytes: most paths need no closer look.
    if (len(path) >= 1024 or max(map(len, parts), default=0) > 63) and (
        len(os.fsencode(path)) >= 4096 or any(len(os.fsencode(part)) > 255 for part in parts)
    ):
        raise UnsafeArchive(member.name, "the path is longer than the kernel allows (PATH_MAX, NAME_MAX)")
    return parts


def examined(member: Member) -> list[str]:
    """The components of an entry's name, if all that its header says can be meant. Raises UnsafeArchive."""
    if not 0 <= member.mtime < _FAR_FUTURE:  # also false for nan
        raise UnsafeArchive(member.name, f"its time, {member.mtime} seconds since 1970, is no time of a file")
    if member.device[0] >= 1 << 12 or member.device[1] >= 1 << 20:
        raise UnsafeArchive(member.name, f"the device numbers {member.device} are none that Linux has")
    return components(member.name, member)


@dataclass
class Unpacked:
    """What was unpacked."""

    entries: int = 0
    bytes: int = 0  # content of files
    reowned: int = 0  # entries whose owner this user namespace does not map: the caller's now


def unpack(
    tarball: Path,
    destination: Path,
    *,
    same_owner: bool = False,
    owner_base: int = 0,
    owner_count: int | None = None,
    allow_devices: bool = False,
    allow_setuid: bool = False,
    limits: Limits = LIMITS,
    progress: Progress | None = None,
) -> Unpacked:
    """Unpack *tarball* (zstd, gzip or plain) as the new directory *destination*, completely or not at all.

    *same_owner*: entries get the uid and gid written in the archive, which takes root, or root of a user
    namespace; an id that the namespace does not map (chown(2) gives EINVAL) falls to the caller, and is
    counted in ``reowned``. *owner_base* is added to both: so root outside gives files to the range of ids
    that a user namespace maps to 0 and up; *owner_count* is how many these are, and what has a higher id falls to
    nobody (65534), is counted too, and loses its set-user-ID bits. Without *same_owner* everything belongs to the
    caller.
    *allow_devices*: device nodes and fifos are made. *allow_setuid*: the set-user-ID and set-group-ID
    bits are kept.

    Raises UnsafeArchive for whatever an honest image does not hold: names that are absolute or have
    ``..``, hard links and relative symbolic links that lead out, entries that pass through a link, an
    entry that stands there twice (a directory may), devices and set-user-ID bits unless allowed, sparse
    files, sizes over *limits*, damaged or truncated archives. Raises FileExistsError if *destination*
    exists and is not an empty directory; OSError as the system has it.
    """
    if destination.is_symlink() or (destination.exists() and any(destination.iterdir())):
        raise FileExistsError(errno.EEXIST, f"{destination} is there already, and not an empty directory")
    temporary = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".labkernel-{destination.name}-"))
    try:
        root = os.open(temporary, _DIRECTORY)
        try:
            unpacker = _Unpacker(
                root, same_owner, owner_base, owner_count, allow_devices, allow_setuid, limits
            )
            unpacker.all(tarball, progress)
        finally:
            os.close(root)
        temporary.rename(destination)
    except BaseException:
        _remove(temporary)
        raise
    return unpacker.result


def _remove(tree: Path) -> None:
    """Remove *tree*, also directories with modes that forbid it, and paths that are too long for one call."""
    tree.chmod(0o700)
    for _, names, _, descriptor in os.fwalk(tree):
        for name in names:
            if stat.S_ISDIR(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode):
                os.chmod(name, 0o700, dir_fd=descriptor)
    shutil.rmtree(tree)


@dataclass
class _Unpacker:
    root: int  # descriptor of the directory that is filled
    same_owner: bool
    owner_base: int
    owner_count: int | None
    allow_devices: bool
    allow_setuid: bool
    limits: Limits
    result: Unpacked = field(default_factory=Unpacked)
    # The directory in which we are: the names from the root down, and the descriptors, that of the root first.
    # Neighbours in an archive mostly share it.
    _names: list[str] = field(default_factory=list)
    _descriptors: list[int] = field(default_factory=list)
    _directories: dict[str, Member] = field(default_factory=dict)
    _links: dict[str, Member] = field(default_factory=dict)  # symbolic ones

    def all(self, tarball: Path, progress: Progress | None) -> None:
        self._descriptors.append(self.root)
        try:
            with open_tarball(tarball, self.limits) as archive:
                compressed = os.fstat(archive.source.fileno()).st_size
                for member in archive:
                    self._member(member, archive)
                    if progress:
                        progress("unpack", archive.source.tell(), compressed)
            self._follow_links()
            self._finish_directories()
        except BadTarball as error:
            raise UnsafeArchive("", str(error)) from error
        finally:
            self._leave(0)

    def _count(self, member: Member) -> None:
        self.result.entries += 1
        if self.result.entries > self.limits.entries:
            raise UnsafeArchive(member.name, f"more than {self.limits.entries} entries")

    def _member(self, member: Member, archive: Tarball) -> None:
        self._count(member)
        *parents, name = examined(member) or ["."]
        self._refuse(member)
        try:
            parent = self._enter(parents, member)
            match member.kind:
                case "file":
                    self._file(name, parent, member, archive)
                case "directory":
                    self._directory(name, parent, member)
                case "symlink":
                    self._symlink(name, parent, member)
                case "hardlink":
                    self._hardlink(name, parent, member)
                case _:
                    self._device(name, parent, member)
        except FileExistsError:
            raise UnsafeArchive(
                member.name, "there is such an entry already, and it would be replaced"
            ) from None

    def _refuse(self, member: Member) -> None:
        """What can be said of an entry without looking where it goes."""
        if member.kind in ("character device", "block device", "fifo") and not self.allow_devices:
            raise UnsafeArchive(member.name, f"a {member.kind}, which was not asked for")
        if member.mode & (stat.S_ISUID | stat.S_ISGID) and not self.allow_setuid:
            raise UnsafeArchive(
                member.name, f"mode {member.mode:o}: a set-user-ID or set-group-ID bit was not asked for"
            )
        if member.kind != "file" and member.size:
            raise UnsafeArchive(member.name, f"a {member.kind} with {member.size} bytes of content")
        if (
            self.owner_base + max(member.uid, member.gid) >= 0xFFFFFFFF
        ):  # (uid_t) -1 means "leave as it is" to chown(2)
            raise UnsafeArchive(member.name, f"its owner {member.uid}:{member.gid} is no user")

    def _enter(self, parents: list[str], member: Member) -> int:
        """A descriptor of the directory *parents*; directories that no entry has described yet are made."""
        if parents == self._names:
            return self._descriptors[-1]
        if len(parents) >= self.limits.depth:
            raise UnsafeArchive(member.name, f"deeper than {self.limits.depth} directories")
        common = 0
        while common < min(len(parents), len(self._names)) and self._names[common] == parents[common]:
            common += 1
        self._leave(common)
        for part in parents[common:]:
            above = self._descriptors[-1]
            try:
                descriptor = self._open_directory(part, above, member)
            except FileNotFoundError:
                self._count(member)
                os.mkdir(part, 0o700, dir_fd=above)
                descriptor = self._open_directory(part, above, member)
                self._dress_implied(descriptor)
            self._names.append(part)
            self._descriptors.append(descriptor)
        return self._descriptors[-1]

    @staticmethod
    def _open_directory(name: str, above: int, member: Member) -> int:
        try:
            return os.open(name, _DIRECTORY, dir_fd=above)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise UnsafeArchive(
                    member.name, f"it leads through {name!r}, which is no directory (a symbolic link?)"
                ) from error
            raise

    def _leave(self, depth: int) -> None:
        while len(self._names) > depth:
            self._names.pop()
            os.close(self._descriptors.pop())

    def _directory(self, name: str, parent: int, member: Member) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:  # it may be described twice, and "." is there from the start
            self._check_is_directory(name, parent, member)
        # Mode and time come last: a directory without write permission still has to be filled.
        self._directories[self._path(name)] = member

    def _path(self, name: str) -> str:
        """The path of *name* in the directory in which we are."""
        return "/".join([*self._names, name])

    @staticmethod
    def _check_is_directory(name: str, parent: int, member: Member) -> None:
        if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            raise UnsafeArchive(member.name, "there is such an entry already, and it is no directory")

    def _finish_directories(self) -> None:
        # From the leaves to the root, which may end up without permission to enter it. Until then it is closed to
        # others, so nobody can change what is in it meanwhile.
        root = self._directories.pop(".", None)
        for path in sorted(self._directories, key=lambda path: path.split("/"), reverse=True):
            member = self._directories[path]
            *parents, name = path.split("/")
            descriptor = self._open_directory(name, self._enter(parents, member), member)
            try:
                self._dress(descriptor, member)
            finally:
                os.close(descriptor)
        if root:
            self._dress(self.root, root)
        else:
            self._dress_implied(self.root)

    def _file(self, name: str, parent: int, member: Member, archive: Tarball) -> None:
        descriptor = os.open(name, _NEW_FILE, 0o600, dir_fd=parent)
        try:
            for data in archive.pieces():
                while data:  # a full disk, or a signal, may end it early
                    data = data[os.write(descriptor, data) :]
            self.result.bytes += member.size
            self._dress(descriptor, member)
        finally:
            os.close(descriptor)

    def _symlink(self, name: str, parent: int, member: Member) -> None:
        target = member.linkname
        if not target or len(target) >= 4096 or len(os.fsencode(target)) >= 4096 or _CONTROL.search(target):
            raise UnsafeArchive(member.name, "a symbolic link without a target, or with an impossible one")
        os.symlink(target, name, dir_fd=parent)
        self._own(member, lambda uid, gid: os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False))
        os.utime(name, ns=_times(member), dir_fd=parent, follow_symlinks=False)
        self._links[self._path(name)] = member

    def _follow_links(self) -> None:
        """Refuse relative symbolic links that lead above the root, by themselves or by way of others.

        Only now all links are there. An absolute one starts at the root again, as it will for a program inside.
        """
        budget = 1 << 22  # steps: links through links through links are a bomb, too
        for path, link in self._links.items():
            if link.linkname.startswith("/"):
                continue
            place, todo, links = path.split("/")[:-1], link.linkname.split("/")[::-1], 0
            # What is deeper than any entry, or behind more links than the kernel follows, is not there.
            while todo and links <= _MAX_LINKS and len(place) <= self.limits.depth:
                part = todo.pop()
                budget -= 1
                if part == ".." and not place:
                    raise UnsafeArchive(link.name, f"a symbolic link that leads out: {brief(link.linkname)}")
                if part == "..":
                    place.pop()
                elif part not in ("", "."):
                    place.append(part)
                    if further := self._links.get("/".join(place)):
                        links += 1
                        place = [] if further.linkname.startswith("/") else place[:-1]
                        todo += further.linkname.split("/")[::-1]
                        budget -= len(todo)
                if budget < 0:
                    raise UnsafeArchive(link.name, "symbolic links that lead through each other without end")

    def _hardlink(self, name: str, parent: int, member: Member) -> None:
        *parents, target = components(member.linkname, member) or ["."]
        keep = os.dup(parent)
        try:
            source = self._enter(parents, member)
            try:
                is_file = stat.S_ISREG(os.stat(target, dir_fd=source, follow_symlinks=False).st_mode)
            except FileNotFoundError:
                is_file = False
            if not is_file:
                raise UnsafeArchive(
                    member.name,
                    f"a hard link to {brief(member.linkname)}, which is no file that came before it",
                )
            os.link(target, name, src_dir_fd=source, dst_dir_fd=keep, follow_symlinks=False)
        finally:
            os.close(keep)

    def _device(self, name: str, parent: int, member: Member) -> None:
        kinds = {"character device": stat.S_IFCHR, "block device": stat.S_IFBLK, "fifo": stat.S_IFIFO}
        try:
            os.mknod(name, kinds[member.kind] | 0o600, os.makedev(*member.device), dir_fd=parent)
        except PermissionError as error:
            raise PermissionError(
                errno.EPERM,
                f"mknod({member.name}, {member.kind}): not permitted; "
                "only root outside of user namespaces makes devices",
            ) from error
        self._own(member, lambda uid, gid: os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False))
        os.chmod(name, self._mode(member), dir_fd=parent)  # it is new and ours: no link

    def _dress(self, descriptor: int, member: Member) -> None:
        """Owner, mode and time, in this order: chown(2) clears set-user-ID bits."""
        self._own(member, lambda uid, gid: os.fchown(descriptor, uid, gid))
        os.fchmod(descriptor, self._mode(member))
        os.utime(descriptor, ns=_times(member))

    def _dress_implied(self, descriptor: int) -> None:
        """A directory that the archive takes for granted: root's, and open to all, whatever the umask is."""
        self._own(_IMPLIED, lambda uid, gid: os.fchown(descriptor, uid, gid))
        os.fchmod(descriptor, 0o755)

    def _beyond(self, member: Member) -> bool:
        """Whether its owner is none of those that the ids are for: it would be somebody else on this machine."""
        return self.same_owner and max(member.uid, member.gid) >= (self.owner_count or 1 << 32)

    def _mode(self, member: Member) -> int:
        return member.mode & ~(stat.S_ISUID | stat.S_ISGID) if self._beyond(member) else member.mode

    def _own(self, member: Member, chown: Callable[[int, int], None]) -> None:
        if not self.same_owner:
            return
        uid, gid = member.uid, member.gid
        if self._beyond(member):
            uid = gid = min(65534, cast(int, self.owner_count) - 1)
            self.result.reowned += 1
        try:
            chown(self.owner_base + uid, self.owner_base + gid)
        except OSError as error:
            if error.errno == errno.EINVAL:  # not mapped in this user namespace, user_namespaces(7)
                self.result.reowned += 1
            elif error.errno == errno.EPERM:
                raise PermissionError(
                    errno.EPERM,
                    f"chown({member.name}, {member.uid}, {member.gid}): not permitted; only root, or root "
                    "of a user namespace, gives files away: unpack with same_owner=False",
                ) from error
            else:
                raise


def _times(member: Member) -> tuple[int, int]:
    """Times of access and of change, in nanoseconds, as utimensat(2) wants them."""
    nanoseconds = int(member.mtime * 10**9)
    return nanoseconds, nanoseconds
