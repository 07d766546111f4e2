"""Watching a program's system calls by means of the filter itself: it asks somebody else, or sends a signal.

A filter that answers USER_NOTIF lets the call wait until a second process, which holds the filter's listener, has been
told of it and has decided. `trace` decides "go on" each time, and keeps a list: a small strace. A filter that answers
TRAP sends the signal SIGSYS to the caller, and `on_trap` shows what that carries.

Source: man 2 seccomp_unotify, man 2 sigaction, https://docs.kernel.org/userspace-api/seccomp_filter.html
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from labkernel.linux import seccomp, syscalls

ASK = struct.pack("=HBBI", seccomp.RET, 0, 0, seccomp.USER_NOTIF)
"""A filter of one instruction: whatever it is, ask."""

# <linux/seccomp.h>: struct seccomp_notif is id, pid, flags, and the struct seccomp_data that the filter saw; struct
# seccomp_notif_resp is id, value, error, flags.
NOTIFICATION, ANSWER = "=QII" + "iIQ6Q", "=QqiI"
SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND = 0xC0502100, 0xC0182101
SECCOMP_USER_NOTIF_FLAG_CONTINUE = 1

SYS_pidfd_getfd = 438
LISTENER_WITHIN = 20.0
"""Seconds after which a process that has not installed its filter is given up."""
CANNOT_RUN = 127

SA_SIGINFO, SYS_SECCOMP = 4, 1


@dataclass(frozen=True)
class Trace:
    """What `trace` has seen: the names of the calls, and how the command ended."""

    calls: frozenset[str]
    exit_code: int
    """Its exit status, or minus the number of the signal that killed it."""


def trace(command: Sequence[str], env: Mapping[str, str] | None = None) -> Trace:
    """Run a command and list the system calls that it makes, its threads and children included, from execve on.

    The first word is the path of the program. What the command leaves running when it ends gets ENOSYS from then on.
    For a process with a single thread. Raises OSError where the filter cannot be installed: EBUSY where this process is
    watched in the same way already.
    """
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        _be_watched(command, dict(os.environ if env is None else env), tell)
    os.close(tell)
    pidfd = os.pidfd_open(pid)
    try:
        listener = _listener_of(pid, pidfd, ready)
        names = _listen(listener, pidfd)
        os.close(listener)
    finally:
        os.close(ready)
        os.close(pidfd)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # where we failed; it has ended otherwise
        _, status = os.waitpid(pid, 0)
    return Trace(frozenset(names), os.waitstatus_to_exitcode(status))


def _be_watched(command: Sequence[str], env: dict[str, str], tell: int) -> NoReturn:
    """In the child. After `install` each call waits to be answered, so there is no way to say where the listener is."""
    try:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        lowest_free = os.dup(tell)
        os.close(lowest_free)
        os.write(tell, struct.pack("=ii", lowest_free, 0))
        try:
            seccomp.install(ASK, listener=True)
        except OSError as error:
            os.write(tell, struct.pack("=ii", -1, error.errno or errno.EIO))
            raise
        os.execve(command[0], list(command), env)
    finally:
        os._exit(CANNOT_RUN)


def _listener_of(pid: int, pidfd: int, ready: int) -> int:
    """Fetch the listener from the child, once it is there. man 2 pidfd_getfd; Linux 5.6."""
    number, _ = struct.unpack("=ii", os.read(ready, 8))
    end = time.monotonic() + LISTENER_WITHIN
    while time.monotonic() < end:
        listener: int = syscalls.libc.syscall(SYS_pidfd_getfd, pidfd, number, 0)
        if listener != -1:
            os.set_inheritable(listener, False)
            return listener
        if ctypes.get_errno() not in (
            errno.EBADF,
            errno.ESRCH,
        ):  # not yet, or it has failed and ended already
            raise syscalls.explained(ctypes.get_errno(), "pidfd_getfd", f"process {pid}")
        if select.select([ready], [], [], 0.001)[0]:
            failed = os.read(ready, 8)
            reason = struct.unpack("=ii", failed)[1] if failed else errno.ESRCH
            raise syscalls.explained(reason, "seccomp", "SECCOMP_FILTER_FLAG_NEW_LISTENER")
    raise TimeoutError("the process has not installed its filter")


def _listen(listener: int, pidfd: int) -> set[str]:
    """Answer "go on" to each call until the process has ended; return the names of the calls since execve."""
    names: set[str] = set()
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(pidfd, select.POLLIN)
    while pidfd not in (events := dict(poll.poll())):
        if (
            not events.get(listener, 0) & select.POLLIN
        ):  # nobody is left who could ask; its end is about to be told
            poll.unregister(listener)
            continue
        try:
            told = fcntl.ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, bytes(struct.calcsize(NOTIFICATION)))
            number, _, _, nr, architecture = struct.unpack(NOTIFICATION, told)[:5]
            names.add(name_of(architecture, nr))
            if "execve" not in names:
                names.clear()  # that was still our own Python
            go_on = struct.pack(ANSWER, number, 0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE)
            fcntl.ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, go_on)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINTR):  # the caller was killed while it waited
                raise
    return names


def name_of(architecture: int, number: int) -> str:
    """The name of a call's number on the architecture with that token of <linux/audit.h>; else the number as text."""
    machine = next((name for name, token in seccomp.ARCHITECTURES.items() if token == architecture), "")
    return (machine and seccomp.call_name(machine, number)) or str(number)


# ---------------------------------------------------------------------- traps


@dataclass(frozen=True)
class Trap:
    """What a SIGSYS of a filter carries: siginfo_t's fields for it, without the `si_` before their names."""

    code: int
    """Why the signal was sent: SYS_SECCOMP."""
    errno: int
    """The lower half of the filter's answer: its author's own number."""
    call_addr: int
    """The address of the instruction after the one that made the call."""
    syscall: int
    arch: int


class _Sigaction(ctypes.Structure):
    """struct sigaction, as glibc and musl have it for 64-bit machines."""

    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_handlers: list[object] = []
"""Handlers that the C library has the address of, and which must therefore live on."""


def on_trap(handler: Callable[[Trap], None]) -> None:
    """Call a function at each SIGSYS, at once and in the thread that made the refused call.

    Python's own `signal.signal` does not tell what the signal carries. man 2 sigaction.
    """

    def handle(_signal: int, info: int, _context: int) -> None:
        _, number, code = struct.unpack_from("=iii", ctypes.string_at(info, 32))
        address, call, architecture = struct.unpack_from("=QiI", ctypes.string_at(info, 32), 16)
        handler(Trap(code, number, address, call, architecture))

    called = _HANDLER(handle)
    _handlers.append(called)
    action = _Sigaction(ctypes.cast(called, ctypes.c_void_p), flags=SA_SIGINFO)
    result = syscalls.libc.sigaction(signal.SIGSYS, ctypes.byref(action), None)
    syscalls.check(result, "sigaction", "SIGSYS")
