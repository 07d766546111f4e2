"""Watching a container from outside: a thread reads the kernel's counters of it, up to 50 times a second.

    with Container("python", ["python3", "work.py"]) as container, Monitor(container, hz=10) as monitor:
        container.wait()
    monitor.recording.columns()["memory_bytes"]

The kernel keeps the counters for the whole control group, so that no process is overlooked, however short its life:
the monitor only reads them. Where a container has no control group, it adds up what /proc says of its processes.
Source: https://docs.kernel.org/admin-guide/cgroup-v2.html, man 5 proc (pid/stat, net/dev), man 2 pidfd_open.
"""

from __future__ import annotations

import contextlib
import csv
import os
import select
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from labkernel.linux.cgroups import Cgroup, CgroupUnavailable, Stats, read

if TYPE_CHECKING:
    from labkernel.container import Container

HZ_MAX = 50
UNLIMITED = 1 << 60
"""v1 writes "no limit" as the largest number of pages; anything near it means that."""


@dataclass(frozen=True)
class Sample:
    """What a container had used at one moment, and what it might use. Counters grow from its start on."""

    seconds: float = 0.0
    """Since the recording began."""
    cpu_usec: int = 0
    cpu_periods: int = 0
    """Periods of the quota in which some process wanted to run; none where there is no quota."""
    cpu_throttled_periods: int = 0
    """Of these, the ones in which the quota was used up."""
    cpu_throttled_usec: int = 0
    """How long its processes were kept waiting because the quota was used up, summed over the cores."""
    memory_bytes: int = 0
    memory_anon_bytes: int = 0
    memory_file_bytes: int = 0
    memory_shmem_bytes: int = 0
    memory_peak_bytes: int = 0
    memory_max_events: int = 0
    """How often it ran into its memory limit."""
    oom_kills: int = 0
    pids: int = 0
    """Processes and threads, the container's init included."""
    pids_max_events: int = 0
    """How many forks were refused; 0 where the kernel does not count it."""
    io_read_bytes: int = 0
    io_write_bytes: int = 0
    """What goes to a disk: counted by v2 when it is written back, otherwise as soon as a process has made it dirty."""
    net_received_bytes: int = 0
    net_sent_bytes: int = 0
    """Over all interfaces of its network namespace; over the loopback, all that is sent is received too."""
    pressure_cpu: float = 0.0
    """Percent of the last 10 s in which some process waited for it (PSI); v1 knows only the machine's."""
    pressure_memory: float = 0.0
    pressure_io: float = 0.0
    memory_limit_bytes: int | None = None
    cpus_limit: float | None = None
    pids_limit: int | None = None


COLUMNS = tuple(f.name for f in fields(Sample))


@dataclass
class Recording:
    """The samples of one container, the oldest first: a small table, with or without the container that it is of."""

    name: str = ""
    samples: list[Sample] = field(default_factory=list)

    def columns(self) -> dict[str, list[Any]]:
        """The table as one list a column, as pandas and matplotlib take it."""
        samples = list(self.samples)
        return {name: [getattr(sample, name) for sample in samples] for name in COLUMNS}

    def rate(self, column: str, over: float = 0.0) -> list[float]:
        """How fast a counter grew before each sample, in its unit a second; 0 for the first.

        over: seconds over which to average, at least one interval; of the time before the first sample nothing is
        known, and it counts as nothing. What a CPU quota allows it allows for each period of 0.1 s: over less than
        several of them the share looks now too high, now too low.
        """
        samples = list(self.samples)
        rates = [0.0] if samples else []
        start = 0
        for number, after in enumerate(samples[1:], 1):
            while start + 1 < number and samples[start + 1].seconds <= after.seconds - over:
                start += 1
            before = samples[start]
            grown = getattr(after, column) - getattr(before, column)
            rates.append(grown / max(after.seconds - before.seconds, over, 1e-6))
        return rates

    def events(self, column: str) -> list[tuple[float, int]]:
        """When a counter of events grew, and by how much: (seconds, events)."""
        steps = (
            (s.seconds, getattr(s, column) - getattr(b, column)) for b, s in pairwise(list(self.samples))
        )
        return [(seconds, count) for seconds, count in steps if count > 0]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table; an unlimited limit is an empty field."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ("container", *COLUMNS))
            writer.writeheader()
            writer.writerows({"container": self.name, **asdict(sample)} for sample in list(self.samples))

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> Recording:
        """Read what `to_csv` wrote. Raises KeyError for a file without our columns, ValueError for other content."""
        types: dict[str, Any] = {f.name: float if "float" in str(f.type) else int for f in fields(Sample)}
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        samples = []
        for row in rows:
            values: dict[str, Any] = {
                key: kind(row[key]) if row[key] else None for key, kind in types.items()
            }
            samples.append(Sample(**values))
        return cls(rows[0]["container"] if rows else "", samples)


