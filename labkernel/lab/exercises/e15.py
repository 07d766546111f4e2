"""The checks of notebook 15: a quota for a given share, weights for given parts, and who is throttled just now."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.group import group
from labkernel.linux import cgroups
from labkernel.linux.cgroups import Cgroup, Limits

WITHIN = 0.1
"""How far what is measured may be from what is asked for."""
TRIES = 5
"""How often it is measured, where somebody else may have wanted the CPU in the meantime."""
FIRST = 10_000
"""The weight of who shall not be disturbed by what else the machine does."""
PARTS = (1, 2, 5)
LEAST_USEC = 150_000
"""CPU time that each competitor has had when their parts are compared."""
LOOK = 0.5
"""Seconds for which those groups have run that a careless look takes for throttled, or for not throttled."""


@exercise("15.1", looks_at="the group's quota and period, and the CPU time that its process gets")
def give(answer: Callable[[Cgroup, float], Any]) -> str:
    """A share of a core, with a period that is given."""
    for cores, period in zip(random.sample((0.2, 0.3, 0.4), 2), (50_000, 200_000), strict=True):
        run_answer(_judge_share, answer, cores, period)
    return "both times the process gets the share that was asked for, within 10 %."


@exercise("15.2", looks_at="the CPU time of three busy groups on one CPU, after your function")
def divide(answer: Callable[[Sequence[Cgroup], int], Any]) -> str:
    """One CPU in parts of 1, 2 and 5, by weights of which the first is given."""
    run_answer(_judge_parts, answer, random.choice((150, 250, 350, 600)))
    return "the first group has an eighth of the CPU, the second two, the third five, within 10 %."


@exercise("15.3", looks_at="what your function says of five groups, and their counters before and after")
def throttled(answer: Callable[[Mapping[str, Cgroup]], Any]) -> str:
    """Who is throttled now; not who was, who has a quota, or who uses much."""
    names = random.sample(("ant", "bee", "cat", "dog", "eel"), 5)
    for order in (names, names[2:] + names[:2]):  # others are throttled the second time
        run_answer(_judge_throttled, answer, order)
    return "both times you have found out who was throttled at that moment, and nobody else."


# ---------------------------------------------------------------------- 15.1


def _judge_share(answer: Callable[..., Any], cores: float, period: int) -> None:
    made = group("asked")
    made.set(Limits(cpu_weight=FIRST))
    _write_quota(made, None, period)
    answer(made, cores)
    quota, now = _quota(made)
    if quota is None:
        raise NotYet("no quota stands in the group's file")
    if now != period:
        raise NotYet("the period is not the one that the group had")
    if abs(quota / now - cores) > 0.01 * cores:
        kind = "more" if quota / now > cores else "less"
        raise NotYet(f"the quota in its file is {kind} than was asked for, for this period")
    _busy(made)
    for _ in range(TRIES):
        before, start = made.stats().cpu_usec, time.monotonic()
        time.sleep(0.6)
        measured = (made.stats().cpu_usec - before) / 1e6 / (time.monotonic() - start)
        if abs(measured - cores) <= WITHIN * cores:
            return
    raise NotYet("the file is right, but the process in the group gets another share")


# ---------------------------------------------------------------------- 15.2


def _judge_parts(answer: Callable[..., Any], first: int) -> None:
    groups = [group(name) for name in ("first", "second", "third")]
    groups[0].set(Limits(cpu_weight=first))
    given = _limit_texts(groups[0])
    for made in groups:
        _busy(made, max(os.sched_getaffinity(0)))
    answer(groups, first)
    if _limit_texts(groups[0]) != given:
        raise NotYet("the first group has no longer the weight, or the quota, that it had")
    if any(_quota(made)[0] is not None for made in groups):
        raise NotYet("there is a quota, and weights are asked for")
    for number in range(3):
        parts = _parts(groups)
        wrong = [abs(has - due) > WITHIN * due for has, due in zip(parts, PARTS, strict=True)]
        if not any(wrong):
            return
        if number == 0 and parts[1] > parts[2]:
            break  # no chance of that by accident
    which = 2 if parts[2] < PARTS[2] * (1 - WITHIN) else 1 if parts[1] < PARTS[1] * (1 - WITHIN) else 0
    name = ("first", "second", "third")[which]
    kind = "less" if parts[which] < PARTS[which] else "more"
    raise NotYet(f"of all that the three use, the {name} group has {kind} than its {PARTS[which]} of 8 parts")


def _parts(groups: Sequence[Cgroup]) -> list[float]:
    """What each uses of the CPU, in eighths of what all of them do, until everybody has had enough to compare."""
    before = [made.stats().cpu_usec for made in groups]
    end = time.monotonic() + 5
    while True:
        time.sleep(0.02)
        used = [made.stats().cpu_usec - start for made, start in zip(groups, before, strict=True)]
        if min(used) > LEAST_USEC or time.monotonic() > end:
            return [sum(PARTS) * one / (sum(used) or 1) for one in used]


# ---------------------------------------------------------------------- 15.3


def _judge_throttled(answer: Callable[..., Any], names: Sequence[str]) -> None:
    """Two are throttled; one was; one has a quota and does not use it up; one has none."""
    groups = {name: group(name) for name in sorted(names)}
    greedy, hungry, pardoned, modest, free = (groups[name] for name in names)
    for made, quota in ((greedy, 20_000), (hungry, 10_000), (pardoned, 15_000), (modest, 60_000)):
        made.set(Limits(cpu_weight=FIRST))
        _write_quota(made, quota, 100_000)
    for made in (greedy, hungry, pardoned, free):
        _busy(made)
    _busy(modest, pause=0.03)
    time.sleep(LOOK)
    _write_quota(pardoned, None, 100_000)
    pardoned.set(Limits(cpu_weight=100))  # out of the others' way
    time.sleep(0.2)
    before = _throttled_periods(groups)
    said = answer(groups)
    if not isinstance(said, Collection) or isinstance(said, str | bytes):
        raise NotYet(f"a set of names is asked for, and this is {type(said).__name__}")
    time.sleep(0.3)
    after = _throttled_periods(groups)
    right = {name for name in groups if after[name] > before[name]} - {
        name
        for name in groups
        if groups[name] is modest  # a stalled machine may charge it too much, once
    }
    if missing := right - set(said):
        raise NotYet(f"you say nothing of {len(missing)} that the kernel keeps waiting at this moment")
    if pardoned in [groups.get(name) for name in said]:
        raise NotYet("you name one that was kept waiting once, and is no longer")
    if set(said) - right:
        raise NotYet("you name one that does not wait for any quota")


def _throttled_periods(groups: Mapping[str, Cgroup]) -> dict[str, int]:
    return {name: made.stats().cpu_throttled_periods for name, made in groups.items()}


# ---------------------------------------------------------------------- files and processes


def _cpu_directory(made: Cgroup) -> Path:
    return Path(made.paths["cpu" if made.version == 1 else ""])


def _write_quota(made: Cgroup, quota: int | None, period: int) -> None:
    place = _cpu_directory(made)
    if made.version == 2:
        cgroups.write(place / "cpu.max", f"{'max' if quota is None else quota} {period}")
    else:
        cgroups.write(place / "cpu.cfs_quota_us", "-1")
        cgroups.write(place / "cpu.cfs_period_us", str(period))
        cgroups.write(place / "cpu.cfs_quota_us", str(-1 if quota is None else quota))


def _quota(made: Cgroup) -> tuple[int | None, int]:
    """The quota, None for none, and the period, in microseconds."""
    place = _cpu_directory(made)
    if made.version == 2:
        quota, period = cgroups.read(place / "cpu.max").split()
    else:
        quota, period = cgroups.read(place / "cpu.cfs_quota_us"), cgroups.read(place / "cpu.cfs_period_us")
    return int(quota) if quota.strip().isdigit() else None, int(period)


def _limit_texts(made: Cgroup) -> dict[str, str]:
    return {path: text for path, text in made.limits_written().items() if "/cpu." in path}


def _busy(made: Cgroup, cpu: int | None = None, pause: float = 0.0) -> None:
    """Put a process into the group that wants a CPU all the time, or a little and then a pause."""
    pid = os.fork()
    if pid == 0:
        _work(cpu, pause)
    made.add(pid)


def _work(cpu: int | None, pause: float) -> NoReturn:
    try:
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})
        while True:
            if pause:
                time.sleep(pause)
                tired = time.process_time() + 0.005
                while time.process_time() < tired:
                    pass
    finally:
        os._exit(1)
