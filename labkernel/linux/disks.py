"""Block devices, by number: which one is below a directory. Limits of input and output are set for such a number.

Source: https://docs.kernel.org/admin-guide/cgroup-v2.html#io-interface-files and man 5 proc_pid_mountinfo
"""

from __future__ import annotations

import os
from pathlib import Path


def below(path: str | os.PathLike[str]) -> str | None:
    """The disk that a file or directory lies on, as "major:minor"; None where the kernel names none.

    A file system may have a number of its own that is no device's (btrfs): then the device from which it was mounted
    counts. Memory, the network and an overlay have no disk of their own. Raises OSError.
    """
    number = _number(os.stat(path).st_dev)
    if os.path.exists(f"/sys/dev/block/{number}"):
        return whole(number)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        source = right.split()[1]
        if left.split()[2] == number and source.startswith("/dev/") and os.path.exists(source):
            return whole(_number(os.stat(source).st_rdev))
    return None


def whole(number: str) -> str:
    """The disk that a partition is a part of; any other device is its own answer."""
    if os.path.exists(f"/sys/dev/block/{number}/partition"):
        return Path(f"/sys/dev/block/{number}/../dev").read_text().strip()
    return number


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"
