"""The checks of notebook 05: a pivoted root, a /proc of one's own in it, and what of that /proc is closed."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.exercises.e03 import second_chroot
from labkernel.lab.scratch import temporary
from labkernel.lab.watch import watched
from labkernel.linux import mounts, namespaces, syscalls

HIDDEN, SHUT = "proc/meminfo", "proc/sys/net/ipv4/ip_forward"
"""A file that must be hidden, and one that must be read-only; root of the namespaces could write to it."""


@exercise(
    "05.1", looks_at="the process's root directory, its list of mounts, and where a second chroot leads it"
)
def lock_up(answer: Callable[[str], Any]) -> str:
    """The directory becomes the root of a mount namespace that has no other mount."""
    with _new_root() as path:
        run_answer(_judge_root, answer, path)
    return "the new root is the only mount that the process has, and a second chroot leads nowhere."


@exercise(
    "05.2", looks_at="the mounts of a process that is root in its own namespaces, and what its /proc lists"
)
def own_proc(answer: Callable[[str], Any]) -> str:
    """Root and /proc are the process's own, and nothing else is mounted."""
    with _new_root() as path:
        run_answer(_judge_proc, answer, path)
    return "two mounts, / and /proc, and that /proc lists the processes of the new pid namespace only."


@exercise("05.3", looks_at="the files below /proc as the process sees them, and the flags of their mounts")
def closed(answer: Callable[[], Any]) -> str:
    """One file is hidden, one directory is read-only, and the rest is as it was."""
    with _new_root() as path:
        run_answer(_judge_closed, answer, path)
    return "the one is hidden, the other can be read and not written, and the rest of /proc is as it was."


@contextlib.contextmanager
def _new_root() -> Iterator[str]:
    """A directory with an empty `proc` and `dev/null` to mount on; children of the lab may write to it."""
    with temporary() as path:
        for name in ("proc", "dev"):
            (path / name).mkdir()
        (path / "dev/null").touch()
        yield str(path)


def _judge_root(answer: Callable[[str], Any], path: str) -> None:
    """Run the answer in a tree that is shared, as systemd leaves it, but not the machine's: no answer can harm that."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    mounts.set_propagation("/", "private")
    mounts.set_propagation("/", "shared")
    before = len(mounts.mountinfo())
    with watched(lambda: answer(path), second_chroot) as go_on:
        pid = go_on()
        if len(mounts.mountinfo()) != before:
            raise NotYet("a mount of the process is seen outside, too: the tree was shared")
        if not os.path.samefile(f"/proc/{pid}/root/", path):
            raise NotYet("the root directory of the process is not the directory")
        if namespaces.shared("self", pid)["mnt"]:
            raise NotYet("the process has no mount namespace of its own")
        _only(pid, {"/"})
        if not os.path.samefile(f"/proc/{pid}/cwd/", path):
            raise NotYet("the working directory of the process is not the new root")
        go_on()
        if not os.path.samefile(f"/proc/{pid}/root/", path):
            raise NotYet("a second chroot leads out of it")


def _judge_proc(answer: Callable[[str], Any], path: str) -> None:
    def dress() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNS)  # or we would go along when the answer pivots
        answer(path)

    with _namespaces(), watched(dress, second_chroot) as go_on:
        pid = go_on()
        if not os.path.samefile(f"/proc/{pid}/root/", path):
            raise NotYet("the root directory of the process is not the directory")
        _only(pid, {"/", "/proc"})
        if not {"1", "self"} <= set(listed := os.listdir(f"/proc/{pid}/root/proc")):
            raise NotYet("what is at /proc is not a proc file system")
        if len([name for name in listed if name.isdigit()]) != 2:
            raise NotYet("that /proc lists processes of another pid namespace")
        go_on()
        if not os.path.samefile(f"/proc/{pid}/root/", path):
            raise NotYet("the old root is still there: a second chroot leads out")


def _judge_closed(answer: Callable[[], Any], path: str) -> None:
    def enter() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        mounts.bind(path, path)
        mounts.bind("/dev/null", f"{path}/dev/null")
        mounts.proc(f"{path}/proc")
        mounts.pivot_root_into(path)

    with _namespaces(), watched(enter, answer) as go_on:
        root = f"/proc/{go_on()}/root"
        there = set(os.listdir(f"{root}/proc"))
        go_on()
        if not os.path.lexists(f"{root}/proc/self") or not set(os.listdir(f"{root}/proc")) >= there:
            raise NotYet("the rest of /proc is no longer to be seen")
        if Path(root, HIDDEN).read_bytes():
            raise NotYet(f"/{HIDDEN} can still be read")
        if not os.path.exists(f"{root}/{SHUT}"):
            raise NotYet(
                "below /proc/sys there is nothing to be read any more: it should only not be written"
            )
        if not Path(root, SHUT).read_bytes():
            raise NotYet(f"/{SHUT} can no longer be read: it should only not be written")
        for name in (SHUT, *(f"proc/sys/{name}" for name in sorted(os.listdir(f"{root}/proc/sys")))):
            if not _read_only(f"{root}/{name}"):
                raise NotYet(f"/{name} is not on a read-only mount")
        if _read_only(f"{root}/proc"):
            raise NotYet("the whole of /proc is read-only; a process has to write to files of its own there")


def _only(pid: int, wanted: set[str]) -> None:
    """Raise NotYet unless exactly these are the mount points that the process sees."""
    points = [mount.mount_point for mount in mounts.mountinfo(pid)]
    if missing := wanted - set(points):
        raise NotYet(f"{' and '.join(sorted(missing))}: nothing is mounted there")
    if len(points) > len(wanted):
        raise NotYet(
            "there are more mounts than that in the process's list: is the old root still among them?"
        )


def _read_only(path: str) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


@contextlib.contextmanager
def _namespaces() -> Iterator[None]:
    """Move to user, mount and network namespaces of our own; what we start next is in a pid namespace, as pid 2.

    pid 1 is an idle process, since it could not be stopped and looked at: it ignores signals from within.
    """
    uid, gid = os.getuid(), os.getgid()
    kinds = ("user", "mnt", "pid", "net")
    syscalls.unshare(namespaces.flags(kinds))
    for file, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        Path(f"/proc/self/{file}").write_text(text)
    mounts.set_propagation("/", "private")
    init = os.fork()
    if init == 0:
        while True:
            signal.pause()
    try:
        yield
    finally:
        os.kill(init, signal.SIGKILL)
        os.waitpid(init, 0)
