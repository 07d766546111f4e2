"""Version 2 of cgroups: one tree, one directory a group.

Source: https://docs.kernel.org/admin-guide/cgroup-v2.html
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time
from pathlib import Path

from labkernel.linux import cgroups
from labkernel.linux.cgroups import (
    CPU_PERIOD_USEC,
    Cgroup,
    CgroupMount,
    CgroupParent,
    CgroupUnavailable,
    Limits,
    Stats,
)

WANTED = ("cpu", "memory", "pids", "io", "cpuset")
LAUNCHER = "labkernel-launcher"
ROUNDS = 3
"""How often a group is frozen and killed until nobody is in it any more."""

DELEGATION = (
    "with systemd, start the lab in a group of its own: systemd-run --user --scope -p Delegate=yes COMMAND "
    "(the lab does so by itself where `systemd-run` and the user's session bus are there)"
)


class CgroupV2(Cgroup):
    """A group of the one tree."""

    version = 2

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def paths(self) -> dict[str, str]:
        return {"": str(self.directory)}

    @property
    def into_fd(self) -> int:
        return os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)

    def set(self, limits: Limits) -> list[tuple[str, str]]:
        written = settings(limits)
        for name, text in written:
            cgroups.write(self.directory / name, text)
        return [(str(self.directory / name), text) for name, text in written]

    def add(self, pid: int) -> None:
        cgroups.write(self.directory / "cgroup.procs", str(pid))

    def pids(self) -> list[int]:
        return [int(line) for line in self._read("cgroup.procs").split()]

    def stats(self) -> Stats:
        cpu = cgroups.numbers(self._read("cpu.stat"))
        memory = cgroups.numbers(self._read("memory.stat"))
        events = cgroups.numbers(self._read("memory.events"))
        io = [pair.split("=") for pair in self._read("io.stat").split() if "=" in pair]
        return Stats(
            cpu_usec=cpu.get("usage_usec", 0),
            cpu_user_usec=cpu.get("user_usec", 0),
            cpu_system_usec=cpu.get("system_usec", 0),
            cpu_periods=cpu.get("nr_periods", 0),
            cpu_throttled_periods=cpu.get("nr_throttled", 0),
            cpu_throttled_usec=cpu.get("throttled_usec", 0),
            memory_bytes=self._number("memory.current"),
            memory_peak_bytes=self._number("memory.peak"),
            memory_anon_bytes=memory.get("anon", 0),
            memory_file_bytes=memory.get("file", 0) - memory.get("shmem", 0),
            memory_shmem_bytes=memory.get("shmem", 0),
            swap_bytes=self._number("memory.swap.current"),
            memory_max_events=events.get("max", 0),
            oom_kills=events.get("oom_kill", 0),
            pids=self._number("pids.current"),
            pids_max_events=cgroups.numbers(self._read("pids.events")).get("max", 0),
            io_read_bytes=sum(int(value) for key, value in io if key == "rbytes"),
            io_write_bytes=sum(int(value) for key, value in io if key == "wbytes"),
        )

    def limits_written(self) -> dict[str, str]:
        names = (
            "memory.max",
            "memory.high",
            "memory.swap.max",
            "cpu.max",
            "cpu.weight",
            "cpuset.cpus",
            "pids.max",
        )
        texts = {str(self.directory / name): self._read(name).strip() for name in (*names, "io.max")}
        return {path: text for path, text in texts.items() if text}

    def freeze(self) -> None:
        self._freeze("1")

    def thaw(self) -> None:
        self._freeze("0")

    def frozen(self) -> bool:
        return "frozen 1" in self._read("cgroup.events")

    def kill(self) -> None:
        killer = self.directory / "cgroup.kill"  # Linux 5.14
        if killer.exists():
            cgroups.write(killer, "1")
        else:
            kill_all_frozen(self)

    def pressure(self) -> dict[str, float]:
        names = ("cpu", "memory", "io")
        return cgroups.parse_pressure((name, self._pressure_file(name)) for name in names)

    def remove(self, timeout: float = 5.0) -> None:
        for inner in sorted(self.directory.glob("**/"), key=lambda path: -len(path.parts)):
            if inner != self.directory:  # groups that the container made below its own
                cgroups.remove_directory(inner, timeout)
        cgroups.remove_directory(self.directory, timeout)

    def _freeze(self, state: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            cgroups.write(self.directory / "cgroup.freeze", state)
            wait_for_event(self.directory / "cgroup.events", f"frozen {state}", 5.0)

    def _read(self, name: str) -> str:
        return cgroups.read(f"{self.directory}/{name}")

    def _number(self, name: str) -> int:
        return int(self._read(name) or 0)

    def _pressure_file(self, name: str) -> str:
        try:
            return self._read(f"{name}.pressure")
        except OSError:  # EOPNOTSUPP: built in, but off (psi=0)
            return ""


class ParentV2(CgroupParent):
    """The group below which ours are made; its `cgroup.subtree_control` hands them the controllers."""

    version = 2

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.controllers = frozenset(cgroups.read(directory / "cgroup.subtree_control").split())

    @classmethod
    def prepare(cls, mounted: CgroupMount, path: str) -> ParentV2:
        """Hand the controllers down from our own group, after leaving it to our children.

        A group other than the root has either processes or controllers for its children, never both. So we move
        into a leaf of our own first. Raises CgroupUnavailable where the group is not ours to divide.
        """
        own = cgroups.below_mount(mounted, path)
        if own.name == LAUNCHER:
            return cls(own.parent)
        available = cgroups.read(own / "cgroup.controllers").split()
        wanted = [name for name in WANTED if name in available]
        enabled = cgroups.read(own / "cgroup.subtree_control").split()
        try:
            if own != Path(mounted.point) or (own / "cgroup.type").exists():
                leaf = own / LAUNCHER
                leaf.mkdir(exist_ok=True)
                cgroups.write(leaf / "cgroup.procs", str(os.getpid()))
            for name in wanted:
                if name not in enabled:
                    cgroups.write(own / "cgroup.subtree_control", f"+{name}")
        except OSError as error:
            with contextlib.suppress(OSError):
                if (own / LAUNCHER).is_dir():
                    cgroups.write(own / "cgroup.procs", str(os.getpid()))
                (own / LAUNCHER).rmdir()
            raise CgroupUnavailable(
                error.errno, f"{own} is not ours to divide: {_why(error)}; {DELEGATION}"
            ) from None
        if not (own / "cgroup.procs").exists() or not os.access(own, os.W_OK):
            raise CgroupUnavailable(errno.EACCES, f"{own} is not writable; {DELEGATION}")
        return cls(own)

    def create(self, name: str) -> Cgroup:
        directory = self.directory / name
        directory.mkdir()
        return CgroupV2(directory)

    def open(self, name: str) -> Cgroup:
        return CgroupV2(self.directory / name)

    def names(self, prefix: str) -> list[str]:
        return sorted(name for name in os.listdir(self.directory) if name.startswith(prefix))


def settings(limits: Limits) -> list[tuple[str, str]]:
    """The files and texts that stand for `limits`, in the order in which they are to be written."""
    files: list[tuple[str, str]] = []
    if limits.memory is not None:
        files.append(("memory.max", str(limits.memory)))
    if limits.memory_high is not None:
        files.append(("memory.high", str(limits.memory_high)))
    if limits.memory_swap is not None:
        files.append(("memory.swap.max", str(limits.memory_swap)))
    if limits.cpus is not None:
        files.append(("cpu.max", f"{round(limits.cpus * CPU_PERIOD_USEC)} {CPU_PERIOD_USEC}"))
    if limits.cpu_weight is not None:
        files.append(("cpu.weight", str(limits.cpu_weight)))
    if limits.cpuset_cpus is not None:
        files.append(("cpuset.cpus", limits.cpuset_cpus))
    if limits.pids is not None:
        files.append(("pids.max", str(limits.pids)))
    files += [("io.max", f"{device} rbps={rate}") for device, rate in limits.read_bps.items()]
    files += [("io.max", f"{device} wbps={rate}") for device, rate in limits.write_bps.items()]
    return files


def wait_for_event(path: Path, line: str, timeout: float) -> None:
    """Wait until a `cgroup.events` file has `line`; the kernel tells by POLLPRI. Raises TimeoutError."""
    end = time.monotonic() + timeout
    with path.open() as file:
        while line not in file.read():
            poll = select.poll()
            poll.register(file, select.POLLPRI)
            if not poll.poll(max(0.0, end - time.monotonic()) * 1000) and time.monotonic() >= end:
                raise TimeoutError(errno.ETIMEDOUT, f"{path} did not say {line!r} within {timeout} s")
            file.seek(0)


def kill_all_frozen(group: Cgroup) -> None:
    """SIGKILL all of a group while it is frozen, so that nothing can fork away, and let the signals arrive.

    Where so many run that they do not all stand still in time, those that do die, and the rest has another round.
    """
    for _ in range(ROUNDS):
        if not cgroups.members(group):
            return
        with contextlib.suppress(OSError):
            group.freeze()
        for pid in cgroups.members(group):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        with contextlib.suppress(OSError):
            group.thaw()
        end = time.monotonic() + 1.0
        while cgroups.members(group) and time.monotonic() < end:  # who is killed is listed for a moment
            time.sleep(0.001)


def _why(error: OSError) -> str:
    if error.errno == errno.EBUSY:
        return "other processes are in it, and a group has either processes or controllers for its children"
    return error.strerror or str(error)
