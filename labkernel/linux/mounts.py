"""Mounts, in the steps from which a container's root is built.

Source: man 2 mount, man 7 mount_namespaces, man 2 pivot_root, man 5 proc, and
https://docs.kernel.org/filesystems/overlayfs.html. Each function changes the calling process's mount namespace, so
it is called in a child that has its own.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from labkernel.linux import capabilities, syscalls
from labkernel.linux.syscalls import (
    AT_FDCWD,
    MNT_DETACH,
    MOUNT_ATTR_RDONLY,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    MS_SHARED,
    MS_SLAVE,
    MS_STRICTATIME,
    MS_UNBINDABLE,
    PathLike,
)

PROPAGATION = {"private": MS_PRIVATE, "shared": MS_SHARED, "slave": MS_SLAVE, "unbindable": MS_UNBINDABLE}

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
"""The device nodes that programs expect; all of them harmless."""

MASKED_PATHS = (
    *("/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats"),
    *("/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats"),
    *("/sys/devices/virtual/powercap", "/sys/firmware"),
)
"""What Docker hides: files that tell about the machine, its memory, or its load (moby, oci/defaults.go, v28.1).

But for /sys/devices/system/cpu/cpuN/thermal_throttle: a mount for each CPU, at each start.
"""

READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
"""What Docker leaves readable but not writable: switches of the machine (moby, oci/defaults.go)."""


def set_propagation(path: PathLike, kind: str, *, recursive: bool = True) -> None:
    """Say whether mounts made below `path` are seen by copies of this tree: private, shared, slave, unbindable."""
    syscalls.mount(None, path, None, PROPAGATION[kind] | (MS_REC if recursive else 0))


def bind(source: PathLike, target: PathLike, *, recursive: bool = False, read_only: bool = False) -> None:
    """Show the tree at `source` at `target` too.

    Read-only takes a second call, since the first one ignores the flag; with `recursive` the mounts below become
    read-only as well where the kernel has mount_setattr (Linux 5.12).
    """
    syscalls.mount(os.fspath(source), target, None, MS_BIND | (MS_REC if recursive else 0))
    if not read_only:
        return
    try:
        syscalls.mount_setattr(AT_FDCWD, target, attr_set=MOUNT_ATTR_RDONLY, recursive=recursive)
    except OSError as error:
        if error.errno != errno.ENOSYS or recursive:
            raise
        syscalls.mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY)


def tmpfs(
    target: PathLike, *, mode: int = 0o755, size: int | None = None, flags: int = MS_NOSUID | MS_NODEV
) -> None:
    """Mount an empty file system that lives in memory; `size` in bytes."""
    data = f"mode={mode:o}" + (f",size={size}" if size is not None else "")
    syscalls.mount("tmpfs", target, "tmpfs", flags, data)


def proc(target: PathLike) -> None:
    """Mount /proc for the pid namespace that we are in."""
    syscalls.mount("proc", target, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)


def sysfs(target: PathLike) -> None:
    """Mount /sys, read-only, for the network namespace that we are in."""
    syscalls.mount("sysfs", target, "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY)


def overlay(target: PathLike, lowerdirs: Sequence[PathLike], upperdir: PathLike, workdir: PathLike) -> None:
    """Lay a writable `upperdir` over read-only `lowerdirs`, the topmost first.

    "userxattr" keeps overlay's own marks in attributes that need no privilege (Linux 5.11). "volatile": unmounting
    does not wait until the whole disk below `upperdir` is written, 20 ms and more; after a crash of the machine the
    layer would be worth nothing (Linux 5.10).
    """
    lower = ":".join(os.fspath(path) for path in lowerdirs)
    data = f"lowerdir={lower},upperdir={os.fspath(upperdir)},workdir={os.fspath(workdir)},userxattr,volatile"
    syscalls.mount("overlay", target, "overlay", 0, data)


def minimal_dev(target: PathLike, *, own_mqueue: bool = True) -> None:
    """A /dev with the harmless devices only, terminals of its own, shared memory and message queues.

    The nodes are bound from the host's /dev, since making them needs the host's CAP_MKNOD.
    """
    dev = os.fspath(target)
    syscalls.mount("tmpfs", dev, "tmpfs", MS_NOSUID | MS_STRICTATIME, "mode=755,size=65536k")
    for name in DEVICES:
        os.close(os.open(f"{dev}/{name}", os.O_CREAT | os.O_WRONLY, 0o666))
        syscalls.mount(f"/dev/{name}", f"{dev}/{name}", None, MS_BIND)
    for name, points_to in (
        *(("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1")),
        *(("stderr", "/proc/self/fd/2"), ("ptmx", "pts/ptmx"), ("core", "/proc/kcore")),
    ):
        os.symlink(points_to, f"{dev}/{name}")
    for name in ("pts", "shm", "mqueue"):
        os.mkdir(f"{dev}/{name}")
    # gid 5 is tty by old custom; without such an id in the map the option would be refused.
    syscalls.mount(
        "devpts", f"{dev}/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"
    )
    syscalls.mount("shm", f"{dev}/shm", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=1777,size=65536k")
    if own_mqueue:  # takes CAP_SYS_ADMIN over the ipc namespace, so it has to be one of our own
        syscalls.mount("mqueue", f"{dev}/mqueue", "mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC)


def mask(path: PathLike, null: PathLike = "/dev/null") -> None:
    """Hide a file behind /dev/null, or a directory behind an empty read-only file system, where it exists."""
    try:
        is_directory = stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, PermissionError):
        return
    if is_directory:
        syscalls.mount("tmpfs", path, "tmpfs", MS_RDONLY, "size=0k")
    else:
        syscalls.mount(os.fspath(null), path, None, MS_BIND)


def make_read_only(path: PathLike) -> None:
    """Bind a path onto itself, read-only, where it exists."""
    if os.path.exists(path):
        syscalls.mount(os.fspath(path), path, None, MS_BIND | MS_REC)
        flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
        syscalls.mount(None, path, None, flags)


def mount_id(path: PathLike) -> int:
    """The number, as in mountinfo, of the mount in which `path` lies (man 5 proc, /proc/PID/fdinfo)."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    finally:
        os.close(fd)
    return next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))


