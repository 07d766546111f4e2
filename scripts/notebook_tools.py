"""What all that runs notebooks shares: the surroundings of a kernel, and how a notebook is executed."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
PRIVATE = ROOT / ".jupyter"
NEEDS = "needs-"


def surroundings() -> dict[str, str]:
    """Return an environment in which Jupyter, IPython and matplotlib keep to this project.

    The reader's own settings, extensions, kernels and styles are neither used nor changed: what a notebook
    shows does not depend on them.
    """
    PRIVATE.mkdir(mode=0o700, exist_ok=True)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON"))
    }
    # ipykernel does not show what children write to file descriptors 1 and 2 when it finds this variable.
    environment.pop("PYTEST_CURRENT_TEST", None)
    environment |= {
        "JUPYTER_CONFIG_PATH": str(ROOT / "jupyter_config"),
        "JUPYTER_CONFIG_DIR": str(PRIVATE / "config"),
        "JUPYTER_DATA_DIR": str(PRIVATE / "data"),
        "JUPYTER_RUNTIME_DIR": str(PRIVATE / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(PRIVATE / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(PRIVATE / "workspaces"),
        "IPYTHONDIR": str(PRIVATE / "ipython"),
        "MPLCONFIGDIR": str(PRIVATE / "matplotlib"),
        # The debugger's remark about frozen modules is not for the reader.
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    # The environment may be used without being activated: its commands come first.
    commands = str(ROOT / ".venv" / "bin")
    environment["PATH"] = os.pathsep.join([commands, environment.get("PATH", os.defpath)])
    return environment


def read(path: Path) -> NotebookNode:
    """Read a notebook, and check that it is one."""
    notebook: NotebookNode = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def selected(beginnings: list[str]) -> list[Path]:
    """Return the notebooks whose names start with one of these words, or all, in reading order."""
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    return [path for path in paths if path.name.startswith(tuple(beginnings))] if beginnings else paths


def missing(notebook: NotebookNode) -> list[str]:
    """Return in words what this machine lacks of what the notebook needs; nothing when it can run.

    A notebook says what it needs in its metadata, as {"labkernel": {"requires": ["userns", …]}}.
    """
    requires = notebook.metadata.get("labkernel", {}).get("requires", [])
    if not requires:
        return []
    try:
        doctor = import_module("labkernel.lab.doctor")
    except ModuleNotFoundError as error:
        if error.name not in ("labkernel.lab", "labkernel.lab.doctor"):
            raise
        print("(no doctor yet: everything is tried)", flush=True)
        return []
    return list(doctor.missing(list(requires)))


def lacking_for(cell: NotebookNode) -> list[str]:
    """Return in words what this machine lacks of what one cell needs: its tags say so, as `needs-cgroup:io`.

    Such a cell runs everywhere; where something is lacking it says so, and its output is another one.
    """
    needs = [tag.removeprefix(NEEDS) for tag in cell.metadata.get("tags", []) if tag.startswith(NEEDS)]
    return _lacking(tuple(needs)) if needs else []


@functools.cache
def _lacking(needs: tuple[str, ...]) -> list[str]:
    return list(import_module("labkernel.lab.doctor").missing(list(needs)))


def client(notebook: NotebookNode, path: Path, timeout: float | None) -> NotebookClient:
    """Return what executes the notebook at `path`, in its directory and always in the same way.

    `timeout` is in seconds, for a cell. The outputs hold no times, and one text for each of stdout and
    stderr, whatever the pieces in which it arrived.
    """
    return NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
    )


@contextmanager
def kernel(runner: NotebookClient) -> Iterator[None]:
    """Start a kernel for the runner; shut it down in an orderly way at the end, so that it can clean up."""
    # The kernel repeats on its own stdout and stderr what its children write; the cell has it already.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    with (
        (PRIVATE / f"kernel{worker}.log").open("w") as log,
        runner.setup_kernel(env=surroundings(), stdout=log, stderr=log),
    ):
        yield


def code_cells(notebook: NotebookNode) -> list[tuple[int, NotebookNode]]:
    """Return the code cells that have code in them, each with its place among all cells."""
    return [
        (place, cell)
        for place, cell in enumerate(notebook.cells)
        if cell.cell_type == "code" and cell.source.strip()
    ]
