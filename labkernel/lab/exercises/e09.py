"""The checks of notebook 09: a box with a /proc of its own, a process's number out here, and an init."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from labkernel.lab import calm
from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.linux import mounts, syscalls

SOON = 4.0
"""Seconds within which something that has been asked for has to happen."""

ORPHANS = 3
ANSWER = 7
"""The exit status of a program that is asked to end, and does."""


# ---------------------------------------------------------------------- 09.1


@exercise("09.1", looks_at="what `program` sees as it runs, and whether anything of it is left with us")
def boxed(answer: Callable[[Callable[[], Any]], Any]) -> str:
    """The program is pid 1, its /proc lists nobody else, and our own /proc is what it was."""
    outcome: str = run_answer(_box, answer)
    if outcome:
        raise NotYet(outcome)
    return "inside it is process 1 and sees no other; outside nothing has changed."


def _box(answer: Callable[[Callable[[], Any]], Any]) -> str:
    """Let the answer build its box in a fork of this child, whose mounts are shared, as a machine's are."""
    syscalls.unshare(syscalls.CLONE_NEWNS)  # the machine's own must not suffer from a wrong answer
    mounts.set_propagation("/", "private")
    mounts.set_propagation("/", "shared")
    read, write = os.pipe()

    def program() -> None:
        seen = [name for name in os.listdir("/proc") if name.isdigit()]
        own = os.readlink("/proc/self") if os.path.lexists("/proc/self") else "nothing"
        os.write(write, f"{os.getpid()} {own} {len(seen)} {int('1' in seen)}\n".encode())

    before = _mount_points()
    child = os.fork()
    if child == 0:
        _last_words(write, lambda: answer(program))
    _, status = os.waitpid(child, 0)
    os.close(write)
    with open(read, encoding="utf-8") as file:
        lines = file.read().splitlines()
    if _mount_points() != before:
        return "a mount of yours is to be seen outside of the box as well"
    failures = [line.removeprefix("failed ") for line in lines if line.startswith("failed ")]
    if failures:
        return f"it failed: {failures[0]}"
    if not lines:
        return "`program` was never called"
    if len(lines) > 1:
        return "`program` was called more than once"
    pid, own, count, first = lines[0].split()
    if pid != "1":
        return "`program` was not called by process 1 of a new pid namespace"
    if own != "1" or first != "1":
        return "in the box, /proc still belongs to the namespace outside: it does not say 1 of process 1"
    if count != "1":
        return "in the box, /proc lists others besides process 1"
    if os.waitstatus_to_exitcode(status) != 0:
        return "your function ended the process that called it, instead of returning"
    return ""


def _mount_points() -> list[tuple[int, str]]:
    """Our mounts; none where a /proc has leaked to us, in which we have no number."""
    try:
        return [(mount.mount_id, mount.mount_point) for mount in mounts.mountinfo()]
    except FileNotFoundError:
        return []


# ---------------------------------------------------------------------- 09.2


@exercise(
    "09.2", looks_at="three pid namespaces with a process 3 in each, and which process your number ends"
)
def outside_number(answer: Callable[[int, int], Any]) -> str:
    """The number out here of a process that is called 3 in one of several namespaces."""
    outcome: str = run_answer(_find, answer)
    if outcome:
        raise NotYet(outcome)
    return "SIGKILL to your number ended process 3 of that namespace, and nobody else."


def _find(answer: Callable[[int, int], Any]) -> str:
    with _three_processes() as other, _three_processes() as wanted, _three_processes() as another:
        number = answer(wanted[0], 3)
        ours = [*other, *wanted, *another]
        if type(number) is not int:
            return f"a number is asked for, and this is {type(number).__name__}"
        if number not in ours:
            return "out here, none of the processes in question has the number that you return"
        os.kill(number, signal.SIGKILL)
        if number in other or number in another:
            return "your number belongs to a process of another namespace"
        if number != wanted[2]:
            return "your number belongs to another process of that namespace, not to the one called 3"
    return ""


@contextlib.contextmanager
def _three_processes() -> Iterator[list[int]]:
    """A pid namespace with the processes 1, 2 and 3; their numbers out here, which do not follow each other."""
    read, write = os.pipe()
    go_read, go = os.pipe()
    helper = os.fork()
    if helper == 0:
        syscalls.unshare(syscalls.CLONE_NEWPID)
        for _ in range(3):
            os.read(go_read, 1)
            pid = os.fork()
            if pid == 0:
                _sleep()
            os.write(write, f"{pid}\n".encode())
        _sleep()
    numbers = []
    try:
        for _ in range(3):
            for _ in range(3):  # take some numbers away in between
                _reaped(os.fork() or os._exit(0))
            os.write(go, b".")
            numbers.append(int(os.read(read, 100)))
        yield numbers
    finally:
        for pid in (*numbers[:1], helper):
            os.kill(pid, signal.SIGKILL)
        _reaped(helper)
        for fd in (read, write, go_read, go):
            os.close(fd)


def _sleep() -> NoReturn:
    while True:
        time.sleep(1000)


