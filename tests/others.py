"""The programs of other projects that the tests compare with, and our own command line: how they are run here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from labkernel.linux import cgroups

ROOT = os.getuid() == 0
PATIENCE = 180.0


def run(*command: str | Path, **settings: Any) -> str:
    """What a program prints, which must not fail. It reads from an empty pipe: crun gives its streams away."""
    words = list(map(str, command))
    done: subprocess.CompletedProcess[str] = subprocess.run(
        words, input="", capture_output=True, text=True, timeout=PATIENCE, **settings
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def cli(*words: str, status: int = 0, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run labkernel; it must end with this status."""
    command = [sys.executable, "-m", "labkernel", *words]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, **settings
    )
    assert done.returncode == status, f"{words}: {done.stdout}{done.stderr}"
    return done


def program(name: str) -> str:
    """The path of a program of another project. Skips where it is not installed, or not for this user."""
    found = shutil.which(name, path=f"{os.environ.get('PATH')}:/usr/sbin:/sbin")
    if not found:
        pytest.skip(f"{name} is not installed (scripts/system_packages.py test)")
    if not ROOT:
        pytest.skip(f"{name} is tried as root here")
    return found


def runtime(name: str) -> list[str]:
    """How runc or crun is called: crun refuses a machine with both versions of cgroups, so here it sees no v2."""
    path = program(name)
    hybrid = any(one.version == 1 for one in cgroups.mounts()) and os.path.ismount("/sys/fs/cgroup/unified")
    if name == "crun" and hybrid:
        hide = 'umount /sys/fs/cgroup/unified; exec "$@"'
        return ["unshare", "-m", "--propagation", "private", "sh", "-c", hide, "sh", path]
    return [path]
