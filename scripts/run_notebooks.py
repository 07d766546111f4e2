"""Run the notebooks in order, as `make run` does, and leave pages, figures and a report under build/.

    .venv/bin/python scripts/run_notebooks.py            all of them
    .venv/bin/python scripts/run_notebooks.py 03 23      those whose names start so

    build/pages/NAME.html        the executed notebook as a page that needs no network
    build/figures/NAME-N.png     its figures (or .svg), N counting from 1
    build/run.json               a list of {"notebook", "seconds", "outcome", "reason"};
                                 outcome is "passed", "failed" or "skipped"

A notebook that fails does not stop the others. The exit status is 0 when none failed.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from notebook_tools import ROOT, client, code_cells, kernel, missing, read, selected, surroundings

BUILD = ROOT / "build"
CELL_TIMEOUT = 300.0

# nbconvert's page without the scripts that it would load from elsewhere, with the figures' alt texts, and with code
# that stands in an output (lab.show_source) in a code's font, which its own style takes away.
PAGE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_css -%}
{{ super() }}
<style>
.jp-OutputArea-output .highlight pre {font-family: var(--jp-code-font-family); line-height: var(--jp-code-line-height)}
</style>
{%- endblock -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block data_png scoped -%}
<div class="jp-RenderedImage jp-OutputArea-output">
<img alt="{{ (output | get_metadata('alt', 'image/png') or '') | escape }}"
 src="data:image/png;base64,{{ output.data['image/png'] }}">
</div>
{%- endblock -%}
"""

# No widget: where there is no kernel, the figure or text that goes with it is shown.
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]


@dataclass
class Result:
    """What became of one notebook: a row of the table, and of build/run.json but for the last two."""

    notebook: str
    seconds: float
    outcome: str
    reason: str
    cells: int = 0
    figures: int = 0

    def row(self) -> dict[str, str | float]:
        """Return the part that goes into build/run.json."""
        return {
            "notebook": self.notebook,
            "seconds": round(self.seconds, 2),
            "outcome": self.outcome,
            "reason": self.reason,
        }


def run(path: Path) -> Result:
    """Execute one notebook in a fresh kernel and leave what comes out under build/, also of a failing one."""
    notebook = read(path)
    if lacking := missing(notebook):
        return Result(path.name, 0.0, "skipped", "; ".join(lacking))
    start = time.monotonic()
    runner = client(notebook, path, CELL_TIMEOUT)
    outcome, reason, done = "passed", "", 0
    for _, cell in code_cells(notebook):  # nothing of an earlier run on the pages of this one
        cell.outputs, cell.execution_count = [], None
    try:
        with kernel(runner):
            for done, (place, cell) in enumerate(code_cells(notebook), 1):  # noqa: B007
                runner.execute_cell(cell, place)
    except CellExecutionError as error:
        outcome, reason = "failed", f"cell {done}: {error.ename}: {error.evalue}"
    except (CellControlSignal, DeadKernelError) as error:
        outcome, reason = "failed", f"cell {done}: {str(error).strip().splitlines()[0]}"
    seconds = time.monotonic() - start
    write_page(notebook, path)
    return Result(path.name, seconds, outcome, reason, done, write_figures(notebook, path))


def write_page(notebook: NotebookNode, path: Path) -> None:
    """Render the executed notebook."""
    exporter = HTMLExporter(raw_template=PAGE)
    exporter.config.NbConvertBase.display_data_priority = SHOWN
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": path.stem}})
    page = re.sub(r'href="([\w.-]+)\.ipynb([#"])', r'href="\1.html\2', page)
    (BUILD / "pages" / f"{path.stem}.html").write_text(page)


def write_figures(notebook: NotebookNode, path: Path) -> int:
    """Write the pictures among the outputs to files; return how many there are."""
    count = 0
    for _, cell in code_cells(notebook):
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/svg+xml" in data or "image/png" in data:
                count += 1
                stem = BUILD / "figures" / f"{path.stem}-{count}"
                if "image/svg+xml" in data:
                    stem.with_suffix(".svg").write_text(data["image/svg+xml"])
                else:
                    stem.with_suffix(".png").write_bytes(base64.b64decode(data["image/png"]))
    return count


def write_index(results: list[Result]) -> None:
    """Write the list of the pages."""
    rows = []
    for result in results:
        name = html.escape(Path(result.notebook).stem)
        link = name if result.outcome == "skipped" else f'<a href="{name}.html">{name}</a>'
        rows.append(f"<li>{link} – {result.outcome} {html.escape(result.reason)}</li>")
    head = '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Building your own containers</title>'
    text = (
        head + "<h1>Building your own containers from scratch</h1><ol>" + "\n".join(rows) + "</ol></html>\n"
    )
    (BUILD / "pages" / "index.html").write_text(text)


def table(results: list[Result]) -> str:
    """Return the closing table."""
    width = max(len(result.notebook) for result in results)
    lines = [f"{'notebook':<{width}}  seconds  cells  figures  outcome"]
    for result in results:
        outcome = result.outcome + (f": {result.reason}" if result.reason else "")
        numbers = f"{result.seconds:7.1f}  {result.cells:5}  {result.figures:7}"
        lines.append(f"{result.notebook:<{width}}  {numbers}  {outcome}")
    return "\n".join(lines)


def main(names: list[str]) -> int:
    """Run the notebooks chosen by the beginnings of their names; return the exit status."""
    os.environ.update(surroundings())
    paths = selected(names)
    if not paths:
        print("There is no such notebook." if names else "There are no notebooks yet.", file=sys.stderr)
        return 2 if names else 0
    for place in ("pages", "figures"):
        shutil.rmtree(BUILD / place, ignore_errors=True)
        (BUILD / place).mkdir(parents=True)
    results: list[Result] = []
    status = 0
    try:
        for number, path in enumerate(paths, 1):
            print(f"[{number}/{len(paths)}] {path.name} ", end="", flush=True)
            results.append(run(path))
            last = results[-1]
            print(
                f"{last.outcome} in {last.seconds:.1f} s" + (f": {last.reason}" if last.reason else ""),
                flush=True,
            )
    except KeyboardInterrupt:
        print("stopped")
        status = 130
    (BUILD / "run.json").write_text(json.dumps([result.row() for result in results], indent=1) + "\n")
    if results:
        write_index(results)
        print("\n" + table(results))
        print("\nbuild/pages/index.html: the pages; build/figures/: the figures; build/run.json: this table")
    return status or int(any(result.outcome == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
