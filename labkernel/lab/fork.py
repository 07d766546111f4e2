"""Processes for experiments: one that runs a function in a fork, and one that does something and then waits."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

from labkernel.children import ChildFailed, memory_file
from labkernel.linux import syscalls

T = TypeVar("T")


def in_fork(function: Callable[..., T], *arguments: object) -> T:
    """Fork, run `function` in the new process, wait for it, and return its value.

    For use inside a child of the lab (`in_child`), which has a single thread: after `unshare(CLONE_NEWPID)` the new
    process is pid 1, and all that it has started ends with it. What the function raises is raised here.
    Raises ChildFailed when the process was killed, or ended without a value.
    """
    sys.stdout.flush()
    result = memory_file(b"")  # not a pipe: somebody who lives on might hold it open for ever
    pid = os.fork()
    if pid == 0:
        tell(result, function, *arguments)
    return cast(T, told(pid, result))


def tell(result: int, function: Callable[..., object], *arguments: object) -> NoReturn:
    """In the new process: run the function, write what came of it to the memory file `result`, and end."""
    import cloudpickle

    try:
        answer: tuple[bool, object]
        try:
            answer = (True, function(*arguments))
        except Exception as error:
            answer = (False, error)
        sys.stdout.flush()
        os.write(result, cloudpickle.dumps(answer))
    finally:
        os._exit(1)


def told(pid: int, result: int) -> Any:
    """In the old one: wait for process `pid` and return what it told, or raise it. Closes `result`."""
    _, status = os.waitpid(pid, 0)
    with open(result, "rb") as file:
        file.seek(0)
        raw = file.read()
    if not raw:
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            raise ChildFailed(f"the process was killed by {signal.Signals(-code).name}", 128 - code)
        raise ChildFailed(f"the process ended with exit status {code} and no value", code)
    went_well, value = pickle.loads(raw)
    if not went_well:
        raise value
    return value


def waiting(*steps: Callable[[], object]) -> int:
    """Fork a process that does these steps and then waits to be killed; return its pid when it has done them.

    For use inside a child of the lab (`in_child`), and the new process ends when that one does. What a step raises is
    raised here. Raises ChildProcessError when the process ended in the middle.
    """
    sys.stdout.flush()
    said, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        _do_and_wait(steps, say)
    os.close(say)
    with open(said, "rb") as file:
        raw = file.read()
    if raw == DONE:
        return pid
    os.waitpid(pid, 0)
    if not raw:
        raise ChildProcessError("the process ended before it had done all that it was to do")
    raise pickle.loads(raw)


DONE = b"done"


def _do_and_wait(steps: tuple[Callable[[], object], ...], say: int) -> NoReturn:
    import cloudpickle

    try:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        answer = DONE
        try:
            for step in steps:
                step()
        except Exception as error:
            answer = cloudpickle.dumps(error)
        sys.stdout.flush()
        os.write(say, answer)
        os.close(say)
        while answer == DONE:
            time.sleep(
                1
            )  # a step may have set a handler, and pause() would sleep through a signal just before it
    finally:
        os._exit(1)
