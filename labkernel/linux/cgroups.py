"""Control groups: how much a group of processes may use, and what it has used. One interface, v2 and v1 behind it.

What is taught is version 2: one tree, one directory a group, files such as `memory.max`. Machines that still mount
version 1 have one tree for each controller and other file names; `cgroup_v1` maps them.
Source: https://docs.kernel.org/admin-guide/cgroup-v2.html and https://docs.kernel.org/admin-guide/cgroup-v1/
"""

from __future__ import annotations

import errno
import functools
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

CPU_PERIOD_USEC = 100_000
"""The period that a CPU quota refers to, the kernel's default: 0.1 s."""


class CgroupUnavailable(OSError):
    """No group of ours can be made here, or not with this controller; the text says why and what to do."""


class Limits(NamedTuple):
    """What a container may use; None leaves a limit as the kernel has it.

    memory, memory_high, memory_swap: bytes (swap alone, as v2 counts it). cpus: cores, 0.5 is half of one.
    cpu_weight: 1 to 10000, the kernel's default is 100. cpuset_cpus: a list such as "0-1,3". pids: processes and
    threads. read_bps and write_bps: bytes a second for each block device, "major:minor".
    """

    memory: int | None = None
    memory_high: int | None = None
    memory_swap: int | None = None
    cpus: float | None = None
    cpu_weight: int | None = None
    cpuset_cpus: str | None = None
    pids: int | None = None
    read_bps: Mapping[str, int] = {}
    write_bps: Mapping[str, int] = {}

    def given(self) -> dict[str, object]:
        """Only the limits that are set."""
        return {name: value for name, value in self._asdict().items() if value not in (None, {})}


CONTROLLERS: Mapping[str, str] = {
    "memory": "memory",
    "memory_high": "memory",
    "memory_swap": "memory",
    "cpus": "cpu",
    "cpu_weight": "cpu",
    "cpuset_cpus": "cpuset",
    "pids": "pids",
    "read_bps": "io",
    "write_bps": "io",
}
"""The controller (by its v2 name) that each field of `Limits` needs."""


class Stats(NamedTuple):
    """What a group has used, in the kernel's units: microseconds, bytes, processes, events. 0 where not counted."""

    cpu_usec: int = 0
    cpu_user_usec: int = 0
    cpu_system_usec: int = 0
    cpu_periods: int = 0
    cpu_throttled_periods: int = 0
    cpu_throttled_usec: int = 0
    memory_bytes: int = 0
    memory_peak_bytes: int = 0
    memory_anon_bytes: int = 0
    memory_file_bytes: int = 0
    memory_shmem_bytes: int = 0
    swap_bytes: int = 0
    memory_max_events: int = 0
    oom_kills: int = 0
    pids: int = 0
    pids_max_events: int = 0
    io_read_bytes: int = 0
    io_write_bytes: int = 0


STAT_FIELDS = Stats._fields


class Cgroup(ABC):
    """One container's group: a directory (v2), or one in each controller's tree (v1)."""

    version: int

    @property
    @abstractmethod
    def paths(self) -> dict[str, str]:
        """The group's directory for each controller; for v2 they are all the same."""

    @property
    def places(self) -> dict[str, str]:
        """`paths`, and where the group would be in a tree that it is not in yet: what a record has to hold."""
        return self.paths

    @abstractmethod
    def set(self, limits: Limits) -> list[tuple[str, str]]:
        """Write `limits` and return what was written: (file, text). Raises CgroupUnavailable or OSError."""

    @abstractmethod
    def add(self, pid: int) -> None:
        """Move process `pid` into the group."""

    @abstractmethod
    def pids(self) -> list[int]:
        """The processes in the group, threads not counted, as pids of the reader's pid namespace."""

    @abstractmethod
    def stats(self) -> Stats:
        """What the group has used until now."""

    @abstractmethod
    def limits_written(self) -> dict[str, str]:
        """The limit files as they stand now: path below /sys/fs/cgroup, and content."""

    @abstractmethod
    def freeze(self) -> None:
        """Stop every process of the group where it is; returns when all have stopped."""

    @abstractmethod
    def thaw(self) -> None:
        """Let a frozen group go on."""

    @abstractmethod
    def frozen(self) -> bool:
        """Whether the group is stopped at this moment."""

    @abstractmethod
    def kill(self) -> None:
        """SIGKILL every process of the group, those that it forks meanwhile included."""

    @abstractmethod
    def pressure(self) -> dict[str, float]:
        """Share of the last 10 s, in percent, in which some task waited: keys "cpu", "memory", "io" (PSI)."""

    @property
    def into_fd(self) -> int | None:
        """A descriptor for clone3's CLONE_INTO_CGROUP, where the version knows that (v2); the caller closes it."""
        return None

    def door_fds(self) -> tuple[int, ...]:
        """Where there is no `into_fd` (v1): descriptors of the files into which a child writes "0" to move itself.

        A single thread that moves itself needs no lock; moving another process takes one for which the kernel may
        wait 20 ms (cgroup_threadgroup_rwsem in kernel/cgroup/cgroup.c). The caller closes them.
        """
        return ()

    def remove(self, timeout: float = 5.0) -> None:
        """Remove the group's directories; waits up to `timeout` seconds for processes that are just ending."""
        for path in dict.fromkeys(self.paths.values()):
            remove_directory(path, timeout)


