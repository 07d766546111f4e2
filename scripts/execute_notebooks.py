"""Execute notebooks and store their outputs in them, the same each time.

    .venv/bin/python scripts/execute_notebooks.py            all of them
    .venv/bin/python scripts/execute_notebooks.py 03 23      those whose names start so

The notebooks are stored executed: people read them before they run them, and `make test` compares what comes
out with what is stored. A notebook that fails is left as it was.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from notebook_tools import client, code_cells, kernel, lacking_for, missing, read, selected, surroundings

# Longer than any cell should take; a cell of `make test` gets 60 s.
CELL_TIMEOUT = 300.0


def execute(path: Path) -> None:
    """Run a notebook from top to bottom in a fresh kernel, and write it back."""
    notebook = read(path)
    normalise(notebook)
    runner = client(notebook, path, CELL_TIMEOUT)
    with kernel(runner):
        for count, (place, cell) in enumerate(code_cells(notebook), 1):
            runner.execute_cell(cell, place, execution_count=count)
            drop_widgets(cell)
    nbformat.write(notebook, path)


def drop_widgets(cell: NotebookNode) -> None:
    """Keep of a widget what shows without a kernel: the picture or text that goes with it.

    The reference to its model would be another one each time, and lead nowhere in a notebook just opened.
    """
    for output in cell.outputs:
        output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)


def normalise(notebook: NotebookNode) -> None:
    """Keep of a notebook's metadata what is the same on every machine; number the cells by their place.

    Ids that follow from the place change less between two versions than random ones do.
    """
    kept = {name: value for name, value in notebook.metadata.items() if name == "labkernel"}
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
            **kept,
        }
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for place, cell in enumerate(notebook.cells):
        cell.id = f"cell-{place:03}"
        cell.metadata = nbformat.from_dict(
            {name: value for name, value in cell.metadata.items() if name in ("tags", "jupyter")}
        )
        if cell.cell_type == "code" and not cell.source.strip():
            cell.execution_count, cell.outputs = None, []


def main(names: list[str]) -> int:
    """Execute the notebooks chosen by the beginnings of their names; return the exit status."""
    os.environ.update(surroundings())
    paths = selected(names)
    if not paths:
        print(f"No notebook starts with {' or '.join(names)}.", file=sys.stderr)
        return 2
    status = 0
    for path in paths:
        start = time.monotonic()
        try:
            notebook = read(path)
            if lacking := missing(notebook) + [
                no for _, cell in code_cells(notebook) for no in lacking_for(cell)
            ]:
                raise RuntimeError(f"this machine cannot run it: {'; '.join(lacking)}")
            execute(path)
        except (CellExecutionError, CellTimeoutError, DeadKernelError, RuntimeError) as error:
            print(f"{path.name}: not stored: {error}", file=sys.stderr)
            status = 1
        else:
            print(f"{path.name}: {time.monotonic() - start:.1f} s", flush=True)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
