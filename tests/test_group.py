"""Control groups that a notebook's child makes by hand: they are gone when it is, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from labkernel import in_child, lab
from labkernel.linux import syscalls
from tests.helpers import facts

PATIENCE = 20.0


def made(deeper: bool = False) -> list[str]:
    """Make a group, and move into it; a process that ignores what one can ignore stays in it."""
    group = lab.group("test")
    group.add(os.getpid())
    for directory in set(group.paths.values()) if deeper else ():
        os.mkdir(f"{directory}/inner")
        Path(directory, "inner", "cgroup.procs").write_text("0")
    lab.waiting(lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    return list(group.paths.values())


def gone(paths: list[str]) -> bool:
    """Whether none of these directories is there, soon."""
    end = time.monotonic() + PATIENCE
    while any(os.path.isdir(path) for path in paths):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture(autouse=True)
def _groups() -> None:
    if why := facts()["no_cgroup"]:
        pytest.skip(f"no control group can be made here: {why}")


@pytest.mark.parametrize("deeper", [False, True])
def test_it_is_gone_with_the_child_that_made_it(deeper: bool) -> None:
    paths = in_child(made, deeper)
    assert paths and gone(paths)


CLIENT = """
import os, signal
from labkernel import in_child
from tests.test_group import made
def stay():
    print(os.getpid(), os.getppid(), *made(), flush=True)
    signal.pause()
in_child(stay)
"""


@pytest.mark.parametrize("whom", ["the child", "the notebook's kernel", "the launcher"])
def test_it_is_gone_when_somebody_is_killed(whom: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-u", "-c", CLIENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as client:
        assert client.stdout
        child, launcher, *paths = client.stdout.readline().split()
        assert paths and all(os.path.isdir(path) for path in paths)
        victims = {
            "the child": int(child),
            "the notebook's kernel": client.pid,
            "the launcher": int(launcher),
        }
        os.kill(victims[whom], signal.SIGKILL)
        client.wait(PATIENCE)
    if whom == "the launcher":
        subprocess.run([sys.executable, "-m", "labkernel", "clean"], check=True)
    assert gone(paths)


def test_it_lies_where_the_others_do_also_for_who_is_in_a_cgroup_namespace() -> None:
    def within() -> tuple[list[str], list[str]]:
        first = lab.group("first")
        syscalls.unshare(syscalls.CLONE_NEWCGROUP)
        return list(first.paths.values()), list(lab.group("second").paths.values())

    first, second = in_child(within)
    assert [os.path.dirname(path) for path in first] == [os.path.dirname(path) for path in second]
    assert gone(first + second)


def test_two_children_have_groups_of_the_same_name() -> None:
    assert in_child(made) != in_child(made)
