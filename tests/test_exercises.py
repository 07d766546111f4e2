"""The exercises in the notebooks: each solution passes its check, and empty, wrong and made-up answers do not.

The solution is taken from the notebook's own text, where the reader unfolds it; of what the notebook has defined before
the exercise there is what the answer refers to.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from nbformat import NotebookNode
from notebook_tools import NOTEBOOKS, missing, read

from labkernel.lab.checks import Verdict, forget
from tests.helpers import own_home

SOLUTION = re.compile(
    r"<details>\s*<summary>Solution</summary>\s*```python\n(.*?)```\s*</details>", re.DOTALL
)
HINT = re.compile(r"<details>\s*<summary>Hint</summary>.*?</details>", re.DOTALL)
CHECK = re.compile(r'lab\.check\("([^"]+)"')

LEAP = "for _ in range(64):\n        os.chdir('..')"
LOCK = "held = capabilities.read().permitted\n    chroot = {capabilities.Capability.CAP_SYS_CHROOT}"

WRONG: dict[str, list[str]] = {
    "00.1": [
        "def will_run(findings, needs):\n    return list(needs)",
        "def will_run(findings, needs):\n    return ['00-start-here', '03-chroot']",
        "def will_run(findings, needs):\n"
        "    return [n for n, wanted in needs.items() if any(f.ok for f in findings if f.name in wanted)]",
        "def will_run(findings, needs):\n    print('00-start-here')",
    ],
    "00.2": [
        "def wander():\n    return '/'",
        "def wander():\n    os.chdir('/tmp')",
        "def wander():\n    in_child(os.chdir, '/')",
    ],
    "03.1": [
        f"def my_escape():\n    {LEAP}\n    os.chroot('.')",
        "def my_escape():\n    os.chroot('..')",
        f"def my_escape():\n    os.mkdir('x')\n    os.chroot('x')\n    os.chdir('/')\n    {LEAP}\n    os.chroot('.')",
        f"def my_escape():\n    os.mkdir('door')\n    os.chroot('door')\n    {LEAP}",
        "def my_escape():\n    print('out again: True')",
        "def my_escape():\n    os._exit(0)",
    ],
    "03.2": ["the_power = 'CAP_SYS_ADMIN'", "the_power = 'root'", "the_power = 'ALL'", "the_power = 18"],
    "03.3": [
        "def lock_up(path):\n    pass",
        "def lock_up(path):\n    go_in(path)\n    os.closerange(3, 4096)",
        f"def lock_up(path):\n    {LOCK}\n    go_in(path)\n    capabilities.limit_to(held - chroot)",
        f"def lock_up(path):\n    {LOCK}\n    os.chroot(path)\n    os.closerange(3, 4096)\n"
        "    capabilities.limit_to(held - chroot)",
        f"def lock_up(path):\n    {LOCK}\n    go_in(path)\n    os.closerange(3, 4096)\n"
        "    capabilities.capset(held, held - chroot)",
        f"def lock_up(path):\n    {LOCK}\n    os.closerange(3, 4096)\n    capabilities.limit_to(held - chroot)",
        "def lock_up(path):\n    os._exit(0)",
    ],
    "23.1": [
        "mine = 'a container with 48 MiB'",
        "mine = Container(rootfs, ['sleep', '60'], memory='48M', cpus=0.25, pids_limit=8)",
        "mine = Container(rootfs, ['sleep', '60'], memory='480M', cpus=0.25, pids_limit=8).start()",
        "mine = Container(rootfs, ['sleep', '60'], memory='48M', cpus=0.25, pids_limit=8, seccomp='unconfined')\n"
        "mine.start()",
    ],
    "23.2": [
        "def two_servers(first, second):\n    return [None, None]",
        "def two_servers(first, second):\n"
        "    return [Container(rootfs, ['sleep', '60'], network='host').start() for _ in range(2)]",
        "def two_servers(first, second):\n    serve = ['python3', '-m', 'http.server', '8000', '-d', '/root']\n"
        "    return [Container(rootfs, serve, publish=[f'{port}:8000']).start() for port in (first, second)]",
    ],
    "23.3": [
        "budget = {'memory': '512M', 'pids_limit': 100}",
        "budget = {'memory': '8M', 'pids_limit': 7}",
        "budget = {'memory': '56M'}",
    ],
}
"""Answers that somebody might give. Each must fail; the empty one, which is in the notebook, is tried besides."""

GIVEN: dict[str, dict[str, Any]] = {"23": {"rootfs": "python"}}
"""What a notebook makes at length before its exercises, and a test takes ready-made."""


@dataclass(frozen=True)
class Exercise:
    """One exercise of a notebook."""

    name: str
    notebook: Path
    text: str
    before: tuple[str, ...]
    """The code cells that come before it."""
    empty: str
    """The cell to write in, as it is stored."""
    check: str


def exercises(path: Path) -> Iterator[Exercise]:
    """The exercises of a notebook: text, a cell to write in, a cell that checks."""
    cells: list[NotebookNode] = read(path).cells
    for place, cell in enumerate(cells):
        if cell.cell_type == "code" and (found := CHECK.search(cell.source)):
            text, answer = cells[place - 2], cells[place - 1]
            before = tuple(c.source for c in cells[: place - 2] if c.cell_type == "code")
            yield Exercise(found[1], path, text.source, before, answer.source, cell.source)


ALL = {exercise.name: exercise for path in sorted(NOTEBOOKS.glob("*.ipynb")) for exercise in exercises(path)}


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home of its own, and the directory in which a notebook runs."""
    with own_home(tmp_path_factory) as place, contextlib.chdir(NOTEBOOKS):
        yield place


