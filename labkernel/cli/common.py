"""What the verbs share: how they declare their options, find containers, and talk to people."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import click

FAILED = 125
"""Docker's exit status where labkernel, not the program inside, has failed."""

Command = TypeVar("Command", bound=Callable[..., Any])


def failed(text: str) -> int:
    """Say on standard error, in one line, what has failed; the exit status for it."""
    click.echo("labkernel: " + " ".join(text.split()), err=True)
    return FAILED


def option(*names: str, teaches: str, help: str, **settings: Any) -> Callable[[Command], Command]:
    """An option whose help names the notebook that teaches what it does."""
    return click.option(*names, help=f"{help} [{teaches}]", **settings)


json_option = option(
    "--json", "as_json", is_flag=True, teaches="00-start-here", help="Print JSON, for other programs."
)
"""Where something is listed or made."""


def together(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order in which they are given."""

    def decorate(function: Any) -> Any:
        for one in reversed(options):
            function = one(function)
        return function

    return decorate


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on standard error, where somebody looks at it; it appears only if there is something to wait for."""
    if not sys.stderr.isatty():
        yield None
        return
    bar: Any = None

    def progress(what: str, done: int, total: int) -> None:
        nonlocal bar
        from tqdm import tqdm

        if bar is None:
            bar = tqdm(leave=False, bar_format="{desc:<24} {percentage:3.0f}% |{bar}| {elapsed}")
        bar.set_description_str(what, refresh=False)
        bar.total, bar.n = total, done
        bar.update(0)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print columns, each as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def in_words(error: Exception) -> str:
    """What an exception says, without Python's "[Errno 2]"; one that nobody expected says so."""
    if isinstance(error, OSError):
        text = error.strerror or str(error) or type(error).__name__
        return f"{text}: {error.filename}" if error.filename else text
    if isinstance(error, (ValueError, LookupError, RuntimeError)) and str(error):
        return str(error)
    return f"an error of labkernel itself, {type(error).__name__}: {error}; LABKERNEL_DEBUG=1 shows where"


def running(name: str) -> dict[str, Any]:
    """The record of a container that runs. Raises NoSuchContainer, RuntimeError."""
    from labkernel import state

    record = state.find(name)
    if record["state"] not in ("running", "paused"):
        raise RuntimeError(f"container {name} does not run: it is {record['state']}")
    return record


def all_running() -> list[dict[str, Any]]:
    """The records of all containers that run, paused ones too."""
    from labkernel import state

    return [record for record in state.records() if record["state"] in ("running", "paused")]
