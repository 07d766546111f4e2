"""The stored notebooks: what can be seen without running them, and that running them sees what it must."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from notebook_tools import NOTEBOOKS, ROOT, code_cells, read

# Paths of somebody's home, and of this project's place.
PLACES = re.compile(rf"(?:/root|/home/[\w.-]+|/Users/[\w.-]+|{re.escape(str(ROOT))})/[\w./-]*")
LINK = re.compile(r"\]\((?![a-z]+:)([^)#]*)#?([^)]*)\)")
IGNORED = {"nbval-ignore-output", "nbval-skip"}


def faults(notebook: NotebookNode) -> Iterator[str]:
    """Yield what a reader of the stored notebook would stumble over, or what would leave it uncompared."""
    cells = [cell for _, cell in code_cells(notebook)]
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        yield "not stored as one run from top to bottom: see scripts/execute_notebooks.py"
    marked = sum(bool(IGNORED & set(cell.metadata.get("tags", []))) for cell in cells)
    if marked * 6 > len(cells):
        yield f"{marked} of {len(cells)} code cells are not compared: at most one in six may be marked"
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for file, anchor in LINK.findall(cell.source):
                if file and not (NOTEBOOKS / file).exists():
                    yield f"a link leads to {file}, which is not there"
                elif file.endswith(".md") and anchor and anchor not in anchors(NOTEBOOKS / file):
                    yield f"a link leads to {anchor} in {file}, where there is no such heading"
    for number, cell in enumerate(cells, 1):
        for output in cell.outputs:
            data = output.get("data", {})
            shown = json.dumps(
                [output.get("text"), output.get("traceback"), data.get("text/plain"), data.get("text/html")]
            )
            for place in sorted(set(PLACES.findall(shown))):
                yield f"cell {number} shows a path of one machine: {place}"
            if output.output_type == "error" and "raises-exception" not in cell.metadata.get("tags", []):
                yield f"cell {number} is stored with the error {output.ename}"
            for kind in data:
                if kind.startswith("image/") and not output.metadata.get(kind, {}).get("alt"):
                    yield f"cell {number} has a picture without a text for who cannot see it"


def anchors(path: Path) -> set[str]:
    """Return what the headings of a Markdown file can be linked by."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def a_notebook(*cells: NotebookNode) -> NotebookNode:
    """Return a notebook of these cells."""
    notebook: NotebookNode = nbformat.v4.new_notebook(cells=list(cells))
    return notebook


def a_cell(
    source: str, count: int | None = 1, output: NotebookNode | None = None, tags: tuple[str, ...] = ()
) -> NotebookNode:
    """Return a code cell, with one output if there is any."""
    cell: NotebookNode = nbformat.v4.new_code_cell(
        source, execution_count=count, metadata={"tags": list(tags)}
    )
    cell.outputs = [output] if output else []
    return cell


def printed(text: str) -> NotebookNode:
    """Return what a cell prints."""
    output: NotebookNode = nbformat.v4.new_output("stream", name="stdout", text=text)
    return output


def displayed(data: dict[str, str], **metadata: object) -> NotebookNode:
    """Return what a cell displays."""
    output: NotebookNode = nbformat.v4.new_output("display_data", data=data, metadata=metadata)
    return output


def raised() -> NotebookNode:
    """Return a traceback."""
    output: NotebookNode = nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])
    return output


PNG = {"image/png": "AAAA"}


def test_stored_notebooks_have_no_faults() -> None:
    found = [
        f"{path.name}: {fault}" for path in sorted(NOTEBOOKS.glob("*.ipynb")) for fault in faults(read(path))
    ]
    assert not found, "\n".join(found)


def test_the_words_of_the_glossary_are_in_order() -> None:
    words = re.findall(r"^### (.+)$", (NOTEBOOKS / "glossary.md").read_text(), re.MULTILINE)
    assert words == sorted(words, key=lambda word: word.lower().replace("_", " "))


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ([a_cell("1", None)], "not stored as one run"),
        ([a_cell("1", 1), a_cell("2", 3)], "not stored as one run"),
        ([a_cell("1", tags=("nbval-skip",)), *(a_cell("1", n) for n in (2, 3, 4, 5))], "1 of 5 code cells"),
        ([a_cell("1", 1, printed("/home/ada/project/x.py"))], "/home/ada/project/x.py"),
        ([a_cell("1", 1, displayed({"text/html": "<b>/root/.cache</b>"}))], "/root/.cache"),
        ([a_cell("1 / 0", 1, raised())], "the error E"),
        ([a_cell("1", 1, displayed(PNG))], "picture without"),
        ([nbformat.v4.new_markdown_cell("[x](99-nowhere.ipynb)")], "99-nowhere.ipynb, which is not there"),
        ([nbformat.v4.new_markdown_cell("[x](glossary.md#nowhere)")], "nowhere in glossary.md"),
        ([a_cell("1", 1, displayed(PNG, **{"image/png": {"alt": ""}}))], "picture without"),
    ],
)
def test_each_fault_is_seen(cells: list[NotebookNode], words: str) -> None:
    assert words in "\n".join(faults(a_notebook(*cells)))


