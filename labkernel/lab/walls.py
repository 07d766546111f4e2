"""The picture of the walls: which of them stand around a process, drawn from what /proc says of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from labkernel.lab.look import Sight, Subject, look_at

if TYPE_CHECKING:
    from matplotlib.figure import Figure

State = Literal["up", "half", "down"]

NAMES = {
    "mnt": "mounts",
    "uts": "hostname",
    "ipc": "ipc",
    "pid": "pids",
    "net": "network",
    "user": "users",
    "cgroup": "cgroup view",
    "time": "time",
}
"""What each namespace walls off, in the order of the notebooks."""


@dataclass(frozen=True)
class Wall:
    """One wall. Half: it stands, but the way round it is still open; or it is a group in which nothing is limited."""

    name: str
    state: State


def walls(subject: Subject = None, *arguments: Any) -> list[Wall]:
    """The walls around a subject, compared with a plain child; subjects as in `inside_outside`."""
    return _walls(look_at(None), look_at(subject, *arguments))


def show_walls(subject: Subject = None, *arguments: Any, title: str = "") -> None:
    """Draw the walls around a subject; the same in words goes with the picture."""
    from labkernel.lab import figures

    found = walls(subject, *arguments)
    words = in_words(found)
    alt = f"The walls around the process{f' ({title})' if title else ''}. {words}"
    figures.show(draw(found, title), alt, words)


def in_words(found: list[Wall]) -> str:
    """`Up: …. Half up: …. Down: ….`"""
    parts = []
    for state, label in (("up", "Up"), ("half", "Half up"), ("down", "Down")):
        names = [wall.name for wall in found if wall.state == state]
        if names:
            parts.append(f"{label}: " + ("all" if len(names) == len(found) else ", ".join(names)))
    return ". ".join(parts) + "."


def _walls(out: Sight, inn: Sight) -> list[Wall]:
    own = {kind for kind, inode in inn.namespaces.items() if out.namespaces.get(kind) != inode}
    # Without a mount namespace of its own the old root is still there, and a second chroot leads back to it.
    root: State = "down" if inn.root == out.root else "up" if "mnt" in own else "half"
    found = [Wall("root directory", root)]
    found += [Wall(name, "up" if kind in own else "down") for kind, name in NAMES.items()]
    # In a group of one's own use is counted; without a limit in one of its files it may grow as before.
    limits: State = "down" if inn.cgroup == out.cgroup else "up" if inn.limited else "half"
    found.append(Wall("limits", limits))
    rest = {
        "capabilities": inn.capabilities < out.capabilities,
        "seccomp": inn.seccomp and not out.seccomp,
        "no new privs": inn.no_new_privs and not out.no_new_privs,
    }
    return found + [Wall(name, "up" if up else "down") for name, up in rest.items()]


def draw(found: list[Wall], title: str = "") -> Figure:
    """The picture: a wall that is up is a column of bricks, one that is down a dashed line on the ground."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(10, 2.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-0.1, len(found) + 0.1), ylim=(-0.62, 1.12))
    axes.axis("off")
    axes.axhline(0, color="black", linewidth=1)
    rows = 8
    for place, wall in enumerate(found):
        left, width = place + 0.1, 0.8
        height = {"up": rows, "half": rows // 2, "down": 0}[wall.state]
        for row in range(height):
            shift = width / 4 if row % 2 else 0.0
            edges = [0.0, *(x for x in (width / 2 - shift, width - shift) if 0 < x < width), width]
            for start, end in pairwise(edges):
                brick = (left + start, row / rows), end - start, 1 / rows
                axes.add_patch(Rectangle(*brick, facecolor="#d9a58a", edgecolor="#4a2a1a", linewidth=0.8))
        if wall.state != "up":
            bottom = height / rows
            hole = (left, bottom), width, 1 - bottom
            axes.add_patch(Rectangle(*hole, fill=False, edgecolor="#888888", linestyle=(0, (2, 3))))
        label = {"up": "UP", "half": "HALF", "down": "down"}[wall.state]
        weight = "normal" if wall.state == "down" else "bold"
        axes.text(place + 0.5, -0.08, label, ha="center", va="top", fontsize=9, weight=weight)
        name = wall.name.replace(" ", "\n", 1)
        axes.text(place + 0.5, -0.26, name, ha="center", va="top", fontsize=8.5)
    if title:
        axes.set_title(title, fontsize=10)
    return figure
