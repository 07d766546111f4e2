"""in_fork: the second fork, which pid and time namespaces ask for. waiting: a process to look at."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from labkernel.children import ChildFailed, in_child
from labkernel.lab.fork import in_fork, waiting
from labkernel.linux import syscalls
from tests.helpers import own_home


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


def forked(function: Callable[..., Any], *arguments: Any) -> Any:
    return in_child(in_fork, function, *arguments, timeout=60)


def test_the_value_comes_back() -> None:
    assert forked(lambda a, b: [a + b] * 100_000, 1, 2) == [3] * 100_000


def test_it_is_another_process_and_the_first_of_a_pid_namespace() -> None:
    def work() -> tuple[int, int]:
        syscalls.unshare(syscalls.CLONE_NEWPID)
        return in_fork(os.getpid), os.getpid()

    inside, outside = in_child(work)
    assert inside == 1
    assert outside != 1


def test_what_is_printed_comes_once_and_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        print("one", end=" ")
        in_fork(print, "two", "three")
        print("four")

    in_child(work)
    assert capsys.readouterr().out == "one two three\nfour\n"


def test_what_it_raises_is_raised() -> None:
    class Own(Exception):
        """Known to nobody else."""

    def work() -> None:
        raise FileNotFoundError(2, "not there", "/x")

    def own() -> None:
        raise Own("mine")

    with pytest.raises(FileNotFoundError, match="not there"):
        forked(work)
    with pytest.raises(Exception, match="mine"):
        forked(own)


def test_a_violent_end_is_told() -> None:
    def how(function: Callable[..., Any], *arguments: Any) -> tuple[str, int]:
        with pytest.raises(ChildFailed) as caught:
            in_fork(function, *arguments)
        return str(caught.value), caught.value.status

    killed = in_child(how, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert killed == ("the process was killed by SIGKILL", 137)
    assert in_child(how, os._exit, 5) == ("the process ended with exit status 5 and no value", 5)


def test_somebody_who_lives_on_does_not_hold_it_up() -> None:
    def work() -> str:
        if os.fork() == 0:
            time.sleep(1000)
        return "done"

    before = time.monotonic()
    assert forked(work) == "done"
    assert time.monotonic() - before < 100


def test_a_process_waits_when_it_has_done_its_steps() -> None:
    def work() -> tuple[bool, str, bool]:
        done, do = os.pipe()
        pid = waiting(lambda: os.write(do, b"one "), lambda: os.write(do, b"two"))
        return pid != os.getpid(), os.read(done, 100).decode(), Path(f"/proc/{pid}").exists()

    assert in_child(work) == (True, "one two", True)


def test_it_ends_with_whoever_started_it() -> None:
    pid = in_child(waiting)
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():  # killed at once, and reaped by the launcher a moment later
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_a_step_raises_is_raised_here() -> None:
    with pytest.raises(ZeroDivisionError):
        in_child(waiting, lambda: 1 // 0)
    with pytest.raises(ChildProcessError, match="before it had done"):
        in_child(waiting, lambda: os._exit(0))
