"""Figures that stay: what a container used, with its limits drawn in, and what an image weighs.

Made for print as well as for the screen: colours that colour-blind readers tell apart (Okabe and Ito,
https://jfly.uni-koeln.de/color/), each with a line style or hatch of its own, so that nothing is lost in grey.
"""

from __future__ import annotations

import base64
import io
import logging
import math
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

from labkernel.monitor import Recording

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from labkernel.image.weigh import Weight
    from labkernel.linux.capabilities import CapabilitySets
    from labkernel.linux.network import End, Interface

# Where it builds its list of fonts, which it does once, it says so on a slow machine: that is not for the reader.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

BLUE, ORANGE, VERMILION, GREEN, SKY = "#0072b2", "#e69f00", "#d55e00", "#009e73", "#56b4e9"
MIB = 1 << 20
BEYOND = 3.0
"""A limit this many times higher than anything measured is named, not drawn: the line would flatten the rest.

Anything: what stands side by side has one scale."""

FPS = 4.0
"""Figures a second, where one is drawn while something goes on."""

OVER = 0.4
"""Seconds over which CPU time is averaged: four of the periods for which a quota is given."""

Table: TypeAlias = Mapping[str, list[Any]]
"""A recording's columns."""

Draw: TypeAlias = Callable[["Axes", Recording, Table, Sequence[Recording]], None]
"""Draws one plot of a recording; the others stand beside it."""

CAPTION = "CPU, memory, processes, disk, network and pressure over time, with the limits drawn in"
CAPTIONS = {
    "cpu": "CPU over time, with the quota drawn in, and in how many of its periods it was used up",
    "memory": "memory over time, with the limit drawn in",
    "pids": "processes and threads over time, with the limit drawn in",
}
"""What a figure of one kind alone shows."""


def recording_figure(*recordings: Recording, only: str | None = None) -> Figure:
    """Draw what containers used over time, one column each, with their limits, throttling, OOM kills, refused forks.

    only: "cpu", "memory" or "pids" alone; with the CPU comes a plot of its throttling.
    """
    from matplotlib.figure import Figure

    panels: list[Draw] = [_draw_cpu, _draw_memory, _draw_pids, _draw_io, _draw_network]
    if any(_waited(recording) for recording in recordings):
        panels.append(_draw_pressure)
    alone: dict[str, list[Draw]] = {
        "cpu": [_draw_cpu, _draw_throttling],
        "memory": [_draw_memory],
        "pids": [_draw_pids],
    }
    if only:
        panels = alone[only]
    figure = Figure(
        figsize=(7.5 if len(recordings) == 1 else 5.4 * len(recordings), 1.72 * len(panels)),
        dpi=100, layout="constrained",
    )  # fmt: skip
    grid = figure.subplots(len(panels), len(recordings), sharex="col", sharey="row", squeeze=False)
    for column, recording in enumerate(recordings):
        for row, draw in enumerate(panels):
            axes = grid[row][column]
            _panel(axes, draw, recording, recordings, 6 if len(recordings) == 1 else 3)
            if column:
                axes.set_ylabel("")
        grid[0][column].set_title(recording.name, fontsize=11, weight="bold", pad=24)
        grid[-1][column].set_xlabel("seconds")
    figure.align_ylabels()
    return figure


def memory_figure(recording: Recording) -> Figure:
    """Draw the memory alone: what it consists of, the limit, and each OOM kill."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    _panel(axes, _draw_memory, recording, [recording], 6)
    axes.set_xlabel("seconds")
    return figure


def describe_memory(recording: Recording) -> str:
    """Say in words what the memory's figure shows."""
    if len(recording.samples) < 2:
        return f"{recording.name}: nothing recorded yet."
    table, last = recording.columns(), recording.samples[-1]
    most = {name: max(table[f"memory_{kind}_bytes"]) / MIB for name, kind in _KINDS.items()}
    limits = [None if size is None else size / MIB for size in table["memory_limit_bytes"]]
    return (
        f"The memory of {recording.name} over {last.seconds:.1f} s{_limited(limits)}, in MiB: all of it up to "
        f"{last.memory_peak_bytes / MIB:.0f}; "
        + ", ".join(f"{name} up to {size:.0f}" for name, size in most.items())
        + f". OOM kills: {last.oom_kills}."
    )


