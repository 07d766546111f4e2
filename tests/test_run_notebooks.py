"""`make run` and `make outputs`, on notebooks made for it."""

from __future__ import annotations

import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import run_notebooks
from execute_notebooks import execute
from nbformat import NotebookNode
from notebook_tools import ROOT, read

FIGURE = """
import matplotlib.pyplot as plt
figure, axes = plt.subplots()
plt.close(figure)
display(figure, metadata={"image/png": {"alt": "axes with \\"nothing\\" in them"}})
"""


def write(path: Path, *sources: str) -> Path:
    """Write a notebook with these code cells below a line with a link."""
    cells = [nbformat.v4.new_markdown_cell("[next](04-next.ipynb) [part](04-next.ipynb#part)")]
    notebook = nbformat.v4.new_notebook(
        cells=cells + [nbformat.v4.new_code_cell(source) for source in sources]
    )
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the pages and figures go to a directory of the test's."""
    (tmp_path / "build" / "pages").mkdir(parents=True)
    (tmp_path / "build" / "figures").mkdir()
    monkeypatch.setattr(run_notebooks, "BUILD", tmp_path / "build")
    return tmp_path / "build"


def test_a_notebook_that_runs_leaves_its_page_and_figures(tmp_path: Path, build: Path) -> None:
    slider = "import ipywidgets\nipywidgets.IntSlider(description='dial')"
    result = run_notebooks.run(write(tmp_path / "03-trial.ipynb", "print('the' + ' output')", FIGURE, slider))
    assert (result.outcome, result.reason, result.cells, result.figures) == ("passed", "", 3, 1)
    assert (build / "figures" / "03-trial-1.png").read_bytes().startswith(b"\x89PNG")
    page = (build / "pages" / "03-trial.html").read_text()
    assert "the output" in page
    assert "dial" in page  # without a kernel, a widget is the text that goes with it
    assert 'axes with "nothing" in them' in html.unescape(page)
    assert (
        ".jp-OutputArea-output .highlight pre {font-family: var(--jp-code-font-family)" in page
    )  # show_source
    assert 'href="04-next.html"' in page and 'href="04-next.html#part"' in page


def test_a_page_loads_nothing_from_elsewhere(tmp_path: Path, build: Path) -> None:
    run_notebooks.run(write(tmp_path / "03-trial.ipynb", FIGURE))
    page = (build / "pages" / "03-trial.html").read_text()
    assert not re.findall(r"""(?:src|href|import|url)\s*[=(]\s*["']?\s*(?:https?:)?//[^"' )]*""", page)


def test_a_notebook_that_fails_says_where_and_why(tmp_path: Path, build: Path) -> None:
    result = run_notebooks.run(
        write(tmp_path / "03-trial.ipynb", "print('before')", "raise ValueError('no')", "1")
    )
    assert (result.outcome, result.reason, result.cells) == ("failed", "cell 2: ValueError: no", 2)
    assert "before" in (build / "pages" / "03-trial.html").read_text()


def test_a_kernel_that_dies_is_a_failure(tmp_path: Path, build: Path) -> None:
    result = run_notebooks.run(write(tmp_path / "03-trial.ipynb", "import os\nos.kill(os.getpid(), 9)"))
    assert (result.outcome, result.reason) == ("failed", "cell 1: Kernel died")


def run_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[dict[str, object]]]:
    """Run all notebooks of a directory; return the exit status and what build/run.json says."""
    monkeypatch.setattr("notebook_tools.NOTEBOOKS", tmp_path)
    status = run_notebooks.main([])
    rows: list[dict[str, object]] = json.loads((run_notebooks.BUILD / "run.json").read_text())
    return status, rows


def test_one_that_fails_does_not_stop_the_others(
    tmp_path: Path, build: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "01-bad.ipynb", "1 / 0")
    write(tmp_path / "02-good.ipynb", "1")
    status, rows = run_main(tmp_path, monkeypatch)
    assert status == 1
    assert [(row["notebook"], row["outcome"], row["reason"]) for row in rows] == [
        ("01-bad.ipynb", "failed", "cell 1: ZeroDivisionError: division by zero"),
        ("02-good.ipynb", "passed", ""),
    ]
    assert all(
        isinstance(row["seconds"], float) and set(row) == {"notebook", "seconds", "outcome", "reason"}
        for row in rows
    )
    assert re.search(r"^02-good.ipynb +\d+\.\d +1 +0  passed$", capsys.readouterr().out, re.MULTILINE)


def test_one_that_cannot_run_here_is_skipped_in_words(
    tmp_path: Path, build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "01-wants.ipynb", "1 / 0")
    monkeypatch.setattr(run_notebooks, "missing", lambda notebook: ["no such kernel", "no such user"])
    status, rows = run_main(tmp_path, monkeypatch)
    assert status == 0
    assert (rows[0]["outcome"], rows[0]["reason"]) == ("skipped", "no such kernel; no such user")


def test_ctrl_c_stops_the_run_and_its_kernel(tmp_path: Path) -> None:
    write(
        tmp_path / "01-long.ipynb",
        "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(60)",
    )
    code = (
        "import sys, pathlib, notebook_tools, run_notebooks;"
        f"notebook_tools.NOTEBOOKS = pathlib.Path({str(tmp_path)!r});"
        f"run_notebooks.BUILD = pathlib.Path({str(tmp_path / 'build')!r});"
        "sys.exit(run_notebooks.main([]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "scripts")},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for _ in range(200):
            if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()
    assert json.loads((tmp_path / "build" / "run.json").read_text()) == []


def test_stored_outputs_are_the_same_each_time(tmp_path: Path) -> None:
    slider = "import ipywidgets\nipywidgets.IntSlider()"
    path = write(
        tmp_path / "03-trial.ipynb",
        "print(1)",
        FIGURE,
        slider,
        "",
        "import sys\nprint(2)\nprint(3, file=sys.stderr)",
    )
    execute(path)
    once = path.read_bytes()
    execute(path)
    assert path.read_bytes() == once
    counts = [cell.execution_count for cell in read(path).cells if cell.cell_type == "code"]
    assert counts == [1, 2, 3, None, 4]


def test_metadata_that_matters_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "03-trial.ipynb", "1")
    notebook: NotebookNode = read(path)
    notebook.metadata["labkernel"] = {"requires": []}
    notebook.metadata["widgets"] = {"state": {}}
    notebook.cells[1].metadata = nbformat.from_dict({"tags": ["nbval-skip"], "execution": {"iopub": "now"}})
    nbformat.write(notebook, path)
    execute(path)
    assert read(path).metadata.labkernel == {"requires": []}
    assert "widgets" not in read(path).metadata
    assert read(path).cells[1].metadata == {"tags": ["nbval-skip"]}


def test_a_notebook_that_fails_is_left_as_it_was(tmp_path: Path) -> None:
    path = write(tmp_path / "03-trial.ipynb", "print(1)", "1 / 0")
    before = path.read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        execute(path)
    assert path.read_bytes() == before
