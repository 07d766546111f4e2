"""Version 1 of cgroups: one tree for each controller, and older file names, mapped to the interface of v2.

| v2                 | v1                                              |
|--------------------|-------------------------------------------------|
| memory.max         | memory.limit_in_bytes                           |
| memory.high        | memory.soft_limit_in_bytes (weaker: only a hint)|
| memory.swap.max    | memory.memsw.limit_in_bytes (memory and swap)   |
| memory.peak        | memory.max_usage_in_bytes                       |
| memory.events      | memory.oom_control, memory.failcnt              |
| cpu.max            | cpu.cfs_quota_us, cpu.cfs_period_us             |
| cpu.weight         | cpu.shares (100 is 1024)                        |
| io.max             | blkio.throttle.{read,write}_bps_device          |
| cgroup.freeze      | freezer.state                                   |
| cgroup.kill        | freeze, signal each process, thaw               |

Source: https://docs.kernel.org/admin-guide/cgroup-v1/
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path

from labkernel.linux import cgroups
from labkernel.linux.cgroup_v2 import kill_all_frozen
from labkernel.linux.cgroups import (
    CPU_PERIOD_USEC,
    Cgroup,
    CgroupMount,
    CgroupParent,
    CgroupUnavailable,
    Limits,
    Stats,
)

ALWAYS = ("memory", "cpu", "cpuacct", "pids", "freezer", "blkio")
"""The trees in which every container gets a group; cpuset only where it is asked for, it has to be filled first."""

V2_NAMES = {"blkio": "io"}
USER_HZ = os.sysconf("SC_CLK_TCK")


class CgroupV1(Cgroup):
    """A group: the same name in the tree of each controller."""

    version = 1

    def __init__(self, directories: dict[str, str]) -> None:
        self._directories = directories

    @property
    def paths(self) -> dict[str, str]:
        return {
            name: path for name, path in self._directories.items() if name in ALWAYS or os.path.isdir(path)
        }

    @property
    def places(self) -> dict[str, str]:
        return dict(self._directories)

    def set(self, limits: Limits) -> list[tuple[str, str]]:
        if limits.cpuset_cpus is not None:
            self._make_cpuset()
        written = []
        for controller, name, text in self.settings(limits):
            path = Path(self._directories[controller], name)
            cgroups.write(path, text)
            written.append((str(path), text))
        return written

    def add(self, pid: int) -> None:
        text = str(pid)
        for path in dict.fromkeys(self.paths.values()):
            cgroups.write(Path(path, "cgroup.procs"), text)

    def door_fds(self) -> tuple[int, ...]:
        return tuple(
            os.open(f"{path}/tasks", os.O_WRONLY | os.O_CLOEXEC)
            for path in dict.fromkeys(self.paths.values())
        )

    def pids(self) -> list[int]:
        return [int(line) for line in self._read("pids", "cgroup.procs").split()]

    def stats(self) -> Stats:
        cpu = cgroups.numbers(self._read("cpu", "cpu.stat"))
        ticks = cgroups.numbers(self._read("cpuacct", "cpuacct.stat"))
        memory = cgroups.numbers(self._read("memory", "memory.stat"))
        shmem = memory.get("total_shmem", 0)
        io = self._read("blkio", "blkio.throttle.io_service_bytes_recursive").split()
        return Stats(
            cpu_usec=self._number("cpuacct", "cpuacct.usage") // 1000,
            cpu_user_usec=ticks.get("user", 0) * 1_000_000 // USER_HZ,
            cpu_system_usec=ticks.get("system", 0) * 1_000_000 // USER_HZ,
            cpu_periods=cpu.get("nr_periods", 0),
            cpu_throttled_periods=cpu.get("nr_throttled", 0),
            cpu_throttled_usec=cpu.get("throttled_time", 0) // 1000,
            memory_bytes=self._number("memory", "memory.usage_in_bytes"),
            memory_peak_bytes=self._number("memory", "memory.max_usage_in_bytes"),
            memory_anon_bytes=memory.get("total_rss", 0),
            memory_file_bytes=memory.get("total_cache", 0) - shmem,
            memory_shmem_bytes=shmem,
            swap_bytes=memory.get("total_swap", 0),
            memory_max_events=self._number("memory", "memory.failcnt"),
            oom_kills=cgroups.numbers(self._read("memory", "memory.oom_control")).get("oom_kill", 0),
            pids=self._number("pids", "pids.current"),
            pids_max_events=cgroups.numbers(self._read("pids", "pids.events")).get("max", 0),
            io_read_bytes=_sum_of("Read", io),
            io_write_bytes=_sum_of("Write", io),
        )

    def limits_written(self) -> dict[str, str]:
        names = (
            *(("memory", f"memory.{name}_in_bytes") for name in ("limit", "soft_limit", "memsw.limit")),
            *(("cpu", name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.shares")),
            *(("cpuset", "cpuset.cpus"), ("pids", "pids.max")),
            *(("blkio", f"blkio.throttle.{way}_bps_device") for way in ("read", "write")),
        )
        texts = {f"{self._directories.get(c)}/{name}": self._read(c, name).strip() for c, name in names}
        return {path: text for path, text in texts.items() if text}

    def freeze(self) -> None:
        self._freeze("FROZEN")

    def thaw(self) -> None:
        self._freeze("THAWED")

    def frozen(self) -> bool:
        return self._read("freezer", "freezer.state").strip() == "FROZEN"

    def kill(self) -> None:
        kill_all_frozen(self)

    def pressure(self) -> dict[str, float]:
        # v1 counts no pressure for a group; the machine's own is the nearest there is.
        return cgroups.parse_pressure((name, _machine_pressure(name)) for name in ("cpu", "memory", "io"))

    def _freeze(self, state: str) -> None:
        path = Path(self._directories["freezer"], "freezer.state")
        cgroups.write(path, state)
        end = time.monotonic() + 5.0
        while cgroups.read(path).strip() not in (state, ""):
            if time.monotonic() > end:
                raise TimeoutError(errno.ETIMEDOUT, f"{path} did not become {state} within 5 s")
            cgroups.write(path, state)  # a FREEZING group is tried again by writing, not by waiting
            time.sleep(0.001)

    def settings(self, limits: Limits) -> list[tuple[str, str, str]]:
        """What stands for `limits`: (controller, file, text), in the order in which it is to be written."""
        files: list[tuple[str, str, str]] = []
        memory = limits.memory
        if memory is not None:
            # memory+swap may never be less than memory, so the order depends on which way the limit moves.
            swap = ("memory", "memory.memsw.limit_in_bytes", str(memory + (limits.memory_swap or 0)))
            plain = ("memory", "memory.limit_in_bytes", str(memory))
            raising = memory > self._number("memory", "memory.limit_in_bytes")
            both = [swap, plain] if raising else [plain, swap]
            files += (
                both if limits.memory_swap is not None else self._with_memsw_raised(plain, memory, raising)
            )
        if limits.memory_high is not None:
            files.append(("memory", "memory.soft_limit_in_bytes", str(limits.memory_high)))
        if limits.cpus is not None:
            files.append(("cpu", "cpu.cfs_period_us", str(CPU_PERIOD_USEC)))
            files.append(("cpu", "cpu.cfs_quota_us", str(round(limits.cpus * CPU_PERIOD_USEC))))
        if limits.cpu_weight is not None:
            files.append(("cpu", "cpu.shares", str(max(2, limits.cpu_weight * 1024 // 100))))
        if limits.cpuset_cpus is not None:
            files.append(("cpuset", "cpuset.cpus", limits.cpuset_cpus))
        if limits.pids is not None:
            files.append(("pids", "pids.max", str(limits.pids)))
        for way, rates in (("read", limits.read_bps), ("write", limits.write_bps)):
            files += [
                ("blkio", f"blkio.throttle.{way}_bps_device", f"{dev} {rate}") for dev, rate in rates.items()
            ]
        return files

    def _with_memsw_raised(
        self, plain: tuple[str, str, str], memory: int, raising: bool
    ) -> list[tuple[str, str, str]]:
        """A swap limit that an earlier call set must not stand in the way of a higher memory limit."""
        if raising and memory > (self._number("memory", "memory.memsw.limit_in_bytes") or memory):
            return [("memory", "memory.memsw.limit_in_bytes", str(memory)), plain]
        return [plain]

    def _make_cpuset(self) -> None:
        """A new group of the cpuset tree is empty: no CPUs, no memory nodes, so no process may enter it yet."""
        directory = Path(self._directories["cpuset"])
        if directory.is_dir():
            return
        directory.mkdir()
        for name in ("cpuset.cpus", "cpuset.mems"):
            cgroups.write(directory / name, cgroups.read(directory.parent / name).strip())
        for pid in self.pids():
            cgroups.write(directory / "cgroup.procs", str(pid))

    def _read(self, controller: str, name: str) -> str:
        directory = self._directories.get(controller)
        return cgroups.read(f"{directory}/{name}") if directory else ""

    def _number(self, controller: str, name: str) -> int:
        return int(self._read(controller, name) or 0)


class ParentV1(CgroupParent):
    """Our own group in each controller's tree."""

    version = 1

    def __init__(self, directories: dict[str, Path]) -> None:
        self._directories = directories
        self.controllers = frozenset(V2_NAMES.get(name, name) for name in directories)

    @classmethod
    def prepare(cls, mounted: Sequence[CgroupMount], paths: dict[str, str]) -> ParentV1:
        """Our own group in each tree, where it is writable. Raises CgroupUnavailable."""
        found: dict[str, Path] = {}
        for name in (*ALWAYS, "cpuset"):
            for tree in mounted:
                if name in tree.controllers and name in paths:
                    found[name] = cgroups.below_mount(tree, paths[name])
        missing = [name for name in ("memory", "cpu", "pids", "freezer") if name not in found]
        if missing:
            raise CgroupUnavailable(errno.ENOENT, f"cgroup v1 is mounted without {', '.join(missing)}")
        closed = [str(path) for path in found.values() if not os.access(path, os.W_OK)]
        if closed:
            raise CgroupUnavailable(
                errno.EACCES,
                f"{closed[0]} is not writable: cgroup v1 cannot be handed to ordinary users safely; "
                "run the lab as root, or on a machine with cgroup v2",
            )
        return cls(found)

    def create(self, name: str) -> Cgroup:
        group = self.open(name)
        for path in dict.fromkeys(path for tree, path in group._directories.items() if tree != "cpuset"):
            os.mkdir(path)
        return group

    def open(self, name: str) -> CgroupV1:
        return CgroupV1({tree: str(path / name) for tree, path in self._directories.items()})

    def names(self, prefix: str) -> list[str]:
        trees = dict.fromkeys(self._directories.values())
        return sorted({name for path in trees for name in os.listdir(path) if name.startswith(prefix)})


def _sum_of(way: str, words: list[str]) -> int:
    """The bytes of "8:0 Read 4096 8:0 Write 0 … Total 4096"."""
    return sum(int(words[i + 1]) for i, word in enumerate(words[:-1]) if word == way)


def _machine_pressure(name: str) -> str:
    try:
        return cgroups.read(f"/proc/pressure/{name}")
    except OSError:
        return ""
