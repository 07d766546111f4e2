"""System V objects and message queues: each call against what the kernel lists, in an ipc namespace of its own."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from labkernel.children import in_child
from labkernel.lab.fork import in_fork
from labkernel.linux import ipc, mounts, syscalls
from labkernel.linux.ipc import IPC_CREAT, IPC_EXCL, IPC_NOWAIT
from tests.helpers import own_home

KEY = 0xFEDCBA98
"""A key that is negative for C."""


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


def alone(function: Callable[[], Any]) -> Any:
    """Run in a child with an ipc namespace of its own: nothing is left behind, and nobody else's objects are there."""

    def work() -> Any:
        syscalls.unshare(syscalls.CLONE_NEWIPC)
        return function()

    return in_child(work, timeout=60)


def attempt(function: Callable[..., Any], *arguments: Any) -> str:
    try:
        function(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def test_shared_memory_is_shared_by_its_key() -> None:
    def work() -> tuple[bytes, bytes]:
        with ipc.attached(ipc.shmget(KEY, 8192, IPC_CREAT | 0o600), 8192) as memory:
            memory[8000:8005] = b"hello"

        def other() -> bytes:
            with ipc.attached(ipc.shmget(KEY), 8192) as memory:
                memory[0:3] = b"yes"
                return bytes(memory[8000:8005])

        heard = in_fork(other)
        with ipc.attached(ipc.shmget(KEY)) as memory:
            return heard, bytes(memory[:3])

    assert alone(work) == (b"hello", b"yes")


def test_what_is_not_there() -> None:
    def work() -> list[str]:
        ipc.shmget(KEY, 4096, IPC_CREAT | 0o600)
        return [
            attempt(ipc.shmget, KEY + 1),
            attempt(ipc.shmget, KEY, 4096, IPC_CREAT | IPC_EXCL),
            attempt(ipc.shm_remove, 12345),
            attempt(ipc.shmat, 12345),
            attempt(ipc.semget, KEY),
            attempt(ipc.mq_open, "/none"),
        ]

    assert alone(work) == ["ENOENT", "EEXIST", "EINVAL", "EINVAL", "ENOENT", "ENOENT"]


def test_errors_name_the_call_and_the_key() -> None:
    with pytest.raises(FileNotFoundError, match=r"shmget\(key 0xfedcba98\): ENOENT"):
        alone(lambda: ipc.shmget(KEY))


def test_the_list() -> None:
    def work() -> tuple[list[ipc.Object], list[int], list[ipc.Object]]:
        assert ipc.objects() == []
        shm, sem = ipc.shmget(KEY, 4096, IPC_CREAT | 0o600), ipc.semget(5, IPC_CREAT | 0o600)
        found = ipc.objects()
        with ipc.attached(shm):
            (inside,) = [o for o in ipc.objects() if o.kind == "shm"]
        ipc.shm_remove(shm)
        return found, [shm, sem, inside.attached], ipc.objects()

    found, (shm, sem, attached), left = alone(work)
    assert found == [ipc.Object("shm", KEY, shm, 0), ipc.Object("sem", 5, sem)]
    assert attached == 1
    assert left == [ipc.Object("sem", 5, sem)]


def test_the_list_agrees_with_ipcs() -> None:
    if not shutil.which("ipcs"):
        pytest.skip("there is no ipcs (package util-linux)")

    def work() -> tuple[str, list[ipc.Object]]:
        for key in (KEY, 7):
            ipc.shmget(key, 4096, IPC_CREAT | 0o600)
            ipc.semget(key + 1, IPC_CREAT | 0o600)
        return subprocess.run(["ipcs"], capture_output=True, text=True, check=True).stdout, ipc.objects()

    text, found = alone(work)
    theirs = {tuple(line.split()[:2]) for line in text.splitlines() if line.startswith("0x")}
    assert theirs == {(f"0x{o.key:08x}", str(o.identity)) for o in found}
    assert len(theirs) == 4


def test_a_semaphore_never_falls_below_zero() -> None:
    def work() -> list[Any]:
        lock = ipc.semget(1, IPC_CREAT | 0o600)
        at_first = ipc.semval(lock)
        ipc.semop(lock, +2)
        taken = [attempt(ipc.semop, lock, -1, IPC_NOWAIT) for _ in range(3)]
        return [at_first, *taken, ipc.semval(lock)]

    assert alone(work) == [0, "done", "done", "EAGAIN", 0]


def test_messages_come_out_in_order() -> None:
    def work() -> tuple[list[str], str, str]:
        queue = ipc.mq_open("/box", os.O_CREAT | os.O_RDWR)
        for text in ("one", "zwei", "trois"):
            ipc.mq_send(queue, text)
        heard = in_fork(lambda: [ipc.mq_receive(ipc.mq_open("/box")) for _ in range(3)])
        empty = attempt(ipc.mq_receive, ipc.mq_open("/box", os.O_RDWR | os.O_NONBLOCK))
        return heard, empty, attempt(ipc.mq_send, queue, "x" * 257)

    assert alone(work) == (["one", "zwei", "trois"], "EAGAIN", "EMSGSIZE")


def test_a_queue_is_a_file_of_mqueue() -> None:
    def work() -> list[str]:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        mounts.set_propagation("/", "private")
        ipc.mq_open("/box", os.O_CREAT | os.O_RDWR)
        syscalls.mount("mqueue", "/tmp", "mqueue")
        return os.listdir("/tmp")

    assert alone(work) == ["box"]


def test_another_namespace_has_none_of_it() -> None:
    def work() -> tuple[list[ipc.Object], list[str]]:
        ipc.shmget(KEY, 4096, IPC_CREAT | 0o600)
        ipc.mq_open("/box", os.O_CREAT | os.O_RDWR)
        syscalls.unshare(syscalls.CLONE_NEWIPC)
        return ipc.objects(), [attempt(ipc.shmget, KEY), attempt(ipc.mq_open, "/box")]

    assert alone(work) == ([], ["ENOENT", "ENOENT"])
