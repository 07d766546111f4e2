"""Inside and outside, side by side: the same small table in every notebook.

Its words are the same on every machine: whose root, pids or network it is, not which numbers they happen to have.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from labkernel.lab.look import Sight, Subject, look_at
from labkernel.linux import capabilities

MACHINE = "the machine's"


@dataclass(frozen=True)
class Row:
    """One thing that a process sees or may touch: in words, outside and inside."""

    what: str
    outside: str
    inside: str
    changed: bool


@dataclass(frozen=True)
class Table:
    """The rows, by index or by the name of the thing; a notebook shows it as a table."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, what: str) -> Row:
        return next(row for row in self.rows if row.what == what)

    def changed(self) -> list[str]:
        """What is not as it is outside."""
        return [row.what for row in self.rows if row.changed]

    def __repr__(self) -> str:
        """As text, for a terminal and for whoever compares outputs."""
        lines = [("", "outside", "inside", "")]
        lines += [(r.what, r.outside, r.inside, "CHANGED" if r.changed else "") for r in self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        cells = (
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=False)) for line in lines
        )
        return "\n".join(f"{cell}  {line[3]}".rstrip() for cell, line in zip(cells, lines, strict=True))

    def _repr_html_(self) -> str:
        """For a notebook; what changed is bold, and says so."""
        parts = ["<table><thead><tr><th></th>"]
        parts += [f'<th style="text-align:left">{side}</th>' for side in ("outside", "inside")]
        parts.append("<th></th></tr></thead><tbody>")
        for row in self.rows:
            inside = html.escape(row.inside)
            parts.append(
                f'<tr><th scope="row" style="text-align:left">{row.what}</th>'
                f'<td style="text-align:left">{html.escape(row.outside)}</td>'
                f'<td style="text-align:left">{f"<b>{inside}</b>" if row.changed else inside}</td>'
                f"<td>{'<b>changed</b>' if row.changed else 'same'}</td></tr>"
            )
        return "".join(parts) + "</tbody></table>"


def inside_outside(subject: Subject, *arguments: Any) -> Table:
    """Compare what a subject sees and may touch with what a plain child of the lab does.

    The subject is a container, a pid, or a function, which is run in a child with these arguments and then looked
    at. Outside is a child to which nothing has been done; it is root, of the machine or of the lab's own user
    namespace, as every child of the lab is.
    """
    return Table(tuple(_rows(look_at(None), look_at(subject, *arguments))))


def _rows(out: Sight, inn: Sight) -> Iterator[Row]:
    own = {kind for kind, inode in inn.namespaces.items() if out.namespaces.get(kind) != inode}
    yield _row("root directory", MACHINE, "another directory" if inn.root != out.root else MACHINE)
    yield _row("hostname", MACHINE, _hostname(out, inn, own))
    yield _pids(inn, own)
    yield _row("mounts", MACHINE, _mounts(out, inn, own))
    network = "its own: " + (", ".join(inn.interfaces) or "nothing in it")
    yield _row("network", MACHINE, network if "net" in own else MACHINE)
    user = "root" if inn.uid == 0 else f"uid {inn.uid}"
    outside = "root" if out.uid == 0 else f"uid {out.uid}"
    yield _row("user", outside, user + (" of its own user namespace" if "user" in own else ""))
    yield _row("cgroup", "the lab's", _cgroup(out, inn, own))
    yield _row("capabilities", "all of root's" if out.capabilities else "none", _capabilities(out, inn, own))
    kinds = [kind for kind in inn.namespaces if kind in own]
    shared = "all shared" if not own else f"its own: {', '.join(kinds)}"
    yield _row("namespaces", "all shared", shared if len(own) < 8 else "its own: all eight")


def _row(what: str, outside: str, inside: str) -> Row:
    return Row(what, outside, inside, outside != inside)


def _hostname(out: Sight, inn: Sight, own: set[str]) -> str:
    if "uts" not in own:
        return MACHINE
    return "a copy of the machine's" if inn.hostname == out.hostname else f"its own: {inn.hostname}"


def _pids(inn: Sight, own: set[str]) -> Row:
    """The pid namespace decides; a missing /proc hides the processes, but it does not protect them."""
    if "pid" not in own:
        words = MACHINE if inn.processes is not None else f"{MACHINE} (but no /proc to list them)"
        return Row("pids", MACHINE, words, False)
    lists = "no /proc to list them" if inn.processes is None else f"/proc lists {inn.processes}"
    return Row("pids", MACHINE, f"its own: this is pid {inn.pid}, {lists}", True)


def _mounts(out: Sight, inn: Sight, own: set[str]) -> str:
    if "mnt" not in own:
        return MACHINE
    return "a copy of the machine's" if inn.mounts == out.mounts else "its own"


def _cgroup(out: Sight, inn: Sight, own: set[str]) -> str:
    """Which group it is in, and what its own cgroup namespace makes of that."""
    group = "the lab's" if inn.cgroup == out.cgroup else "its own"
    if "cgroup" not in own:
        return group
    paths = {line.split(":", 2)[2] for line in inn.cgroup_seen.splitlines()}
    return group + (", which it sees as /" if paths == {"/"} else ", which it sees above its /")


def _capabilities(out: Sight, inn: Sight, own: set[str]) -> str:
    lacking = out.capabilities - inn.capabilities
    where = ", within its own user namespace" if "user" in own else ""
    if not inn.capabilities:
        return "none"
    if not lacking:
        return "all of root's" + where
    if inn.capabilities == capabilities.DOCKER_DEFAULT & out.capabilities:
        return f"Docker's default {len(inn.capabilities)}{where}"
    few = len(lacking) <= 4
    names = ", ".join(capabilities.names(lacking if few else inn.capabilities))
    return f"all of root's but {names}{where}" if few else f"only {names}{where}"
