"""How pytest runs the notebooks (`pytest --nbval notebooks`), and what it says of skipped tests.

nbval collects the cells, cleans up their outputs and compares them. Four things are done differently here:

- nbclient executes the cells, as it did when the outputs were stored (scripts/notebook_tools.py). nbval's own
  way knows nothing of outputs that are updated or cleared, or of what an Output widget captures, and it
  waits for its whole timeout when the kernel has died.
- A notebook that cannot run on this machine is skipped, in the doctor's words. Its metadata says its needs.
- Side by side with others (pytest-xdist) each notebook has a home of its own, where no recipe has been built before.
- When a notebook's kernel has ended, processes, mounts, cgroups, interfaces, rules and directories are those of before.
"""

from __future__ import annotations

import copy
import os
import signal
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import nbval.plugin
import pytest
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbval.plugin import coalesce_streams
from notebook_tools import client, kernel, lacking_for, missing, surroundings

from tests.helpers import assert_nothing_left, own_home, snapshot

os.environ.update(surroundings())
# A shell lets its background jobs ignore Ctrl-C, and so all that they start; some tests are about Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Notebook(nbval.plugin.IPyNbFile):  # type: ignore[misc]
    """A notebook whose cells nbclient executes."""

    def collect(self) -> Iterator[Cell]:
        """Take the cells as nbval finds them, with the marks that it reads from their tags."""
        for cell in super().collect():
            yield Cell.from_parent(
                self, name=cell.name, cell_num=cell.cell_num, cell=cell.cell, options=cell.options
            )

    def setup(self) -> None:
        """Start the kernel, or skip the whole notebook."""
        self.held = ExitStack()
        if hasattr(self.config, "workerinput"):  # pytest-xdist's: another notebook may run beside this one
            places = self.config._tmp_path_factory
            self.held.enter_context(own_home(places, descriptors=False))
        if lacking := missing(self.nb):
            pytest.skip("; ".join(lacking))
        # A copy of the whole notebook: an output can be updated by a later cell.
        self.runner = client(copy.deepcopy(self.nb), self.path, self.config.option.nbval_cell_timeout)
        self.places = [place for place, cell in enumerate(self.nb.cells) if cell.cell_type == "code"]
        self.stopped = ""
        self.held.callback(assert_nothing_left, snapshot(descriptors=False))
        self.held.enter_context(kernel(self.runner))
        self.setup_sanitize_files()

    def get_sanitize_files(self) -> list[str]:
        """Name the one file of rules, so that nobody has to on the command line."""
        return [str(Path(__file__).with_name("tests") / "sanitize.cfg")]

    def teardown(self) -> None:
        """Shut the kernel down, and see that it has cleaned up."""
        self.held.close()


class Cell(nbval.plugin.IPyNbCell):  # type: ignore[misc]
    """A code cell: executed, then compared with what is stored."""

    def runtest(self) -> None:
        """Execute the cell, and fail if it does or if its outputs differ from the stored ones."""
        notebook = self.parent
        if self.options["skip"]:
            pytest.skip("the cell is tagged nbval-skip")
        if notebook.stopped:
            self.raise_cell_error(f"Not run: {notebook.stopped}")
        place = notebook.places[self.cell_num]
        try:
            ran = notebook.runner.execute_cell(notebook.runner.nb.cells[place], place)
        except CellExecutionError as error:
            self.raise_cell_error("The cell raised an exception", error.traceback)
        except (CellTimeoutError, DeadKernelError) as error:
            what = "took too long" if isinstance(error, CellTimeoutError) else "ended the kernel"
            notebook.stopped = f"cell {self.cell_num} {what}"
            self.raise_cell_error(f"The cell {what}", str(error))
        if self.cell.source.strip() and self.cell.execution_count is None:
            self.raise_cell_error("Stored without having been run: see scripts/execute_notebooks.py")
        stored = coalesce_streams(self.cell.outputs)
        if lacking := lacking_for(self.cell):
            pytest.skip(f"run, not compared: {'; '.join(lacking)}")
        if self.options["check"] and not self.compare_outputs(coalesce_streams(ran.outputs), stored):
            # nbval does not show what nobody expected.
            errors = [output.text for output in ran.outputs if output.get("name") == "stderr"]
            self.raise_cell_error("The outputs differ", "\n".join([*self.comparison_traceback, *errors]))


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(
    parent: pytest.Collector,
) -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    """Put a `Notebook` wherever nbval has put its own."""
    found = yield
    return [
        Notebook.from_parent(parent, path=file.path) if isinstance(file, nbval.plugin.IPyNbFile) else file
        for file in found
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count and name what was skipped, with the reasons; a notebook's cells in one line."""
    skipped: Counter[tuple[str, str]] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        name = report.nodeid.split("::")[0] if ".ipynb" in report.nodeid else report.nodeid
        skipped[name, reason.removeprefix("Skipped: ")] += 1
    if skipped:
        terminalreporter.section(f"skipped, and why: {skipped.total()}")
        for (name, reason), count in sorted(skipped.items()):
            cells = f" ({count} cells)" if name.endswith(".ipynb") else ""
            terminalreporter.line(f"{name}{cells}: {reason}")
