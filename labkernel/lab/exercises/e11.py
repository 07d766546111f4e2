"""The checks of notebook 11: a map of one's own, a range for a given file, and a hostname that root does not own."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.scratch import temporary
from labkernel.lab.watch import watched
from labkernel.linux import capabilities, namespaces, syscalls, users

NUMBERS = ((1234, 77), (0, 4711))
"""Pairs of uid and gid for exercise 11.1."""


@exercise("11.1", looks_at="the process's user namespace, and its uid and gid by the maps in /proc/PID")
def both(answer: Callable[[int, int], Any]) -> str:
    """In a user namespace of its own the process has the uid and the gid that were asked for."""
    for uid, gid in NUMBERS:
        run_answer(_judge_both, answer, uid, gid)
    return "each is the number that was asked for, in a user namespace of its own."


@exercise(
    "11.2", looks_at="the maps of the process's user namespace, and what the file's owner is from in there"
)
def file_of_root(answer: Callable[[int, str, int], Any]) -> str:
    """Inside, the file belongs to uid 0 and gid 0, and as many ids are mapped as were asked for."""
    with temporary() as place:
        run_answer(_judge_file, answer, f"{place}/file")
    return "inside, the file is root's, and all the ids are there."


@exercise(
    "11.3", looks_at="the process's user namespace and capabilities, its hostname, and who may change that"
)
def fixed_name(answer: Callable[[], Any]) -> str:
    """Root of a user namespace, with a hostname of its own that belongs to the namespace above."""
    run_answer(_judge_name, answer)
    return "it is root, holds every capability, and its hostname stays."


def _judge_both(answer: Callable[[int, int], Any], uid: int, gid: int) -> None:
    with watched(lambda: answer(uid, gid)) as go_on:
        pid = go_on()
        _in_a_user_namespace(pid)
        for name, wanted in (("uid", uid), ("gid", gid)):
            if not (entries := _map(pid, name)):
                raise NotYet(f"its {name}_map has not been written")
            if (found := _inside(pid, name, entries)) != wanted:
                raise NotYet(f"the {name} inside was to be {wanted}, and it is {found}")


def _judge_file(answer: Callable[[int, str, int], Any], path: str) -> None:
    """Give a file to somebody (where there are several ids to choose from), and ask from inside whose it is."""
    whole = sum(entry.count for entry in users.own_map())
    owner, group, count = (300, 500, 200) if whole != 1 else (0, 0, 1)
    Path(path).touch()
    os.chown(path, owner, group)
    file = os.open(path, os.O_RDONLY)
    ready, go = os.pipe()
    told, tell = os.pipe()
    pid, _ = syscalls.clone3(syscalls.CLONE_NEWUSER)
    if pid == 0:
        os.close(go)  # so that we end if the other one does
        os.read(ready, 1)
        seen = os.fstat(file)
        os.write(tell, f"{seen.st_uid} {seen.st_gid}".encode())
        os._exit(0)
    try:
        answer(pid, path, count)
    finally:
        os.write(go, b"!")
    uid, gid = map(int, os.read(told, 100).split())
    entries = {name: _map(pid, name) for name in ("uid", "gid")}
    os.waitpid(pid, 0)
    for (name, found), seen_as in zip(entries.items(), (uid, gid), strict=True):
        if not found:
            raise NotYet(f"its {name}_map has not been written")
        if seen_as != 0:
            raise NotYet(f"from inside, the file's {name} is {seen_as}")
        mapped = {entry.inside + step for entry in found for step in range(entry.count)}
        if mapped != set(range(count)):
            raise NotYet(f"the {name}s that are mapped are not {count}, from 0 on")


def _judge_name(answer: Callable[[], Any]) -> None:
    """The machine's hostname is played by one of our own, so that no answer can harm the real one."""
    syscalls.unshare(syscalls.CLONE_NEWUTS)
    socket.sethostname("machine")

    def rename() -> None:
        with contextlib.suppress(PermissionError):
            socket.sethostname("changed")

    with watched(answer, rename) as go_on:
        pid = go_on()
        _in_a_user_namespace(pid)
        if _inside(pid, "uid", _map(pid, "uid")) != 0:
            raise NotYet("the process is not root of its user namespace")
        if not capabilities.read(pid).effective >= set(capabilities.Capability):
            raise NotYet("the process does not hold all capabilities")
        if socket.gethostname() != "machine":
            raise NotYet("it is the machine's hostname that was changed")
        if namespaces.shared("self", pid)["uts"]:
            raise NotYet("the process has no hostname of its own: it is the machine's")
        go_on()
        namespaces.enter(pid, ["uts"])
        if (name := socket.gethostname()) == "changed":
            raise NotYet("root inside can still change the hostname")
        if name != "fixed":
            raise NotYet(f"its hostname was to be 'fixed', and it is {name!r}")


def _in_a_user_namespace(pid: int) -> None:
    if namespaces.shared("self", pid)["user"]:
        raise NotYet("the process is in no user namespace of its own")


def _map(pid: int, name: str) -> list[users.IdMap]:
    """A map of the process's user namespace; outside are the numbers as we see them."""
    lines = Path(f"/proc/{pid}/{name}_map").read_text().splitlines()
    return [users.IdMap(*map(int, line.split())) for line in lines]


def _inside(pid: int, name: str, entries: list[users.IdMap]) -> int:
    """The process's own uid or gid, as it sees it itself."""
    status = Path(f"/proc/{pid}/status").read_text()
    outside = int(status.split(f"\n{name.capitalize()}:")[1].split()[0])
    for entry in entries:
        if entry.outside <= outside < entry.outside + entry.count:
            return entry.inside + outside - entry.outside
    return 65534  # what the kernel shows for a number that is not in the map
