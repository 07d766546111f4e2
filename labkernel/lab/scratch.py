"""A directory for a notebook's experiments, on the disk, which is gone when the notebook is, however that ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from labkernel import children, state

_TIDY = 'read -r _; rm -rf -- "$1"'
"""Wait until the process at the other end of the pipe closes it, or dies; then remove the directory."""

_mine: tuple[int, Path, contextlib.ExitStack] | None = None


def scratch() -> Path:
    """The notebook's own directory, made when it is first asked for; `lab.end()` removes it."""
    global _mine
    if _mine is None or _mine[0] != os.getpid() or not _mine[1].is_dir():
        held = contextlib.ExitStack()
        _mine = os.getpid(), held.enter_context(temporary()), held
    return _mine[1]


def remove() -> None:
    """Remove the notebook's directory, if there is one."""
    global _mine
    if _mine is not None and _mine[0] == os.getpid():
        _mine[2].close()
    _mine = None


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    """A directory for as long as the block lasts, or this process: another one removes it when this one is killed.

    It lies where the containers' writable layers do, so that overlay can write there: /tmp may be a file system that
    cannot keep its marks.
    """
    state.home().mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=state.PREFIX, dir=state.home())).resolve()
    place.chmod(0o755)
    command = ["sh", "-c", _TIDY, "sh", str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):  # its end closes the pipe
        try:
            yield place
        finally:  # children of the lab may have put there what only they can remove
            with contextlib.suppress(OSError, children.LauncherDied):
                children.in_child(shutil.rmtree, place, ignore_errors=True)