class Monitor:
    """A thread that samples one started container until the container ends, or `stop` is called.

    hz: samples a second, at most 50. As a context manager it starts on entry and stops on exit. The container may be
    waited for meanwhile: the monitor learns of the end by a pidfd of its own. Raises ValueError for another hz,
    RuntimeError for a container that does not run.
    """

    def __init__(self, container: Container, hz: float = 10.0) -> None:
        if not 0 < hz <= HZ_MAX:
            raise ValueError(f"hz {hz!r}: give samples a second, up to {HZ_MAX}")
        self.container = container
        self.hz = hz
        self.ended = threading.Event()
        """Set when sampling is over, for whatever reason."""
        self.cpu_seconds = 0.0
        """CPU time that the sampling itself has taken."""
        self._recording = Recording(title(container))
        self._ended_at: float | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        """Take the first sample and go on in a thread of its own."""
        if self.container.pid is None:
            raise RuntimeError("the container has not been started: there is nothing to watch yet")
        try:
            self._init = os.pidfd_open(self.container.pid)
        except ProcessLookupError:
            raise RuntimeError("the container has ended: there is nothing to watch any more") from None
        self._wake, self._waker = os.pipe()
        self._source = source(self.container)
        self._began = time.monotonic()
        self._take()
        self._thread = threading.Thread(
            target=self._run, name=f"monitor of {self.container.name}", daemon=True
        )
        self._thread.start()
        return self

    def stop(self) -> Recording:
        """Take the last sample and end the thread; what was recorded. Once it is stopped, this changes nothing."""
        if self._thread:
            os.write(self._waker, b".")
            self._thread.join()
            self._thread = None
            for fd in (self._init, self._wake, self._waker):
                os.close(fd)
            if self._ended_at is not None:
                self.container.wait()  # has ended, so this is at once; it brings the final counters
        return self.recording

    @property
    def recording(self) -> Recording:
        """What has been recorded until now; the last sample has the container's final counters, once it has ended.

        The kernel's counters go with the group, so those come from the launcher, with the exit status.
        """
        final = self.container.final_stats
        with self._lock:
            last = self._recording.samples[-1] if self._recording.samples else Sample()
            if self._ended_at is not None and final and last.seconds < self._ended_at:
                at_end = _from_stats(final)
                for name in (
                    "io_read_bytes",
                    "io_write_bytes",
                    "memory_peak_bytes",
                ):  # where the group did not know
                    at_end[name] = max(at_end[name], getattr(last, name))
                self._recording.samples.append(replace(last, seconds=self._ended_at, **at_end))
        return self._recording

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.stop()

    def _run(self) -> None:
        """Sample on a grid of times. One that was missed is left out: the counters lose nothing by it."""
        poll = select.poll()
        for fd in (self._init, self._wake):
            poll.register(fd, select.POLLIN)
        interval = 1 / self.hz
        number = 0
        while True:
            number = max(number, int((time.monotonic() - self._began) / interval)) + 1
            left = self._began + number * interval - time.monotonic()
            ready = [fd for fd, _ in poll.poll(max(0.0, left) * 1000)]
            if self._init in ready:
                break
            if not self._take() or self._wake in ready:
                break
            self.cpu_seconds = time.thread_time()
        self.cpu_seconds = time.thread_time()
        if _readable(self._init):
            self._ended_at = time.monotonic() - self._began
        self.ended.set()

    def _take(self) -> bool:
        """Add a sample; False when the container has ended: its files may have vanished while we read them."""
        start = time.monotonic()
        try:
            sample = self._source.sample()
        except OSError:
            sample = None
        seconds = (
            start + time.monotonic()
        ) / 2 - self._began  # on a busy machine we may have had to wait meanwhile
        if sample is None or _readable(self._init):
            return not _readable(self._init)
        peak = max(sample.memory_bytes, sample.memory_peak_bytes)  # before Linux 5.19, v2 has no memory.peak
        if self._recording.samples:
            peak = max(peak, self._recording.samples[-1].memory_peak_bytes)
        self._recording.samples.append(replace(sample, seconds=seconds, memory_peak_bytes=peak))
        return True


