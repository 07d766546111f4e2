"""Checks of exercises: they say what they look at, look at the kernel's state, and have three answers.

Passes; not yet, because …; was right and no longer is. The checks themselves are in `labkernel.lab.exercises`, one
module a notebook: a function with the decorator `exercise` gets the reader's answer, returns what it found, or raises
`NotYet` with what is missing, in words that do not contain the solution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from labkernel.children import ChildFailed, in_child
from labkernel.lab import calm

PATIENCE = 20.0
"""Seconds after which an answer that is still running is given up."""


class NotYet(Exception):
    """The answer is not right yet; the text continues the sentence "not yet, because …"."""


@dataclass(frozen=True)
class Exercise:
    """One check: its name, what it looks at, and the function that does."""

    name: str
    looks_at: str
    judge: Callable[..., str]


@dataclass(frozen=True)
class Verdict:
    """The answer of a check."""

    name: str
    looks_at: str
    passed: bool
    words: str

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return f"Exercise {self.name}. Looking at {self.looks_at} …\n{self.words}"


EXERCISES: dict[str, Exercise] = {}
_passed: set[str] = set()


def exercise(name: str, *, looks_at: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Make a function the check of an exercise. The name is the notebook's number and the exercise's: "03.1"."""

    def register(judge: Callable[..., str]) -> Callable[..., str]:
        EXERCISES[name] = Exercise(name, looks_at, judge)
        return judge

    return register


def check(name: str, *answer: Any) -> Verdict:
    """Check the answer to an exercise. The verdict is true when it passes. Raises KeyError: no such exercise."""
    import_module(f"labkernel.lab.exercises.e{name.partition('.')[0]}")
    found = EXERCISES[name]
    try:
        words, passed = "Passes: " + found.judge(*answer), True
        _passed.add(name)
    except NotYet as reason:
        before = "Was right and no longer is" if name in _passed else "Not yet"
        words, passed = f"{before}, because {reason}", False
    return Verdict(name, found.looks_at, passed, calm.scrub(words))


def forget() -> None:
    """Forget which exercises were right before."""
    _passed.clear()


def run_answer(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run an answer in a child of the lab and return its value. However it fails, it is `NotYet`, in words."""
    if not callable(function):
        raise NotYet(f"a function is asked for, and this is {type(function).__name__}")
    try:
        return in_child(function, *arguments, timeout=PATIENCE)
    except NotYet:
        raise
    except TimeoutError:
        raise NotYet(f"it was still running after {PATIENCE:.0f} seconds") from None
    except ChildFailed as error:
        raise NotYet(f"{error}") from None
    except Exception as error:
        raise NotYet(f"it failed: {calm.in_words(error)}") from None
