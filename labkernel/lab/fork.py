"""Run a function in a fork: the pid and the time namespace hold for the children of whoever makes them."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable
from typing import TypeVar, cast

from labkernel.children import ChildFailed, memory_file

T = TypeVar("T")


def in_fork(function: Callable[..., T], *arguments: object) -> T:
    """Fork, run `function` in the new process, wait for it, and return its value.

    For use inside a child of the lab (`in_child`), which has a single thread: after `unshare(CLONE_NEWPID)` the new
    process is pid 1, and all that it has started ends with it. What the function raises is raised here.
    Raises ChildFailed when the process was killed, or ended without a value.
    """
    import cloudpickle

    sys.stdout.flush()
    result = memory_file(b"")  # not a pipe: somebody who lives on might hold it open for ever
    pid = os.fork()
    if pid == 0:
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
    return cast(T, value)