def _panel(axes: Axes, draw: Draw, recording: Recording, beside: Sequence[Recording], ncols: int) -> None:
    """One plot of a recording, with its legend above it in so many columns."""
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes, recording, recording.columns(), beside)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    axes.legend(
        *_named(axes), loc="lower left", bbox_to_anchor=(0, 1), ncols=ncols,
        fontsize=7.5, frameon=False, borderaxespad=0.1, handlelength=1.8, columnspacing=1.2,
    )  # fmt: skip


def _draw_cpu(axes: Axes, recording: Recording, table: Table, beside: Sequence[Recording]) -> None:
    axes.set_ylabel("CPU (cores)")
    seconds, used = table["seconds"], [usec / 1e6 for usec in recording.rate("cpu_usec", OVER)]
    waiting = recording.rate("cpu_throttled_usec", OVER / 2)
    _shade(axes, seconds, [rate > 0 for rate in waiting], "throttled")
    axes.plot(seconds, used, color=BLUE, label=f"used, averaged over {OVER:g} s")
    most = _highest(one.rate("cpu_usec", OVER) for one in beside) / 1e6
    _limit(axes, seconds, table["cpus_limit"], most, "quota", " cores")


def _draw_throttling(axes: Axes, recording: Recording, table: Table, _: Sequence[Recording]) -> None:
    axes.set_ylabel("throttled\n(% of periods)")
    label = f"averaged over {OVER:g} s"
    if recording.samples:
        last = recording.samples[-1]
        label += f"; in the end: nr_throttled {last.cpu_throttled_periods} of nr_periods {last.cpu_periods}"
        label += f", throttled_usec {last.cpu_throttled_usec}"
    axes.plot(table["seconds"], throttled_percent(recording, OVER), color=BLUE, label=label)
    axes.set_ylim(0, 105)


def throttled_percent(recording: Recording, over: float) -> list[float]:
    """Percent of the quota's periods in which it was used up, averaged over so many seconds before each sample."""
    rates = (recording.rate(name, over) for name in ("cpu_throttled_periods", "cpu_periods"))
    return [
        100 * min(1.0, throttled / all_of_them) if all_of_them else 0.0
        for throttled, all_of_them in zip(*rates, strict=True)
    ]


_KINDS = {"anonymous": "anon", "page cache": "file", "tmpfs": "shmem"}
"""What memory consists of, as people and as our columns call it."""


def _draw_memory(axes: Axes, recording: Recording, table: Table, beside: Sequence[Recording]) -> None:
    axes.set_ylabel("memory (MiB)")
    seconds = table["seconds"]
    named = {
        name: kind for name, kind in _KINDS.items() if kind != "shmem" or any(table["memory_shmem_bytes"])
    }
    kinds = [[size / MIB for size in table[f"memory_{kind}_bytes"]] for kind in named.values()]
    areas = axes.stackplot(seconds, kinds, colors=[SKY, ORANGE, GREEN], labels=list(named), linewidth=0)
    for area, hatch in zip(areas, ("", "////", "...."), strict=False):
        area.set(hatch=hatch, edgecolor="white")
    whole = [size / MIB for size in table["memory_bytes"]]
    axes.plot(seconds, whole, color="black", linewidth=1, label="all")
    limits = [None if size is None else size / MIB for size in table["memory_limit_bytes"]]
    most = _highest(one.columns()["memory_bytes"] for one in beside) / MIB
    _limit(axes, seconds, limits, most, "limit", " MiB")
    _marks(axes, recording.events("oom_kills"), "OOM kill")