def pivot_root_obstacles(new_root: PathLike, put_old: PathLike) -> list[str]:
    """What stands in the way of `pivot_root(new_root, put_old)`, in words; nothing, where it will work.

    The conditions are those of man 2 pivot_root. One cannot be seen from here: a mount that was inherited from the
    namespace of another, more powerful user is locked in its place. One that we bind ourselves is not.
    Raises FileNotFoundError; needs a /proc.
    """
    seen = {mount.mount_id: mount for mount in mountinfo()}
    root, new, old = (seen.get(mount_id(path)) for path in ("/", new_root, put_old))
    parent = seen.get(new.parent_id) if new else None
    top, below = os.path.realpath(new_root), os.path.realpath(put_old)
    tags = [tag for mount in (old, parent) if mount for tag in mount.propagation]
    conditions = {
        "CAP_SYS_ADMIN is not held": capabilities.Capability.CAP_SYS_ADMIN in capabilities.read().effective,
        "new_root and put_old must be directories": os.path.isdir(top) and os.path.isdir(below),
        "the root of this process is not a mount point": root is not None and root.mount_point == "/",
        "the root is the kernel's first one, which stays": root is None or root.parent_id != root.mount_id,
        "new_root or put_old lies in the mount that is the root now": root is None or root not in (new, old),
        "new_root is not a mount point": new is not None and new.mount_point == top,
        "put_old does not lie below new_root": os.path.commonpath([top, below]) == top,
        "a mount is shared: the one of put_old, or the one above new_root": not any(
            tag.startswith("shared:") for tag in tags
        ),
    }
    return [words for words, holds in conditions.items() if not holds]


def pivot_root_into(new_root: PathLike) -> None:
    """Make `new_root` (a mount point) the root and unmount the old one, without a directory for it.

    `pivot_root(".", ".")` stacks the old root on top of the new; the lazy unmount takes it away (man 2 pivot_root).
    """
    os.chdir(new_root)
    syscalls.pivot_root(".", ".")
    syscalls.umount2(".", MNT_DETACH)
    os.chdir("/")


class Mount(NamedTuple):
    """One line of /proc/PID/mountinfo; man 5 proc explains each field."""

    mount_id: int
    parent_id: int
    device: str
    root: str
    mount_point: str
    options: tuple[str, ...]
    propagation: tuple[str, ...]
    fstype: str
    source: str
    super_options: tuple[str, ...]


def mountinfo(pid: int | str = "self") -> list[Mount]:
    """The mounts that process `pid` sees, in the order in which the kernel lists them."""
    found = []
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        mount_id, parent_id, device, root, point, options, *tags = left.split(" ")
        fstype, source, super_options = right.split(" ", 2)
        found.append(
            Mount(
                int(mount_id), int(parent_id), device, _unescape(root), _unescape(point), tuple(options.split(",")),
                tuple(tags), fstype, _unescape(source), tuple(super_options.split(",")),
            )
        )  # fmt: skip
    return found


def _unescape(text: str) -> str:
    """mountinfo writes blank, tab, newline and backslash in octal."""
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(octal, character)
    return text
