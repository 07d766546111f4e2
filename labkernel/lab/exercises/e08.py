"""The checks of notebook 08: one namespace of several shared, left-over memory removed, a message sent elsewhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.fork import in_fork, waiting
from labkernel.linux import ipc, namespaces, syscalls
from labkernel.linux.ipc import IPC_CREAT

MAILBOX = "/mailbox"


@exercise("08.1", looks_at="/proc/PID/ns of the two processes, and of yours")
def partners(answer: Callable[[], list[int]]) -> str:
    """Two processes with one new ipc namespace, and a uts and a net namespace each."""
    run_answer(_judge_partners, answer)
    return "they share a new ipc namespace; name and network are each one's own."


@exercise("08.2", looks_at="the shared memory and semaphores that the kernel lists in /proc/sysvipc")
def tidy(answer: Callable[[], Any]) -> str:
    """Shared memory that nobody has attached is removed, and nothing else is."""
    run_answer(_judge_tidy, answer)
    return "what nobody used is gone, and the rest is there."


@exercise("08.3", looks_at="the message queues of both namespaces, and what is in them")
def deliver(answer: Callable[[int, str], Any]) -> str:
    """A message in the queue of another ipc namespace."""
    for text in ("dear reader", "once more"):
        run_answer(_judge_deliver, answer, text)
    return "the letter has arrived there, and nothing has arrived here."


def _judge_partners(answer: Callable[[], list[int]]) -> None:
    ours = namespaces.inodes()
    pids = answer()
    if not isinstance(pids, list | tuple) or len(set(pids)) != 2 or os.getpid() in pids:
        raise NotYet("it did not return the pids of two other processes")
    try:
        one, other = (namespaces.inodes(pid) for pid in pids)
        if not {"ipc", "uts", "net"} <= one.keys() & other.keys():
            raise ProcessLookupError
    except ProcessLookupError:
        raise NotYet("one of the processes does not live on") from None
    if one["ipc"] != other["ipc"]:
        raise NotYet("the two processes are in two ipc namespaces")
    if one["ipc"] == ours["ipc"]:
        raise NotYet("the two processes are in the ipc namespace in which your function was started")
    now = namespaces.inodes()
    for kind, what in (("uts", "UTS"), ("net", "network")):
        if one[kind] == other[kind]:
            raise NotYet(f"the two processes share a {what} namespace")
        if {one[kind], other[kind]} & {ours[kind], now[kind]}:
            raise NotYet(f"one of the processes has no {what} namespace for itself")


def _judge_tidy(answer: Callable[[], Any]) -> None:
    """Eight pieces of memory, of which two processes use three; and more semaphores than that."""
    syscalls.unshare(syscalls.CLONE_NEWIPC)
    keep: set[int] = set()
    drop: set[int] = set()
    for number in range(8):
        identity = ipc.shmget(100 - number, 4096, IPC_CREAT | 0o600)
        (keep if number in (1, 4, 5) else drop).add(identity)
    users = [waiting(lambda: [ipc.shmat(identity) for identity in keep]) for _ in range(2)]
    locks = {ipc.semget(key, IPC_CREAT | 0o600) for key in range(100, 110)}
    answer()
    left = {(thing.kind, thing.identity) for thing in ipc.objects()}
    # What is removed while it is in use stays until its users end, but its key is taken from it.
    in_use = {thing.identity for thing in ipc.objects() if thing.attached >= len(users) and thing.key}
    if not {("sem", identity) for identity in locks} <= left:
        raise NotYet("a semaphore is missing")
    if not {("shm", identity) for identity in keep} <= left or in_use != keep:
        raise NotYet("memory that was in use is missing, or its users are")
    if remaining := sum(("shm", identity) in left for identity in drop):
        raise NotYet(f"of {len(drop)} pieces of memory that nobody has attached, {remaining} are still there")


def _judge_deliver(answer: Callable[[int, str], Any], text: str) -> None:
    syscalls.unshare(syscalls.CLONE_NEWIPC)
    _open(os.O_CREAT)
    there = waiting(lambda: syscalls.unshare(syscalls.CLONE_NEWIPC), lambda: _open(os.O_CREAT))
    own = waiting()
    answer(there, text)
    here, found = in_fork(_letters, own), in_fork(_letters, there)
    if here:
        raise NotYet("a letter is in the queue of the namespace in which your function was started")
    if not found:
        raise NotYet("the queue of the other namespace is empty")
    if found != [text]:
        raise NotYet("something else is in the queue of the other namespace")


def _open(flags: int = 0) -> int:
    return ipc.mq_open(MAILBOX, os.O_RDWR | os.O_NONBLOCK | flags)


def _letters(pid: int) -> list[str]:
    """What is in the mailbox where process `pid` is."""
    namespaces.enter(pid, ["ipc"])
    queue, letters = _open(os.O_CREAT), []
    with contextlib.suppress(BlockingIOError):
        while True:
            letters.append(ipc.mq_receive(queue))
    return letters
