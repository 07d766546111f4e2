"""Where the lab keeps what must outlive a process: images, unpacked root file systems, one record a container."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from labkernel.linux import cgroups

PREFIX = "labkernel-"


def home() -> Path:
    """The lab's own directory: `LABKERNEL_HOME`, or `labkernel` below `XDG_DATA_HOME` (`~/.local/share`).

    Nothing is made; whoever writes there makes what it needs.
    Source: https://specifications.freedesktop.org/basedir-spec/latest/
    """
    return _home(*map(os.environ.get, ("LABKERNEL_HOME", "XDG_DATA_HOME", "HOME")))


@cache
def _home(chosen: str | None, data: str | None, _: str | None) -> Path:
    """To put a path together takes longer than many a system call, and a start asks for it often."""
    return Path(chosen) if chosen else Path(data or Path.home() / ".local" / "share") / "labkernel"


def check_home() -> None:
    """Make the lab's own directory where it is missing. Raises OSError in words where nothing can be kept there."""
    try:
        launchers().mkdir(parents=True, exist_ok=True)
        if not os.access(launchers(), os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        words = f"the lab keeps its files below {home()}, and nothing can be written there: {error.strerror}"
        raise OSError(error.errno, f"{words} (LABKERNEL_HOME names another place)") from None


def containers() -> Path:
    """One directory a container: its record, its writable layer, its log."""
    return home() / "containers"


def launchers() -> Path:
    """One file a launcher that runs, or that was killed before it could tidy up."""
    return home() / "launchers"


def spare(launcher: int) -> Path:
    """The directory of the empty container that the launcher of this pid keeps: a file `group` in it says its
    control group, then its pid."""
    return launchers() / f"{launcher}.spare"


def ended(launcher: int) -> Path:
    """Where the launcher of this pid puts the directories of containers that have ended, until it removes them."""
    return launchers() / f"{launcher}.ended"


def names() -> Path:
    """One link a name that was chosen for a container; it says the container's id."""
    return home() / "names"


@contextmanager
def locked(directory: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a directory for this process alone, as long as the block lasts or the process lives (man 2 flock).

    What is half made in it while nobody holds it was left behind. Without `wait` says whether it was to be had.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield True
    except BlockingIOError:
        if wait:
            raise
        yield False
    finally:
        os.close(fd)


class ProcessKey(NamedTuple):
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


STAGES = ("created", "running", "exited")
REQUIRED = {"id": str, "name": str, "state": str, "created": float, "command": list}


def write_group(directory: str, text: str) -> None:
    """Add to what is written down of an empty container: never anew, for whoever kills us meanwhile."""
    with open(f"{directory}/group", "a", encoding="ascii") as file:
        file.write(text)


def write_record(directory: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write down a container's present state: a new file for each stage of its life.

    None is ever replaced: a reader sees an old one or a new one, never half of one, and ext4 does not write to disk
    at once, as it does when a file is renamed over another.
    """
    fd = open_record(directory, record["state"])
    try:
        text = json.dumps(record).encode()
        if os.write(fd, text) < len(text):  # the disk had room for the beginning
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(fd)


def open_record(directory: str | os.PathLike[str], stage: str) -> int:
    """A descriptor of the file for the record of this stage, which is made if need be. Empty, it is none yet."""
    return os.open(f"{os.fspath(directory)}/{stage}.json", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)


def read_record(directory: Path) -> dict[str, Any] | None:
    """A container's latest record, or None where there is none that can be read."""
    for stage in reversed(STAGES):
        try:
            record = json.loads((directory / f"{stage}.json").read_text())
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and all(isinstance(record.get(k), kind) for k, kind in REQUIRED.items()):
            return record
    return None


def take_name(name: str, identity: str) -> None:
    """Keep a name for one container. Raises FileExistsError where a container has it already."""
    if name == identity:
        return
    names().mkdir(exist_ok=True)
    for _ in range(2):
        try:
            os.symlink(identity, names() / name)
            return
        except FileExistsError:
            holder = os.readlink(names() / name)
            if (containers() / holder).is_dir():
                break
            (names() / name).unlink(missing_ok=True)  # its container is gone
    raise FileExistsError(
        errno.EEXIST,
        f"--name {name!r}: there is a container of that name already; labkernel rm {name} removes it",
    )


def free_name(name: str, identity: str) -> None:
    """Give a name back that `take_name` kept for this container."""
    if name == identity:
        return
    try:
        if os.readlink(names() / name) == identity:
            (names() / name).unlink()
    except OSError:
        return


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
        try:
            if record.get(who) and not ProcessKey(**record[who]).alive():
                return "dead"
        except TypeError:  # written by somebody else
            return "dead"
    group = cgroups.at(record.get("cgroup")) if record["state"] == "running" else None
    return "paused" if group and group.frozen() else str(record["state"])


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
