"""The checks of notebook 07: a shared UTS namespace, an empty one that is kept, and who is in company with whom."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.fork import in_fork, waiting
from labkernel.lab.scratch import temporary
from labkernel.linux import mounts, namespaces, syscalls

KINDS = ("uts", "ipc", "net", "cgroup")
"""The kinds for exercise 07.3: each is an unshare away, without a fork or a map."""


@exercise("07.1", looks_at="/proc/PID/ns/uts of the three processes, and the hostname in each")
def three(answer: Callable[[], list[int]]) -> str:
    """Two processes in one new UTS namespace, a third where we are."""
    run_answer(_judge_three, answer)
    return "the first two share a new one, called pair; the third is outside."


@exercise(
    "07.2", looks_at="the namespace under that path, its hostname, and every process's /proc/PID/ns/uts"
)
def room(answer: Callable[[str], Any]) -> str:
    """A UTS namespace that is kept by a mount, with nobody in it."""
    with temporary() as place:
        file = place / "namespace"
        file.touch()
        run_answer(_judge_room, answer, str(file))
    return "the namespace is there, it is called room, and nobody is in it."


@exercise(
    "07.3", looks_at="/proc/PID/ns of four processes, each of which shares something else with the others"
)
def company(answer: Callable[[int, str], list[int]]) -> str:
    """All who share a namespace with a process."""
    run_answer(_judge_company, answer)
    return "the right company for each process and each kind."


def _judge_three(answer: Callable[[], list[int]]) -> None:
    """The machine's hostname is played by one of our own, so that no answer can harm the real one."""
    syscalls.unshare(syscalls.CLONE_NEWUTS)
    socket.sethostname("machine")
    before = namespaces.inodes()["uts"]
    pids = answer()
    if namespaces.inodes()["uts"] != before:
        raise NotYet(
            "the process that ran your function is no longer in the namespace in which it was started"
        )
    if not isinstance(pids, list | tuple) or len(set(pids)) != 3:
        raise NotYet("it did not return three different pids")
    if socket.gethostname() != "machine":
        raise NotYet("it is the machine's hostname that was changed")
    if os.getpid() in pids:
        raise NotYet("one of the pids is that of the process that ran your function")
    one, other, third = (_uts_of(pid) for pid in pids)
    if one != other:
        raise NotYet("the first two processes are in two UTS namespaces")
    if one == before:
        raise NotYet("the first two processes are where your function was started: that one is not new")
    if third != before:
        raise NotYet("the third process is not in the UTS namespace in which your function was started")
    if (name := in_fork(_name_in, f"/proc/{pids[0]}/ns/uts")) != "pair":
        raise NotYet(f"the hostname of the first two was to be 'pair', and it is {name!r}")


def _judge_room(answer: Callable[[str], Any], file: str) -> None:
    syscalls.unshare(syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWNS)
    mounts.set_propagation("/", "private")
    socket.sethostname("machine")
    answer(file)
    kinds = [mount.root.partition(":")[0] for mount in mounts.mountinfo() if mount.mount_point == file]
    if not kinds:
        raise NotYet("nothing is mounted on the file")
    if kinds[-1] != "uts":
        raise NotYet("what is mounted on the file is no UTS namespace")
    inside = namespaces.lsns().get(("uts", os.stat(file).st_ino), [])
    if os.getpid() in inside:
        raise NotYet("the process that ran your function is in it")
    if inside:
        raise NotYet("a process is in it")
    if (name := in_fork(_name_in, file)) != "room":
        raise NotYet(f"its hostname was to be 'room', and it is {name!r}")


def _judge_company(answer: Callable[[int, str], list[int]]) -> None:
    """In a pid namespace of its own, so that the machine's processes do not come and go meanwhile."""
    syscalls.unshare(syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNS)
    mounts.set_propagation("/", "private")
    trouble = in_fork(_judge_company_inside, answer)
    if trouble:
        raise NotYet(trouble)


def _judge_company_inside(answer: Callable[[int, str], list[int]]) -> str:
    mounts.proc("/proc")
    first = waiting(lambda: syscalls.unshare(namespaces.flags(KINDS)))
    pids = [os.getpid(), first]
    for number, kind in enumerate(KINDS):  # each enters one of the first's, and makes another anew
        steps = (
            lambda kind=kind: namespaces.enter(first, [kind]),
            lambda kind=KINDS[number - 1]: syscalls.unshare(namespaces.FLAGS[kind]),
        )
        pids.append(waiting(*steps))
    rows = {pid: namespaces.inodes(pid) for pid in pids}
    for pid in pids:
        for kind in (*KINDS, "mnt"):
            wanted = sorted(other for other in pids if rows[other][kind] == rows[pid][kind])
            found = answer(pid, kind)
            if found != wanted:
                return f"for one process and the kind {kind!r}, there are {len(wanted)} pids; {_words(found)}"
    return ""


def _words(found: object) -> str:
    if not isinstance(found, list):
        return f"it returned no list, but {type(found).__name__}"
    return f"it found {len(found)}, not the right ones in order"


def _uts_of(pid: int) -> int:
    try:
        return namespaces.inodes(pid)["uts"]
    except (ProcessLookupError, KeyError):
        raise NotYet("one of the processes does not live on") from None


def _name_in(file: str) -> str:
    with open(file, "rb") as namespace:
        syscalls.setns(namespace.fileno(), syscalls.CLONE_NEWUTS)
    return socket.gethostname()
