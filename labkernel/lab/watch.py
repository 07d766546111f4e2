"""Watch a process from outside, stop by stop: how the checks of exercises see what an answer has really done."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

from labkernel.lab import calm
from labkernel.lab.checks import NotYet


@contextlib.contextmanager
def watched(*steps: Callable[[], Any]) -> Iterator[Callable[[], int]]:
    """A child that does these steps and stops itself after each; for use inside a child of the lab.

    Yields a function that lets it do its next step and returns its pid, once it has stopped again: then /proc/PID
    shows what it has become. Raises NotYet when a step fails or does not come to its end.
    """
    said = mmap.mmap(-1, 4096)  # shared memory, not a pipe: a step may close every descriptor
    pid = os.fork()
    if pid == 0:
        try:
            for step in steps:
                step()
                os.kill(os.getpid(), signal.SIGSTOP)
        except BaseException as error:
            said.write(calm.in_words(error).encode()[:4096])
        finally:
            os._exit(1)

    stopped = False

    def go_on() -> int:
        nonlocal stopped
        if stopped:  # not before its first stop: a SIGCONT that comes too early would undo it
            os.kill(pid, signal.SIGCONT)
        stopped = True
        _, status = os.waitpid(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            text = said[:].rstrip(b"\0").decode(errors="replace")
            raise NotYet(f"it failed: {text}" if text else "it ended the process before it was done")
        return pid

    try:
        yield go_on
    finally:
        said.close()
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
