"""The dashboard's moving picture: the last seconds of a recording as SVG text, in a fraction of a millisecond.

matplotlib would take a hundred times as long for each frame; its figures are for what stays, see `figures`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from labkernel.lab import figures
from labkernel.monitor import Recording, Sample

OVER = 0.3
"""Seconds over which CPU time is averaged, three periods of the quota: a moved slider is seen after half a second."""
BEYOND = 16.0
"""A limit this many times higher than anything shown is named, not drawn."""
WINDOW = 20.0
"""Seconds that the moving picture shows."""

WIDTH, LEFT, PANEL, GAP = 540, 88, 62, 10
"""Sizes in the picture's own units; the front end scales it to its column."""


@dataclass(frozen=True)
class Line:
    """One line of a panel: its values, its name, its colour and dashes."""

    values: Sequence[float]
    name: str = ""
    colour: str = figures.BLUE
    dashes: str = ""


@dataclass(frozen=True)
class Panel:
    """One of the plots that stand above each other."""

    kind: str
    name: str
    now: str
    lines: Sequence[Line]
    limits: Sequence[float | None] = ()
    shaded: Sequence[bool] = ()
    marked: Sequence[bool] = ()
    least: float = 1.0
    """The height that the panel has at least, in its unit: what is nothing shall look like nothing."""


