"""The checks of notebook 19: a filter by hand, the holes of somebody else's, and one that allows what is needed."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import random
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.linux import seccomp, seccomp_notify, syscalls
from labkernel.linux.seccomp import ALLOW, ERRNO, JA, JEQ, JGE, KILL_PROCESS, LD_ABS, RET

MACHINE = platform.machine()
FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_NETLINK)
ERRNOS = (errno.ENETDOWN, errno.EAFNOSUPPORT, errno.EHOSTDOWN, errno.ENOTCONN)
X32 = 0x40000000
ALLOWED = seccomp.ACTION & ALLOW

# ---------------------------------------------------------------------- a filter by hand


@exercise(
    "19.1",
    looks_at="sockets of several families, asked for behind your filter, and what it answers elsewhere",
)
def refuse_family(answer: Callable[[int, int], Any]) -> str:
    """One family of addresses refused, by an errno; everything else as before."""
    for family, number in zip(random.sample(FAMILIES, 2), random.sample(ERRNOS, 2), strict=True):
        program = _program(run_answer(answer, int(family), number))
        _well_made(program, int(family))
        seen = run_answer(_sockets, program, int(family))
        if seen[int(family)] != number:
            raise NotYet("a socket of the family is not refused with the errno that was asked for")
        if seen["upper half"] != number:
            raise NotYet(
                "with something in the upper half of the argument, which the kernel ignores, it gets a socket"
            )
        if any(seen[int(other)] for other in FAMILIES if other != family):
            raise NotYet("a socket of another family is refused, too")
    return "that family is refused, in those words, by every door, and nothing else is."


def _program(answer: Any) -> bytes:
    """What looks like a filter program."""
    if not isinstance(answer, bytes):
        raise NotYet(f"a filter is asked for, as bytes, and this is {type(answer).__name__}")
    if not answer or len(answer) % 8:
        raise NotYet("a filter is made of instructions of eight bytes, at least one")
    try:
        run_answer(_try_on, answer)
    except NotYet:
        raise NotYet("the kernel does not take this for a filter: perhaps a jump beyond the end") from None
    return answer


def _try_on(program: bytes) -> None:
    """Whether the kernel takes it; what it then answers, and how that ends, is not looked at."""
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        try:
            seccomp.install(program)
        except OSError:
            os._exit(1)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1:
        raise NotYet("it is not taken")


def _well_made(program: bytes, family: int) -> None:
    """What the program answers to calls that are not made for real here."""
    native, companion = (seccomp.ARCHITECTURES[name] for name in (MACHINE, seccomp.COMPANIONS[MACHINE]))
    for name in ("read", "exit_group", "dup", "getpgid"):
        if _answer(program, native, seccomp.call_number(MACHINE, name), family) != ALLOWED:
            raise NotYet(f"{name} is refused, too, at least when its first argument has the family's number")
    number = seccomp.call_number(MACHINE, "socket")
    for words, one in (
        ("the", family),
        ("another", next(int(other) for other in FAMILIES if other != family)),
    ):
        if _answer(program, native, number, one) in (KILL_PROCESS, seccomp.KILL_THREAD):
            raise NotYet(
                f"a socket of {words} family ends the process: `seccomp.path` shows which way it takes"
            )
    if _answer(program, native, number, family) == ALLOWED:
        raise NotYet("a socket of the family is not refused")
    number = seccomp.call_number(seccomp.COMPANIONS[MACHINE], "socket")
    if _answer(program, companion, number, family) == ALLOWED:
        raise NotYet("a call for the other architecture, which has other numbers, gets the socket")
    if _answer(program, native, X32 | seccomp.call_number(MACHINE, "socket"), family) == ALLOWED:
        raise NotYet("a call whose number has bit 30 set gets through")


def _answer(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    try:
        return seccomp.verdict(program, architecture, number, arguments) & seccomp.ACTION
    except (IndexError, struct.error, ValueError) as error:
        raise NotYet(f"an instruction is not one that this notebook has explained: {error}") from None


def _sockets(program: bytes, family: int) -> dict[int | str, int]:
    """The errno with which a socket of each family is refused behind the filter, or 0; and of one with more bits."""
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    seccomp.install(program)
    seen: dict[int | str, int] = {int(one): _socket(int(one)) for one in FAMILIES}
    seen["upper half"] = _socket(family | 1 << 32)
    return seen


def _socket(family: int) -> int:
    number = seccomp.call_number(MACHINE, "socket")
    arguments = (ctypes.c_uint64(value) for value in (family, socket.SOCK_DGRAM, 0))
    fd = syscalls.libc.syscall(number, *arguments)
    if fd == -1:
        return ctypes.get_errno()
    os.close(fd)
    return 0


# ---------------------------------------------------------------------- holes

VICTIMS = ("mount", "unshare", "setns", "chroot", "swapon")
KINDS = ("looks at no architecture", "lets other architectures pass", "forgets a bit", "has no hole")


@exercise(
    "19.2", looks_at="what your function says of four filters, and whether the call really gets through there"
)
def hole(answer: Callable[[bytes, str], Any]) -> str:
    """The door that a filter has forgotten."""
    said = {}
    for kind in random.sample(KINDS, len(KINDS)):
        name = random.choice(VICTIMS)
        program = _with_hole(kind, name)
        said[kind] = program, name, run_answer(answer, program, name)
    for kind in KINDS:  # the words are the same whatever the order was: notebooks keep them
        _judge(kind, *said[kind])
    return "the holes of three filters, and none where there is none."


def _judge(kind: str, program: bytes, name: str, door: Any) -> None:
    if kind == "has no hole":
        if door is not None:
            raise NotYet("you see a hole in a filter that has none")
        return
    if door is None:
        raise NotYet(f"there is a hole in the one that {kind}")
    try:
        architecture, number = (int(part) for part in door)
    except (TypeError, ValueError):
        raise NotYet("an architecture and a number are asked for, or None") from None
    names = {
        seccomp.ARCHITECTURES["x86_64"]: seccomp.call_number("x86_64", name),
        seccomp.ARCHITECTURES["i386"]: seccomp.call_number("i386", name),
    }
    plain = number & ~X32 if architecture == seccomp.ARCHITECTURES["x86_64"] else number
    if names.get(architecture) != plain:
        raise NotYet(f"of the filter that {kind}: behind that door, the number is another call's")
    if _answer(program, architecture, number) != ALLOWED:
        raise NotYet(f"of the filter that {kind}: behind that door, the filter refuses the call")


def _with_hole(kind: str, name: str) -> bytes:
    """A filter for x86_64 that is meant to refuse a call, as bytes."""
    number, token = seccomp.call_number("x86_64", name), seccomp.ARCHITECTURES["x86_64"]
    answers = [(RET, 0, 0, ALLOW), (RET, 0, 0, ERRNO | errno.EPERM), (RET, 0, 0, KILL_PROCESS)]
    check = [(LD_ABS, 0, 0, seccomp.ARCH), (JEQ, 1, 0, token)]
    load, test, bit = (LD_ABS, 0, 0, seccomp.NUMBER), (JEQ, 1, 0, number), (JGE, 3, 0, X32)
    code = {
        "looks at no architecture": [load, bit, test, *answers],
        "lets other architectures pass": [*check, (JA, 0, 0, 3), load, bit, test, *answers],
        "forgets a bit": [*check, (JA, 0, 0, 4), load, test, *answers],
        "has no hole": [*check, (JA, 0, 0, 5), load, bit, test, *answers],
    }[kind]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


# ---------------------------------------------------------------------- exactly what it needs

OCCASIONS = {
    "priority": "os.getpriority(os.PRIO_PROCESS, 0)",
    "umask": "os.umask(0o22)",
    "session": "os.getsid(0)",
    "group": "os.getpgid(0)",
    "yield": "os.sched_yield()",
    "uname": "os.uname()",
    "affinity": "os.sched_getaffinity(0)",
    "sync": "os.fsync(os.memfd_create('x'))",
    "pipe": "os.pipe2(0)",
}
"""Each with a call of its own, and which fails where that is refused (os.times() does not: glibc hides it)."""
DONE = 7
"""The exit status that says that the program has done its day's work."""
ANY_DAY = frozenset(
    (
        *("brk", "mmap", "munmap", "mremap", "mprotect", "madvise", "futex", "getrandom", "rseq"),
        *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "restart_syscall"),
    )
)
"""What the C library and Python may call on one day and not on the next: how full the memory is decides."""