def _draw_pids(axes: Axes, recording: Recording, table: Table, beside: Sequence[Recording]) -> None:
    axes.set_ylabel("processes\nand threads")
    axes.plot(table["seconds"], table["pids"], color=BLUE, drawstyle="steps-post", label="now")
    most = _highest(one.columns()["pids"] for one in beside)
    _limit(axes, table["seconds"], table["pids_limit"], most, "limit")
    _marks(axes, recording.events("pids_max_events"), "fork refused")


def _draw_io(axes: Axes, recording: Recording, table: Table, _: Sequence[Recording]) -> None:
    axes.set_ylabel("disk (MiB/s)")
    _two_ways(axes, recording, table, io_read_bytes="read", io_write_bytes="written")


def _draw_network(axes: Axes, recording: Recording, table: Table, _: Sequence[Recording]) -> None:
    axes.set_ylabel("network (MiB/s)")
    _two_ways(axes, recording, table, net_received_bytes="received", net_sent_bytes="sent")


def _draw_pressure(axes: Axes, recording: Recording, table: Table, _: Sequence[Recording]) -> None:
    """The shares of time in which somebody waited; with cgroup v1 the kernel knows only the whole machine's."""
    axes.set_ylabel("pressure (%)")
    styles = {"cpu": (BLUE, "-"), "memory": (VERMILION, (0, (4, 2))), "io": (GREEN, (0, (1, 2)))}
    for name, (colour, line) in styles.items():
        axes.plot(table["seconds"], table[f"pressure_{name}"], color=colour, linestyle=line, label=name)
    axes.set_ylim(0, 100)


def _waited(recording: Recording) -> bool:
    """Whether the kernel has told of any pressure: not every kernel counts it."""
    return any(s.pressure_cpu or s.pressure_memory or s.pressure_io for s in recording.samples)


def _two_ways(axes: Axes, recording: Recording, table: Table, **names: str) -> None:
    styles: tuple[dict[str, Any], ...] = ({"color": BLUE}, {"color": VERMILION, "linestyle": (0, (4, 2))})
    for (column, name), style in zip(names.items(), styles, strict=True):
        rates = [rate / MIB for rate in recording.rate(column)]
        axes.plot(table["seconds"], rates, drawstyle="steps-pre", label=name, **style)
    if axes.get_ylim()[1] < 0.01:
        axes.set_ylim(0, 1)  # nothing happened: an axis that magnifies nothing would deceive


def _highest(columns: Iterable[Iterable[float]]) -> float:
    return max((value for column in columns for value in column), default=0)


def _limit(
    axes: Axes,
    seconds: Sequence[float],
    limits: Sequence[float | None],
    most: float,
    what: str,
    unit: str = "",
) -> None:
    """A limit as a dashed line that moves when the limit does; only named where it is far beyond what was used."""
    given = [limit for limit in limits if limit is not None]
    if not given:
        axes.plot([], [], " ", label=f"no {what}")
    elif min(given) > BEYOND * most > 0:
        axes.plot([], [], " ", label=f"{what} {_values(given)[-1]}{unit}: far above")
    else:
        drawn = [math.nan if limit is None else limit for limit in limits]
        values = _values(limits)
        shown = values if len(values) <= 2 else [values[0], "…", values[-1]]
        label = f"{what} {' → '.join(shown)}{unit if limits[-1] is not None else ''}"
        axes.plot(seconds, drawn, color="black", linestyle=(0, (5, 3)), drawstyle="steps-post", label=label)


def _values(limits: Iterable[float | None]) -> list[str]:
    """What a limit was, one after the other."""
    texts = ("none" if limit is None else f"{round(limit, 2):g}" for limit in limits)
    return [text for text, _ in groupby(texts)]


def _shade(axes: Axes, seconds: Sequence[float], which: Sequence[bool], label: str) -> None:
    for start, end in spans(seconds, which):
        axes.axvspan(start, end, facecolor="#d4d4d4", linewidth=0, label=label)