def picture(recording: Recording, only: str | None = None) -> str:
    """The last seconds of a recording as SVG. only: "cpu", "memory" or "pids", in more detail than among the others."""
    window, marks = _last_seconds(recording)
    if not window.samples:
        return "<i>nothing recorded yet</i>"
    table = window.columns()
    end = window.samples[-1].seconds
    right = max(end, WINDOW)
    across = [LEFT + (WIDTH - LEFT) * (1 - (right - seconds) / WINDOW) for seconds in table["seconds"]]
    panels = [panel for panel in _panels(window, table, marks) if not only or panel.kind == only]
    if only == "cpu":
        panels.append(_throttling(window))
    height = len(panels) * (PANEL + GAP) + 14
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" width="100%" role="img" aria-label="{html.escape(_spoken(panels))}" '
        'font-size="10" fill="currentColor" font-family="sans-serif">'
    ]
    for number, panel in enumerate(panels):
        parts += _panel_svg(panel, across, number * (PANEL + GAP))
    ticks = range(int(right - WINDOW) // 5 * 5 + 5, int(right) + 1, 5)
    for tick in ticks:
        x = LEFT + (WIDTH - LEFT) * (1 - (right - tick) / WINDOW)
        parts.append(f'<text x="{x:.0f}" y="{height - 3}" text-anchor="end">{tick} s</text>')
    return "".join([*parts, "</svg>"])


def _last_seconds(recording: Recording) -> tuple[Recording, dict[str, list[bool]]]:
    """The samples that the picture shows, and which of them saw an OOM kill or a refused fork."""
    samples = recording.samples
    end = samples[-1].seconds if samples else 0.0
    first = len(samples)
    while first and samples[first - 1].seconds > end - WINDOW:
        first -= 1
    shown = samples[first:]
    grew = {
        column: [
            False,
            *(getattr(b, column) > getattr(a, column) for a, b in pairwise(shown)),
        ]
        for column in ("oom_kills", "pids_max_events")
    }
    return Recording(recording.name, shown), grew


def _panels(window: Recording, table: dict[str, list[Any]], marks: dict[str, list[bool]]) -> list[Panel]:
    mib = figures.MIB
    last: Sample = window.samples[-1]
    cores = [usec / 1e6 for usec in window.rate("cpu_usec", OVER)]
    waiting = [rate > 0 for rate in window.rate("cpu_throttled_usec", 0.2)]
    rates = {
        column: [rate / mib for rate in window.rate(column)]
        for column in ("io_read_bytes", "io_write_bytes", "net_received_bytes", "net_sent_bytes")
    }
    second = {"colour": figures.VERMILION, "dashes": "5 3"}
    anon = [size / mib for size in table["memory_anon_bytes"]]
    memory_limits = [None if size is None else size / mib for size in table["memory_limit_bytes"]]
    pressure = [[s.pressure_cpu, s.pressure_memory, s.pressure_io] for s in window.samples]
    read_write = f"{rates['io_read_bytes'][-1]:.1f} read, {rates['io_write_bytes'][-1]:.1f} written"
    in_out = f"{rates['net_received_bytes'][-1]:.1f} in, {rates['net_sent_bytes'][-1]:.1f} out"
    return [
        Panel(
            "cpu", "CPU, cores", _now(cores[-1], last.cpus_limit, "{:.2f}"), [Line(cores)],
            table["cpus_limit"], waiting, least=0.1,
        ),
        Panel(
            "memory", "memory, MiB", _now(last.memory_bytes / mib, memory_limits[-1], "{:.0f}"),
            [
                Line([size / mib for size in table["memory_bytes"]], "all"), Line(anon, "anonymous", **second),
                Line([size / mib for size in table["memory_file_bytes"]], "page cache", figures.GREEN, "1 3"),
            ],
            memory_limits, marked=marks["oom_kills"],
        ),
        Panel(
            "pids", "processes", _now(last.pids, last.pids_limit, "{:.0f}"), [Line(table["pids"])],
            table["pids_limit"], marked=marks["pids_max_events"],
        ),
        Panel(
            "io", "disk, MiB/s", read_write,
            [Line(rates["io_read_bytes"], "read"), Line(rates["io_write_bytes"], "written", **second)],
        ),
        Panel(
            "network", "network, MiB/s", in_out,
            [Line(rates["net_received_bytes"], "in"), Line(rates["net_sent_bytes"], "out", **second)],
        ),
        Panel(
            "pressure", "pressure, %", "cpu {:.0f}, memory {:.0f}, io {:.0f}".format(*pressure[-1]),
            [
                Line([row[0] for row in pressure], "cpu"), Line([row[1] for row in pressure], "memory", **second),
                Line([row[2] for row in pressure], "io", figures.GREEN, "1 3"),
            ], least=100.0,
        ),
    ]  # fmt: skip


def _throttling(window: Recording) -> Panel:
    """In how many of the quota's periods it was used up, with the counters as the kernel has them."""
    last = window.samples[-1]
    counters = {
        "nr_periods": last.cpu_periods,
        "nr_throttled": last.cpu_throttled_periods,
        "throttled_usec": last.cpu_throttled_usec,
    }
    words = ", ".join(f"{name} {value}" for name, value in counters.items())
    line = Line(figures.throttled_percent(window, OVER))
    return Panel("cpu", "throttled, %", words, [line], least=100.0)


def _now(value: float, limit: float | None, words: str) -> str:
    return words.format(value) + (f" of {limit:.4g}" if limit is not None else "")


def _spoken(panels: Sequence[Panel]) -> str:
    return "; ".join(f"{panel.name} {panel.now}" for panel in panels)


def _panel_svg(panel: Panel, across: Sequence[float], top: float) -> Iterable[str]:
    """The parts of a panel: ground line, shades, lines, the limit that may have moved, marks, words."""
    most = max(panel.least, *(max(line.values) for line in panel.lines))
    limits = [limit for limit in panel.limits if limit is not None]
    drawn = limits and max(limits) <= BEYOND * most
    scale = (PANEL - 14) / (max(most, *limits) if drawn else most)
    bottom = top + PANEL

    def up(value: float) -> float:
        return bottom - value * scale

    yield f'<line x1="{LEFT}" x2="{WIDTH}" y1="{bottom}" y2="{bottom}" stroke="currentColor" stroke-width="0.5"/>'
    for x1, x2 in figures.spans(across, panel.shaded):
        box = f'x="{x1:.1f}" y="{top + 12}" width="{x2 - x1:.1f}" height="{PANEL - 12}"'
        yield f'<rect {box} opacity="0.2"/>'
    for line in panel.lines:
        points = " ".join(f"{x:.1f},{up(y):.1f}" for x, y in zip(across, line.values, strict=True))
        dashes = f' stroke-dasharray="{line.dashes}"' if line.dashes else ""
        yield f'<polyline points="{points}" fill="none" stroke="{line.colour}" stroke-width="1.6"{dashes}/>'
    if drawn:
        pairs = zip(across, panel.limits, strict=True)
        points = " ".join(f"{x:.1f},{up(limit):.1f}" for x, limit in pairs if limit is not None)
        yield f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-dasharray="8 4"/>'
    for x, marked in zip(across, panel.marked, strict=False):
        if marked:
            ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{top + 8}" y2="{bottom}"'
            yield f'<line {ends} stroke="{figures.VERMILION}" stroke-width="2"/>'
            yield f'<text x="{x:.1f}" y="{top + 10}" text-anchor="middle" fill="{figures.VERMILION}">✕</text>'
    names = "  ".join(
        f'<tspan fill="{line.colour}" font-weight="bold">{"╌╌" if line.dashes else "──"}</tspan> {line.name}'
        for line in panel.lines
        if line.name
    )
    above = f", limit {limits[-1]:.4g} far above" if limits and not drawn else ""
    words = html.escape(f"{panel.now}{above}")
    yield f'<text x="{LEFT - 6}" y="{top + PANEL / 2 + 6}" text-anchor="end">{html.escape(panel.name)}</text>'
    yield f'<text x="{LEFT}" y="{top + 9}" font-weight="bold">{words}</text>'
    yield f'<text x="{WIDTH}" y="{top + 9}" text-anchor="end">{names}</text>'
