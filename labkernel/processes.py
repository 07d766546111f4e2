"""Starting and ending processes of the launcher's: a clone3 for Python, told by pid and pidfd."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable
from typing import NoReturn

from labkernel import walls
from labkernel.linux import syscalls


def fork(child: Callable[[], NoReturn], flags: int = 0, into: int | None = None) -> tuple[int, int]:
    """clone3 a child that runs `child` and nothing else of us, whatever happens in it; its pid and pidfd.

    It begins with all signals blocked, so that none finds it half made, and dies with the launcher.
    """
    before = syscalls.block_signals()
    parent = os.pidfd_open(os.getpid())
    try:
        pid, pidfd = syscalls.clone3(flags, into)
        if pid:
            return pid, pidfd
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            if _has_ended(parent):  # before we asked for the signal: none will come
                os._exit(walls.SET_UP_FAILED)
            os.close(parent)
            child()
        finally:
            os._exit(walls.SET_UP_FAILED)
    finally:
        os.close(parent)
        syscalls.block_signals(before)


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def kill(pidfd: int) -> None:
    """SIGKILL a process, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def end_now(pid: int, pidfd: int) -> None:
    """Kill a child of ours that nobody watches, and reap it, unless the launcher's loop was quicker."""
    kill(pidfd)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
