"""An ordinary user, made for tests by root, and removed afterwards with all that is theirs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from labkernel.linux import syscalls

ROOT = Path(__file__).parent.parent
PYTHON = str(Path(sys.executable).resolve())
LIBRARIES = ("pytest", "cloudpickle", "pyroute2", "pyelftools", "psutil", "zstandard", "tqdm", "click")
"""What labkernel and its tests need; a notebook needs more, see `make setup`."""

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can make a user; all tests are this user's already"
)

# Python may lie in somebody's closed home. Then that is covered, for the command alone, by an empty directory in
# which nothing but Python can be found, where it always was.
SHOW_PYTHON = """
set -e
held=$(mktemp -d)
mount --bind "$2" "$held"
mount -t tmpfs -o mode=755 none "$1"
mkdir -p "$2"
mount --move "$held" "$2"
rmdir "$held"
shift 2
exec "$@"
"""


@dataclass(frozen=True)
class User:
    """Somebody without rights, and their home."""

    name: str
    uid: int
    gid: int
    home: Path

    def command(self, *words: str | Path) -> list[str]:
        """What root has to start so that `words` are run by this user, who can read our Python."""
        switch = ["setpriv", f"--reuid={self.uid}", f"--regid={self.gid}", "--init-groups"]
        return [*_python_shown(), *switch, *map(str, words)]

    def environment(self) -> dict[str, str]:
        """Our own, but for what names files of ours: how the network is reached is the same for everybody."""
        places = (
            "HOME",
            "XDG_",
            "LABKERNEL_",
            "TMPDIR",
            "VIRTUAL_ENV",
            "UV_CACHE",
            "JUPYTER",
            "IPYTHON",
            "MPL",
        )
        ours = (*places, "PYTHON", "PYTEST_", "MAKE")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return kept | {"HOME": str(self.home), "USER": self.name, "LOGNAME": self.name}

    def run(self, *words: str | Path, variables: dict[str, str] | None = None, **settings: Any) -> Any:
        """`subprocess.run` as this user, in their home."""
        defaults: dict[str, Any] = {"cwd": self.home, "capture_output": True, "timeout": 60}
        environment = self.environment() | (variables or {})
        return subprocess.run(self.command(*words), env=environment, **(defaults | settings))

    def gets(self, place: Path) -> None:
        """What root has put there is theirs."""
        for directory, _, names in os.walk(place):
            for name in (*names, "."):
                os.chown(os.path.join(directory, name), self.uid, self.gid, follow_symlinks=False)

    def processes(self) -> list[int]:
        """What runs as this user, zombies left out."""
        found = []
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if name.isdigit() and os.stat(f"/proc/{name}").st_uid == self.uid:
                    zombie = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
                    found += [] if zombie else [int(name)]
        return found


@contextlib.contextmanager
def ordinary_user() -> Iterator[User]:
    """A new user with a home and a range of subordinate ids; gone afterwards, with all processes and files."""
    name = f"labkernel-test-{secrets.token_hex(3)}"
    # Their orphans come to us: a pid 1 that does not reap would keep them as zombies.
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    subprocess.run([_program("useradd"), "--create-home", "--shell", "/bin/sh", name], check=True)
    entry = pwd.getpwnam(name)
    user = User(name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))
    try:
        user.home.chmod(0o755)
        yield user
    finally:
        end = time.monotonic() + 10
        while (pids := user.processes()) and time.monotonic() < end:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        subprocess.run([_program("userdel"), name], check=True)
        shutil.rmtree(user.home, ignore_errors=True)
    assert not user.home.exists()
    assert user.processes() == []


def copy_package(user: User) -> dict[str, str]:
    """Copies of labkernel and of the libraries it needs, for a user who cannot read ours; the variables to set."""
    packages = user.home / "packages"
    shutil.copytree(ROOT / "labkernel", packages / "labkernel", ignore=shutil.ignore_patterns("__pycache__"))
    for name in _with_requirements(LIBRARIES):
        for file in importlib.metadata.files(name) or ():
            where = packages / file
            if ".." not in file.parts and not where.exists() and os.path.isfile(source := str(file.locate())):
                where.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, where)
    user.gets(packages)
    return {"PYTHONPATH": str(packages)}


def _with_requirements(names: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name.lower() not in found:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                for line in importlib.metadata.requires(name) or ():
                    if "extra ==" not in line:
                        todo += re.findall(r"^[\w.-]+", line)
                found.add(name.lower())
    return found


def _python_shown() -> list[str]:
    """What to put before a command so that everybody who is started by it can read our Python."""
    closed = [place for place in Path(sys.base_prefix).parents if place.stat().st_mode & 0o005 != 0o005]
    if not closed:
        return []
    script = ["sh", "-c", SHOW_PYTHON, "sh", str(closed[-1]), sys.base_prefix]
    return ["unshare", "--mount", "--propagation", "private", *script]


def _program(name: str) -> str:
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if not found:
        pytest.skip(f"there is no {name} here to make an ordinary user with")
    return found
