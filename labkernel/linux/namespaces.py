"""The eight namespaces: which a process is in, who shares which, and how to enter them.

A namespace is a file in /proc/PID/ns; two processes share one exactly when the inode numbers are the same.
Source: man 7 namespaces, man 2 setns, man 2 pidfd_open.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from labkernel.linux import syscalls
from labkernel.linux.syscalls import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWTIME,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
)

FLAGS: Mapping[str, int] = {
    "user": CLONE_NEWUSER,
    "mnt": CLONE_NEWNS,
    "uts": CLONE_NEWUTS,
    "ipc": CLONE_NEWIPC,
    "pid": CLONE_NEWPID,
    "net": CLONE_NEWNET,
    "cgroup": CLONE_NEWCGROUP,
    "time": CLONE_NEWTIME,
}
"""The kernel's name of each kind (as in /proc/PID/ns) and the flag that makes a new one."""


def flags(kinds: Iterable[str]) -> int:
    """The flags for `unshare` or `clone3` of several kinds. Raises KeyError for an unknown one."""
    return sum(FLAGS[kind] for kind in kinds)


def inodes(pid: int | str = "self", *, children: bool = False) -> dict[str, int]:
    """The inode number of each namespace of process `pid`; a kind that the kernel lacks is left out.

    With `children` those in which its next child will be (pid_for_children, time_for_children), which differ from
    its own after an `unshare`. Raises PermissionError for a process of somebody else.
    """
    found = {}
    for kind in FLAGS:
        name = f"{kind}_for_children" if children and kind in ("pid", "time") else kind
        try:
            found[kind] = os.stat(f"/proc/{pid}/ns/{name}").st_ino
        except FileNotFoundError:
            if not os.path.isdir(f"/proc/{pid}"):
                raise ProcessLookupError(errno.ESRCH, f"no process {pid}") from None
    return found


def shared(one: int | str, other: int | str) -> dict[str, bool]:
    """For each kind, whether two processes are in the same namespace."""
    left, right = inodes(one), inodes(other)
    return {kind: left[kind] == right[kind] for kind in left if kind in right}


def lsns() -> dict[tuple[str, int], list[int]]:
    """The namespaces that processes are in, by kind and inode number, with their pids: what lsns(8) lists.

    Processes at which we may not look are left out, as they are there; and so is a namespace that no process is in.
    """
    found: dict[tuple[str, int], list[int]] = {}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            for kind, inode in inodes(pid).items():
                found.setdefault((kind, inode), []).append(pid)
        except (PermissionError, ProcessLookupError):  # somebody else's; or it has ended since
            continue
    return found


def supported() -> list[str]:
    """The kinds that this kernel has."""
    return [kind for kind in FLAGS if os.path.exists(f"/proc/self/ns/{kind}")]


def enter(pid: int, kinds: Iterable[str] = tuple(FLAGS)) -> None:
    """Enter several namespaces of process `pid` in one call, by its pidfd (Linux 5.8).

    The pid and time namespaces hold for children only: fork afterwards. Only for a single-threaded process.
    Kinds in which we are already are left out: the user namespace that one is in cannot be entered again.
    """
    wanted = flags(kind for kind, same in shared("self", pid).items() if not same and kind in set(kinds))
    if not wanted:
        return
    pidfd = os.pidfd_open(pid)
    try:
        syscalls.setns(pidfd, wanted)
    finally:
        os.close(pidfd)


TIME_OFFSETS_REFUSED: Mapping[int, str] = {
    errno.EACCES: "somebody lives in this time namespace already; the offsets are set between unshare and fork",
    errno.EPERM: "needs CAP_SYS_TIME in the user namespace that owns the time namespace",
    errno.ERANGE: "the clock would stand below zero, or above 146 years",
}


def set_time_offsets(*, monotonic: float = 0, boottime: float = 0) -> None:
    """Move two clocks, by so many seconds, of the time namespace in which our children will be.

    For use after `unshare(CLONE_NEWTIME)` and before the first fork. The wall clock has no offset. Raises OSError.
    Source: man 7 time_namespaces.
    """
    text = ""
    for clock, offset in (("monotonic", monotonic), ("boottime", boottime)):
        seconds, nanoseconds = divmod(round(offset * 10**9), 10**9)  # the second is never negative
        text += f"{clock} {seconds} {nanoseconds}\n"
    fd = os.open("/proc/self/timens_offsets", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        number = error.errno or 0
        cause = TIME_OFFSETS_REFUSED.get(number, os.strerror(number))
        raise OSError(
            number, f"timens_offsets: {errno.errorcode[number]}, {os.strerror(number)}: {cause}"
        ) from None
    finally:
        os.close(fd)


@contextmanager
def opened(pid: int, kind: str) -> Iterator[int]:
    """A descriptor of one namespace of process `pid`, for `setns`, or to keep it alive. Raises ProcessLookupError."""
    try:
        fd = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ProcessLookupError(
            errno.ESRCH, f"process {pid} has ended, or has no {kind} namespace"
        ) from None
    try:
        yield fd
    finally:
        os.close(fd)
