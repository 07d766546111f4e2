"""Make the environment `.venv` from the lock, or find in milliseconds that it is there already.

    python3 scripts/set_up.py

Standard library only: all it needs is Python with its venv module. What it does, in order:

1. `python -m venv .venv`, with the interpreter that runs this script;
2. pip installs uv, pinned and hashed in requirements/uv.txt;
3. uv installs requirements/lock.txt, every file checked against its hash;
4. labkernel itself goes in as an editable install: a .pth file with the path of this directory.

A stamp in .venv, written last, says for which Python and which lock this was done. As long as it fits nothing
is done and nothing is downloaded. An interrupted set-up leaves none, and is taken up again by the next one.
The Makefile has looked for a Python that is new enough.

`WHEELS=DIR` in the environment takes every file from DIR and nothing from the network.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from system_packages import Package, install, missing

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "stamp.json"
LOCK = ROOT / "requirements" / "lock.txt"
UV_LOCK = ROOT / "requirements" / "uv.txt"
INPUTS = (LOCK, UV_LOCK, ROOT / "pyproject.toml")


def main() -> None:
    """Bring .venv up to date; say what is done, and nothing when there is nothing to do."""
    with LOCK.open() as lock:  # one set-up at a time in one directory
        fcntl.flock(lock, fcntl.LOCK_EX)
        python, contents = interpreter(), digest()
        done = read_stamp()
        if done == {"python": python, "contents": contents}:
            return
        start = time.monotonic()
        if done.get("python") != python:
            make_venv()
        else:
            STAMP.write_text(json.dumps({"python": python}))  # until the packages are in as well
        install_packages()
        STAMP.write_text(json.dumps({"python": python, "contents": contents}))
        say(f"the environment is ready ({time.monotonic() - start:.0f} s)")
        for package in missing("lab"):
            say(f"recommended, not needed: apt install {package.name} ({package.why})")


def say(line: str) -> None:
    """Print a line of progress at once, also into a pipe."""
    print(f"=> {line}", flush=True)


def base_python() -> Path:
    """Return the interpreter behind this one: when .venv's own Python runs this, the one it was made with."""
    return Path(getattr(sys, "_base_executable", sys.executable)).resolve()


def interpreter() -> str:
    """Return what makes .venv unusable when it changes: the interpreter, its version, the place of .venv."""
    return f"{base_python()} {sys.version} {VENV}"


def digest() -> str:
    """Return the hash of everything that decides what is in the environment."""
    total = hashlib.sha256()
    for path in INPUTS:
        total.update(path.read_bytes())
    return total.hexdigest()


def read_stamp() -> dict[str, str]:
    """Return what the last set-up left; nothing if there was none, or if it did not finish."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def make_venv() -> None:
    """Make an empty .venv, with pip in it."""
    if importlib.util.find_spec("ensurepip") is None:
        # Debian and Ubuntu keep ensurepip in a package of its own, one for each Python.
        name = f"python3.{sys.version_info.minor}-venv"
        why = f"lets {base_python()} make the environment .venv"
        if not install([Package(name, "", (), why)], "The set-up"):
            sys.exit(f"Without {name} there is no environment.")
    say(f"making .venv with {base_python()} ({sys.version.split()[0]})")
    run(base_python(), "-m", "venv", "--clear", VENV)


def install_packages() -> None:
    """Install exactly what is locked, and labkernel."""
    wheels = os.environ.get("WHEELS")
    offline = ["--no-index", "--find-links", wheels] if wheels else []
    python = VENV / "bin" / "python"
    say("pip installs uv")
    pip: list[str | Path] = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    run(*pip, *offline, "--require-hashes", "--requirement", UV_LOCK)
    say(f"uv installs {count(LOCK)} packages from {LOCK.relative_to(ROOT)}")
    uv: list[str | Path] = [VENV / "bin" / "uv", "pip"]
    # The machine's own certificates: some networks have their own authority.
    where: list[str | Path] = ["--python", python, "--system-certs", *offline, *cache()]
    run(*uv, "sync", *where, "--require-hashes", LOCK, hide=(" + ", " - "))
    run(*uv, "install", *where, "--quiet", "--no-deps", "--no-build-isolation", "--editable", ROOT)


def cache() -> list[str]:
    """Return uv's option for a machine where its cache cannot be written, such as one without a home."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = Path(os.environ.get("UV_CACHE_DIR") or caches / "uv")
    nearest = next(path for path in (place, *place.parents) if path.exists())
    return [] if os.access(nearest, os.W_OK) else ["--no-cache"]


def count(lock: Path) -> int:
    """Return the number of packages that a lock names."""
    return sum(line[0].isalnum() for line in lock.read_text().splitlines() if line)


def run(*command: str | Path, hide: tuple[str, ...] = ("\0",)) -> None:
    """Run a command, without the lines of its progress that start as in `hide`.

    When it fails, end the set-up with its status: it has said why itself.
    """
    words = [str(word) for word in command]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if not line.startswith(hide):
                print("   " + line, end="", flush=True)
    if process.returncode:
        sys.exit(f"Set-up failed, exit status {process.returncode}: {' '.join(words)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. The next `make` goes on from here.")
