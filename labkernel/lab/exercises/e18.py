"""The checks of notebook 18: a server that is nobody, what an operation needs, and giving everything up for good."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from labkernel.children import memory_file
from labkernel.images import rootfs
from labkernel.lab import calm
from labkernel.lab.box import boxed
from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.fork import in_fork, waiting
from labkernel.linux import capabilities, mounts, syscalls
from labkernel.linux.capabilities import ALL, Capability, FileCapabilities
from labkernel.walls import become

NOBODY, PORT, FIRST_FREE_PORT = 65534, 80, 1024
SERVER = ["python3", "-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory", "/tmp", str(PORT)]
LISTENS_WITHIN = 15.0
"""Seconds in which the server of an answer has to listen."""


@exercise(
    "18.1",
    looks_at="the process that listens on port 80: its user, groups and capabilities in /proc/PID/status",
)
def serve(answer: Callable[[list[str]], Any]) -> str:
    """The program listens on port 80 as nobody, with the one capability that this takes."""
    _in_box(_judge_server, answer)
    return "the server is nobody, and its one capability is all that it can ever have."


@exercise("18.2", looks_at="what your function says of several operations")
def needs(answer: Callable[[Callable[[], object]], Any]) -> str:
    """Each capability that is enough alone, and no other."""
    _in_box(_judge_needs, answer)
    return "you have found out all of them."


@exercise(
    "18.3", looks_at="the five sets afterwards, and those of four programs that the process then executes"
)
def give_up(answer: Callable[[], Any]) -> str:
    """Root without any capability, which no program gives any back."""
    _in_box(_judge_given_up, answer)
    return "it is root, it holds nothing, and no program gives it anything back."


def _in_box(judge: Callable[[Any], None], answer: Any) -> None:
    if not callable(answer):
        raise NotYet(f"a function is asked for, and this is {type(answer).__name__}")
    run_answer(boxed, str(rootfs()), judge, answer)


# ---------------------------------------------------------------------- 18.1


def _judge_server(answer: Callable[[list[str]], Any]) -> None:
    log = memory_file(b"")
    start = os.fork()
    if start == 0:
        _be_server(answer, log)
    servers = _wait_for_listeners(start, log)
    if (first := Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text().strip()) != "1024":
        raise NotYet(
            f"port {PORT} is free for everybody now: ports from {first} on are not low ones any more"
        )
    for pid in servers:
        _judge_process(pid)


def _be_server(answer: Callable[[list[str]], Any], log: int) -> None:
    try:
        for fd in (1, 2):
            os.dup2(log, fd)
        answer(list(SERVER))
        os.write(log, b"came back")
    except BaseException as error:
        os.write(log, f"failed in {_where(error)}: {calm.in_words(error)}".encode())
    finally:
        os._exit(125)


def _where(error: BaseException) -> str:
    """The reader's own function in which it failed: of an errno alone nobody knows which call it was."""
    own = [
        frame.f_code.co_name
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if not frame.f_globals.get("__name__", "").startswith("labkernel.")
    ]
    return own[-1] if own else "your function"


def _wait_for_listeners(start: int, log: int) -> list[int]:
    """The processes that listen on the port; whoever was started first may end, if another one goes on."""
    end = time.monotonic() + LISTENS_WITHIN
    ended: int | None = None
    while time.monotonic() < end:
        if found := list(_listeners()):
            return found
        if ended is None and (reaped := os.waitpid(start, os.WNOHANG))[0]:
            ended = reaped[1]
        if ended is not None and os.pread(log, 1 << 16, 0):
            break
        time.sleep(0.02)
    text = os.pread(log, 1 << 16, 0).decode(errors="replace")
    if "failed " in text:
        raise NotYet(f"it failed {text.rpartition('failed ')[2]}")
    if text.endswith("came back"):
        raise NotYet("your function came back, and nobody listens: it was to become the program")
    if "PermissionError" in text:
        raise NotYet(f"the program runs, and is not allowed to listen on port {PORT}")
    raise NotYet(f"nobody listens on port {PORT}")


