"""The tree of mounts at several moments: which of those that have a name hangs where, in words and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from labkernel.linux.mounts import Mount


@dataclass(frozen=True)
class Branch:
    """A mount that has a name, at one moment."""

    name: str
    place: str
    above: tuple[str, ...]
    """The others that it hangs from, directly or not, the nearest first."""
    machine: bool
    """Whether it is the machine's root: the one that was mounted at / at the first moment."""


@dataclass(frozen=True)
class Tree:
    """The mounts of one moment: those that have a name, in the order in which they hang, and how many others."""

    branches: tuple[Branch, ...]
    others: int

    def __str__(self) -> str:
        words = ", ".join(f"{branch.name} at {branch.place}" for branch in self.branches)
        return words + (", and others" if self.others else "")


def trees(lists: Mapping[str, Sequence[Mount]], names: Mapping[str, str], rootfs: str) -> dict[str, Tree]:
    """Follow mounts by their number through several lists.

    names: what the mount at a place is called, by its place in the first list. A path that begins with `rootfs` is
    shown without what differs from machine to machine.
    """
    first = next(iter(lists.values()))
    called = {mount.mount_id: names[mount.mount_point] for mount in first if mount.mount_point in names}
    top = next((mount.mount_id for mount in first if mount.mount_point == "/"), None)
    return {moment: _tree(found, called, top, rootfs) for moment, found in lists.items()}


def _tree(found: Sequence[Mount], called: Mapping[int, str], top: int | None, rootfs: str) -> Tree:
    parents = {mount.mount_id: mount.parent_id for mount in found}

    def above(number: int) -> tuple[str, ...]:
        way = [number]
        while (number := parents.get(number, number)) not in way:
            way.append(number)
        return tuple(called[n] for n in way[1:] if n in called and n in parents)

    branches = [
        Branch(called[n], mount.mount_point.replace(rootfs, "ROOTFS", 1), above(n), n == top)
        for mount in found
        if (n := mount.mount_id) in called
    ]
    branches.sort(key=lambda branch: (len(branch.above), branch.place))
    return Tree(tuple(branches), len(found) - len(branches))


def figure(moments: Mapping[str, Tree]) -> Figure:
    """Draw the trees side by side; what is the machine's has a dashed frame."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 3), dpi=100, layout="constrained")
    for axes, (moment, tree) in zip(drawn.subplots(1, len(moments)), moments.items(), strict=True):
        axes.set(xlim=(-0.1, 3), ylim=(-3.6, 0.5), title=moment)
        axes.axis("off")
        rows = [(len(b.above), f"{b.name}: {b.place}", b.machine) for b in tree.branches]
        machine = [level for level, _, ours in rows if ours]
        if tree.others and machine:
            rows.append((machine[0] + 1, f"{tree.others} more of the machine's", True))
        for row, (level, text, ours) in enumerate(rows):
            style = {"fc": "white", "ls": "--"} if ours else {"fc": "#cfe8f7", "ls": "-"}
            box: dict[str, Any] = {"boxstyle": "square,pad=0.4", "ec": "black", **style}
            axes.text(level * 0.45, -row, text, va="center", bbox=box)
            if level:
                above = max(other for other in range(row) if rows[other][0] < level)
                arrow = {"arrowstyle": "<-", "connectionstyle": "angle,angleA=0,angleB=90"}
                ends = (level * 0.45 - 0.35, -above - 0.25), (level * 0.45 - 0.06, -row)
                axes.annotate("", *ends, arrowprops={**arrow, "shrinkA": 0, "shrinkB": 0})
    return drawn


def describe(moments: Mapping[str, Tree]) -> str:
    """Say in words what the picture shows."""
    return "Trees of mounts. " + " ".join(
        f"{moment}: " + "; ".join(_described(tree)) + "." for moment, tree in moments.items()
    )


def _described(tree: Tree) -> list[str]:
    words = [
        f"{b.name} at {b.place}" + (f", which hangs from {b.above[0]}" if b.above else "")
        for b in tree.branches
    ]
    return words + (["the others hang from the machine's root"] if tree.others else [])
