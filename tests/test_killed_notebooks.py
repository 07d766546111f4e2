"""The kernel of each notebook is killed somewhere in the middle: nothing of the lab is left on the machine.

(That nothing is left when a notebook has run to its end is looked at where it does: conftest.py.)
"""

from __future__ import annotations

import copy
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from jupyter_client.provisioning.local_provisioner import LocalProvisioner
from nbclient.exceptions import DeadKernelError
from notebook_tools import client, code_cells, kernel, missing, read, selected

from labkernel import children
from tests.helpers import assert_nothing_left, own_home, seed, snapshot


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory, descriptors=False) as place:
        yield place


@pytest.mark.parametrize("path", selected([]), ids=lambda path: path.stem)
def test_nothing_is_left_when_its_kernel_is_killed(path: Path) -> None:
    notebook = read(path)
    if lacking := missing(notebook):
        pytest.skip("; ".join(lacking))
    number = seed()
    chance = random.Random(number)
    children.close_launcher()
    before = snapshot(descriptors=False)
    cells = code_cells(notebook)
    last, after = chance.randrange(1, len(cells)), chance.uniform(0, 0.4)
    runner = client(copy.deepcopy(notebook), path, 120)
    with kernel(runner):
        for place, _ in cells[:last]:
            runner.execute_cell(runner.nb.cells[place], place)
        process = runner.km.provisioner if runner.km else None
        assert isinstance(process, LocalProvisioner)
        killer = threading.Timer(after, os.kill, (process.pid, signal.SIGKILL))
        killer.start()
        try:
            for place, _ in cells[last:]:
                runner.execute_cell(runner.nb.cells[place], place)
        except DeadKernelError:
            pass
        killer.join()
    what = f"LABKERNEL_TEST_SEED={number}: killed {after:.3f} s after cell {last} of {len(cells)} had begun"
    try:
        assert_nothing_left(before)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None