def spans(along: Sequence[float], which: Sequence[bool]) -> list[tuple[float, float]]:
    """The stretches that end in a marked sample and begin at the one before it, those that touch as one."""
    found: list[tuple[float, float]] = []
    for (before, after), marked in zip(pairwise(along), which[1:], strict=False):
        if marked:
            start = found.pop()[0] if found and found[-1][1] == before else before
            found.append((start, after))
    return found


def _marks(axes: Axes, events: Sequence[tuple[float, int]], label: str) -> None:
    """A vertical line with a cross on top for each time at which something was refused or killed."""
    total = sum(count for _, count in events)
    for seconds, _ in events:
        axes.axvline(seconds, color=VERMILION, linewidth=1)
        axes.plot(
            [seconds], [0.97], marker="X", markersize=8, color=VERMILION, linestyle=" ",
            transform=axes.get_xaxis_transform(), clip_on=False, label=f"{label} ({total})",
        )  # fmt: skip


def _named(axes: Axes) -> tuple[list[Any], list[str]]:
    """What the legend shows: each label once."""
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    return list(found.values()), list(found)


def describe(*recordings: Recording, only: str | None = None) -> str:
    """Say in words what the figure shows, for who cannot see it."""
    return " ".join(_described(recording, only) for recording in recordings)


def _described(recording: Recording, only: str | None) -> str:
    if len(recording.samples) < 2:
        return f"{recording.name}: nothing recorded yet."
    table, last = recording.columns(), recording.samples[-1]
    memory_limits = [None if size is None else size / MIB for size in table["memory_limit_bytes"]]
    parts = {
        "cpu": f"CPU up to {max(recording.rate('cpu_usec', OVER)) / 1e6:.2f} cores{_limited(table['cpus_limit'])}, "
        f"throttled in {last.cpu_throttled_periods} of {last.cpu_periods} periods",
        "memory": f"memory up to {last.memory_peak_bytes / MIB:.0f} MiB{_limited(memory_limits)}, "
        f"OOM kills: {last.oom_kills}",
        "pids": f"up to {max(table['pids'])} processes and threads{_limited(table['pids_limit'])}, "
        f"forks refused: {last.pids_max_events}",
        "io": f"{last.io_write_bytes / MIB:.1f} MiB written to disk",
        "network": f"{last.net_sent_bytes / MIB:.1f} MiB sent over its network",
    }
    if _waited(recording):
        parts["pressure"] = f"pressure on the CPU up to {max(table['pressure_cpu']):.0f} %"
    words = "; ".join(text for kind, text in parts.items() if not only or kind == only)
    return f"{recording.name} over {last.seconds:.1f} s: {words}."


def _limited(limits: Sequence[float | None]) -> str:
    """A limit in words, with all the values that it had."""
    return f" (limit: {', then '.join(_values(limits))})"


# ---------------------------------------------------------------------- who sees what


def grid_figure(columns: Sequence[str], rows: Mapping[str, Sequence[str]], plain: str) -> Figure:
    """Draw a table of words; a cell with another word than `plain` is hatched, and its word bold."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(8, 0.7 + 0.52 * len(rows)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    axes.set_xticks([place + 0.5 for place in range(len(columns))], list(columns))
    axes.set_yticks([place + 0.5 for place in range(len(rows))], list(rows))
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for y, row in enumerate(rows.values()):
        for x, word in enumerate(row):
            face, hatch = ("#f4f4f4", "") if word == plain else ("#f2c48d", "//")
            axes.add_patch(
                Rectangle((x, y), 1, 1, facecolor=face, edgecolor="white", linewidth=3, hatch=hatch)
            )
            style: dict[str, Any] = {"ha": "center", "va": "center"}
            if word != plain:
                style |= {"weight": "bold", "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 2}}
            axes.text(x + 0.5, y + 0.5, word, **style)
    return figure


def describe_grid(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Say in words what such a table shows."""
    lines = (
        f"{name}: " + ", ".join(f"{column} {word}" for column, word in zip(columns, row, strict=True))
        for name, row in rows.items()
    )
    return "A table. " + ". ".join(lines) + "."