class CgroupParent(ABC):
    """The place on this machine below which our groups are made."""

    version: int
    controllers: frozenset[str]
    """The controllers, by their v2 names, that groups made here have."""

    @abstractmethod
    def create(self, name: str) -> Cgroup:
        """Make the group `name`. Raises OSError."""

    @abstractmethod
    def open(self, name: str) -> Cgroup:
        """The group `name` that somebody made before, without checking that it exists."""

    @abstractmethod
    def names(self, prefix: str) -> list[str]:
        """The groups here whose names begin so."""

    def lacking(self, limits: Limits) -> list[str]:
        """Those of `limits` whose controllers are not to be had here."""
        return [name for name in limits.given() if CONTROLLERS[name] not in self.controllers]


class CgroupMount(NamedTuple):
    """A mounted cgroup hierarchy: where, which part of the tree, its version and controllers."""

    point: str
    root: str
    version: int
    controllers: frozenset[str]


def mounts(mountinfo: str | None = None) -> list[CgroupMount]:
    """The cgroup hierarchies that are mounted here, from /proc/self/mountinfo (man 5 proc)."""
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    found = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fstype, _, options = right.split(" ", 2)
        if fstype not in ("cgroup", "cgroup2"):
            continue
        root, point = left.split(" ")[3:5]
        names = frozenset(options.split(",")) if fstype == "cgroup" else frozenset[str]()
        found.append(CgroupMount(point, root, 2 if fstype == "cgroup2" else 1, names))
    return found


def own_paths(pid: int | str = "self") -> dict[str, str]:
    """The path of a process in each hierarchy, by controller; the key of v2 is "". man 7 cgroups."""
    paths = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            paths[name] = path
    return paths


@functools.cache
def parent() -> CgroupParent:
    """Find out which version this machine uses, and where below our own group we may make groups.

    It is found out once, and children inherit the answer: who is in a cgroup namespace cannot find it out any more.
    v2 is taken where its tree has controllers, otherwise v1. Raises CgroupUnavailable with reason and remedy.
    """
    from labkernel.linux.cgroup_v1 import ParentV1
    from labkernel.linux.cgroup_v2 import ParentV2

    here = mounts()
    if not here:
        raise CgroupUnavailable(
            "no cgroup file system is mounted: as root, mount -t cgroup2 none /sys/fs/cgroup"
        )
    paths = own_paths()
    for mounted in here:
        # On a hybrid machine the v2 tree is there too, but the controllers are with v1.
        if mounted.version == 2 and "memory" in read(Path(mounted.point) / "cgroup.controllers").split():
            return ParentV2.prepare(mounted, paths[""])
    return ParentV1.prepare(here, paths)


def at(places: Mapping[str, str] | None) -> Cgroup | None:
    """The group whose `places` a container's record names; None for None."""
    from labkernel.linux.cgroup_v1 import CgroupV1
    from labkernel.linux.cgroup_v2 import CgroupV2

    if not places:
        return None
    return CgroupV2(Path(places[""])) if "" in places else CgroupV1(dict(places))


def members(group: Cgroup) -> set[int]:
    """The processes of a group and of all groups inside it, in each of its trees."""
    return {
        int(line)
        for path in dict.fromkeys(group.paths.values())
        for directory, _, _ in os.walk(path)
        for line in read(f"{directory}/cgroup.procs").split()
    }


def below_mount(mounted: CgroupMount, path: str) -> Path:
    """The directory of the group `path` (from /proc/PID/cgroup) under a mount that may show only a part of the tree."""
    inside = path.removeprefix(mounted.root) if mounted.root != "/" else path
    return Path(mounted.point) / inside.lstrip("/")


def directory_of(pid: int | str = "self", controller: str = "") -> Path:
    """The directory of the group that a process is in: in the tree of this controller (v1's name), or the one of v2.

    Raises CgroupUnavailable where no such tree is mounted, ProcessLookupError or FileNotFoundError for no such process.
    """
    paths = own_paths(pid)
    here = mounts()
    for mounted in here:
        if controller and controller in mounted.controllers:
            return below_mount(mounted, paths[controller])
    for mounted in here:
        if mounted.version == 2 and "" in paths:
            return below_mount(mounted, paths[""])
    raise CgroupUnavailable(errno.ENOENT, f"no tree of control groups with {controller} is mounted here")


def write(path: Path, text: str) -> None:
    """Write a control file in one call; the error names the file and what was to be written."""
    try:
        fd = os.open(path, os.O_WRONLY)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise OSError(error.errno, f"write {text!r} to {path}: {os.strerror(error.errno or 0)}") from None


def read(path: str | Path) -> str:
    """A control file's text, or "" where the kernel has no such file (any more)."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):  # ENODEV: the group goes while we open
            raise
        return ""
    text = b""
    try:
        # One read gives a page at most: the list of a big group has several.
        while piece := os.read(fd, 65536):
            text += piece
    except OSError:  # ENODEV: the group is gone between open and read
        return ""
    finally:
        os.close(fd)
    return text.decode(errors="replace")  # a process may give itself any name


def numbers(text: str) -> dict[str, int]:
    """The lines "name value" of a flat keyed file such as cpu.stat or memory.stat."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}


def parse_pressure(files: Iterable[tuple[str, str]]) -> dict[str, float]:
    """ "avg10" of the line "some" of each pressure file; what the kernel does not count is left out."""
    found = {}
    for name, text in files:
        first = text.partition("\n")[0]
        if first.startswith("some avg10="):
            found[name] = float(first.split()[1].removeprefix("avg10="))
    return found


def remove_directory(path: str | os.PathLike[str], timeout: float) -> None:
    """rmdir a group; a process that ends leaves its group a moment after it can no longer be seen."""
    end = time.monotonic() + timeout
    while True:
        try:
            os.rmdir(path)
            return
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.001)
