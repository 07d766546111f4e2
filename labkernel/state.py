"""Where the lab keeps what must outlive a process: images, unpacked root file systems, one record a container."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PREFIX = "labkernel-"


def home() -> Path:
    """The lab's own directory: `LABKERNEL_HOME`, or `labkernel` below `XDG_DATA_HOME` (`~/.local/share`).

    Nothing is made; whoever writes there makes what it needs.
    Source: https://specifications.freedesktop.org/basedir-spec/latest/
    """
    if chosen := os.environ.get("LABKERNEL_HOME"):
        return Path(chosen)
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "labkernel"


def containers() -> Path:
    """One directory a container: its record, its writable layer, its log."""
    return home() / "containers"


def launchers() -> Path:
    """One file a launcher that runs, or that was killed before it could tidy up."""
    return home() / "launchers"


@dataclass(frozen=True)
class ProcessKey:
    """A process, told apart from a later one that got the same pid: by its start and by the machine's boot."""

    pid: int
    started: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> ProcessKey:
        """The key of a process that runs. Raises ProcessLookupError."""
        return cls(pid, start_time(pid), boot_id())

    def alive(self) -> bool:
        """Whether that very process is still there (a zombie is not)."""
        try:
            return self.boot == boot_id() and self.started == start_time(self.pid)
        except ProcessLookupError:
            return False


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot (field 22 of /proc/PID/stat; man 5 proc).

    Raises ProcessLookupError when there is none, or only its zombie.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, *rest = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(errno.ESRCH, f"no process {pid}") from None
    if state in (b"Z", b"X"):
        raise ProcessLookupError(errno.ESRCH, f"process {pid} has ended")
    return int(rest[18])


@cache
def boot_id() -> str:
    """The random name of this boot of the machine; man 4 random."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Replace a container's record at once, so that no reader sees half of it."""
    new = directory / "record.json.new"
    new.write_text(json.dumps(record))
    new.rename(directory / "record.json")


def read_record(directory: Path) -> dict[str, Any] | None:
    """A container's record, or None where there is none that can be read."""
    try:
        record: dict[str, Any] = json.loads((directory / "record.json").read_text())
    except (OSError, ValueError):
        return None
    return record


def records() -> list[dict[str, Any]]:
    """The records of all containers, the oldest first, each with its present "state".

    States as Docker names them: created, running, paused, exited; and dead, where the processes are gone but nobody
    tidied up (the launcher was killed).
    """
    found = []
    for directory in sorted(containers().glob("*/")) if containers().is_dir() else ():
        record = read_record(directory)
        if record:
            found.append(record | {"state": _present_state(record), "directory": str(directory)})
    return sorted(found, key=lambda record: record["created"])


def _present_state(record: Mapping[str, Any]) -> str:
    if record["state"] == "exited":
        return "exited"
    for who in ("launcher", "init"):
        if record.get(who) and not ProcessKey(**record[who]).alive():
            return "dead"
    return str(record["state"])


def find(name_or_id: str) -> dict[str, Any]:
    """The record of one container, by its name, its id, or the beginning of its id. Raises NoSuchContainer."""
    everything = records()
    matching = [r for r in everything if r["name"] == name_or_id]
    matching = matching or [r for r in everything if name_or_id and r["id"].startswith(name_or_id)]
    if len(matching) != 1:
        names = ", ".join(r["name"] for r in everything) or "none at all"
        how_many = "no container" if not matching else f"{len(matching)} containers"
        raise NoSuchContainer(f"{how_many} called {name_or_id!r}; there are: {names}")
    return matching[0]


class NoSuchContainer(LookupError):
    """There is no container of that name or id, or more than one."""

    def __str__(self) -> str:
        return str(self.args[0])
