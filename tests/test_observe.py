"""Observing: what a program in a container names, by which calls and from where, and how it ends."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from labkernel import children, images, observe
from labkernel.container import Container
from labkernel.image.closure import closure
from labkernel.image.pack import pack
from labkernel.lab.scratch import temporary
from labkernel.linux import seccomp
from labkernel.observe import Observation
from tests.helpers import own_home


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


@pytest.fixture(scope="module")
def root(home: Path) -> Iterator[Path]:
    """A shell, a few programs and a few files."""
    content = closure(["sh", "cat", "grep", "ls"])
    for path in ("/data/a", "/data/b", "/data/deep/c"):
        content.file(path, f"in {path}\n".encode(), "a test")
    content.file("/data/script", b"#!/bin/sh\nread -r line < b\n", "a test", 0o755)
    content.symlink("/data/link", "/data/deep", "a test")
    content.symlink("/data/round", "/data/round", "a test")
    content.symlink("/other", "/data/a", "a test", absolute=True)
    with temporary() as place:
        pack(content, place / "root.tar", compression="none")
        images.unpack_for_containers(place / "root.tar", place / "root")
        yield place / "root"


def seen(root: Path, *command: str, **options: Any) -> Observation:
    return observe.observe(Container(root, command, **options), timeout=30)


def shell(root: Path, script: str, **options: Any) -> Observation:
    return seen(root, "sh", "-c", script, **options)


def in_data(paths: Sequence[str] | frozenset[str]) -> set[str]:
    return {path for path in paths if path.startswith("/data/")}


def test_what_it_opens_asks_about_and_does_not_find(root: Path) -> None:
    found = shell(root, "read -r line < /data/a; test -s /data/b; test -e /data/nothing || echo $line")
    assert (found.returncode, found.stdout) == (0, b"in /data/a\n")
    assert in_data(found.opened) == {"/data/a"}
    assert in_data(found.asked) == {"/data/b"}
    assert in_data(found.missing) == {"/data/nothing"}
    assert found.succeeded and not found.stopped


def test_its_libraries_and_those_of_its_children_and_not_our_python(root: Path) -> None:
    found = shell(root, "cat /data/a | grep -q a")
    assert any(path.endswith("/libc.so.6") for path in found.opened)
    assert {"/usr/bin/cat", "/usr/bin/grep"} <= found.opened
    assert not any("python" in path for path in found.opened)


@pytest.mark.parametrize(
    "script",
    [
        "cd /data; read -r line < ./deep/../b",
        "cd /data/deep; cd ..; cat b",
        "cat /data/./link/../b",
        "cat /../../data//b",
        "cd data; cat /proc/self/cwd/b",
    ],
)
def test_a_path_is_followed_as_the_kernel_does(root: Path, script: str) -> None:
    found = shell(root, script)
    assert found.returncode == 0, found.stderr
    assert "/data/b" in found.opened or "/proc/self" in script


def test_links_on_the_way_are_told(root: Path) -> None:
    found = shell(root, "cat /data/link/c /other")
    assert in_data(found.opened) == {"/data/deep/c", "/data/a"}
    assert {"/data/link", "/other"} <= found.links


def test_a_link_to_itself_is_no_trap(root: Path) -> None:
    assert shell(root, "cat /data/round").returncode == 1


def test_a_script_and_where_it_starts(root: Path) -> None:
    found = seen(root, "/data/script", workdir="/data")
    assert found.returncode == 0, found.stderr
    assert {"/data/script", "/data/b"} <= found.opened


def test_how_it_ended_and_what_it_said(root: Path) -> None:
    found = shell(root, "echo out; echo err >&2; exit 3")
    assert (found.returncode, found.stdout, found.stderr) == (3, b"out\n", b"err\n")
    assert not found.succeeded
    assert seen(root, "/nothing").returncode == 127


def test_much_output_does_not_stop_it(root: Path) -> None:
    found = shell(root, "i=0; while [ $i -lt 20000 ]; do echo 0123456789; i=$((i+1)); done; cat /data/a >&2")
    assert (len(found.stdout), found.stderr) == (220_000, b"in /data/a\n")


def test_one_that_does_not_end_is_watched_for_as_long_as_was_asked(root: Path) -> None:
    server = "trap 'cat /data/b; exit 0' TERM; while :; do read -r line < /data/a; done"
    found = observe.observe(Container(root, ["sh", "-c", server]), enough=0.5)
    assert found.stopped and found.succeeded
    assert in_data(found.opened) == {"/data/a", "/data/b"}


def test_one_that_takes_too_long_is_killed(root: Path) -> None:
    container = Container(root, ["sh", "-c", "trap '' TERM; while :; do :; done"])
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        observe.observe(container, timeout=1)
    assert time.monotonic() - start < 20
    assert not container.running()


def test_what_runs_on_in_the_background_ends_with_it(root: Path) -> None:
    start = time.monotonic()
    found = shell(root, "while :; do :; done & cat /data/a")
    assert found.returncode == 0 and time.monotonic() - start < 20


def name_in_what_is_killed() -> str:
    """A name in the memory of a process that dies when that has been opened and not read yet."""
    process, real = subprocess.Popen(["sleep", "100"]), os.open

    def open_and_kill(path: str, flags: int) -> int:
        memory = real(path, flags)
        process.kill()
        process.wait()
        return memory

    os.open = open_and_kill  # type: ignore[assignment]
    return observe._Watch.name(process.pid, 0x1000)


def test_one_that_is_killed_while_it_is_looked_at() -> None:
    assert children.in_child(name_in_what_is_killed, timeout=5) == ""


@pytest.mark.parametrize(
    ("call", "answer"),
    [("openat", "ask"), ("execve", "ask"), ("statx", "ask"), ("read", "allow"), ("mmap", "allow")],
)
def test_only_calls_that_name_a_file_wait(call: str, answer: str) -> None:
    assert says(observe.program(), call) == answer


def test_the_containers_own_filter_still_counts(root: Path) -> None:
    """By io_uring files can be opened without any of these calls: the default filter does not let it in."""
    program = Container(root, ["sh"]).spec.process.seccomp
    assert program is not None
    assert says(program, "io_uring_setup") != "allow"


def says(program: bytes, call: str) -> str:
    machine = platform.machine()
    return seccomp.answer(program, seccomp.ARCHITECTURES[machine], seccomp.call_number(machine, call))