class CgroupSource:
    """Reads a container's counters from its control group.

    v1 does not know whose data it is that the kernel writes back to a disk; so there I/O is asked of the processes: of
    the init and its descendants, and of what `Container.exec` has started. What that reads and writes between our last
    look and its end is not counted: nobody in the container waits for it.
    """

    def __init__(self, group: Cgroup, pid: int) -> None:
        self.group = group
        self.pid = pid
        self._limit_files = _limit_files(group)
        self._io: dict[int, tuple[int, int]] = {}
        """Of the init, and of each program that was started later, with its descendants: the most that was seen."""

    def sample(self) -> Sample:
        """One sample, but for its time. Raises OSError when the group is gone."""
        counted = _from_stats(self.group.stats())
        if self.group.version == 1:
            for pid in (self.pid, *self._started_later()):
                self._io[pid] = _larger(self._io.get(pid, (0, 0)), io_bytes(descendants(pid)))
            read, written = zip(*self._io.values(), strict=True)
            counted["io_read_bytes"], counted["io_write_bytes"] = sum(read), sum(written)
        received, sent = network_bytes(self.pid)
        pressure = {f"pressure_{name}": percent for name, percent in self.group.pressure().items()}
        return Sample(
            **counted,
            net_received_bytes=received,
            net_sent_bytes=sent,
            **pressure,  # type: ignore[arg-type]
            **_limits_in(*self._limit_files),
        )

    def _started_later(self) -> list[int]:
        """Who is in the group, and descends neither from its init nor from somebody else in it."""
        group = {self.pid, *self.group.pids()}
        others = group - set(descendants(self.pid))
        return [pid for pid in others if int(status(pid).get("PPid", self.pid)) not in group]


class ProcessSource:
    """Adds up a container's processes, where there is no control group: its init, and all that descends from it.

    A process that has ended is not lost: when its parent, or at last the init, waits for it, the kernel adds its CPU
    time and I/O to the parent's (man 2 getrusage, RUSAGE_CHILDREN). What `Container.exec` started is not counted:
    it descends from the launcher. Memory that processes share is counted for each of them.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._before = Sample()

    def sample(self) -> Sample:
        """One sample, but for its time."""
        import psutil

        pids = descendants(self.pid)
        totals = dict.fromkeys(("cpu", "anon", "file", "threads"), 0.0)
        for pid in pids:
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                process = psutil.Process(pid)
                totals["cpu"] += sum(
                    process.cpu_times()[:4]
                )  # user and system time, its own and its children's
                memory = process.memory_info()
                totals["anon"] += memory.rss - memory.shared
                totals["file"] += memory.shared
                totals["threads"] += process.num_threads()
        before = self._before
        received, sent = network_bytes(self.pid)
        read, written = _larger((before.io_read_bytes, before.io_write_bytes), io_bytes(pids))
        rss = int(totals["anon"] + totals["file"])
        # A counter never falls; it would for a moment where a process is waited for while we read.
        self._before = Sample(
            cpu_usec=max(before.cpu_usec, round(totals["cpu"] * 1e6)),
            memory_bytes=rss,
            memory_anon_bytes=int(totals["anon"]),
            memory_file_bytes=int(totals["file"]),
            memory_peak_bytes=max(before.memory_peak_bytes, rss),
            pids=int(totals["threads"]),
            io_read_bytes=read,
            io_write_bytes=written,
            net_received_bytes=received,
            net_sent_bytes=sent,
        )
        return self._before


def title(container: Container) -> str:
    """What people call a container: the name that was given to it, else its hostname."""
    return container.spec.hostname if container.name == container.spec.id else container.name


def source(container: Container) -> CgroupSource | ProcessSource:
    """Where a container's numbers come from on this machine."""
    assert container.pid is not None
    try:
        return CgroupSource(container.cgroup, container.pid)
    except CgroupUnavailable:
        return ProcessSource(container.pid)