# ---------------------------------------------------------------------- who is connected with whom


def network_figure(
    networks: Mapping[str, Sequence[Interface]], cables: Sequence[tuple[End, End]], title: str = ""
) -> Figure:
    """Draw network namespaces as boxes, their bridge as a bar, and the cables between them; what is off is dotted.

    The one with a bridge lies in the middle, below it those that are plugged into it, above it the others.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    middle = next(name for name, found in networks.items() if any(one.kind == "bridge" for one in found))
    ports = [(middle, one.name) for one in networks[middle] if one.bridge]
    plugged = {other[0] for port in ports if (other := _other_end(port, cables))}
    below = [name for name in networks if name in plugged]
    above = [name for name in networks if name not in (*below, middle)]
    width = 3.0 * max(len(below), len(above), 1)
    figure = Figure(figsize=(8, 5.2 if above else 3.7), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-0.1, width + 0.1), ylim=(-0.1, 6.3 if above else 4.3))
    axes.axis("off")
    axes.set_title(title, fontsize=10)
    places: dict[End, tuple[float, float]] = {}

    def box(name: str, left: float, bottom: float, wide: float, high: float, label: float) -> None:
        axes.add_patch(Rectangle((left, bottom), wide, high, facecolor="#f4f4f4", edgecolor="#333333"))
        axes.text(left + 0.1, label, name, fontsize=11, weight="bold", va="center")

    def socket(name: str, one: Interface, x: float, y: float) -> None:
        words = "\n".join([one.name + ("" if one.up else " (off)"), *_ipv4(one)])
        style = {"boxstyle": "square", "facecolor": "white", "linestyle": "-" if one.up else ":"}
        axes.text(x, y, words, fontsize=8.5, ha="center", va="center", bbox=style, zorder=3)
        places[name, one.name] = x, y

    box(middle, 0, 2.1, width, 2.1, 3.15)
    for names, bottom in ((below, 0.0), (above, 5.0)):
        for index, name in enumerate(names):
            left = width * (index + 0.5) / len(names) - 1.3
            box(name, left, bottom, 2.6, 1.1, bottom + (0.25 if names is below else 0.85))
            ends = [one for one in networks[name] if one.name != "lo"]
            for number, one in enumerate(ends, 1):
                x = left + 2.6 * number / (len(ends) + 1)
                socket(name, one, x, bottom + (0.75 if names is below else 0.35))
    for one in networks[middle]:
        if one.kind == "bridge":
            words = "   ".join([one.name, *_ipv4(one)]) + ("" if one.up else " (off)")
            axes.add_patch(Rectangle((1.2, 2.95), width - 1.4, 0.4, facecolor="#cfe3f1", edgecolor="black"))
            axes.text(width / 2 + 0.5, 3.15, words, fontsize=8.5, ha="center", va="center")
        elif other := _other_end((middle, one.name), cables):
            if one.bridge:
                x = places[other][0]
                axes.plot([x, x], [2.45, 2.95], color="black", linewidth=1)
                socket(middle, one, x, 2.45)
            elif other in places:
                socket(middle, one, places[other][0], 3.85)
    for pair in cables:
        if pair[0] in places and pair[1] in places:
            on = all(one.up for name, end in pair for one in networks[name] if one.name == end)
            (x1, y1), (x2, y2) = places[pair[0]], places[pair[1]]
            axes.plot([x1, x2], [y1, y2], color="black", linewidth=2, linestyle="-" if on else ":", zorder=2)
    return figure


def _ipv4(one: Interface) -> list[str]:
    return [address for address in one.addresses if ":" not in address]


def _other_end(end: End, cables: Sequence[tuple[End, End]]) -> End | None:
    return next((pair[pair[0] == end] for pair in cables if end in pair), None)


def describe_network(networks: Mapping[str, Sequence[Interface]], cables: Sequence[tuple[End, End]]) -> str:
    """Say in words what such a picture shows."""
    found = {(name, one.name): one for name, ends in networks.items() for one in ends}
    bridges = [
        f"{name} has the bridge {one.name} ({', '.join(_ipv4(one))}) with the ports "
        + ", ".join(port.name for port in networks[name] if port.bridge == one.name)
        for (name, _), one in found.items()
        if one.kind == "bridge"
    ]

    def words(end: End) -> str:
        notes = [*_ipv4(found[end]), *([] if found[end].up else ["off"])]
        return f"{end[1]} of {end[0]}" + (f" ({', '.join(notes)})" if notes else "")

    lines = [f"a cable from {words(one)} to {words(other)}" for one, other in cables]
    return "Network namespaces as boxes. " + "; ".join([*bridges, *lines]) + "."


# ---------------------------------------------------------------------- which capabilities a process holds

SETS = ("permitted", "effective", "inheritable", "bounding", "ambient")


def capabilities_figure(processes: Mapping[str, CapabilitySets]) -> Figure:
    """Draw the five sets of some processes side by side: a row for each capability, a black square where it is in."""
    from matplotlib.figure import Figure

    from labkernel.linux.capabilities import ALL, names

    numbers, wide = sorted(ALL), len(SETS) + 1
    figure = Figure(figsize=(8.4, 9.2), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-0.7, wide * len(processes) - 1.3), ylim=(len(numbers) - 0.4, -0.6))
    axes.barh(numbers[::2], 1000, height=1, left=-1, color="#f0f0f0", zorder=0)
    held: list[tuple[int, int]] = []
    lacking: list[tuple[int, int]] = []
    labels = []
    for block, (title, sets) in enumerate(processes.items()):
        axes.text(wide * block + (len(SETS) - 1) / 2, -0.9, title, ha="center", va="bottom", fontsize=9)
        for place, name in enumerate(SETS):
            labels.append((wide * block + place, name))
            for number in numbers:
                (held if number in getattr(sets, name) else lacking).append((labels[-1][0], number))
    for points, size in ((held, 5.5), (lacking, 1.5)):
        axes.plot(*zip(*points, strict=True), "s", color="black", markersize=size)
    axes.set_xticks(*zip(*labels, strict=True), rotation=90, fontsize=8)
    axes.set_yticks(numbers, [f"{name[4:]} {n}" for n, name in zip(numbers, names(ALL), strict=True)])
    axes.set(xlabel="the five sets of each process", ylabel="capability, and its number")
    axes.tick_params(axis="y", labelsize=7, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def describe_capabilities(processes: Mapping[str, CapabilitySets]) -> str:
    """Say in words how many capabilities are in each set, and which where they are few."""
    from labkernel.linux.capabilities import names

    def some(held: frozenset[int]) -> str:
        return ", ".join(names(held)) if 0 < len(held) <= 3 else str(len(held) or "none")

    sentences = (
        title.replace("\n", " ")
        + ": "
        + "; ".join(f"{name} {some(getattr(sets, name))}" for name in SETS)
        + "."
        for title, sets in processes.items()
    )
    return "A grid: a row for each capability, five columns, the sets, for each process. " + " ".join(
        sentences
    )


# ---------------------------------------------------------------------- what an image weighs


def weight_figure(weights: Sequence[Weight], title: str = "", depth: int = 3) -> Figure:
    """Draw a treemap: each directory an area as large as its content, in it the files and directories that weigh most.

    depth: how many levels of directories have a frame of their own.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(8, 4.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(0, 160), ylim=(0, 92))
    axes.axis("off")
    axes.set_title(title, fontsize=10)
    shades = ["#cfe3f1", "#f7dfae", "#bfe5d8", "#f2cdb4", "#e4e4e4"]
    groups = _groups(weights, depth)
    totals = {name: float(sum(parts.values())) for name, parts in groups.items()}
    nameless = [0.0]
    for name, (x, y, width, height) in squarify(totals, 160, 92).items():
        shade = shades[
            zlib.crc32(name.encode()) % len(shades)
        ]  # the same directory, the same colour in all pictures
        head = 4.0 if height > 8 and width > 12 else 0.0
        for part, (px, py, w, h) in squarify(groups[name], width, height - head).items():
            axes.add_patch(
                Rectangle((x + px, y + py), w, h, facecolor=shade, edgecolor="white", linewidth=0.8)
            )
            size = groups[name][part]
            weight = f"{size / MIB:.1f}" if size >= MIB / 20 else f"{size / 1024:.0f} KiB"
            labels = (f"{_short(part, letters)}\n{weight}" for letters in (18, 15, 12, 9))
            if not any(_label(axes, (x + px, y + py, w, h), label, 7.0) for label in labels):
                nameless.append(size)
        axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor="#333333", linewidth=1.2))
        if head:
            words = f"{name}  {totals[name] / MIB:.1f} MiB"
            _label(axes, (x, y + height - head, width, head), words, 8.5, weight="bold")
    if any(nameless):
        most = math.ceil(max(nameless) / MIB * 10) / 10
        axes.text(160, -1, f"without a name: at most {most} MiB each", ha="right", va="top", fontsize=7.5)
    return figure