def _listeners() -> Iterator[int]:
    """The pids of who holds the socket that listens on the port, by the kernel's table of sockets."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {row[9] for row in rows if row[1].endswith(f":{PORT:04X}") and row[3] == "0A"}
    for name in os.listdir("/proc") if inodes else ():
        with contextlib.suppress(OSError):
            if name.isdigit() and any(
                os.readlink(f"/proc/{name}/fd/{fd}") in {f"socket:[{inode}]" for inode in inodes}
                for fd in os.listdir(f"/proc/{name}/fd")
            ):
                yield int(name)


def _judge_process(pid: int) -> None:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    if Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1] != SERVER:
        raise NotYet("who listens is not the program that you were given")
    for name, kind in (("Uid", "user"), ("Gid", "group")):
        strangers = {int(word) for word in status[name].split()} - {NOBODY}
        if strangers:
            raise NotYet(f"the server is, or can become, {kind} {min(strangers)}, and not only {NOBODY}")
    if others := {int(word) for word in status["Groups"].split()} - {NOBODY}:
        raise NotYet(f"the server is still a member of group {min(others)}")
    sets = capabilities.read(pid)
    needed = {Capability.CAP_NET_BIND_SERVICE}
    held = sets.permitted | sets.effective | sets.inheritable | sets.ambient
    if sets.bounding - needed and not held - needed:
        raise NotYet(
            "a program that the server executes could bring capabilities back: look at its bounding set"
        )
    if more := held - needed:
        some = ", ".join(capabilities.names(more)[:3])
        raise NotYet(
            f"the server holds {len(more)} more than it needs: {some}{' …' if len(more) > 3 else ''}"
        )


# ---------------------------------------------------------------------- 18.2


def _judge_needs(answer: Callable[[Callable[[], object]], Any]) -> None:
    operations = _operations()
    told = {}
    for name in random.sample(sorted(operations), len(operations)):
        told[name] = in_fork(_asked, answer, operations[name][0])
    for name, (_, right) in operations.items():  # the words are the same whatever the order was
        said = told[name]
        if said is None:
            raise NotYet(f"a set of capabilities is asked for, and for {name} there is something else")
        if missing := right - said:
            raise NotYet(
                f"{name} works with {capabilities.names(missing)[0]} alone, and you say that it does not"
            )
        if said - right and not right:
            raise NotYet(f"{name} works without any capability, and you say that it needs one")
        if more := said - right:
            raise NotYet(
                f"{name} does not work with {capabilities.names(more)[0]} alone, and you say that it does"
            )


def _asked(
    answer: Callable[[Callable[[], object]], Any], operation: Callable[[], object]
) -> frozenset[int] | None:
    said = answer(operation)
    if not isinstance(said, Iterable) or isinstance(said, str):
        return None
    members = list(said)
    return frozenset(map(int, members)) if all(isinstance(member, int) for member in members) else None


def _operations() -> dict[str, tuple[Callable[[], object], frozenset[int]]]:
    """Operations that can be repeated, and what each needs, by the names of the capabilities."""
    other = waiting(lambda: become(1000, 1000))
    closed = Path("/tmp/closed")
    closed.write_text("x")
    os.chown(closed, 1000, 1000)
    closed.chmod(0)
    given = Path("/tmp/given")
    given.touch()
    os.chown(given, 1000, 1000)
    given.chmod(0o666)
    place = Path("/tmp/place")
    place.mkdir()

    def listen() -> None:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 81))

    def mount() -> None:
        mounts.tmpfs(place)
        syscalls.umount2(place)

    needed: dict[str, tuple[Callable[[], object], str]] = {
        "giving a file away": (lambda: os.chown(given, 1000, 1000), "CHOWN"),
        "listening on port 81": (listen, "NET_BIND_SERVICE"),
        "a packet socket": (
            lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(), "NET_RAW",
        ),
        "a signal to somebody's process": (lambda: os.kill(other, 0), "KILL"),
        "chroot": (lambda: os.chroot("/"), "SYS_CHROOT"),
        "mount": (mount, "SYS_ADMIN"),
        "reading somebody's closed file": (closed.read_text, "DAC_OVERRIDE DAC_READ_SEARCH"),
        "changing the mode of somebody's file": (lambda: given.chmod(0o666), "FOWNER"),
        "reading an open file": (given.read_text, ""),
    }  # fmt: skip
    return {
        name: (operation, capabilities.parse(words.split())) for name, (operation, words) in needed.items()
    }


# ---------------------------------------------------------------------- 18.3


def _judge_given_up(answer: Callable[[], Any]) -> None:
    uids, held, after = in_fork(_given_up, answer, _programs())
    if uids != (0, 0, 0):
        raise NotYet("the process is not root any more: it was to stay uid 0")
    for name, numbers in held.items():
        if numbers:
            raise NotYet(f"its {name} set still holds {_some(numbers)}")
    for words, numbers in after.items():
        if numbers:
            raise NotYet(f"when it executes {words}, it holds {_some(numbers)} again")


def _some(numbers: frozenset[int]) -> str:
    return f"{len(numbers)} capabilities" if len(numbers) > 1 else capabilities.names(numbers)[0]


def _programs() -> dict[str, str]:
    """Programs that might give something back, each a copy of cat."""
    cat = shutil.which("cat") or "/usr/bin/cat"
    given = {
        "any program": None,
        "a set-user-id program of root's": None,
        "a program with capabilities": FileCapabilities(permitted=ALL, effective=False),
        "a program that lets what is inheritable through": FileCapabilities(inheritable=ALL),
    }
    programs = {}
    for number, (words, has) in enumerate(given.items()):
        programs[words] = shutil.copy(cat, f"/tmp/program-{number}")
        os.chmod(programs[words], 0o4755 if "set-user-id" in words else 0o755)
        if has:
            capabilities.set_on_file(programs[words], has)
    return programs


def _given_up(
    answer: Callable[[], Any], programs: dict[str, str]
) -> tuple[tuple[int, int, int], dict[str, frozenset[int]], dict[str, frozenset[int]]]:
    signal.alarm(15)
    answer()
    sets = capabilities.read()
    held = {"permitted": sets.permitted, "inheritable": sets.inheritable, "ambient": sets.ambient}
    return os.getresuid(), held, {words: _after(path) for words, path in programs.items()}


def _after(program: str) -> frozenset[int]:
    """What a process may use that has executed this program; nothing where the kernel refuses to execute it."""
    try:
        done = subprocess.run([program, "/proc/self/status"], capture_output=True, text=True)
    except PermissionError:
        return frozenset()
    return capabilities.decode(done.stdout).permitted
