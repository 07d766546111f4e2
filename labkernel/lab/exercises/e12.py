"""The checks of notebook 12: a process at the top of its tree, who is with it in its group, and where that top is."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labkernel.lab import calm
from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.fork import waiting
from labkernel.lab.group import group
from labkernel.linux import cgroups, syscalls

TREE = ("memory", "")
"""Whose path counts: the tree of cgroup v1 that has the memory controller, or the one tree of v2."""


@exercise("12.1", looks_at="the path of the process that runs `program`, as it reads it and as we do")
def settle(answer: Callable[[Callable[[], Any]], Any]) -> str:
    """In a group of its own, which it sees as /."""
    ours, inside, outside = run_answer(_seen_twice, answer)
    if outside == ours:
        raise NotYet("`program` runs in the group that was there before")
    if inside == outside:
        raise NotYet("it reads the same path as we do: it is in our cgroup namespace")
    if inside != "/":
        raise NotYet("its namespace has a root, but that is not its group: it sees a longer path than /")
    return "it is in a group of its own, and knows it by no other name than /."


@exercise("12.2", looks_at="the groups of all processes, while your function looks for company")
def company(answer: Callable[[int], Any]) -> str:
    """All processes in one group, and nobody of the groups around and inside it."""
    for _ in range(2):
        said, right, names = run_answer(_asked_for_company, answer)
        if not isinstance(said, set | frozenset | list | tuple):
            raise NotYet(f"a set of pids is asked for, and this is {type(said).__name__}")
        if missing := right - set(said):
            raise NotYet(f"one of its company is missing: {names[min(missing)]}")
        if strangers := set(said) - right:
            raise NotYet(f"{names.get(min(strangers), 'a process in another group')} is not of its company")
    return "both times all of its group, and nobody else."


@exercise("12.3", looks_at="what your function says of three processes, one of which has moved deeper since")
def root_of(answer: Callable[[int], Any]) -> str:
    """The root of a process's cgroup namespace, as seen from outside."""
    answers = {deep: run_answer(_asked_for_root, answer, deep) for deep in random.sample(range(3), 3)}
    # The words are the same whatever the order was: notebooks keep them.
    for deep, where in enumerate(("in its root", "one group below its root", "two groups below its root")):
        said, right = answers[deep]
        if not isinstance(said, str):
            raise NotYet(f"a path is asked for, and this is {type(said).__name__}")
        if said != right:
            raise NotYet(f"of a process that is {where}, you say something else than the kernel")
    return "three processes at different depths, and each time it is the root of their namespace."


def path_of(pid: int | str = "self") -> str:
    """The path of a process's group in the tree that counts."""
    paths = cgroups.own_paths(pid)
    return next(paths[name] for name in TREE if name in paths)


def _directory(made: cgroups.Cgroup) -> Path:
    return Path(next(made.paths[name] for name in TREE if name in made.paths))


def _seen_twice(answer: Callable[..., Any]) -> tuple[str, str, str]:
    """Our own path, and that of the process in which `program` is called: as it reads it, and as we do meanwhile."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def program() -> None:
        theirs.send(f"{os.getpid()} {path_of()}".encode())
        theirs.recv(1)

    child = os.fork()
    if child == 0:
        try:
            ours.close()
            answer(program)
        except Exception as error:
            theirs.send(f"failed {calm.in_words(error)}".encode())
        finally:
            os._exit(0)
    theirs.close()
    word, _, text = ours.recv(1 << 16).decode().partition(" ")
    if word == "failed":
        raise NotYet(f"it failed: {text}")
    if not word:
        raise NotYet("`program` was never called")
    seen = path_of(), text, path_of(int(word))
    ours.close()
    os.waitpid(child, 0)  # it may be about to make a group
    return seen


def _asked_for_company(answer: Callable[[int], Any]) -> tuple[Any, set[int], dict[int, str]]:
    """What is said of one process, the pids that are with it, and names for those and for others."""
    made, other = group("company"), group("others")
    inner = _directory(made) / "inner"
    inner.mkdir()
    inside = [waiting(lambda: made.add(os.getpid())) for _ in range(random.randint(3, 5))]
    names = dict.fromkeys(inside, "another process in its group")
    names[waiting(lambda: other.add(os.getpid()))] = "a process in the group beside it"
    names[waiting(lambda: (inner / "cgroup.procs").write_text("0"))] = "a process in a group inside its group"
    asked = random.choice(inside)
    names[asked] = "the process itself"
    return answer(asked), set(inside), names


def _asked_for_root(answer: Callable[[int], Any], deep: int) -> tuple[Any, str]:
    """What is said of a process that is so many groups below its namespace's root, and what is true."""
    made = group("root")
    right: list[Path] = [_directory(made)]
    for name in ("inner", "innermost")[:deep]:
        right.append(right[-1] / name)
        right[-1].mkdir()
    witness = waiting(lambda: made.add(os.getpid()))
    pid = waiting(
        lambda: made.add(os.getpid()),
        lambda: syscalls.unshare(syscalls.CLONE_NEWCGROUP),
        lambda: (right[-1] / "cgroup.procs").write_text("0"),
    )
    return answer(pid), path_of(witness)