def _short(name: str, letters: int) -> str:
    """A name of at most so many letters, its beginning and its end."""
    end = letters // 3
    return name if len(name) <= letters else f"{name[: letters - end - 1]}…{name[-end:]}"


def _groups(weights: Sequence[Weight], depth: int) -> dict[str, dict[str, float]]:
    """Bytes by directory, and in it by file where one weighs much, otherwise by the next directory, or as "others"."""
    whole = sum(weight.bytes for weight in weights) or 1
    groups: dict[str, Counter[str]] = {}
    for weight in weights:
        parts = weight.path.split("/")[1:]
        where, rest = "/" + "/".join(parts[:-1][:depth]), parts[:-1][depth:]
        part = parts[-1] if weight.bytes > whole / 100 else f"{rest[0]}/" if rest else "others"
        groups.setdefault(where, Counter())[part] += weight.bytes
    light = [where for where, parts in groups.items() if sum(parts.values()) < whole / 200]
    for where in light:
        groups.setdefault("the rest", Counter())[where] += sum(groups.pop(where).values())
    return {where: dict(parts) for where, parts in groups.items()}


READABLE = 6.0
"""Points: smaller letters are left out."""


def _label(axes: Axes, box: tuple[float, float, float, float], text: str, size: float, **style: Any) -> bool:
    """Write into a box, upright or turned, as large as fits; whether that is large enough to read, and done."""
    x, y, width, height = box
    lines = text.split("\n")
    longest = max(map(len, lines))
    fits = {
        turned: min(size, 4.9 * along / longest, 2.6 * across / len(lines))
        for turned, along, across in ((False, width, height), (True, height, width))
    }
    turned = fits[True] > fits[False]
    if fits[turned] < READABLE:
        return False
    place: dict[str, Any] = {"ha": "center", "va": "center", "rotation": 90 if turned else 0}
    axes.text(x + width / 2, y + height / 2, text, fontsize=fits[turned], **place, **style)
    return True


