"""The checks of notebook 03: a way out of a chroot, the power behind it, and a jail that holds a little better."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.scratch import temporary
from labkernel.lab.watch import watched
from labkernel.linux import capabilities

DEPTH = 64
"""More directories than any path here has: `..` at the top leads to the top."""


@exercise("03.1", looks_at="the root directory of the process that ran your function, in /proc/PID/root")
def escape(answer: Callable[[], Any]) -> str:
    """The process is in an empty jail with no descriptor open to the outside; the answer must lead it out."""
    outcome = _tried(answer)
    if outcome != "out":
        raise NotYet(outcome)
    return "the root directory of the process is the machine's again."


@exercise("03.2", looks_at="two processes in a jail: one with all of root's capabilities, one without yours")
def capability(answer: str) -> str:
    """The one capability without which the second chroot fails."""
    if not answer:
        raise NotYet("no capability is named")
    try:
        dropped = capabilities.parse([answer])
    except (ValueError, AttributeError):
        raise NotYet(f"{answer!r} is not the name of a capability; man 7 capabilities lists them") from None
    if len(dropped) != 1:
        raise NotYet("that is more than one; one is enough")
    if _tried(second_chroot) != "out":
        raise NotYet("the escape does not work here even with all capabilities: something else is wrong")
    if _tried(second_chroot, dropped) == "out":
        raise NotYet("without it, the escape still works: the kernel asks for another one")
    return "without it, the escape fails; with it, the process gets out."


@exercise("03.3", looks_at="whether the process is in the jail, and whether it can be led out: by two ways")
def lock_up(answer: Callable[[str], Any]) -> str:
    """A chroot from which neither the second chroot nor an open descriptor leads out."""
    with _jail() as jail:
        outcome = run_answer(_attack, answer, jail)
    if outcome:
        raise NotYet(outcome)
    return "the process is root, lives, and neither way leads out."


def second_chroot() -> None:
    """The classic way out."""
    os.mkdir("door")
    os.chroot("door")
    for _ in range(DEPTH):
        os.chdir("..")
    os.chroot(".")


@contextlib.contextmanager
def _jail() -> Iterator[str]:
    """An empty directory that children of the lab may write to."""
    with temporary() as jail:
        yield str(jail)


def _tried(answer: Callable[[], Any], dropped: frozenset[int] = frozenset()) -> str:
    """`out` if the function led a process out of a jail; otherwise what happened, in words."""
    with _jail() as jail:
        outcome: str = run_answer(_in_jail, answer, jail, dropped)
    return outcome


def _in_jail(answer: Callable[[], Any], jail: str, dropped: frozenset[int]) -> str:
    """Run the answer in a jail, and see from outside where that leads."""
    held = capabilities.read().permitted

    def prisoner() -> None:
        os.chroot(jail)
        os.chdir("/")
        if dropped:
            capabilities.limit_to(held - dropped)
        answer()

    try:
        with watched(prisoner) as go_on:
            return "out" if _same(f"/proc/{go_on()}/root/", "/") else "its root directory is still the jail"
    except NotYet as reason:
        return str(reason)


def _attack(answer: Callable[[str], Any], jail: str) -> str:
    """Let the answer lock a process up, then try both ways out. Returns "" if it holds."""
    descriptor = os.open("/", os.O_RDONLY | os.O_DIRECTORY)  # the one that somebody forgot to close
    os.set_inheritable(descriptor, True)
    held = capabilities.read().permitted  # inside there is no /proc to read it from

    def lock_up() -> None:
        answer(jail)

    def break_out() -> None:
        with contextlib.suppress(OSError):
            capabilities.capset(held, held)  # what is still permitted can be taken again
        with contextlib.suppress(OSError):
            second_chroot()

    with watched(lock_up, break_out) as go_on:
        pid = go_on()
        if os.stat(f"/proc/{pid}").st_uid != os.stat("/proc/self").st_uid:
            return "the process is no longer root: that is a lock too, but not the one asked for"
        if not _same(f"/proc/{pid}/root/", jail):
            return "the root directory of the process is not the jail"
        if not _same(f"/proc/{pid}/cwd/", jail):
            return "the working directory of the process is not the jail"
        directories = [fd for fd in os.listdir(f"/proc/{pid}/fd") if os.path.isdir(f"/proc/{pid}/fd/{fd}")]
        if any(not _same(f"/proc/{pid}/fd/{fd}", jail) for fd in directories):
            return "a descriptor of a directory outside is still open, and fchdir follows it"
        go_on()
        return "" if _same(f"/proc/{pid}/root/", jail) else "a second chroot still leads out"


def _same(one: str, other: str) -> bool:
    """Whether two paths lead to the same directory."""
    return os.path.samefile(one, other)
