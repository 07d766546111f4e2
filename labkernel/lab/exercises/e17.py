"""The checks of notebook 17: a program held by the fewest limits, a picture of one moment, a tree killed whole.

What is lit here is lit inside limits only: they are read back from the kernel, by the process itself, before.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.fork import waiting
from labkernel.lab.group import group
from labkernel.linux import cgroups
from labkernel.linux.cgroups import Cgroup, Limits

PIDS, MEMORY = 20, 64 << 20
MIB = 1 << 20
MOST = 40
"""The highest limit of processes under which anything is lit."""
PATIENCE = 10.0
"""Seconds for what takes much less, on a slow machine too."""


@exercise(
    "17.1",
    looks_at="the limits of the group, read back, and then at what the kernel says of the program in it",
)
def contain(answer: Callable[[Cgroup], Any]) -> str:
    """Processes and memory are limited, nothing else is, and the kernel has held the program at both."""
    most, refused, at_limit = run_answer(_lit_inside, answer)
    if not refused:
        raise NotYet("the kernel has never said no to a fork of the program")
    if not at_limit:
        raise NotYet("the program never came to the limit of its memory")
    if most > PIDS:
        raise NotYet(f"{most} processes were seen in the group")
    return f"two limits, and the kernel has held it at both: never more than {PIDS} processes, and 64 MiB."


@exercise("17.2", looks_at="whether the group stands still at each question, and whether it runs afterwards")
def picture(answer: Callable[[Cgroup, list[Callable[[], int]]], Any]) -> str:
    """All parts are asked while the group is frozen, and it is thawed whatever happens."""
    for fails in (False, True):
        said, asked, one_moment, runs = run_answer(_pictured, answer, fails)
        if not asked:
            raise NotYet("none of the parts was asked")
        if not all(frozen for _, frozen in asked):
            raise NotYet(
                "the group was running while you asked, and its numbers changed between two questions"
            )
        if not one_moment:
            raise NotYet("the group stood still at each question, and ran on between two of them")
        if not runs:
            when = "when a part has raised an exception, " if fails else ""
            raise NotYet(f"{when}the group stands still for ever afterwards")
        if not fails and said != [value for value, _ in asked]:
            raise NotYet("what you return is not what the parts have said, one number each, in their order")
    return "all of one moment; and the group runs again, also after an exception."


@exercise(
    "17.3", looks_at="who lives in the group of that process, and in the group beside it, after your function"
)
def kill_all(answer: Callable[[int], Any]) -> str:
    """Nobody in the group lives, and everybody beside it does."""
    left, first_lives, others = run_answer(_hunted, answer)
    if first_lives:
        raise NotYet("the process itself still lives")
    if left:
        raise NotYet("some of its tree still live, in the same group")
    if not others:
        raise NotYet("you have killed somebody who was not in its group")
    return "the whole tree is dead, and nobody else."


def fuse() -> None:
    """Raise NotYet unless this very process is in a group with a low limit of processes, read back from the kernel."""
    limit = cgroups.read(cgroups.directory_of("self", "pids") / "pids.max").strip()
    if not limit.isdigit() or int(limit) > MOST:
        raise NotYet("the program would be in no group with a limit of processes, so it is not lit")


def limits_of(made: Cgroup) -> dict[str, int | None]:
    """The limits that stand in the group's files: processes, memory and cpu as numbers; None for no limit.

    The other entries are 1 where a file says anything else than at first.
    """
    written = {os.path.basename(path): text for path, text in made.limits_written().items()}
    memory = written.get("memory.max") or written.get("memory.limit_in_bytes", "max")
    found: dict[str, int | None] = {
        "processes": _number(written.get("pids.max", "max")),
        "memory": _number(memory),
        "CPU time": _number((written.get("cpu.max") or written.get("cpu.cfs_quota_us", "max")).split()[0]),
    }
    for name, files in OTHERS.items():
        told = [written[file] for file in files if file in written]
        found[name] = None if all(text in DEFAULTS for text in told) else 1
    return found


OTHERS = {
    "the soft limit of memory": ("memory.high", "memory.soft_limit_in_bytes"),
    "swap": ("memory.swap.max", "memory.memsw.limit_in_bytes"),
    "the weight of CPU time": ("cpu.weight", "cpu.shares"),
    "the disk": ("io.max", "blkio.throttle.read_bps_device", "blkio.throttle.write_bps_device"),
}
UNLIMITED = 1 << 60
"""Version 1 says "no limit" of memory by a number that no machine reaches."""
DEFAULTS = {"", "max", "100", "1024", str((1 << 63) - os.sysconf("SC_PAGE_SIZE"))}


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() and int(text) < UNLIMITED else None


def _judge_limits(made: Cgroup) -> None:
    found = limits_of(made)
    pids, memory = found["processes"], found["memory"]
    if pids is None:
        raise NotYet("nothing keeps the program from forking, so it is not started")
    if pids != PIDS:
        raise NotYet(f"{pids} is not the number of processes that it is to have")
    if memory is None:
        raise NotYet("nothing keeps the program from taking memory, so it is not started")
    if memory != MEMORY:
        raise NotYet(f"{memory} bytes is not the memory that it is to have; 1 MiB is 1024 times 1024 bytes")
    more = [
        name for name, value in found.items() if value is not None and name not in ("processes", "memory")
    ]
    if more:
        raise NotYet(f"there is one limit too many: {more[0]}")


def _program() -> NoReturn:
    """The program of the exercise; its leak has an end, for machines with much swap."""
    fuse()
    leak = []
    for _ in range(4 * MEMORY // MIB):
        with contextlib.suppress(BlockingIOError):
            if os.fork() == 0:
                signal.pause()
        leak.append(bytearray(b"x" * MIB))
        time.sleep(0.01)
    while True:
        signal.pause()


def _lit_inside(answer: Callable[[Cgroup], Any]) -> tuple[int, bool, bool]:
    """Most processes at once, whether a fork was refused, whether the memory was at its limit."""
    made = group("contained")
    if made.pids():
        raise NotYet("somebody is in the group already")
    answer(made)
    _judge_limits(made)
    pid = os.fork()
    if pid == 0:
        try:
            made.add(os.getpid())
            _program()
        finally:
            os._exit(1)
    most, end = 0, time.monotonic() + PATIENCE
    while time.monotonic() < end:
        now = made.stats()
        most = max(most, now.pids)
        if now.pids_max_events and (now.memory_max_events or now.oom_kills):
            break
        time.sleep(0.002)
    _judge_limits(made)  # they are still there
    now = made.stats()
    made.kill()
    return most, now.pids_max_events > 0, now.memory_max_events > 0 or now.oom_kills > 0


def _pictured(
    answer: Callable[[Cgroup, list[Callable[[], int]]], Any], fails: bool
) -> tuple[Any, list[tuple[int, bool]], bool, bool]:
    """What is returned; what each part said, and whether the group stood still then; whether it did in between;
    and whether it runs afterwards."""
    made = group("counting")
    memory = [mmap.mmap(-1, 8) for _ in range(5)]
    pids = [_counting(made, own) for own in memory]
    asked: list[tuple[int, bool]] = []
    pictures = set()  # what all of them had counted at each question
    failing = random.randrange(len(memory)) if fails else None

    def part(number: int) -> int:
        value = int.from_bytes(memory[number][:8])
        asked.append((value, made.frozen()))
        pictures.add(tuple(bytes(own[:8]) for own in memory))
        if number == failing:
            raise RuntimeError("this part does not answer")
        return value

    parts: list[Callable[[], int]] = [functools.partial(part, number) for number in range(len(memory))]
    said = None
    with contextlib.suppress(RuntimeError) if fails else contextlib.nullcontext():
        said = answer(made, parts)
    before = [bytes(own[:8]) for own in memory]
    end = time.monotonic() + (0.5 if made.frozen() else PATIENCE)
    while any(bytes(own[:8]) == old for own, old in zip(memory, before, strict=True)):
        if time.monotonic() > end:
            return said, asked, len(pictures) == 1, False
        time.sleep(0.005)
    assert len(pids) == len(made.pids())
    return said, asked, len(pictures) == 1, True


def _counting(made: Cgroup, memory: mmap.mmap) -> int:
    """A process in the group that counts."""
    pid = os.fork()
    if pid == 0:
        try:
            made.add(os.getpid())
            number = random.randrange(1 << 30)
            while True:
                number += 1
                memory[:8] = number.to_bytes(8)
                time.sleep(0.001)
        finally:
            os._exit(1)
    while int.from_bytes(memory[:8]) == 0:
        time.sleep(0.001)
    return pid


def _run_away() -> NoReturn:
    while True:
        with contextlib.suppress(BlockingIOError):
            if os.fork():
                os._exit(0)
            os.setsid()
        time.sleep(0.02)


def _mother(made: Cgroup, runners: int) -> NoReturn:
    made.add(os.getpid())
    fuse()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.setsid()  # so that a signal for its process group is not one for the answer's
    for _ in range(runners):
        if os.fork() == 0:
            _run_away()
    while True:
        with contextlib.suppress(ChildProcessError):
            os.wait()
        time.sleep(0.02)


def _make_kill_slow(made: Cgroup, others: list[int]) -> None:
    """Let os.kill in this process wait first, as it may on a busy machine: no loop of kills is just lucky.

    A number that is nobody's by then may soon be somebody else's, so it goes to those of this exercise only.
    """
    kill = os.kill

    def slow(pid: int, number: int) -> None:
        time.sleep(0.05)
        if pid > 0 and pid not in {*made.pids(), *others, os.getpid()}:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        kill(pid, number)

    os.kill = slow


def _hunted(answer: Callable[[int], Any]) -> tuple[bool, bool, bool]:
    """Whether anybody is left in the group, whether the first process lives, whether those beside it do."""
    made, beside = group("hunted"), group("beside")
    made.set(Limits(pids=MOST))
    others = [waiting(lambda: beside.add(os.getpid())), waiting()]
    pid = os.fork()
    if pid == 0:
        try:
            _mother(made, 5)
        finally:
            os._exit(1)
    end = time.monotonic() + PATIENCE
    children = Path(f"/proc/{pid}/task/{pid}/children")
    while (len(made.pids()) < 6 or children.read_text()) and time.monotonic() < end:
        time.sleep(0.005)
    _make_kill_slow(made, others)
    answer(pid)
    end = time.monotonic() + 2.0
    while made.pids() and time.monotonic() < end:
        time.sleep(0.005)
    first_lives = pid in made.pids()
    return bool(made.pids()), first_lives, all(os.waitpid(one, os.WNOHANG) == (0, 0) for one in others)
