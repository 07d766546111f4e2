"""The table of capabilities: what the default set does with each, why, and where one can read that up."""

from __future__ import annotations

import html
from collections.abc import Iterable

from labkernel.linux.capabilities import CHOICES, Choice


class Reasons(tuple[Choice, ...]):
    """Some of the choices; a notebook shows them as a table."""

    def __repr__(self) -> str:
        lines = []
        for choice in self:
            name = choice.capability.name.removeprefix("CAP_")
            lines.append(f"{name:<18} {_word(choice):<8} {choice.allows}")
            lines.append(f"{'':<27} {choice.reason} [{label(choice.source)}]")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        left = 'style="text-align:left"'
        heads = ("capability", "by default", "allows to", "reason", "source")
        head = "".join(f"<th {left}>{name}</th>" for name in heads)
        rows = "".join(
            f'<tr><th scope="row" {left}>{choice.capability.name}</th><td {left}><b>{_word(choice)}</b></td>'
            f"<td {left}>{html.escape(choice.allows)}</td><td {left}>{html.escape(choice.reason)}</td>"
            f'<td {left}><a href="{html.escape(choice.source)}">{html.escape(label(choice.source))}</a></td></tr>'
            for choice in self
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def reasons(choices: Iterable[Choice] = CHOICES) -> Reasons:
    """The table of these choices, in their order; by default of every capability."""
    return Reasons(choices)


def label(source: str) -> str:
    """How a source is called in a table: `chown(2)`, `moby #41886`, or the site and the last part of the address."""
    parts = source.removeprefix("https://").split("/")
    if parts[0] == "man7.org":
        name, section, _ = parts[-1].rsplit(".", 2)
        return f"{name}({section})"
    names = [part for part in parts[1:] if part]
    if parts[0] == "github.com":
        return f"{names[1]} #{names[-1]}"
    return f"{parts[0]}: {names[-1].removesuffix('.html')}"


def _word(choice: Choice) -> str:
    return "kept" if choice.kept else "dropped"