def describe_weights(weights: Iterable[Weight], depth: int = 3) -> str:
    """Say in words what the treemap shows: the whole, and the five heaviest directories."""
    from labkernel.image.weigh import by_directory

    totals = by_directory(weights, depth)
    heaviest = ", ".join(f"{name} {size / MIB:.1f} MiB" for name, size in list(totals.items())[:5])
    return f"A treemap of {sum(totals.values()) / MIB:.1f} MiB in {len(totals)} directories. The heaviest: {heaviest}."


def squarify(
    sizes: Mapping[str, float], width: float, height: float
) -> dict[str, tuple[float, float, float, float]]:
    """Lay out areas in a rectangle, heaviest first, in rows as nearly square as can be: name to (x, y, width, height).

    Source: Bruls, Huizing, van Wijk: Squarified Treemaps (2000).
    """
    left = sorted(((name, size) for name, size in sizes.items() if size > 0), key=lambda item: -item[1])
    scale = width * height / (sum(size for _, size in left) or 1)
    x = y = 0.0
    placed = {}
    while left:
        short = min(width, height)
        row = [left[0]]
        while len(row) < len(left) and _worst(left[: len(row) + 1], scale, short) <= _worst(
            row, scale, short
        ):
            row = left[: len(row) + 1]
        left = left[len(row) :]
        thickness = sum(size for _, size in row) * scale / short
        along = 0.0
        for name, size in row:
            length = size * scale / thickness
            across = width < height
            placed[name] = (x + along, y, length, thickness) if across else (x, y + along, thickness, length)
            along += length
        if width < height:
            y, height = y + thickness, height - thickness
        else:
            x, width = x + thickness, width - thickness
    return placed


