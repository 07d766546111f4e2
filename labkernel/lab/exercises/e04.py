"""The checks of notebook 04: a directory that is read-only for one, and who hears of whose mounts."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labkernel.lab import calm
from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.fork import in_fork, waiting
from labkernel.linux import mounts, namespaces, syscalls

PLACE = "/media"
"""Where the checks attach things, in a mount namespace of their own."""

KINDS = ("shared", "private", "slave", "unbindable")
WAYS = ("outwards", "inwards")


@exercise("04.1", looks_at="who can write to a directory and below it, while `program` runs")
def look_but_do_not_touch(answer: Callable[[str, Callable[[], Any]], Any]) -> str:
    """Read-only for the process that runs `program`, with what is attached below, and for nobody else."""
    inside, outside, arrived = run_answer(_writers, answer)
    for where, reason in inside.items():
        if reason is None:
            raise NotYet(f"`program` can write {where}")
        if reason == errno.ENOENT:
            raise NotYet("`program` does not find what was in the directory, or attached below it")
        if reason != errno.EROFS:
            raise NotYet(
                f"`program` cannot write {where}, but not because it is read-only: {os.strerror(reason)}"
            )
    for where, reason in outside.items():
        if reason is not None:
            raise NotYet(f"somebody else can no longer write {where}: {os.strerror(reason)}")
    if arrived:
        raise NotYet("what was attached for `program` has arrived in everybody else's list of mounts, too")
    return "it is read-only for that one process, down to what is attached below, and all others write."


@exercise("04.2", looks_at="what the kernel does in all sixteen cases")
def arrives(answer: Callable[[str, str, str], Any]) -> str:
    """The function says of each case what the kernel does."""
    cases = list(itertools.product(("shared", "private"), KINDS, WAYS))
    said = run_answer(_says, answer, cases)
    for (outside, inside, way), answered in zip(cases, said, strict=True):
        if not isinstance(answered, bool):
            raise NotYet(f"True or False is asked for, and this is {type(answered).__name__}")
        if answered != run_answer(_happens, outside, inside, way):
            raise NotYet(
                f"you say {answered} and the kernel says {not answered}, where the machine's mount is {outside}, "
                f"the copy is {inside}, and the way is {way}"
            )
    return "sixteen cases, and the kernel does what you said in each of them."


@exercise("04.3", looks_at="what the second process really sees, after the first one has attached something")
def hears(answer: Callable[[int, int, str], Any]) -> str:
    """The function reads off mountinfo what will be seen."""
    pairs = [*itertools.product(KINDS, KINDS), ("own group", "shared"), ("shared", "own group")]
    pairs += [("slave and shared", "shared"), ("shared", "slave and shared"), ("slave and shared", "slave")]
    answers = {pair: run_answer(_said_and_seen, answer, *pair) for pair in random.sample(pairs, len(pairs))}
    # The words are the same whatever the order was: notebooks keep them.
    for speaker, listener in pairs:
        said, seen = answers[speaker, listener]
        if not isinstance(said, bool):
            raise NotYet(f"True or False is asked for, and this is {type(said).__name__}")
        if said != seen:
            words = f"the mount of the first is {speaker}, and that of the second is {listener}"
            raise NotYet(f"you say {said} and the kernel says {seen}, where {words}")
    return f"{len(pairs)} pairs, and each time it is as you read it."


def _machine(kind: str) -> None:
    """A mount namespace of which nobody hears, with a tmpfs of this kind at PLACE."""
    if not os.path.isdir(PLACE):
        raise NotYet(f"this machine has no directory {PLACE} to try it in: make one (sudo mkdir {PLACE})")
    syscalls.unshare(syscalls.CLONE_NEWNS)
    mounts.set_propagation("/", "private")
    mounts.tmpfs(PLACE)
    mounts.set_propagation(PLACE, kind)
    for name in ("below", *WAYS):
        os.mkdir(f"{PLACE}/{name}")


Reasons = dict[str, int | None]


def _writers(answer: Callable[..., Any]) -> tuple[Reasons, Reasons, bool]:
    """For two places: why the process that runs `program` cannot write there, and why we cannot meanwhile.

    And whether our list of mounts has changed by what it did.
    """
    _machine("shared")
    mounts.tmpfs(f"{PLACE}/below")
    places = {"in the directory": PLACE, "to what is attached below it": f"{PLACE}/below"}
    for path in places.values():
        Path(path, "here-before").touch()
    before = mounts.mountinfo()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def program() -> None:
        theirs.send(json.dumps({where: _why_not(path) for where, path in places.items()}).encode())
        theirs.recv(1)

    child = os.fork()
    if child == 0:
        try:
            ours.close()
            answer(PLACE, program)
        except Exception as error:
            theirs.send(f"failed {calm.in_words(error)}".encode())
        finally:
            os._exit(0)
    theirs.close()
    text = ours.recv(1 << 16).decode()
    if text.startswith("failed "):
        raise NotYet(f"it failed: {text.removeprefix('failed ')}")
    if not text:
        raise NotYet("`program` was never called")
    outside = {where: _why_not(path) for where, path in places.items()}
    arrived = mounts.mountinfo() != before
    ours.close()
    os.waitpid(child, 0)
    return json.loads(text), outside, arrived


def _why_not(directory: str) -> int | None:
    """The number of the error with which writing there fails; None when it does not."""
    if not os.path.exists(f"{directory}/here-before"):
        return errno.ENOENT
    try:
        Path(directory, f"written-by-{os.getpid()}").write_text("hello")
    except OSError as error:
        return error.errno
    return None


def _says(answer: Callable[[str, str, str], Any], cases: list[tuple[str, str, str]]) -> list[Any]:
    return [answer(*case) for case in cases]


def _happens(outside: str, inside: str, way: str) -> bool:
    """Whether the other side sees it, on the running kernel."""
    _machine(outside)
    attach = [lambda: mounts.tmpfs(f"{PLACE}/outwards")] if way == "outwards" else []
    pid = waiting(
        lambda: syscalls.unshare(syscalls.CLONE_NEWNS), lambda: mounts.set_propagation(PLACE, inside), *attach
    )
    if way == "inwards":
        mounts.tmpfs(f"{PLACE}/inwards")
    seen = mounts.mountinfo(pid if way == "inwards" else "self")
    return f"{PLACE}/{way}" in {mount.mount_point for mount in seen}


STEPS = {kind: (kind,) for kind in KINDS} | {
    "own group": ("private", "shared"),
    "slave and shared": ("slave", "shared"),
}
"""What is done, one after the other, to a copy of a shared mount."""


def _said_and_seen(answer: Callable[[int, int, str], Any], *kinds: str) -> tuple[Any, bool]:
    _machine("shared")
    speaker, listener = (
        waiting(
            lambda: syscalls.unshare(syscalls.CLONE_NEWNS),
            *[lambda step=step: mounts.set_propagation(PLACE, step) for step in STEPS[kind]],
        )
        for kind in kinds
    )
    said = in_fork(answer, speaker, listener, PLACE)
    in_fork(_attach_for, speaker)
    return said, f"{PLACE}/below" in {mount.mount_point for mount in mounts.mountinfo(listener)}


def _attach_for(pid: int) -> None:
    namespaces.enter(pid, ["mnt"])
    mounts.tmpfs(f"{PLACE}/below")
