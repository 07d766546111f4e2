"""Checks of exercises: three answers, made from what was seen, and never a traceback."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labkernel import in_child, lab
from labkernel.lab import checks
from labkernel.lab.checks import EXERCISES, NotYet, Verdict, check, exercise, forget, run_answer
from labkernel.lab.watch import watched
from tests.helpers import own_home


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


@pytest.fixture
def even() -> Iterator[str]:
    """An exercise: an even number. Its name belongs to notebook 00, so that its module is found."""

    @exercise("00.even", looks_at="your number")
    def judge(answer: int) -> str:
        if answer % 2:
            raise NotYet("it is odd")
        return "it is even."

    yield "00.even"
    del EXERCISES["00.even"]
    forget()


def test_passes(even: str) -> None:
    verdict = check(even, 2)
    assert verdict
    assert repr(verdict) == "Exercise 00.even. Looking at your number …\nPasses: it is even."


def test_not_yet(even: str) -> None:
    verdict = check(even, 3)
    assert not verdict
    assert verdict.words == "Not yet, because it is odd"


def test_was_right_and_no_longer_is(even: str) -> None:
    assert check(even, 2)
    assert check(even, 3).words == "Was right and no longer is, because it is odd"
    assert check(even, 4)
    forget()
    assert check(even, 3).words.startswith("Not yet")


def test_an_exercise_that_is_not_there() -> None:
    with pytest.raises(KeyError):
        check("00.99", 1)


def fails() -> None:
    raise ValueError("wrong turn")


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leaves() -> None:
    raise SystemExit(3)


def refused() -> None:
    os.listdir("/no/such/place")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "a function is asked for"),
        (fails, "ValueError: wrong turn"),
        (dies, "killed by SIGKILL"),
        (leaves, "exit status 3"),
        (refused, "ENOENT, No such file or directory: /no/such/place"),
    ],
)
def test_an_answer_that_fails_is_not_yet_in_words(answer: Any, words: str) -> None:
    with pytest.raises(NotYet, match=words):
        run_answer(answer)


def test_an_answer_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "PATIENCE", 0.3)
    with pytest.raises(NotYet, match="still running"):
        run_answer(time.sleep, 60)


def test_an_answer_runs_in_a_child() -> None:
    assert run_answer(os.getpid) != os.getpid()


def test_watched_stops_after_each_step() -> None:
    def watch() -> list[str]:
        def one() -> None:
            os.chdir("/proc")

        def two() -> None:
            os.chdir("/")

        with watched(one, two) as go_on:
            return [os.readlink(f"/proc/{go_on()}/cwd") for _ in range(2)]

    assert in_child(watch) == ["/proc", "/"]


def test_watched_also_when_the_child_stops_before_it_is_waited_for() -> None:
    def watch() -> str:
        with watched(lambda: os.chdir("/proc")) as go_on:
            time.sleep(0.2)
            return os.readlink(f"/proc/{go_on()}/cwd")

    assert in_child(watch) == "/proc"


def test_watched_says_how_a_step_failed_and_leaves_no_process() -> None:
    def watch() -> str:
        try:
            with watched(fails) as go_on:
                go_on()
        except NotYet as reason:
            return str(reason)
        return ""

    def with_closed_doors() -> str:
        def step() -> None:
            os.closerange(0, 4096)
            fails()

        try:
            with watched(step) as go_on:
                go_on()
        except NotYet as reason:
            return str(reason)
        return ""

    def silent() -> str:
        try:
            with watched(lambda: os._exit(0)) as go_on:
                go_on()
        except NotYet as reason:
            return str(reason)
        return ""

    def left_alive() -> bool:
        with watched(os.getpid) as go_on:
            pid = go_on()
        return os.path.exists(f"/proc/{pid}")

    assert in_child(watch) == "it failed: ValueError: wrong turn"
    assert in_child(with_closed_doors) == "it failed: ValueError: wrong turn"
    assert in_child(silent) == "it ended the process before it was done"
    assert in_child(left_alive) is False


def test_a_verdict_shows_no_place_of_this_machine(home: Path) -> None:
    @exercise("00.place", looks_at="a place")
    def judge() -> str:
        raise NotYet(f"{home}/containers is empty")

    try:
        assert check("00.place").words == "Not yet, because LAB/containers is empty"
    finally:
        del EXERCISES["00.place"]


def test_the_lab_offers_it() -> None:
    assert lab.check is check
    assert bool(Verdict("x", "y", True, "z"))
