"""What an ipc namespace separates: System V shared memory and semaphores, and POSIX message queues.

A System V object has a key, a number on which its users agree, and an identity, which the kernel gives. It stays until
it is removed, or its namespace is; no process has to hold it.
Source: man 7 sysvipc, man 7 mq_overview, man 7 ipc_namespaces.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from labkernel.linux.syscalls import check, libc

# <linux/ipc.h>, <linux/sem.h>
IPC_CREAT = 0o1000
IPC_EXCL = 0o2000
IPC_NOWAIT = 0o4000
IPC_RMID = 0
GETVAL = 12

libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
libc.shmdt.argtypes = (ctypes.c_void_p,)
libc.shmget.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_int)
libc.mq_send.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint)
libc.mq_receive.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p)
libc.mq_receive.restype = ctypes.c_ssize_t

PAGE = 4096
MESSAGE = 256
"""The longest message, in bytes, of a queue that `mq_open` makes."""


@dataclass(frozen=True)
class Object:
    """One System V object of our ipc namespace, as a line of /proc/sysvipc names it."""

    kind: str
    """shm, sem or msg."""
    key: int
    identity: int
    attached: int = 0
    """For shared memory: how many have it attached."""


def objects() -> list[Object]:
    """All System V objects of our ipc namespace: what ipcs(1) lists."""
    found = []
    for kind in ("shm", "sem", "msg"):
        header, *lines = Path(f"/proc/sysvipc/{kind}").read_text().splitlines()
        for line in lines:
            row = dict(zip(header.split(), map(int, line.split()), strict=False))
            identity = row["msqid" if kind == "msg" else f"{kind}id"]
            found.append(Object(kind, row["key"] & 0xFFFFFFFF, identity, row.get("nattch", 0)))
    return found


def shmget(key: int, size: int = 0, flags: int = 0) -> int:
    """The identity of the shared memory with this key; with IPC_CREAT it is made if it is missing. man 2 shmget.

    size: bytes. flags: IPC_CREAT, IPC_EXCL, and permissions as for a file. Raises FileNotFoundError, PermissionError.
    """
    return check(libc.shmget(ctypes.c_int(key).value, size, flags), "shmget", f"key {key:#x}")


def shmat(identity: int) -> int:
    """Attach shared memory to this process, until it ends; the address at which it begins. man 2 shmat."""
    address = libc.shmat(identity, None, 0)
    if address == ctypes.c_void_p(-1).value:
        check(-1, "shmat", f"identity {identity}")
    return int(address)


@contextmanager
def attached(identity: int, size: int = PAGE) -> Iterator[memoryview]:
    """Attach shared memory as bytes to be read and written, and detach it at the end."""
    address = shmat(identity)
    memory = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
    try:
        yield memory
    finally:
        memory.release()
        libc.shmdt(address)


def shm_remove(identity: int) -> None:
    """Remove shared memory: at once from the list, its bytes when the last has detached. man 2 shmctl."""
    check(libc.shmctl(identity, IPC_RMID, None), "shmctl", f"identity {identity}, IPC_RMID")


class SemBuf(ctypes.Structure):
    """struct sembuf of <sys/sem.h>."""

    _fields_ = [("num", ctypes.c_ushort), ("op", ctypes.c_short), ("flg", ctypes.c_short)]


def semget(key: int, flags: int = 0) -> int:
    """The identity of the semaphore with this key, a set of one; made with IPC_CREAT, with value 0. man 2 semget."""
    return check(libc.semget(ctypes.c_int(key), 1, flags), "semget", f"key {key:#x}")


def semop(identity: int, change: int, flags: int = 0) -> None:
    """Add to a semaphore's value, which never falls below 0: who would take too much waits. man 2 semop.

    With IPC_NOWAIT nobody waits: BlockingIOError is raised.
    """
    operation = SemBuf(0, change, flags)
    check(libc.semop(identity, ctypes.byref(operation), 1), "semop", f"identity {identity}, {change:+}")


def semval(identity: int) -> int:
    """A semaphore's value. man 2 semctl."""
    return check(libc.semctl(identity, 0, GETVAL), "semctl", f"identity {identity}, GETVAL")


class MqAttr(ctypes.Structure):
    """struct mq_attr of <mqueue.h>."""

    _fields_ = [(name, ctypes.c_long) for name in ("flags", "maxmsg", "msgsize", "curmsgs", *"abcd")]


def mq_open(name: str, flags: int = os.O_RDWR) -> int:
    """A descriptor of the message queue `name` ("/name"), for messages of up to 256 bytes. man 3 mq_open.

    flags: as for a file; with os.O_CREAT it is made if it is missing. Raises FileNotFoundError, FileExistsError.
    """
    attributes = MqAttr(maxmsg=8, msgsize=MESSAGE)
    result = libc.mq_open(name.encode(), flags, 0o600, ctypes.byref(attributes))
    return check(result, "mq_open", name)


def mq_send(queue: int, text: str) -> None:
    """Put a message into a queue; waits while it is full. man 3 mq_send."""
    raw = text.encode()
    check(libc.mq_send(queue, raw, len(raw), 0), "mq_send", f"fd {queue}")


def mq_receive(queue: int) -> str:
    """Take the oldest message out of a queue; waits while there is none, unless opened with O_NONBLOCK."""
    buffer = ctypes.create_string_buffer(MESSAGE)
    length = check(libc.mq_receive(queue, buffer, MESSAGE, None), "mq_receive", f"fd {queue}")
    return buffer.raw[:length].decode()
