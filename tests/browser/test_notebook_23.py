"""Notebook 23 in a real JupyterLab and a real browser: run from top to bottom, and a slider moved by the mouse.

What is seen on the way is left as pictures in build/browser/.
"""

from __future__ import annotations

import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from notebook_tools import NOTEBOOKS, ROOT, missing, read
from playwright.sync_api import Page, sync_playwright

from labkernel import state
from labkernel.container import cgroup_at
from labkernel.monitor import limits_in_force
from tests.helpers import environment

NOTEBOOK = "23-python-container.ipynb"
PICTURES = ROOT / "build" / "browser"
WITHIN = 120.0
"""Seconds in which the notebook has to get anywhere."""
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)

# The first cell after the worker has had its work: before it, the browser moves the slider. (A kernel that is busy with
# a cell hears of no slider.)
AFTER_WORK = "view = board.views[0]"


@dataclass(frozen=True)
class Lab:
    """A JupyterLab that runs for this test alone."""

    url: str
    token: str
    place: Path


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """JupyterLab as `make lab` starts it, over a copy of the notebooks and with a home of its own."""
    if lacking := missing(read(NOTEBOOKS / NOTEBOOK)):
        pytest.skip("; ".join(lacking))
    place, settings = tmp_path / "notebooks", tmp_path / "settings"
    shutil.copytree(NOTEBOOKS, place)
    _clear_outputs(place / NOTEBOOK)
    # All cells are in the page, seen or not: otherwise what is found depends on how far it has been scrolled.
    tracker = settings / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text('{"windowingMode": "none"}')
    token, port = secrets.token_hex(16), _free_port()
    command: list[str | Path] = [
        *(sys.executable, ROOT / "scripts" / "lab.py", f"--port={port}", "--ServerApp.port_retries=0"),
        *("--no-browser", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={place}"),
        *(f"--LabApp.user_settings_dir={settings}", f"--LabApp.workspaces_dir={tmp_path / 'workspaces'}"),
    ]
    with environment(LABKERNEL_HOME=str(tmp_path / "home")), (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait_for(f"http://127.0.0.1:{port}/api?token={token}", server)
            yield Lab(f"http://127.0.0.1:{port}", token, place)
        finally:
            server.terminate()
            server.wait(WITHIN)


@pytest.fixture
def page() -> Iterator[Page]:
    """A page of a headless Chromium; its last look is kept when the test fails."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("there is no Chromium on this machine: scripts/system_packages.py browser installs it")
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        page.set_default_timeout(WITHIN * 1000)
        yield page
        page.screenshot(path=PICTURES / "last.png")
        browser.close()


def test_the_notebook_runs_and_its_slider_moves_the_limit(lab: Lab, page: Page) -> None:
    page.goto(f"{lab.url}/lab/tree/{NOTEBOOK}?token={lab.token}&reset")
    page.wait_for_selector(".jp-Notebook")
    # Only then is there a kernel for the notebook; before that JupyterLab would ask which one to take.
    page.get_by_text(re.compile(r"Python 3.* \| Idle")).wait_for()
    _run(page, "Run All Above Selected Cell")
    _until(lambda: page.locator(".jp-OutputArea-output", has_text="MiB received").count() or _errors(page))
    assert _errors(page) == []
    slider = page.locator(".widget-slider", has_text="memory (MiB)").first
    slider.scroll_into_view_if_needed()
    assert _worker_limit() == 96 << 20
    page.screenshot(path=PICTURES / "before.png")

    handle = slider.locator(".noUi-handle")
    box = handle.bounding_box()
    assert box
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 12, y, steps=4)
    page.mouse.up()

    moved = int(slider.locator(".widget-readout").inner_text())
    assert moved < 96
    _until(lambda: _worker_limit() == moved << 20)
    said = page.locator("[role=status]", has_text=f"{moved << 20}").first
    said.wait_for()  # the dashboard says which file it wrote, and what
    assert re.search(r"memory\.(max|limit_in_bytes)", said.inner_text())
    plot = page.locator(f'svg[role=img][aria-label*="of {moved};"]').first
    plot.wait_for()  # and the plot draws the new limit
    page.wait_for_timeout(1500)  # for a picture with the moved limit in it
    page.locator(".jupyter-widgets", has=slider).first.screenshot(path=PICTURES / "dashboard.png")

    _run(page, "Run Selected Cell and All Below")
    page.wait_for_function(
        """() => document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'
            && [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].every(
                prompt => /\\[\\d+\\]/.test(prompt.innerText))""",
        timeout=WITHIN * 1000,
    )
    assert _errors(page) == []
    last = page.locator(".jp-CodeCell").last.inner_text()
    assert re.search(r"processes\s+none", last)
    # Where the dashboard was there is now the figure of the whole recording.
    cell = page.locator(".jp-CodeCell", has_text="board = Dashboard(worker")
    assert cell.locator(".jp-RenderedImage img").count() == 1
    assert cell.locator("svg[role=img]").count() == 0
    cell.locator("img").screenshot(path=PICTURES / "figure.png")


def _clear_outputs(path: Path) -> None:
    """What is seen afterwards has been made by this run."""
    notebook = read(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, path)


def _run(page: Page, what: str) -> None:
    """Select the cell after the work, and click an entry of the menu "Run"."""
    page.locator(".jp-CodeCell", has_text=AFTER_WORK).locator(".jp-InputPrompt").click()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name=what, exact=True).click()


def _errors(page: Page) -> list[str]:
    """Whatever a cell has complained of."""
    kinds = [f'[data-mime-type="application/vnd.jupyter.{kind}"]' for kind in ("stderr", "error")]
    return page.locator(", ".join(kinds)).all_inner_texts()


def _worker_limit() -> int | None:
    """The memory limit of the worker, asked of the kernel."""
    worker = next(record for record in state.records() if "/srv/work.py" in record["command"])
    group = cgroup_at(worker["cgroup"])
    assert group
    limit: int | None = limits_in_force(group)["memory_limit_bytes"]
    return limit


def _until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WITHIN
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + WITHIN
    while True:
        assert server.poll() is None, "JupyterLab has ended"
        try:
            opener.open(url, timeout=10).close()
            return
        except urllib.error.URLError:
            assert time.monotonic() < end, "JupyterLab does not answer"
            time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