def _worst(row: Sequence[tuple[str, float]], scale: float, short: float) -> float:
    """The least square of a row's rectangles: its ratio of the long side to the short one."""
    areas = [size * scale for _, size in row]
    square = sum(areas) ** 2
    return max(short**2 * max(areas) / square, square / (short**2 * min(areas)))


# ---------------------------------------------------------------------- showing and keeping


def show(figure: Figure, alt: str, caption: str = CAPTION) -> None:
    """Show a figure in a notebook. `alt` is for who cannot see it; `caption`, the same in every run, is its text."""
    from IPython.display import display

    display(as_output(figure, caption), raw=True, metadata={"image/png": {"alt": alt}})  # type: ignore[no-untyped-call]


def show_while(
    goes_on: Callable[[], bool], draw: Callable[[], tuple[Figure, str]], caption: str = CAPTION
) -> None:
    """Show a figure that is drawn anew, with its `alt`, some times a second while something goes on; the last stays."""
    from IPython.display import display

    shown: Any = None
    still = True
    while still:
        still = goes_on()
        start = time.monotonic()
        figure, alt = draw()
        output, metadata = as_output(figure, caption), {"image/png": {"alt": alt}}
        if shown:
            shown.update(output, raw=True, metadata=metadata)
        else:
            shown = display(output, raw=True, metadata=metadata, display_id=True)  # type: ignore[no-untyped-call]
        if still:  # as long again as the drawing took, so that it never takes more than half a core
            time.sleep(max(1 / FPS, time.monotonic() - start))


def as_output(figure: Figure, caption: str = CAPTION) -> dict[str, str]:
    """A figure as a notebook's output: a picture, and a text for where there are none."""
    return {"image/png": base64.b64encode(as_png(figure)).decode(), "text/plain": f"[figure: {caption}]"}


def as_png(figure: Figure) -> bytes:
    """The figure as a PNG file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def save(figure: Figure, path: str | os.PathLike[str], alt: str = "") -> None:
    """Write a figure to a file; its suffix decides: .pdf or .svg for print, .png. No date and no program is in it.

    Raises ValueError for another suffix.
    """
    import matplotlib

    about: dict[str, Callable[[], dict[str, Any]]] = {
        ".pdf": lambda: {"Subject": alt, "CreationDate": None, "Creator": None, "Producer": None},
        ".svg": lambda: {"Description": alt, "Date": None, "Creator": None},
        ".png": lambda: {"Description": alt, "Software": None},
    }
    suffix = os.path.splitext(path)[1]
    if suffix not in about:
        raise ValueError(f"{os.fspath(path)!r}: a figure is saved as {', '.join(about)}")
    # 42: letters stay letters, which a printer and a search can use; the salt makes the ids in an SVG repeatable.
    with matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "labkernel"}):
        figure.savefig(path, metadata=about[suffix](), dpi=200)