STATEMENTS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


def named(node: ast.AST, context: type[ast.expr_context]) -> set[str]:
    """The names that a piece of code reads (ast.Load), or sets (ast.Store)."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, context)}


def defined(node: ast.stmt) -> set[str]:
    """The names that a statement at the top of a cell defines."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    return named(node, ast.Store)


def definitions(sources: tuple[str, ...], answer: str, given: Collection[str]) -> str:
    """Of several cells, what an answer refers to, and what that refers to; nothing else is run."""
    wanted = named(ast.parse(answer), ast.Load) - set(given)
    kept: list[ast.stmt] = []
    for node in reversed([node for source in sources for node in ast.parse(source).body]):
        if isinstance(node, STATEMENTS) and defined(node) & wanted:
            kept.insert(0, node)
            wanted |= named(node, ast.Load) - set(given)
    return ast.unparse(ast.Module(kept, []))


def verdict(exercise: Exercise, answer: str) -> Verdict:
    """Give an answer as a reader would, in the notebook's own surroundings, and check it."""
    if lacking := missing(read(exercise.notebook)):
        pytest.skip("; ".join(lacking))
    forget()
    given = GIVEN.get(exercise.name.partition(".")[0], {})
    surroundings: dict[str, Any] = {"__name__": "__main__", **given}  # __main__: functions are sent by value
    exec(definitions(exercise.before, f"{answer}\n{exercise.check}", given), surroundings)
    exec(answer, surroundings)
    found = eval(exercise.check, surroundings)
    assert isinstance(found, Verdict)
    return found


def solution(exercise: Exercise) -> str:
    """The solution as it stands in the notebook."""
    (found,) = SOLUTION.findall(exercise.text)
    return str(found)


def test_there_are_exercises() -> None:
    assert {"00.1", "00.2", "03.1", "03.2", "03.3"} <= set(ALL)


@pytest.mark.parametrize("name", sorted(ALL))
def test_each_has_a_hint_and_a_solution_folded_away(name: str) -> None:
    assert len(HINT.findall(ALL[name].text)) == 1
    assert len(SOLUTION.findall(ALL[name].text)) == 1


@pytest.mark.parametrize("name", sorted(ALL))
def test_the_solution_passes(name: str) -> None:
    found = verdict(ALL[name], solution(ALL[name]))
    assert found, found


@pytest.mark.parametrize("name", sorted(ALL))
def test_the_empty_answer_does_not(name: str) -> None:
    found = verdict(ALL[name], ALL[name].empty)
    assert not found
    assert found.words.startswith("Not yet, because ")


@pytest.mark.parametrize(
    ("name", "answer"), [(name, answer) for name in sorted(ALL) for answer in WRONG.get(name, [])]
)
def test_a_wrong_answer_does_not(name: str, answer: str) -> None:
    found = verdict(ALL[name], answer)
    assert not found, answer
    assert found.words.startswith("Not yet, because ")


@pytest.mark.parametrize("name", sorted(ALL))
def test_enough_wrong_answers_are_tried(name: str) -> None:
    assert len(WRONG.get(name, [])) >= 2


@pytest.mark.parametrize("name", sorted(ALL))
def test_no_verdict_gives_the_solution_away(name: str) -> None:
    lines = [line.strip() for line in solution(ALL[name]).splitlines()[1:] if len(line.strip()) > 12]
    for answer in (ALL[name].empty, *WRONG.get(name, [])):
        words = verdict(ALL[name], answer).words
        assert not any(line in words for line in lines)


def test_the_notebooks_directory_is_where_we_stand() -> None:
    assert Path(os.getcwd()) == NOTEBOOKS
