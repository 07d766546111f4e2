"""Processes that the launcher starts: they end with it, at whatever moment it dies."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest

MOTHER = """
import os, signal, time
from labkernel import processes

os.set_inheritable(PIPE, True)
slowly = signal.set_wakeup_fd
def late(fd):
    time.sleep(0.5)         # a busy machine: the mother dies before her child has asked for the signal
    return slowly(fd)
signal.set_wakeup_fd = late
processes.fork(lambda: time.sleep(60), FLAGS)
print("forked", flush=True)
time.sleep(AFTER)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("after", [0, 1.0], ids=["before it could ask for the signal", "later"])
@pytest.mark.parametrize("flags", [0, 0x30000000], ids=["as it is", "in namespaces of its own"])
def test_a_child_ends_with_its_mother(after: float, flags: int) -> None:
    alive, held = os.pipe()
    text = MOTHER.replace("PIPE", str(held)).replace("FLAGS", str(flags)).replace("AFTER", str(after))
    mother = subprocess.Popen(
        [sys.executable, "-c", text], pass_fds=[held], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    os.close(held)
    assert mother.stdout
    with mother.stdout:  # its end would be that of the child, too
        assert mother.stdout.readline() == "forked\n"
    try:
        assert mother.wait() == -signal.SIGKILL
        ended, _, _ = select.select([alive], [], [], 10)
        assert ended and os.read(alive, 1) == b""  # the child had the other end open, too
    finally:
        os.close(alive)
