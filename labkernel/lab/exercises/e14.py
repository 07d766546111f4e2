"""The checks of notebook 14: two namespaces joined, a command run in a container, and a tool of one's own beside it."""

from __future__ import annotations

import contextlib
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from labkernel.children import in_child, start_child
from labkernel.container import Container
from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.look import program_of
from labkernel.lab.watch import watched
from labkernel.linux import capabilities, mounts, namespaces, syscalls

STARTS_WITHIN = 5.0
"""Seconds in which the command of an answer has to be seen in the container."""


@exercise("14.1", looks_at="which of the container's namespaces the process is in")
def join(answer: Callable[[int], Any]) -> str:
    """In the container's network and ipc namespaces, and in the lab's own otherwise."""
    with _container() as pid:
        run_answer(_judge_join, answer, pid)
    return "it shares the network and the ipc namespace with the container, and nothing else."


@exercise(
    "14.2", looks_at="the command's process beside the container's program, in /proc, and its exit code"
)
def execute(answer: Callable[[int, list[str]], Any]) -> str:
    """The command runs in all of the container's namespaces, as its root, with Docker's capabilities at the most."""
    if not callable(answer):
        raise NotYet(f"a function is asked for, and this is {type(answer).__name__}")
    with _container() as pid:
        visitor = start_child(answer, pid, ["sleep", "1000"])
        try:
            if found := in_child(_judge_visitor, visitor.pid, pid):
                raise NotYet(found)
        finally:
            visitor.kill()
        for code in (7, 0):
            if (told := run_answer(answer, pid, ["sh", "-c", f"exit {code}"])) != code:
                raise NotYet(f"the command ended with exit code {code}, and your function says {told!r}")
    return "the command runs behind the container's walls, and its exit code comes back."


@exercise(
    "14.3", looks_at="the namespaces of the process that calls your tool, its root directory and its /proc"
)
def own_tool(answer: Callable[[int, Callable[[], None]], Any]) -> str:
    """The tool runs among the container's processes, with the machine's files."""
    with _container() as pid:
        run_answer(_judge_tool, answer, pid)
    return "your tool sees the container's processes, with the machine's files."


@contextlib.contextmanager
def _container() -> Iterator[int]:
    """A container that does nothing; yields the pid of its program."""
    with Container("python", ["sleep", "1000"]) as container:
        yield program_of(container)


def _judge_join(answer: Callable[[int], Any], pid: int) -> None:
    with watched(lambda: answer(pid)) as go_on:
        visitor = go_on()
        shared = {kind for kind, same in namespaces.shared(visitor, pid).items() if same}
        if missing := {"net", "ipc"} - shared:
            raise NotYet(f"it does not share the container's {' and '.join(sorted(missing))} namespace")
        if more := shared - {"net", "ipc"}:
            raise NotYet(f"it shares more than that with the container: {', '.join(sorted(more))}")
        if lost := [
            kind
            for kind, same in namespaces.shared(visitor, "self").items()
            if not same and kind not in shared
        ]:
            raise NotYet(f"it has left the lab's own {', '.join(lost)} namespace, too")


def _judge_visitor(visitor: int, pid: int) -> str:
    """Look for the command below the visitor, and compare it with the container's program; "" when all is well."""
    end = time.monotonic() + STARTS_WITHIN
    while (command := _sleeping(visitor)) is None:
        if time.monotonic() > end or not os.path.exists(f"/proc/{visitor}"):
            return "no process runs the command"
        time.sleep(0.02)
    shared = namespaces.shared(command, pid)
    if outside := [kind for kind, same in shared.items() if not same]:
        return f"the command runs, and is not in these namespaces of the container: {', '.join(outside)}"
    if not os.path.samefile(f"/proc/{command}/root/", f"/proc/{pid}/root/"):
        return "the command's root directory is not the container's"
    if os.stat(f"/proc/{command}").st_uid != os.stat(f"/proc/{pid}").st_uid:
        return "inside, the command does not run as uid 0"
    if capabilities.read(command).permitted - capabilities.DOCKER_DEFAULT:
        return "the command has capabilities that the container's program has not"
    return ""


def _sleeping(visitor: int) -> int | None:
    """The process that has become `sleep`: the visitor, or one below it."""
    todo = [visitor]
    while todo:
        pid = todo.pop()
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text() == "sleep\n":
                return pid
            todo += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return None


def _judge_tool(answer: Callable[[int, Callable[[], None]], Any], pid: int) -> None:
    """The lab's mounts are played by a list of our own, shared as a machine's is; no answer can harm the real one."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    mounts.set_propagation("/", "private")
    mounts.set_propagation("/", "shared")
    machine, before, ours = os.stat("/"), _mount_ids(), namespaces.inodes()
    theirs = namespaces.inodes(
        pid
    )  # now: an answer may leave us with a /proc that does not list this process
    told, tell = os.pipe()

    def tool() -> None:
        seen = {
            "root": os.path.samestat(os.stat("/"), machine),
            "mine": os.readlink("/proc/self") == str(os.getpid()),
            "first": os.path.exists("/proc/1"),
            "namespaces": namespaces.inodes() if os.path.exists("/proc/self/ns") else {},
        }
        os.write(tell, pickle.dumps(seen))

    visitor = os.fork()
    if visitor == 0:
        ended = 1
        try:
            answer(pid, tool)
            ended = 0
        except BaseException as error:
            os.write(tell, pickle.dumps(f"it failed: {type(error).__name__}: {error}"))
        finally:
            os._exit(ended)
    os.waitpid(visitor, 0)
    os.close(tell)
    with open(told, "rb") as file:
        raw = file.read()
    if not raw:
        raise NotYet("the tool has not been called")
    seen = pickle.loads(raw)
    if isinstance(seen, str):
        raise NotYet(seen)
    if _mount_ids() != before:
        raise NotYet("the lab's list of mounts has changed")
    if not seen["root"]:
        raise NotYet("the tool does not have the machine's files")
    for kind in ("pid", "net"):
        if seen["namespaces"].get(kind) != theirs[kind]:
            raise NotYet(f"the tool is not in the container's {kind} namespace")
    if seen["namespaces"]["mnt"] == ours["mnt"]:
        raise NotYet("the tool has no list of mounts of its own")
    if not (seen["mine"] and seen["first"]):
        raise NotYet("the /proc that the tool sees is that of other processes")


def _mount_ids() -> set[int]:
    """Our mounts; none where a /proc has leaked to us, in which we have no number."""
    try:
        return {mount.mount_id for mount in mounts.mountinfo()}
    except FileNotFoundError:
        return set()
