"""The exercises in the notebooks: each solution passes its check, and empty, wrong and made-up answers do not.

The solution is taken from the notebook's own text, where the reader unfolds it; of what the notebook has defined before
the exercise there is what the answer refers to.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import os
import re
import runpy
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

ANSWERS = {
    path.stem[1:]: runpy.run_path(str(path))
    for path in (Path(__file__).parent / "wrong_answers").glob("e*.py")
}
"""A file a notebook: `WRONG`, answers that somebody might give, by exercise; and what is `GIVEN` to all its answers.

Each wrong answer must fail; the empty one, which is in the notebook, is tried besides.
"""

WRONG: dict[str, list[str]] = {
    name: some for file in ANSWERS.values() for name, some in file["WRONG"].items()
}
GIVEN: dict[str, dict[str, Any]] = {number: file.get("GIVEN", {}) for number, file in ANSWERS.items()}


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


@functools.cache
def lacking_here(notebook: Path) -> list[str]:
    """What the machine lacks of what the notebook needs; asked once, since the doctor tries it all."""
    return missing(read(notebook))


@functools.cache
def verdict(exercise: Exercise, answer: str) -> Verdict:
    """Give an answer as a reader would, in the notebook's own surroundings, and check it; each is tried once."""
    if lacking := lacking_here(exercise.notebook):
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


@pytest.mark.parametrize(
    ("name", "part", "words"),
    [
        ("03.3", "go_in(path)\n    capabilities.read()", "it failed: ENOENT"),
        ("04.1", "CLONE_NEWNS)\n    mounts.bind", "has arrived in everybody else's list"),
        ("05.3", "mounts.mask('/proc/sys')", "nothing to be read any more"),
        ("05.3", "mounts.make_read_only('/proc/sys/net')", "is not on a read-only mount"),
        ("09.1", "| syscalls.CLONE_NEWNS)\n    lab.in_fork(inside)", "to be seen outside"),
        ("14.3", "CLONE_NEWNS)\n    in_fork(lambda", "list of mounts has changed"),
    ],
)
def test_a_verdict_says_what_is_wrong(name: str, part: str, words: str) -> None:
    (answer,) = [answer for answer in WRONG[name] if part in answer]
    assert words in verdict(ALL[name], answer).words


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