def _reaped(pid: int) -> None:
    os.waitpid(pid, 0)


# ---------------------------------------------------------------------- 09.3


@exercise("09.3", looks_at="orphans, signals and the exit status, with your function as process 1")
def init(answer: Callable[[Callable[[], NoReturn]], Any]) -> str:
    """An init that reaps, forwards signals to its program, and ends as the program does."""
    outcome: str = run_answer(_try_init, answer)
    if outcome:
        raise NotYet(outcome)
    return "it reaps orphans, passes signals on, and ends as its program does."


@dataclass(frozen=True)
class FirstProcess:
    """Process 1 of a pid namespace, which runs an answer: its pid out here, and what is said in there."""

    pid: int
    said: int

    def says(self, word: str, ask: int = 0) -> bool:
        """Wait until this word is said in there. Where there is a signal to `ask` with, it is sent again and again.

        Raises NotYet when process 1 ends first.
        """
        end = time.monotonic() + SOON
        while time.monotonic() < end:
            if ask:
                os.kill(self.pid, ask)
            if select.select([self.said], [], [], 0.1)[0]:
                data = os.read(self.said, 4096).decode()
                if data.startswith("failed "):
                    raise NotYet(f"it failed: {data.removeprefix('failed ')}")
                if "one" in data.split():
                    raise NotYet("`program` itself is process 1: it needs a process of its own")
                if word in data.split():
                    return True
            if self.ended() is not None:
                raise NotYet("process 1 ended while its program was still at work")
        return False

    def ended(self) -> int | None:
        """The exit code of process 1, negative where a signal ended it; None while it runs."""
        found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def ends(self, ask: int = 0) -> int | None:
        """Wait until process 1 has ended."""
        end = time.monotonic() + SOON
        while (code := self.ended()) is None and time.monotonic() < end:
            if ask:
                os.kill(self.pid, ask)
            time.sleep(0.02)
        return code

    def zombies(self) -> int:
        """How many of its children nobody has waited for."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in children]
        except (FileNotFoundError, ProcessLookupError):
            return self.zombies() if self.ended() is None else 0  # one went while we looked
        return states.count("Z")

    def reaps(self) -> bool:
        """Wait until no zombie is left."""
        end = time.monotonic() + SOON
        while self.zombies() and time.monotonic() < end:
            time.sleep(0.02)
        return not self.zombies()


def _try_init(answer: Callable[[Callable[[], NoReturn]], Any]) -> str:
    try:
        with _as_pid_1(answer, _busy_program) as first:
            if not first.says("ready"):
                return "`program` was not started"
            if not first.reaps():
                return "orphans of its program have ended, and stay zombies: nobody waits for them"
            for number in (signal.SIGUSR1, signal.SIGHUP):
                if not first.says(number.name, ask=number):
                    return f"{number.name} was sent to process 1, and its program has not got it"
            code = first.ends(ask=signal.SIGTERM)
            if code is None:
                return "SIGTERM was sent to process 1, and it still runs"
            if code != ANSWER:
                return f"SIGTERM ended the program with status {ANSWER}, and process 1 ended with {code}"
        with _as_pid_1(answer, _killed_program) as first:
            code = first.ends()
            if code is None:
                return "its program was killed, and process 1 still runs"
            if code != 128 + signal.SIGKILL:
                return f"its program was killed by signal 9, and process 1 ended with {code}"
    except NotYet as reason:
        return str(reason)
    return ""


@contextlib.contextmanager
def _as_pid_1(
    answer: Callable[[Callable[[], NoReturn]], Any], program: Callable[[int], NoReturn]
) -> Iterator[FirstProcess]:
    """Run `answer` as process 1 of a new pid namespace."""
    read, write = os.pipe()
    pid, pidfd = syscalls.clone3(syscalls.CLONE_NEWPID)  # unlike unshare, it leaves our next children here
    if pid == 0:
        os.close(read)
        _last_words(write, lambda: answer(lambda: program(write)))
    os.close(pidfd)
    os.close(write)
    try:
        yield FirstProcess(pid, read)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)


def _last_words(say: int, work: Callable[[], Any]) -> NoReturn:
    """Do something, say why where it fails, and end."""
    try:
        work()
    except Exception as error:
        os.write(say, f"failed {calm.in_words(error)}\n".encode())
        os._exit(1)
    except BaseException:
        os._exit(1)
    os._exit(0)


def _busy_program(say: int) -> NoReturn:
    """Leaves some orphans behind, tells which signals it gets, and ends when it is asked to."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # an init may have them blocked
    if os.getpid() == 1:
        os.write(say, b"one\n")
    for number in (signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, lambda got, _: os.write(say, f"{signal.Signals(got).name}\n".encode()))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(ANSWER))
    for _ in range(ORPHANS):
        child = os.fork()
        if child == 0:
            os.fork()  # both end; the second one an orphan
            os._exit(0)
        os.waitpid(child, 0)
    os.write(say, b"ready\n")
    while True:
        time.sleep(0.1)  # pause() would sleep through a signal that came just before it


def _killed_program(_: int) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    _sleep()
