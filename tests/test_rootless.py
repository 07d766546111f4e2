"""The same containers, children and walls, for somebody who is not root: a user is made, and removed afterwards."""

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
from pathlib import Path

import pytest

from tests.helpers import assert_nothing_left, snapshot

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can make a user; all tests are this user's already"
)

FILES = ("test_container", "test_walls", "test_children", "test_namespaces", "test_users")
LIBRARIES = ("pytest", "cloudpickle", "pyroute2", "pyelftools", "psutil", "zstandard", "tqdm", "click")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def user() -> Iterator[pwd.struct_passwd]:
    """An ordinary user with a home and a range of subordinate ids; gone afterwards with all that is theirs."""
    name = f"labkernel-test-{secrets.token_hex(3)}"
    subprocess.run(["useradd", "--create-home", "--shell", "/bin/sh", name], check=True)
    entry = pwd.getpwnam(name)
    try:
        yield entry
    finally:
        end = time.monotonic() + 10
        while (pids := processes_of(entry.pw_uid)) and time.monotonic() < end:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        subprocess.run(["userdel", name], check=True)
        shutil.rmtree(entry.pw_dir, ignore_errors=True)
    assert not Path(entry.pw_dir).exists()
    assert processes_of(entry.pw_uid) == []


def processes_of(uid: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == uid:
                zombie = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
                found += [] if zombie else [int(name)]
    return found


def readable_python() -> str:
    """A Python of this version that everybody may run: this one, if it does not lie in a closed home."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for path in (Path(sys.executable).resolve(), Path("/usr/local/bin", version), Path("/usr/bin", version)):
        if path.exists() and all(place.stat().st_mode & 0o005 == 0o005 for place in (path, *path.parents)):
            return str(path)
    pytest.skip(
        f"no {version} here that an ordinary user can read: {sys.executable} lies in a closed directory"
    )


def copy_libraries(packages: Path) -> None:
    """The libraries that the tests need, copied to where the user can read them."""
    for name in with_requirements(LIBRARIES):
        for file in importlib.metadata.files(name) or ():
            where = packages / file
            if ".." not in file.parts and not where.exists() and os.path.isfile(source := str(file.locate())):
                where.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, where)


def with_requirements(names: tuple[str, ...]) -> set[str]:
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


@pytest.mark.parametrize("with_range", [True, False], ids=["with a range of ids", "with a single id"])
def test_the_tests_pass_for_an_ordinary_user(
    user: pwd.struct_passwd, with_range: bool, tmp_path: Path
) -> None:
    """Without a range in /etc/subuid a container has a single id: what needs more is skipped, in words."""
    home = Path(user.pw_dir)
    if not with_range:
        subprocess.run(
            ["usermod", "--del-subuids", "1-4294967294", "--del-subgids", "1-4294967294", user.pw_name],
            check=True,
        )
    before = snapshot()
    python = readable_python()
    copy_libraries(home / "packages")
    for name in ("labkernel", "tests"):
        shutil.copytree(ROOT / name, home / "lab" / name, ignore=shutil.ignore_patterns("__pycache__"))
    (home / "lab" / "pytest.ini").write_text("[pytest]\n")
    for directory, _, names in os.walk(home):
        for name in (*names, "."):
            os.chown(os.path.join(directory, name), user.pw_uid, user.pw_gid, follow_symlinks=False)
    chosen = FILES if with_range else FILES[3:]
    command = [
        *("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups", "--reset-env"),
        *("env", f"PYTHONPATH={home}/packages", python, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *("--tb=short", "-rs", f"--basetemp={home}/tmp", *(f"tests/{name}.py" for name in chosen)),
    ]
    ended = subprocess.run(command, cwd=home / "lab", capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, f"as an ordinary user:\n{ended.stdout[-20000:]}\n{ended.stderr[-5000:]}"
    passed = re.search(r"(\d+) passed", ended.stdout)
    assert passed
    assert int(passed[1]) > (300 if with_range else 50)
    assert_nothing_left(before)