@pytest.mark.parametrize(
    "cells",
    [
        [],
        [a_cell("1", 1), a_cell("", None), a_cell("2", 2)],
        [nbformat.v4.new_markdown_cell("[x](glossary.md#setuid-program) [y](https://example.org/#z) `f(x)`")],
        [a_cell("1", tags=("nbval-ignore-output",)), *(a_cell("1", n) for n in (2, 3, 4, 5, 6))],
        [a_cell("1", 1, printed("/proc/self/root\n/etc/passwd"))],
        [a_cell("1 / 0", 1, raised(), ("raises-exception",))],
        [a_cell("1", 1, displayed(PNG, **{"image/png": {"alt": "a line that rises"}}))],
    ],
)
def test_what_is_right_is_no_fault(cells: list[NotebookNode]) -> None:
    assert list(faults(a_notebook(*cells))) == []


# How pytest runs a notebook (conftest.py). Below the project's root, so that its conftest.py counts.


@pytest.fixture
def place() -> Iterator[Path]:
    """Give a directory for a notebook, and remove it afterwards."""
    place = ROOT / "build" / "test-notebooks"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    yield place
    shutil.rmtree(place)


def nbval(place: Path, notebook: NotebookNode, *options: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on one notebook."""
    nbformat.write(notebook, place / "trial.ipynb")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "--color=no",
        "-p",
        "no:cacheprovider",
        *options,
        str(place),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_outputs_as_stored_pass(place: Path) -> None:
    """Those too that nbval alone gets wrong: updated, cleared, captured by a widget, written by a child."""
    updated = "shown = display('first', display_id=True)\nshown.update('last')"
    cleared = "from IPython.display import clear_output\nprint('gone')\nclear_output()\nprint('stays')"
    captured = "import ipywidgets\nbox = ipywidgets.Output()\nwith box:\n    print('captured')"
    # (ipykernel has a thread that reads what children print: on a busy machine it needs a moment.)
    child = "import subprocess, time\n_ = subprocess.run(['echo', 'from a child'])\ntime.sleep(1)"
    done = nbval(
        place,
        a_notebook(
            a_cell(updated, 1, displayed({"text/plain": "'last'"})),
            a_cell(cleared, 2, printed("stays\n")),
            a_cell(captured, 3),
            a_cell(child, 4, printed("from a child\n")),
        ),
    )
    assert "4 passed" in done.stdout, done.stdout


def test_other_outputs_fail(place: Path) -> None:
    done = nbval(place, a_notebook(a_cell("print('new')", 1, printed("old\n"))))
    assert done.returncode == 1
    assert "The outputs differ" in done.stdout
    assert "1 failed" in done.stdout


def test_what_a_cell_complains_of_is_shown_where_it_should_say_nothing(place: Path) -> None:
    done = nbval(place, a_notebook(a_cell("import sys\nprint(6 * 7, file=sys.stderr)")))
    assert done.returncode == 1
    assert "Unexpected output fields" in done.stdout
    assert "\n42\n" in done.stdout


def test_a_cell_stored_without_having_been_run_fails(place: Path) -> None:
    done = nbval(place, a_notebook(a_cell("x = 1", None)))
    assert "Stored without having been run" in done.stdout
    assert "1 failed" in done.stdout


def test_after_the_kernel_died_the_rest_fails_at_once(place: Path) -> None:
    done = nbval(place, a_notebook(a_cell("import os\nos.kill(os.getpid(), 9)"), a_cell("x = 1", 2)))
    assert "Cell 0: The cell ended the kernel" in done.stdout
    assert "Cell 1: Not run: cell 0 ended the kernel" in done.stdout


def test_after_a_cell_took_too_long_the_rest_fails_at_once(place: Path) -> None:
    cells = a_cell("import time\ntime.sleep(60)"), a_cell("x = 1", 2)
    done = nbval(place, a_notebook(*cells), "--nbval-cell-timeout=1")
    assert "Cell 0: The cell took too long" in done.stdout
    assert "Cell 1: Not run: cell 0 took too long" in done.stdout


def test_a_cell_whose_needs_are_not_met_is_run_and_not_compared(place: Path) -> None:
    other = a_cell("x = 6\nprint('here')", 1, printed("elsewhere\n"), ("needs-wings",))
    done = nbval(place, a_notebook(other, a_cell("print(x)", 2, printed("6\n"))))
    assert "1 passed, 1 skipped" in done.stdout, done.stdout
    assert "run, not compared: wings: the doctor knows no such thing." in done.stdout


def test_where_they_are_met_it_is_compared(place: Path) -> None:
    wrong = a_cell("print('here')", 1, printed("elsewhere\n"), ("needs-children",))
    assert "1 failed" in nbval(place, a_notebook(wrong)).stdout


def test_a_cell_whose_needs_are_not_met_may_not_fail(place: Path) -> None:
    assert "1 failed" in nbval(place, a_notebook(a_cell("1 / 0", 1, None, ("needs-wings",)))).stdout


def test_skips_are_counted_and_named_at_the_end(place: Path) -> None:
    notebook = a_notebook(a_cell("x = 1", tags=("nbval-skip",)), a_cell("y = 1", tags=("nbval-skip",)))
    done = nbval(place, notebook)
    assert "skipped, and why: 2" in done.stdout
    assert "trial.ipynb (2 cells): the cell is tagged nbval-skip" in done.stdout
    assert re.fullmatch(r"=+ 2 skipped in .* =+", done.stdout.splitlines()[-1])
