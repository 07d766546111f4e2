"""The checks of notebook 13: a year more of uptime, a clock that goes on after a restore, and a wall of glass."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from labkernel.lab import calm
from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.fork import in_fork
from labkernel.linux import namespaces, syscalls

DAY = 86400
YEAR = 365 * DAY
EXACTLY = 0.1
"""Seconds by which a clock may be wrong."""


@dataclass(frozen=True)
class Clocks:
    """What a process reads off its clocks, all at one moment, in seconds."""

    realtime: float
    monotonic: float
    boottime: float
    uptime: float
    """/proc/uptime."""
    namespace: int
    """The inode number of its time namespace."""

    @classmethod
    def read(cls) -> Clocks:
        """Read the clocks of this process."""
        return cls(
            time.clock_gettime(time.CLOCK_REALTIME),
            time.clock_gettime(time.CLOCK_MONOTONIC),
            time.clock_gettime(time.CLOCK_BOOTTIME),
            float(Path("/proc/uptime").read_text().split()[0]),
            namespaces.inodes()["time"],
        )


@exercise(
    "13.1", looks_at="the clocks, /proc/uptime and the time namespace of the process that runs `program`"
)
def year_older(answer: Callable[[Callable[[], Any]], Any]) -> str:
    """The boot clock is a year ahead, the monotonic one is not, in a time namespace of its own."""
    before, inside = run_answer(_clocks_inside, answer)
    if inside.namespace == before.namespace:
        raise NotYet("`program` runs in the time namespace that was there before")
    passed = inside.realtime - before.realtime
    boot, monotonic = (
        inside.boottime - before.boottime - passed,
        inside.monotonic - before.monotonic - passed,
    )
    if abs(boot - YEAR) > EXACTLY:
        raise NotYet(f"its boot clock is ahead by {_days(boot)}, and {_days(YEAR)} are asked for")
    if abs(inside.uptime - inside.boottime) > 1:
        raise NotYet("its /proc/uptime says something else than its boot clock")
    if abs(monotonic) > EXACTLY:
        raise NotYet(f"its monotonic clock is to stay as it was, and is ahead by {_days(monotonic)}")
    return "its uptime is a year more than the machine's, and its monotonic clock is the machine's."


@exercise("13.2", looks_at="the monotonic clock of the process that runs `program`, after two checkpoints")
def resume(answer: Callable[[float, Callable[[], Any]], Any]) -> str:
    """The monotonic clock goes on from where it stood at the checkpoint, be that later or earlier than ours."""
    for of_a_machine, factor in (
        ("that had been up for longer", 3.0),
        ("that had not been up for so long", 0.5),
    ):
        saved = time.monotonic() * factor + random.random()
        before, inside = run_answer(_clocks_inside, answer, saved)
        passed = inside.realtime - before.realtime
        if inside.namespace == before.namespace:
            raise NotYet("`program` runs in the time namespace that was there before")
        ahead = inside.monotonic - saved
        if not -EXACTLY < ahead < passed + EXACTLY:
            wrong = ahead if ahead < 0 else ahead - passed
            words = f"{abs(wrong):.1f} seconds {'behind' if ahead < 0 else 'ahead'}"
            raise NotYet(f"after a checkpoint on a machine {of_a_machine}, its clock is {words}")
    return "its clock goes on from where it stood, whichever machine it was saved on."


@exercise(
    "13.3", looks_at="what your function says in two time namespaces, and how long the machine has been up"
)
def true_uptime(answer: Callable[[], Any]) -> str:
    """The machine's uptime, found out by somebody whose own boot clock is moved."""
    for _ in range(2):
        offset = random.uniform(30 * DAY, 900 * DAY)
        before = time.clock_gettime(time.CLOCK_BOOTTIME)
        said = run_answer(_in_moved_time, answer, offset)
        after = time.clock_gettime(time.CLOCK_BOOTTIME)
        if not isinstance(said, int | float):
            raise NotYet(f"a number of seconds is asked for, and this is {type(said).__name__}")
        if not before - 1 < said < after + 1:
            how = "small" if said < before else "large"
            raise NotYet(f"your number is too {how}: that is not how long the machine has been up")
    return "both times it is the machine's own uptime."


def _clocks_inside(answer: Callable[..., Any], *arguments: Any) -> tuple[Clocks, Clocks]:
    """The clocks before the answer was called, and those that its `program` has read."""
    read, write = os.pipe()

    def program() -> None:
        os.write(write, json.dumps(asdict(Clocks.read())).encode() + b"\n")

    before = Clocks.read()
    child = os.fork()
    if child == 0:
        try:
            answer(*arguments, program)
        except Exception as error:
            os.write(write, json.dumps({"failed": calm.in_words(error)}).encode() + b"\n")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with open(read, encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    for one in found:
        if "failed" in one:
            raise NotYet(f"it failed: {one['failed']}")
    if len(found) != 1:
        raise NotYet("`program` was never called" if not found else "`program` was called more than once")
    return before, Clocks(**found[0])


def _in_moved_time(answer: Callable[[], Any], offset: float) -> Any:
    syscalls.unshare(syscalls.CLONE_NEWTIME)
    namespaces.set_time_offsets(boottime=offset, monotonic=offset / 2)
    return in_fork(answer)


def _days(seconds: float) -> str:
    return f"{seconds / DAY:.1f} days"
