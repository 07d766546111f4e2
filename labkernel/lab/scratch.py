"""A directory for a notebook's experiments, on the disk, which is gone when the notebook is, however that ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from labkernel import children, state

_TIDY = 'read -r _; rm -rf -- "$1"'
"""Wait until the process at the other end of the pipe closes it, or dies; then remove the directory."""

_mine: tuple[int, Path, subprocess.Popen[bytes]] | None = None


def scratch() -> Path:
    """The notebook's own directory, made when it is first asked for; `lab.end()` removes it.

    It lies where the containers' writable layers do, so that overlay can write there: /tmp may be a file system that
    cannot keep its marks. A process of its own removes it when this one is killed.
    """
    global _mine
    if _mine is None or _mine[0] != os.getpid() or not _mine[1].is_dir():
        state.home().mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=state.PREFIX, dir=state.home())).resolve()
        place.chmod(0o755)
        tidier = subprocess.Popen(
            ["sh", "-c", _TIDY, "sh", str(place)], stdin=subprocess.PIPE, start_new_session=True
        )
        _mine = os.getpid(), place, tidier
    return _mine[1]


def remove() -> None:
    """Remove the directory, if there is one, with what children of the lab have put there under ids of their own."""
    global _mine
    if _mine is None or _mine[0] != os.getpid():
        return
    _, place, tidier = _mine
    _mine = None
    with contextlib.suppress(OSError, children.LauncherDied):
        children.in_child(shutil.rmtree, place, ignore_errors=True)
    assert tidier.stdin
    tidier.stdin.close()
    tidier.wait()
