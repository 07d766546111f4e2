"""Which file a limit goes into, with version 2 of cgroups and with version 1, side by side.

The texts are made by the code that writes them (`labkernel.linux.cgroup_v2`, `cgroup_v1`), for both versions on every
machine; which of the two a machine has does not show.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from labkernel import spec
from labkernel.linux import cgroup_v2
from labkernel.linux.cgroup_v1 import CgroupV1
from labkernel.linux.cgroups import Limits

UNITS = {
    "cpu.max": "µs of CPU time, in each period of so many µs",
    "cpu.cfs_period_us": "µs: the period",
    "cpu.cfs_quota_us": "µs of CPU time in each period",
    "cpu.weight": "1 to 10000; 100 if nobody writes",
    "cpu.shares": "2 to 262144; 1024 if nobody writes",
    "cpuset.cpus": "numbers of CPUs",
    "memory.max": "bytes",
    "memory.limit_in_bytes": "bytes",
    "memory.high": "bytes",
    "memory.soft_limit_in_bytes": "bytes",
    "memory.swap.max": "bytes of swap",
    "memory.memsw.limit_in_bytes": "bytes of memory and swap together",
    "pids.max": "processes and threads",
    "io.max": "disk, bytes a second",
    "blkio.throttle.read_bps_device": "disk, bytes a second",
    "blkio.throttle.write_bps_device": "disk, bytes a second",
}
"""What the number in each file counts."""

OPTIONS = {
    "memory_high": "memory_reservation",
    "pids": "pids_limit",
    "read_bps": "device_read_bps",
    "write_bps": "device_write_bps",
}
"""The option that sets a field of `Limits`, where it is not called as the field is."""

NEEDS = {"memory_swap": "memory"}
"""A field that cannot be written without another one."""

ANY_DISK = "DISK"
"""What may stand for a disk: in the table, its number then stands as this word, the same on every machine."""

Files = list[tuple[str, str]]


@dataclass(frozen=True)
class LimitFiles:
    """The files of one limit, each with the text that goes into it."""

    option: str
    version_2: Files
    version_1: Files


@dataclass(frozen=True)
class LimitTable:
    """A row for each limit; a notebook shows it as a table."""

    rows: tuple[LimitFiles, ...]

    def __iter__(self) -> Iterator[LimitFiles]:
        return iter(self.rows)

    def names(self, version: int) -> set[str]:
        """The names of the files of one version."""
        return {name for row in self.rows for name, _ in (row.version_2 if version == 2 else row.version_1)}

    def __repr__(self) -> str:
        """As text, for a terminal and for whoever compares outputs: a line for each file."""
        lines = []
        files = [file for row in self.rows for file in (*row.version_2, *row.version_1)]
        wide, long = (max((len(file[part]) for file in files), default=0) for part in (0, 1))
        for row in self.rows:
            lines.append(row.option)
            for version, files in ((2, row.version_2), (1, row.version_1)):
                for number, (name, text) in enumerate(files):
                    words = f"version {version}" if number == 0 else ""
                    lines.append(f"  {words:<11}{name:<{wide}} ← {text:<{long}}  {UNITS[name]}".rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """For a notebook: the two versions beside each other."""
        left = 'style="text-align:left"'
        head = "".join(f"<th {left}>{words}</th>" for words in ("limit", "version 2", "version 1"))
        parts = [f"<table><thead><tr>{head}</tr></thead><tbody>"]
        for row in self.rows:
            cells = "".join(
                f"<td {left}>{'<br>'.join(_cell(*file) for file in files)}</td>"
                for files in (row.version_2, row.version_1)
            )
            parts.append(f'<tr><th scope="row" {left}>{html.escape(row.option)}</th>{cells}</tr>')
        return "".join(parts) + "</tbody></table>"


def limit_files(**options: Any) -> LimitTable:
    """Show what is written for these limits, which are named as the options of `Container`. Raises BadOption.

    For limits of a disk, {"DISK": "1M"} shows them for any.
    """
    limits = _limits(options)
    rows = []
    for field in limits.given():
        option = OPTIONS.get(field, field)
        shown = (
            ", ".join(f"{k} {v}" for k, v in options[option].items())
            if field.endswith("bps")
            else options[option]
        )
        rows.append(
            LimitFiles(
                f"{option} = {shown}",
                _files(cgroup_v2.settings, limits, field),
                _files(_settings_v1, limits, field),
            )
        )
    return LimitTable(tuple(rows))


def _limits(options: dict[str, Any]) -> Limits:
    """The limits in the kernel's units; a rate of any disk is only read, since there is no such disk to look for."""
    rates: dict[str, Any] = {
        field: {ANY_DISK: spec.parse_size(options[option][ANY_DISK], f"--{option.replace('_', '-')}", 1)}
        for field, option in OPTIONS.items()
        if field.endswith("bps") and ANY_DISK in options.get(option, {})
    }
    shown = {OPTIONS[field] for field in rates}
    plain = spec.make_limits(**{o: value for o, value in options.items() if o not in shown})
    return plain._replace(**rates)


def _files(settings: Callable[[Limits], Iterable[tuple[str, str]]], limits: Limits, field: str) -> Files:
    """What one limit adds to the files that are written."""
    given = limits.given()
    base: dict[str, Any] = {name: given[name] for name in (NEEDS.get(field),) if name}
    before = list(settings(Limits(**base)))
    return [file for file in settings(Limits(**base | {field: given[field]})) if file not in before]


def _settings_v1(limits: Limits) -> Files:
    """Of version 1, without the tree in which each file is: a group that is nowhere says what it would write."""
    return [(name, text) for _, name, text in CgroupV1({}).settings(limits)]


def _cell(name: str, text: str) -> str:
    return f"<code>{html.escape(f'{name} ← {text}')}</code><br><small>{html.escape(UNITS[name])}</small>"
