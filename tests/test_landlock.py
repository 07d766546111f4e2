"""Landlock, in children: what is given up is refused, what a rule allows is not, and none of it needs a privilege."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from labkernel.lab.fork import in_fork
from labkernel.linux import capabilities, landlock, syscalls
from labkernel.linux.landlock import ALL, READ, Access

pytestmark = pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")


def attempt(call: Callable[..., Any], *arguments: Any) -> int:
    """The errno with which a call fails, or 0."""
    try:
        call(*arguments)
    except OSError as error:
        return error.errno or -1
    return 0


def opened(path: Path | str, flags: int = os.O_RDONLY) -> int:
    return attempt(lambda: os.close(os.open(path, flags)))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two directories with a file in each."""
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("text")
    return tmp_path


def test_it_is_confined_to_a_directory(place: Path) -> None:
    def run() -> list[int]:
        before = os.open(place / "other" / "file", os.O_RDONLY)
        landlock.confine({str(place / "mine"): ALL})
        return [
            opened(place / "mine" / "file", os.O_RDWR),
            attempt((place / "mine" / "new").write_text, "x"),
            attempt(os.unlink, place / "mine" / "new"),
            opened(place / "other" / "file"),
            attempt(os.listdir, place / "other"),
            attempt((place / "other" / "new").write_text, "x"),
            attempt(os.unlink, place / "other" / "file"),
            attempt(os.execv, "/bin/true", ["true"]),
            attempt(os.stat, place / "other" / "file"),
            attempt(os.read, before, 1),
        ]

    refused = errno.EACCES
    assert in_fork(run) == [0, 0, 0, refused, refused, refused, refused, refused, 0, 0]


def test_reading_alone(place: Path) -> None:
    def run() -> list[int]:
        landlock.confine({str(place / "mine"): READ})
        mine = place / "mine"
        return [opened(mine / "file"), opened(mine / "file", os.O_WRONLY), attempt(os.mkdir, mine / "new")]

    assert in_fork(run) == [0, errno.EACCES, errno.EACCES]


def test_what_a_ruleset_is_not_about_stays_allowed(place: Path) -> None:
    def run() -> list[int]:
        ruleset = landlock.create_ruleset(Access.MAKE_DIR)
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        landlock.restrict_self(ruleset)
        return [attempt(os.mkdir, place / "new"), attempt((place / "new").write_text, "x")]

    assert in_fork(run) == [errno.EACCES, 0]


def test_it_can_only_be_narrowed_and_is_inherited(place: Path) -> None:
    def run() -> list[int]:
        landlock.confine({str(place / "mine"): ALL})
        landlock.confine({"/": ALL})
        there = place / "other" / "file"
        child = in_fork(opened, there)
        landlock.confine({str(place / "other"): ALL})
        return [opened(there), child, opened(place / "mine" / "file")]

    assert in_fork(run) == [errno.EACCES] * 3


def test_it_takes_the_promise_or_a_capability(place: Path) -> None:
    def run(promise: bool) -> int:
        capabilities.capset((), ())
        ruleset = landlock.create_ruleset(ALL)
        if promise:
            syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        return attempt(landlock.restrict_self, ruleset)

    assert in_fork(run, False) == errno.EPERM
    assert in_fork(run, True) == 0


def test_mistakes_say_what_was_asked_for(place: Path) -> None:
    ruleset = landlock.create_ruleset(Access.READ_FILE)
    try:
        with pytest.raises(OSError, match=r"landlock_add_rule.*WRITE_FILE.*EINVAL"):
            landlock.add_rule(ruleset, place, Access.WRITE_FILE)
        with pytest.raises(FileNotFoundError):
            landlock.add_rule(ruleset, place / "nowhere", Access.READ_FILE)
        with pytest.raises(OSError, match="landlock_create_ruleset"):
            landlock.create_ruleset(Access(1 << 40))
    finally:
        os.close(ruleset)


def test_confine_leaves_nothing_open(place: Path) -> None:
    def run() -> bool:
        before = os.listdir("/proc/self/fd")
        landlock.confine({str(place): ALL, "/proc": READ})
        return before == os.listdir("/proc/self/fd")

    assert in_fork(run)