@exercise(
    "19.3",
    looks_at="the program on each of its days, behind your filter, and what the filter answers to all calls",
)
def exactly(answer: Callable[[list[list[str]]], Any]) -> str:
    """A filter made from traces of all days."""
    chosen = random.sample(sorted(OCCASIONS), 4)
    days = [_command(occasion) for occasion in chosen[:3]]
    program = _program(run_answer(answer, days))
    for number, command in enumerate(days, 1):
        done = run_answer(_behind, program, command)
        if done.returncode != DONE:
            speechless = f"its exit status is {done.returncode}, and it cannot even write why"
            last = (done.stderr.splitlines() or [speechless])[-1]
            raise NotYet(f"on one of its days the program does not do its work: {last}" if number > 1 else
                         f"the program does not even do its first day's work: {last}")  # fmt: skip
    needed = ANY_DAY.union(*(run_answer(seccomp_notify.trace, command).calls for command in days))
    for name in sorted(_allowed(program) - needed):
        raise NotYet(f"{name} is allowed, and the program calls it on none of its days")
    if run_answer(_behind, program, _command(chosen[3])).returncode == DONE:
        raise NotYet("another program, which makes one more call, does its work behind it as well")
    native = seccomp.ARCHITECTURES[MACHINE]
    if _answer(program, native, X32 | seccomp.call_number(MACHINE, "read")) == ALLOWED:
        raise NotYet("a call whose number has bit 30 set gets through")
    return "it works on all its days, and no other call is allowed."


def _command(occasion: str) -> list[str]:
    code = f"import os, sys; {OCCASIONS[occasion]}; sys.exit({DONE})"
    return [sys.executable, "-I", "-S", "-B", "-c", code]


def _behind(program: bytes, command: list[str]) -> subprocess.CompletedProcess[str]:
    def enter() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        seccomp.install(program)

    plain = os.environ | {"NO_COLOR": "1"}  # of its traceback the last line is told
    return subprocess.run(
        command, env=plain, preexec_fn=enter, close_fds=False, capture_output=True, text=True
    )


def _allowed(program: bytes) -> set[str]:
    """The names of the calls of this machine that a program lets through, with one argument or another."""
    native = seccomp.ARCHITECTURES[MACHINE]
    return {
        name
        for number, name in _calls()
        if any(_answer(program, native, number, value) == ALLOWED for value in (0, 1, 2, 1 << 32))
    }


def _calls() -> Iterator[tuple[int, str]]:
    for number in range(1024):
        if name := seccomp.call_name(MACHINE, number):
            yield number, name
