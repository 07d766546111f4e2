"""The first and the last cell of a notebook, the quiz, and the source that a notebook shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config

from labkernel import children, lab, state
from labkernel.lab import doctor, notebook, quiz
from labkernel.linux import mounts
from tests.helpers import own_home


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    """A shell as a notebook has it, in a directory with two notebooks."""
    for name, requires in (("03-here", ["children"]), ("04-not-here", ["wings"]), ("05-plain", None)):
        metadata = {} if requires is None else {"labkernel": {"requires": requires}}
        (tmp_path / f"{name}.ipynb").write_text(json.dumps({"metadata": metadata, "cells": []}))
    monkeypatch.chdir(tmp_path)
    config = Config()
    config.HistoryManager.enabled = False  # it would leave a database open
    found = InteractiveShell.instance(config=config)
    yield found
    notebook._be_quiet(False)
    InteractiveShell.clear_instance()


def run(shell: InteractiveShell, cell: str) -> Any:
    with capture_output() as captured:
        result = shell.run_cell(cell)  # type: ignore[no-untyped-call]
    assert result.success, result.error_in_exec or result.error_before_exec
    return captured


def test_what_notebooks_need_is_read_from_their_metadata(shell: InteractiveShell) -> None:
    assert lab.requirements() == {"03-here": ["children"], "04-not-here": ["wings"], "05-plain": []}


def test_where_it_can_run_it_says_so_and_the_cells_run(shell: InteractiveShell) -> None:
    said = run(shell, 'from labkernel import lab\nlab.begin("03-here")').stdout
    assert said == "03-here can run here: it needs children.\n"
    assert run(shell, "print(6 * 7)").stdout == "42\n"
    assert run(shell, 'lab.begin("05-plain")').stdout == "05-plain can run here: it needs nothing special.\n"


def test_where_it_cannot_it_says_why_and_the_cells_stay_quiet(shell: InteractiveShell) -> None:
    said = run(shell, 'from labkernel import lab\nlab.begin("04-not-here")').stdout
    assert said.startswith(
        "04-not-here cannot run on this machine yet:\n  - wings: the doctor knows no such thing."
    )
    assert run(shell, "1 / 0\nprint('not seen')").stdout == ""
    assert run(shell, "lab.end()").stdout == ""
    run(shell, 'lab.begin("03-here")')
    assert run(shell, "print(6 * 7)").stdout == "42\n"


NONE_LEFT = "left behind by this notebook:\n" + "".join(
    f"  {what:<12} none\n" for what in ("processes", "mounts", "cgroups", "interfaces", "directories")
)


def test_end_ends_what_runs_and_shows_that_nothing_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    notebook._before = notebook._ours()
    child = children.start_child(time.sleep, 1000)
    lab.end()
    assert capsys.readouterr().out == NONE_LEFT
    assert not os.path.exists(f"/proc/{child.pid}")


def test_end_names_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    notebook._before = notebook._ours()
    sleeper = subprocess.Popen(["sleep", "1000"])
    directory = state.containers() / "forgotten"
    directory.mkdir(parents=True)
    try:
        lab.end()
    finally:
        sleeper.kill()
        sleeper.wait()
        directory.rmdir()
    said = capsys.readouterr().out
    assert f"processes    {sleeper.pid}\n" in said
    assert "directories  forgotten\n" in said


def test_a_mount_and_an_interface_and_a_group_of_ours_are_seen() -> None:
    """In a child with namespaces of its own, where they can be made; the group is not made but looked for."""

    def look() -> tuple[list[str], list[str]]:
        from labkernel.lab.doctor import _new_link
        from labkernel.linux import syscalls

        syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET)
        mounts.set_propagation("/", "private")
        syscalls.mount("tmpfs", "/tmp", "tmpfs")
        os.mkdir("/tmp/labkernel-x")
        before = notebook._ours()
        mounts.bind("/tmp/labkernel-x", "/tmp/labkernel-x")
        _new_link("lk-x", "bridge")
        now = notebook._ours()
        return sorted(now.mounts - before.mounts), sorted(now.interfaces - before.interfaces)

    assert children.in_child(look) == (["/tmp/labkernel-x"], ["lk-x"])


def test_importing_the_lab_is_cheap() -> None:
    script = "import sys; from labkernel import lab; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"matplotlib", "ipywidgets", "IPython", "pyroute2", "psutil", "numpy", "elftools"}


def test_source_is_shown_as_it_runs(shell: InteractiveShell) -> None:
    (shown,) = run(
        shell,
        "from labkernel import lab\nfrom labkernel.linux import mounts\nlab.show_source(mounts.pivot_root_into)",
    ).outputs
    assert shown.data["text/plain"].startswith("# labkernel/linux/mounts.py\ndef pivot_root_into(")
    assert 'syscalls.pivot_root(".", ".")' in shown.data["text/markdown"]


QUESTION = {"right": {"b": "because"}, "wrong": {"c": "<too> late", "a": "too early"}}


def test_a_quiz_tells_the_reason_behind_each_answer_and_gives_nothing_away_by_order(
    shell: InteractiveShell,
) -> None:
    (shown,) = run(shell, f"from labkernel import lab\nlab.predict('which?', **{QUESTION!r})").outputs
    page, text = shown.data["text/html"], shown.data["text/plain"]
    assert [place for word in ("a", "b", "c") if (place := page.index(f"<summary>{word}<"))] == sorted(
        page.index(f"<summary>{word}<") for word in ("a", "b", "c")
    )
    assert page.count("<details>") == 3
    assert "Yes. because" in page
    assert "Not so. &lt;too&gt; late" in page
    assert text == "Predict: which?\n  ( ) a\n  ( ) b\n  ( ) c"
    assert "application/vnd.jupyter.widget-view+json" in shown.data


def test_the_widget_answers_to_each_choice() -> None:
    box = quiz.as_widget("which?", {"a": "Not so. too early", "b": "Yes. because"})
    _, choices, answer = box.children
    assert answer.value == ""
    for choice, words in (("a", "Not so. too early"), ("b", "Yes. because")):
        choices.value = choice
        assert words in answer.value


def test_what_only_some_cells_need_is_asked_for_once_and_told_each_time(
    shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    answers = {"wings": ["wings: none. What to do: grow some."], "legs": []}

    def missing(names: list[str]) -> list[str]:
        asked.append(names)
        return answers[names[0]] if names else []

    monkeypatch.setattr(doctor, "missing", missing)
    run(shell, 'from labkernel import lab\nlab.begin("05-plain")')
    asked.clear()
    for _ in range(2):
        said = run(shell, 'print(lab.allows("wings"))').stdout
        assert said == "Not on this machine: wings: none. What to do: grow some.\nFalse\n"
    assert run(shell, 'print(lab.allows("legs"))').stdout == "True\n"
    assert asked == [["wings"], ["legs"]]
    run(shell, 'lab.begin("05-plain")\nlab.allows("wings")')
    assert ["wings"] in asked[2:]  # a notebook that begins anew asks anew
