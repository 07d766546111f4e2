"""The checks of notebook 01: a program that was started, the namespaces one is in, and how a program ended."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.scratch import temporary
from labkernel.linux import namespaces, syscalls

STARTS_WITHIN = 3.0
"""Seconds that a program has to be there after it was started."""
RUNS_FOR = 6
"""Seconds that it runs, at most: an answer that puts it in its own place is waited for as long."""
OWN = ("uts", "ipc", "net", "cgroup")
"""Kinds of which a process can give itself a new one by an unshare alone."""
ENDS = {
    "exit 0": 0,
    "exit 3": 3,
    "exit 255": 255,
    "kill -TERM $$": 128 + signal.SIGTERM,
    "kill -KILL $$": 128 + signal.SIGKILL,
    "kill -USR1 $$": 128 + signal.SIGUSR1,
}
"""Commands for a shell, and the exit status that it has then."""


@exercise("01.1", looks_at="/proc/PID of the program: its words, environment, working directory and parent")
def start(answer: Callable[[list[str], str, dict[str, str]], int]) -> str:
    """A program that runs, with these words and variables, in this directory."""
    with temporary() as directory:
        run_answer(_judge_start, answer, str(directory))
    return "it runs, where and with what you were asked for."


@exercise("01.2", looks_at="/proc/PID/ns of three processes, two of which have been given new namespaces")
def my_namespaces(answer: Callable[[], dict[str, int]]) -> str:
    """The eight inode numbers, for whoever asks."""
    for own in ((), OWN[:2], OWN[2:]):
        run_answer(_judge_namespaces, answer, own)
    return "the right eight numbers for each of them."


@exercise("01.3", looks_at="what your function says of seven programs, and which zombies it leaves")
def run(answer: Callable[[list[str]], int]) -> str:
    """The exit status as a shell has it."""
    run_answer(_judge_run, answer)
    return "exit codes, signals and a program that is not there are told apart, and no zombie is left."


def _judge_start(answer: Callable[[list[str], str, dict[str, str]], int], directory: str) -> None:
    words = [shutil.which("sleep") or "/bin/sleep", str(RUNS_FOR)]
    variables = {"SECRET": secrets.token_hex(4), "EMPTY": ""}
    own_directory, own_variables = os.getcwd(), dict(os.environ)
    pid = answer(words, directory, variables)
    if not isinstance(pid, int) or pid <= 1:
        raise NotYet("it did not return the pid of a process")
    if os.getcwd() != own_directory or dict(os.environ) != own_variables:
        raise NotYet("the process that ran your function has another directory or environment now")
    if _status(pid, "PPid") != str(os.getpid()):
        raise NotYet("the program was not started by the process that ran your function")
    end = time.monotonic() + STARTS_WITHIN
    while _read(pid, "cmdline") != "".join(f"{word}\0" for word in words):
        if time.monotonic() > end:
            raise NotYet("no process of that number runs with these words")
        time.sleep(0.01)
    if os.readlink(f"/proc/{pid}/cwd") != os.path.realpath(directory):
        raise NotYet("its working directory is another one")
    if sorted(_read(pid, "environ").split("\0")[:-1]) != sorted(f"{k}={v}" for k, v in variables.items()):
        raise NotYet("its environment has more, or less, than the variables that were asked for")


def _judge_namespaces(answer: Callable[[], dict[str, int]], own: tuple[str, ...]) -> None:
    for kind in own:
        syscalls.unshare(namespaces.FLAGS[kind])
    expected = namespaces.inodes()
    found = answer()
    if not isinstance(found, dict):
        raise NotYet("it did not return a dictionary")
    if set(found) != set(expected):
        raise NotYet("the kinds are not the eight that there are")
    wrong = [kind for kind in expected if found[kind] != expected[kind]]
    if wrong:
        raise NotYet(f"the number is another one for {', '.join(wrong)}")


def _judge_run(answer: Callable[[list[str]], int]) -> None:
    for command, expected in ENDS.items():
        _expect(answer, ["sh", "-c", command], expected, f"sh -c '{command}'")
    _expect(answer, ["no-such-program-anywhere"], 127, "a program that is not there")
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return
    raise NotYet("it has left a child behind for which nobody has waited")


def _expect(answer: Callable[[list[str]], int], words: list[str], expected: int, what: str) -> None:
    ours = os.getpid()
    found = answer(words)
    if os.getpid() != ours:  # a copy of us that came back from the answer
        os._exit(1)
    if found != expected:
        raise NotYet(f"of {what} it says {found!r}, where a shell says something else")


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""


def _status(pid: int, name: str) -> Any:
    lines = _read(pid, "status").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith(f"{name}:")), "")
