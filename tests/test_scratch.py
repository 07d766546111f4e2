"""The directory for a notebook's experiments: there when asked for, gone when the notebook is, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkernel import lab, state
from labkernel.children import in_child
from labkernel.lab.scratch import remove
from labkernel.linux import mounts, syscalls
from tests.helpers import own_home


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


def use_overlay(place: Path) -> None:
    """Leave behind what overlay leaves: a whiteout, and a work directory that nobody may list."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    mounts.set_propagation("/", "private")
    for name in ("lower", "upper", "work", "merged"):
        (place / name).mkdir()
    (place / "lower" / "file").touch()
    mounts.overlay(place / "merged", [place / "lower"], place / "upper", place / "work")
    (place / "merged" / "file").unlink()


def test_it_is_one_directory_and_new_after_its_removal() -> None:
    place = lab.scratch()
    assert place.parent == state.home().resolve()
    assert place.is_dir()
    assert lab.scratch() == place
    in_child(use_overlay, place)
    remove()
    assert not place.exists()
    again = lab.scratch()
    assert again.is_dir()
    assert again != place
    remove()
    remove()
    assert not again.exists()


def test_the_clean_up_cell_removes_it(capsys: pytest.CaptureFixture[str]) -> None:
    place = lab.scratch()
    lab.end()
    assert not place.exists()
    assert "processes    none" in capsys.readouterr().out


def test_it_goes_when_its_process_is_killed() -> None:
    script = (
        "import time; from labkernel import lab; from labkernel.children import in_child;"
        "from tests.test_scratch import use_overlay; place = lab.scratch(); in_child(use_overlay, place);"
        "print(place, flush=True); time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        place = Path(process.stdout.readline().strip())
        assert place.is_dir()
        os.kill(process.pid, signal.SIGKILL)
    end = time.monotonic() + 20
    while place.exists():
        assert time.monotonic() < end, "it is still there"
        time.sleep(0.02)
