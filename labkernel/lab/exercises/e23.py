"""The checks of notebook 23: a program of one's own under a budget, two servers on one port, limits that fit."""

from __future__ import annotations

import contextlib
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from labkernel.container import Container
from labkernel.lab import calm
from labkernel.lab.checks import NotYet, exercise
from labkernel.lab.look import look_at, program_of
from labkernel.linux import namespaces
from labkernel.monitor import limits_in_force
from labkernel.spec import BadOption

BUDGET = {"memory_limit_bytes": 48 << 20, "cpus_limit": 0.25, "pids_limit": 8}
ANSWERS_WITHIN = 30.0
"""Seconds in which a server has to be up."""

PUZZLE = """
import os, signal
children = []
for _ in range(5):
    pid = os.fork()
    if pid == 0:
        signal.pause()
    children.append(pid)
block = bytearray(b"x") * (40 << 20)
for pid in children:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
print("all the work is done")
"""
"""The program of exercise 23.3: five children at once, and 40 MiB."""
TOO_MUCH = 4 / 3
"""A limit that could be divided by this, and so be a quarter less, is not a tight one."""


@exercise("23.1", looks_at="your container's limit files and namespaces, and its program's status")
def own_program(answer: Container) -> str:
    """A running container with a program of the reader's own, within the budget and behind all walls."""
    _running(answer)
    for (name, most), written in zip(BUDGET.items(), limits_in_force(answer.cgroup).values(), strict=True):
        if written is None or written > most:
            found = "no limit" if written is None else f"{written:g}"
            raise NotYet(
                f"its {name.replace('_', ' ')} may be {most:g} at the most, and the kernel has {found}"
            )
    outside, inside = look_at(None), look_at(answer)
    if shared := [kind for kind in inside.namespaces if inside.namespaces[kind] == outside.namespaces[kind]]:
        raise NotYet(f"it shares a namespace with the lab: {', '.join(shared)}")
    if not (inside.seccomp and inside.no_new_privs):
        raise NotYet("its program runs without the filter for system calls, or may gain privileges")
    if inside.capabilities == outside.capabilities:
        raise NotYet("its program has all of root's capabilities")
    return "your program runs, within its budget, behind all walls."


@exercise("23.2", looks_at="both containers' network namespaces, and what each answers on its published port")
def one_port(answer: Callable[[int, int], Any]) -> str:
    """Two containers that both listen on 8000 inside, published on two ports, each with a page of its own."""
    if not callable(answer):
        raise NotYet(f"a function is asked for, and this is {type(answer).__name__}")
    ports = [_free_port(), _free_port()]
    with contextlib.ExitStack() as stack:
        try:
            both = answer(*ports)
        except Exception as error:
            raise NotYet(f"your function failed: {calm.in_words(error)}") from None
        if not isinstance(both, list | tuple) or len(both) != 2:
            raise NotYet("your function is to return two containers")
        for container in both:
            if isinstance(container, Container):
                stack.callback(container.kill)
        for container in both:
            _running(container)
        inodes = [namespaces.inodes(program_of(container))["net"] for container in both]
        if len({*inodes, namespaces.inodes()["net"]}) < 3:
            raise NotYet("they do not have a network each")
        pages = [_fetch(port, container) for port, container in zip(ports, both, strict=True)]
        if any("0100007F:1F40" not in text and "00000000:1F40" not in text for text in map(_listening, both)):
            raise NotYet("not both listen on port 8000 inside")
    if pages[0] == pages[1]:
        raise NotYet("both answer the same")
    return "two servers, both on port 8000, and neither knows of the other."


@exercise(
    "23.3", looks_at="how the puzzle ends under your limits, and how it ends when one of them is tightened"
)
def tight(answer: Mapping[str, Any]) -> str:
    """Limits under which the puzzle ends well, and of which none is much larger than it has to be."""
    if not isinstance(answer, Mapping) or set(answer) != {"memory", "pids_limit"}:
        raise NotYet(
            'a dict with a value for "memory" and one for "pids_limit" is asked for, and nothing else'
        )
    try:
        trial = Container(command=["true"], **answer).limits
    except BadOption as error:
        raise NotYet(str(error)) from None
    memory, pids = trial.memory or 0, trial.pids or 0
    if _killed(memory, pids):
        raise NotYet("under these limits the puzzle does not come to its end: the kernel refuses or kills")
    if not _killed(int(memory / TOO_MUCH), pids):
        raise NotYet("with a quarter less memory it would still come to its end")
    if not _killed(memory, pids - 1):
        raise NotYet("with one process less it would still come to its end")
    return "the puzzle comes to its end, and would not with less."


def _killed(memory: int, pids: int) -> bool:
    """Whether the kernel keeps the puzzle from its end under these limits; Docker's least memory is no way round."""
    try:
        puzzle = Container(
            command=["python3", "-c", PUZZLE], memory=memory, memory_swap=memory, pids_limit=pids
        )
    except BadOption:
        return True
    return puzzle.run(timeout=60).returncode != 0


def _running(answer: Any) -> None:
    if not isinstance(answer, Container):
        raise NotYet(f"a Container is asked for, and this is {type(answer).__name__}")
    if answer.pid is None:
        raise NotYet("it has not been started")
    if not answer.running():
        raise NotYet(f"it has ended already, with exit status {answer.wait()}")


def _fetch(port: int, container: Container) -> str:
    """What a server answers; it gets some time to start."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + ANSWERS_WITHIN
    while True:
        try:
            with opener.open(f"http://127.0.0.1:{port}/", timeout=ANSWERS_WITHIN) as answer:
                text: str = answer.read().decode(errors="replace")
                return text
        except OSError as error:
            if time.monotonic() > end or not container.running():
                raise NotYet(f"nobody answers on a published port: {calm.in_words(error)}") from None
            time.sleep(0.1)


def _listening(container: Container) -> str:
    """The sockets that listen in a container's network namespace, as the kernel lists them (man 5 proc, net/tcp)."""
    with open(f"/proc/{program_of(container)}/net/tcp", encoding="ascii") as file:
        return "\n".join(_local_addresses(file))


def _local_addresses(lines: Iterator[str]) -> Iterator[str]:
    next(lines)
    for line in lines:
        words = line.split()
        if words[3] == "0A":  # TCP_LISTEN
            yield words[1]


def _free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
