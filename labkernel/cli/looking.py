"""Looking: what the machine allows, which containers there are, and what they use."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import click

from labkernel.cli.common import all_running, json_option, option, print_table, running


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """Tell what this machine allows, by trying it, and for every "no" what to do. [00-start-here]

    The exit status is 1 where something is lacking without which some notebook cannot run.
    """
    from dataclasses import asdict

    from labkernel.lab.doctor import examine

    findings = examine()
    click.echo(json.dumps([asdict(finding) for finding in findings]) if as_json else findings)
    return int(not all(finding.ok or finding.optional for finding in findings))


@click.command()
@json_option
def ps(as_json: bool) -> None:
    """List the containers of this machine and what they are doing. [09-pid]"""
    from labkernel import state

    rows = [_row(record) for record in state.records()]
    if as_json:
        click.echo(json.dumps(rows))
        return
    table = [("ID", "NAME", "IMAGE", "COMMAND", "CREATED", "STATE", "PID", "PORTS")]
    for row in rows:
        command = " ".join(row["command"])
        state_ = row["state"] + (f" ({row['exit_code']})" if row["exit_code"] is not None else "")
        table.append((
            row["id"], row["name"], row["image"], command if len(command) <= 30 else command[:29] + "…",
            _ago(time.time() - row["created"]), state_, str(row["pid"] or ""), ", ".join(row["publish"]),
        ))  # fmt: skip
    print_table(table)


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    alive = record["state"] in ("running", "paused")
    same = {key: record[key] for key in ("id", "name", "image", "command", "created", "state", "publish")}
    return same | {"pid": record["pid"] if alive else None, "exit_code": record.get("exit_code")}


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} seconds ago"


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@option(
    "--no-stream",
    is_flag=True,
    teaches="16-memory",
    help="Print it once, not every second until all have ended.",
)
@json_option
def stats(names: tuple[str, ...], no_stream: bool, as_json: bool) -> None:
    """Tell what containers use at this moment: the named ones, or all that run. [16-memory]

    CPU: 100% is one core. With --json it is told once.
    """
    records = [running(name) for name in names] if names else all_running()
    watched = [Watched(record) for record in records]
    once = no_stream or as_json
    while True:
        time.sleep(0.5 if once else 1.0)
        rows = [row for one in watched if (row := one.row())]
        if as_json:
            click.echo(json.dumps(rows))
        elif rows or once:
            if not once and sys.stdout.isatty():
                click.clear()
            print_table([STATS_HEAD, *map(_stats_line, rows)])
        if once or not rows:
            return


STATS_HEAD = ("ID", "NAME", "CPU", "MEMORY / LIMIT", "MEMORY", "NET IN / OUT", "DISK READ / WRITTEN", "PIDS")


class Watched:
    """A container of which we read the counters, now and then."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        from labkernel import monitor
        from labkernel.container import cgroup_at

        self.record = record
        group = cgroup_at(record["cgroup"])
        self.source = (
            monitor.CgroupSource(group, record["pid"]) if group else monitor.ProcessSource(record["pid"])
        )
        self.before = self.source.sample(), time.monotonic()

    def row(self) -> dict[str, Any] | None:
        """What it uses, its CPU since the last call; None when it has ended."""
        from labkernel import state
        from labkernel.spec import machine_memory

        try:
            sample, now = self.source.sample(), time.monotonic()
        except OSError:
            return None
        if not state.ProcessKey(**self.record["init"]).alive():
            return None
        (before, then), self.before = self.before, (sample, now)
        limit = sample.memory_limit_bytes or machine_memory()
        return {
            "id": self.record["id"],
            "name": self.record["name"],
            "cpu_percent": round((sample.cpu_usec - before.cpu_usec) / (now - then) / 1e4, 1),
            "memory_bytes": sample.memory_bytes,
            "memory_limit_bytes": limit,
            "memory_percent": round(100 * sample.memory_bytes / limit, 1),
            "net_received_bytes": sample.net_received_bytes,
            "net_sent_bytes": sample.net_sent_bytes,
            "io_read_bytes": sample.io_read_bytes,
            "io_write_bytes": sample.io_write_bytes,
            "pids": sample.pids,
        }


def _stats_line(row: Mapping[str, Any]) -> tuple[str, ...]:
    from labkernel.spec import human

    def both(one: str, other: str) -> str:
        return f"{human(row[one])} / {human(row[other])}"

    return (
        row["id"], row["name"], f"{row['cpu_percent']:.1f}%", both("memory_bytes", "memory_limit_bytes"),
        f"{row['memory_percent']:.1f}%", both("net_received_bytes", "net_sent_bytes"),
        both("io_read_bytes", "io_write_bytes"), str(row["pids"]),
    )  # fmt: skip