def limits_in_force(group: Cgroup) -> dict[str, Any]:
    """A group's limits as the kernel has them at this moment, None for no limit, by the names of Sample's fields."""
    return _limits_in(*_limit_files(group))


def _limit_files(group: Cgroup) -> tuple[str, str, str, str]:
    """The files of the limits on memory, CPU (v1: quota, period) and pids."""
    paths = group.paths
    if group.version == 2:
        return f"{paths['']}/memory.max", f"{paths['']}/cpu.max", "", f"{paths['']}/pids.max"
    cpu = f"{paths['cpu']}/cpu.cfs"
    return (
        f"{paths['memory']}/memory.limit_in_bytes",
        f"{cpu}_quota_us",
        f"{cpu}_period_us",
        f"{paths['pids']}/pids.max",
    )


def _limits_in(memory_file: str, quota_file: str, period_file: str, pids_file: str) -> dict[str, Any]:
    memory = _number(read(memory_file))
    words = read(quota_file).split() + (read(period_file).split() if period_file else [])
    quota = _number(words[0]) if len(words) == 2 else None
    return {
        "memory_limit_bytes": memory if memory is not None and memory < UNLIMITED else None,
        "cpus_limit": None if quota is None else quota / int(words[1]),
        "pids_limit": _number(read(pids_file)),
    }


def _number(text: str) -> int | None:
    """A limit file's number; None for "max", for v1's -1, and where the kernel has no such file."""
    return int(text) if text.strip().isdigit() else None


def network_bytes(pid: int) -> tuple[int, int]:
    """(received, sent) over all interfaces of a process's network namespace; (0, 0) when it has ended."""
    lines = _proc(f"{pid}/net/dev").splitlines()[2:]
    counters = [line.partition(":")[2].split() for line in lines]
    return sum(int(words[0]) for words in counters), sum(int(words[8]) for words in counters)


def io_bytes(pids: Iterable[int]) -> tuple[int, int]:
    """(read, written) from and to disks by these processes, and by those they have waited for (man 5 proc, pid/io).

    A process whose file is not ours to read counts as nothing.
    """
    counters: Counter[str] = Counter()
    for pid in pids:
        counters.update({name: int(number) for name, number in _pairs(_proc(f"{pid}/io"))})
    return counters["read_bytes"], counters["write_bytes"]


def descendants(pid: int) -> list[int]:
    """A process and all that descend from it, parents first (man 5 proc, pid/task/tid/children)."""
    found = [pid]
    for parent in found:
        try:
            threads = os.listdir(f"/proc/{parent}/task")
        except OSError:
            continue
        for thread in threads:
            found += map(int, _proc(f"{parent}/task/{thread}/children").split())
    return found


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status of a process, by name; nothing when it has ended."""
    lines = (line.partition(":") for line in _proc(f"{pid}/status").splitlines())
    return {name: value.strip() for name, _, value in lines}


def _pairs(text: str) -> Iterable[tuple[str, str]]:
    """The lines "name: value" of a file below /proc."""
    for line in text.splitlines():
        name, _, value = line.partition(": ")
        yield name, value


def _proc(name: str) -> str:
    """A file below /proc; nothing where its process has ended, or where it is not ours to read."""
    try:
        return read(f"/proc/{name}")
    except OSError:
        return ""


def _from_stats(stats: Stats) -> dict[str, Any]:
    return {name: value for name, value in stats._asdict().items() if name in COLUMNS}


def _larger(before: tuple[int, int], now: tuple[int, int]) -> tuple[int, int]:
    return max(before[0], now[0]), max(before[1], now[1])


def _readable(pidfd: int) -> bool:
    """Whether the process of a pidfd has ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
