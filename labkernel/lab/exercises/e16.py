"""The checks of notebook 16: a program that survives its limit, why one died, and the smallest limit for one."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labkernel.lab import calm
from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.group import group
from labkernel.lab.scratch import temporary
from labkernel.linux import cgroups
from labkernel.linux.cgroups import Cgroup

MIB = 1 << 20
ENOUGH = 16 * MIB
"""The limit of exercise 16.1."""
BLOCKS, LINES = 128, 4096
"""The file of 16.1: so many times the same lines, each of 64 bytes; 32 MiB, and an end of its own."""
TOO_MUCH = 1.35
"""A limit that could be divided by this is not the smallest one."""
FATES = {
    "out of memory": "one that the kernel killed for the limit",
    "killed": "one that somebody killed with SIGKILL",
    "full, then killed": "one that ran into its limit by reading a file, and was killed by somebody later",
    "terminated": "one that somebody sent SIGTERM",
    "ended": "one that ended with exit code 137",
    "lost a child": "one that ended with exit code 1, after its child had been killed for the limit",
    "lost a child, then terminated": "one that somebody sent SIGTERM, after its child had been killed for the limit",
}
"""Ways to die, of which 16.2 asks, and how its verdict calls them."""
RIGHT = {
    "full, then killed": "killed",
    "terminated": "killed",
    "lost a child": "ended",
    "lost a child, then terminated": "killed",
}
"""What is to be said of each, where it is not its own name."""


@exercise(
    "16.1", looks_at="how your function ends in a group with a limit of 16 MiB, and at the group's counters"
)
def total(answer: Callable[[Path], Any]) -> str:
    """A sum over a file that is twice as large as the limit."""
    with temporary() as place:
        path, right = place / "numbers", _numbers(place / "numbers")
        said, status, stats, stayed = run_answer(_under_limit, answer, path)
    if stats.oom_kills:
        raise NotYet("the kernel killed it: it wanted more than 16 MiB at once")
    if said.startswith("failed "):
        raise NotYet(f"it failed: {said.removeprefix('failed ')}")
    if status or not said:
        raise NotYet("it ended the process in which it ran")
    if not stayed:
        raise NotYet("it left the group that has the limit")
    if said != f"said {right}":
        raise NotYet("it survives, but what it returns is not the sum of the numbers")
    return "the sum is right and nobody was killed: the page cache of 32 MiB was charged too, and gave way."


@exercise("16.2", looks_at="what your function says of seven processes, whose groups are still there")
def why(answer: Callable[[int, Cgroup], Any]) -> str:
    """Who killed a process, from its status and the counters of its group."""
    with temporary() as place:
        path = _file(place, 48 * MIB)
        said = {
            fate: run_answer(_asked_why, answer, fate, path)
            for fate in random.sample(list(FATES), len(FATES))
        }
    for fate, words in FATES.items():  # the verdict does not depend on the order in which they died
        if said[fate] not in ("out of memory", "killed", "ended"):
            raise NotYet(f"one of three texts is asked for, and of {words} you say {said[fate]!r}")
        if said[fate] != RIGHT.get(fate, fate):
            raise NotYet(f"of {words}, you say something else")
    return "seven deaths, and each time the cause."


@exercise(
    "16.3", looks_at="how two programs end under the limit that you give, and under one a quarter smaller"
)
def smallest(answer: Callable[[Callable[[], Any]], Any]) -> str:
    """A limit under which a program lives, and not much more than that."""
    with temporary() as place:
        path = _file(place, 32 * MIB)
        # One small and one large, so that no single number is near enough for both.
        sizes = [random.randrange(8, 11) * MIB, random.randrange(24, 41) * MIB]
        random.shuffle(sizes)
        _judge_limit(answer, "a program that only computes", sizes[0], None)
        _judge_limit(answer, "a program that reads a file too", sizes[1], path)
    return "both programs live under your limits, and would not with a quarter less."


def _judge_limit(answer: Callable[..., Any], words: str, size: int, reads: Path | None) -> None:
    limit = run_answer(_asked_for_limit, answer, size, reads)
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise NotYet(f"a number of bytes is asked for, and this is {type(limit).__name__}")
    if not MIB <= limit <= 1 << 40:
        raise NotYet(f"a number of bytes is asked for, 1 MiB or more, and of {words} you say {limit}")
    if not any(
        run_answer(_lives, limit, size, reads) for _ in range(3)
    ):  # just at the edge it may go either way
        raise NotYet(f"under your limit, {words} is killed")
    if run_answer(_lives, int(limit / TOO_MUCH), size, reads):
        raise NotYet(f"with a quarter less, {words} would still come to its end")


def _file(place: Path, size: int) -> Path:
    """A file that is on the disk: what is not yet cannot be forgotten, and so is not charged to who reads it."""
    path = place / "file"
    with path.open("wb") as file:
        file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())
    return path


def _numbers(path: Path) -> int:
    """Write the file of 16.1; the sum of what is in it."""
    numbers = [random.randrange(10**62, 10**63) for _ in range(LINES)]
    rest = [random.randrange(10**62, 10**63) for _ in range(random.randrange(1, LINES))]
    block = "".join(f"{number}\n" for number in numbers)
    with path.open("w") as file:
        for _ in range(BLOCKS):
            file.write(block)
        file.writelines(f"{number}\n" for number in rest)
        file.flush()
        os.fsync(file.fileno())
    return BLOCKS * sum(numbers) + sum(rest)


def _limited(size: int) -> Cgroup:
    """A group with this limit, and without swap."""
    box = group("check")
    box.set(cgroups.Limits(memory=size, memory_swap=0))
    return box


def _start_in(box: Cgroup, program: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            box.add(os.getpid())
            code = program() or 0
        finally:
            os._exit(code)
    return pid


def _under_limit(answer: Callable[[Path], Any], path: Path) -> tuple[str, int, cgroups.Stats, bool]:
    """What an answer says under the limit, how it ends, what its group has used, whether it stayed there."""
    box = _limited(ENOUGH)
    said, say = os.pipe()

    def program() -> int:
        os.close(said)
        where = cgroups.own_paths()
        try:
            text = f"said {answer(path)!r}"
        except Exception as error:
            text = f"failed {calm.in_words(error)}"
        os.write(say, f"{int(cgroups.own_paths() == where)}{text[:4000]}".encode())
        return 0

    pid = _start_in(box, program)
    os.close(say)
    with open(said, encoding="utf-8", errors="replace") as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    return text[1:], status, box.stats(), text[:1] == "1"


def _asked_why(answer: Callable[[int, Cgroup], Any], fate: str, path: Path) -> Any:
    """Let a process die in this way, and ask."""
    box = _limited(32 * MIB)
    ready, say = os.pipe()
    pid = _start_in(box, lambda: _meet(fate, path, say))
    os.close(say)
    signals = {
        "killed": signal.SIGKILL,
        "full, then killed": signal.SIGKILL,
        "terminated": signal.SIGTERM,
        "lost a child, then terminated": signal.SIGTERM,
    }
    if fate in signals:
        os.read(ready, 1)
        os.kill(pid, signals[fate])
    _, status = os.waitpid(pid, 0)
    return answer(status, box)


def _meet(fate: str, path: Path, say: int) -> int:
    """In the process that is to die."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if fate == "out of memory":
        _touch(64 * MIB)
    if fate == "ended":
        return 137
    if fate.startswith("lost a child"):
        child = os.fork()
        if child == 0:
            try:
                _touch(64 * MIB)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    if fate == "lost a child":
        return 1
    if fate == "full, then killed":
        _read(path)
    os.write(say, b".")
    signal.pause()
    return 0


def _asked_for_limit(answer: Callable[..., Any], size: int, reads: Path | None) -> Any:
    return answer(lambda: _work(size, reads))


def _lives(limit: int, size: int, reads: Path | None) -> bool:
    """Whether the program comes to its end under a limit."""
    box = _limited(limit)
    return os.waitpid(_start_in(box, lambda: _work(size, reads)), 0)[1] == 0


def _work(size: int, reads: Path | None) -> None:
    """The program of 16.3."""
    block = _touch(size)
    if reads:
        _read(reads)
    block.close()


def _touch(size: int) -> mmap.mmap:
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, size, mmap.PAGESIZE):
        block[page] = 1
    return block


def _read(path: Path) -> None:
    """Read a file from the disk, so that its page cache is charged to us, whoever has read it before."""
    with path.open("rb", buffering=0) as file:
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(MIB):
            pass
