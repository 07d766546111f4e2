"""Control groups: each limit is driven into, and what the kernel counts is compared with what was done."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labkernel import children, lab, state
from labkernel.container import Container
from labkernel.launcher import Launcher
from labkernel.linux import cgroup_v2, cgroups, disks, syscalls
from labkernel.linux.cgroups import CgroupUnavailable, Limits
from labkernel.spec import BadOption
from tests.helpers import (
    assert_nothing_left,
    emulated,
    facts,
    logged,
    needs_limits,
    on_a_disk,
    own_home,
    run_python,
)
from tests.helpers import snapshot as everything_of_ours

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


limits_are_there = pytest.mark.usefixtures("limits")


@pytest.fixture
def limits() -> None:
    needs_limits()


BUSY = ["python3", "-c", "while True: pass"]
MIB = 1 << 20


def python(program: str, **options: Any) -> Container:
    return Container("python", ["python3", "-u", "-c", program], **options)


# ---------------------------------------------------------------------- memory


@limits_are_there
def test_memory_over_the_limit_is_the_end_of_it_and_not_of_its_neighbour() -> None:
    with Container("python", ["sleep", "60"], memory="32M") as neighbour:
        ended = python("x = bytearray(200 << 20)", memory="32M").run(timeout=60)
        assert (ended.returncode, ended.oom_killed) == (137, True)
        assert ended.stats
        assert ended.stats.oom_kills == 1
        assert ended.stats.memory_max_events > 0
        assert 31 * MIB < ended.stats.memory_peak_bytes <= 33 * MIB
        assert neighbour.running()
        assert neighbour.stats().oom_kills == 0


@limits_are_there
def test_memory_under_the_limit_is_no_trouble() -> None:
    ended = python("x = bytearray(40 << 20)", memory="64M").run(timeout=60)
    assert (ended.returncode, ended.oom_killed) == (0, False)
    assert ended.stats
    assert ended.stats.memory_peak_bytes > 40 * MIB


@limits_are_there
def test_only_the_greedy_one_of_a_container_is_killed() -> None:
    """The kernel kills a process, not a container: the program lives on and may tell."""
    program = """
import os, time
pid = os.fork()
if pid == 0:
    x = bytearray(100 << 20)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"""
    ended = python(program, memory="48M").run(timeout=60)
    assert (ended.returncode, ended.stdout, ended.oom_killed) == (0, b"-9\n", True)


@limits_are_there
@pytest.mark.parametrize("where", ["/dev/shm/x", "/dev/x"])
def test_files_in_memory_count(where: str) -> None:
    program = f"""
with open({where!r}, 'wb') as file:
    for _ in range(60): file.write(bytes(1 << 20))
print('written')"""
    ended = python(program, memory="32M").run(timeout=60)
    assert (ended.returncode, ended.oom_killed, ended.stdout) == (137, True, b"")


@limits_are_there
def test_files_in_memory_are_counted_as_such() -> None:
    program = """
with open('/dev/shm/x', 'wb') as file: file.write(bytes(20 << 20))
print('written', flush=True)
import time; time.sleep(60)"""
    with python(program, memory="64M") as container:
        logged(container, "written")
        stats = container.stats()
        assert 19 * MIB < stats.memory_shmem_bytes < 22 * MIB
        assert stats.memory_anon_bytes < 19 * MIB
        assert stats.memory_bytes > 20 * MIB


@limits_are_there
def test_the_page_cache_counts_and_is_given_back() -> None:
    """A file larger than the limit is written and read to its end: the cache is thrown away, nobody is killed."""
    program = """
import os
with open('/data/x', 'wb') as file:
    for _ in range(60): file.write(os.urandom(1 << 20)); file.flush(); os.fdatasync(file.fileno())
with open('/data/x', 'rb') as file:
    while file.read(1 << 20): pass
print('done')"""
    with on_a_disk() as place:
        ended = python(program, memory="32M", volumes=[f"{place}:/data"]).run(timeout=60)
    assert (ended.stdout, ended.returncode, ended.oom_killed) == (b"done\n", 0, False)


@limits_are_there
def test_the_memory_limit_moves_while_it_runs() -> None:
    program = """
import sys
for line in sys.stdin:
    x = bytearray(int(line) << 20)
    print('has', int(line))"""
    read, write = os.pipe()
    with (
        os.fdopen(write, "w", buffering=1) as asks,
        python(program, memory="128M").start(stdin=read) as container,
    ):
        os.close(read)
        asks.write("60\n")
        logged(container, "has 60")
        asks.write("1\n")
        logged(container, "has 1")
        written = dict(container.set_limits(memory="32M"))
        assert str(32 * MIB) in written.values()
        for path, text in written.items():
            assert Path(path).read_text().strip() == text
        asks.write("60\n")
        assert container.wait(30) == 137
        assert container.stats().oom_kills == 1


@limits_are_there
def test_a_limit_below_what_is_used_is_told_or_enforced() -> None:
    """v1 refuses it (EBUSY), v2 kills; neither leaves the limit unsaid."""
    with python(
        "x = bytearray(60 << 20); print('here'); import time; time.sleep(60)", memory="128M"
    ) as container:
        logged(container, "here")
        try:
            container.set_limits(memory="16M")
        except OSError as error:
            assert error.errno == errno.EBUSY
            assert "memory" in str(error)
        else:
            assert container.wait(30) == 137


@limits_are_there
def test_without_swap_of_its_own_it_cannot_swap() -> None:
    if len(Path("/proc/swaps").read_text().splitlines()) < 2:
        pytest.skip("this machine has no swap space")
    ended = python("x = bytearray(60 << 20)", memory="32M", memory_swap="32M").run(timeout=60)
    assert (ended.returncode, ended.oom_killed) == (137, True)
    ended = python("x = bytearray(60 << 20)", memory="32M", memory_swap="128M").run(timeout=60)
    assert ended.returncode == 0


SOFT: dict[str, Any] = {"memory": "96M", "memory_swap": "96M", "memory_reservation": "32M"}
"""Far below the hard limit, and without swap: what is above it has nowhere to go."""


@limits_are_there
def test_page_cache_above_the_soft_limit_is_given_back() -> None:
    """By version 2, at once. Version 1 looks at the limit only where the whole machine is short of memory."""
    program = """
import os, time
with open('/data/x', 'wb') as file:
    for _ in range(64): file.write(bytes(1 << 20)); file.flush(); os.fdatasync(file.fileno())
with open('/data/x', 'rb') as file:
    while file.read(1 << 20): pass
print('read', flush=True)
time.sleep(60)"""
    with on_a_disk() as place, python(program, volumes=[f"{place}:/data"], **SOFT) as container:
        logged(container, "read")
        stats = container.stats()
        if container.cgroup.version == 2:
            assert stats.memory_bytes < 36 * MIB
        else:
            assert stats.memory_bytes > 64 * MIB
        assert (stats.memory_max_events, stats.oom_kills) == (0, 0)


@limits_are_there
def test_memory_above_the_soft_limit_is_had_slowly_and_nobody_is_killed() -> None:
    """With version 2; it is had at once when the limit is gone. With version 1 it is had at once all the time."""
    program = "print('starts', flush=True); x = bytearray(72 << 20); print('has', flush=True); time.sleep(60)"
    with python("import time; " + program, **SOFT) as container:
        logged(container, "starts")
        if container.cgroup.version == 2:
            time.sleep(3)
            assert b"has" not in container.logs()
            events = Path(next(iter(container.cgroup.paths.values())), "memory.events").read_text()
            assert cgroups.numbers(events)["high"] > 0
            assert container.stats().memory_bytes > 32 * MIB
            container.set_limits(memory_reservation="96M")
        logged(container, "has")
        assert container.running() and container.stats().oom_kills == 0
        assert container.stats().memory_anon_bytes > 72 * MIB


# ---------------------------------------------------------------------- CPU


def share(container: Container, seconds: float) -> float:
    """The cores that a container used during the next seconds."""
    begin, used = time.monotonic(), container.stats().cpu_usec
    time.sleep(seconds)
    now = time.monotonic()
    return (container.stats().cpu_usec - used) / 1e6 / (now - begin)


def assert_share(container: Container, cpus: float, seconds: float = 1.5) -> None:
    """A quota is held within a tenth. Only too little may be somebody else's doing, who wants the same core.

    (So the container has a great weight besides: then it gets what its quota allows on a busy machine too.)

    (An emulated core also waits for a real one, and the kernel in the VM, which does not see that, takes the time
    for used; it is given back later.)
    """
    time.sleep(0.3)  # the first period may be a whole one
    for _ in range(5):
        measured = share(container, seconds)
        assert measured < 1.1 * cpus or emulated()
        if 0.9 * cpus < measured < 1.1 * cpus:
            return
    pytest.fail(f"{measured:.3f} cores used, five times not a quota of {cpus}")


@limits_are_there
@pytest.mark.parametrize("cpus", [0.2, 0.5])
def test_the_quota_holds_within_a_tenth(cpus: float) -> None:
    with Container("python", BUSY, cpus=cpus, cpu_weight=10_000) as container:
        assert_share(container, cpus)
        stats = container.stats()
        assert stats.cpu_throttled_periods > 0
        assert stats.cpu_throttled_usec > 0
        assert stats.cpu_periods >= stats.cpu_throttled_periods


@limits_are_there
def test_the_quota_holds_for_many_processes_together() -> None:
    program = "import os\nfor _ in range(3): os.fork()\nwhile True: pass"
    with python(program, cpus=0.4, cpu_weight=10_000) as container:
        assert_share(container, 0.4)


@limits_are_there
def test_the_quota_moves_while_it_runs() -> None:
    with Container("python", BUSY, cpus=0.1, cpu_weight=10_000) as container:
        assert_share(container, 0.1)
        container.set_limits(cpus=0.5)
        assert_share(container, 0.5)


@limits_are_there
def test_the_weight_divides_one_core() -> None:
    """Two busy containers on the same core, the one with three times the other's weight."""
    needs_limits("cpuset")
    heavy, light = (
        Container("python", BUSY, cpu_weight=weight, cpuset_cpus="0", cpus=1.0) for weight in (300, 100)
    )
    with heavy, light:
        time.sleep(0.3)
        begin = [heavy.stats().cpu_usec, light.stats().cpu_usec]
        time.sleep(2.0)
        used = [heavy.stats().cpu_usec - begin[0], light.stats().cpu_usec - begin[1]]
    assert used[0] / used[1] == pytest.approx(3, rel=0.25)


@limits_are_there
def test_the_cpuset_is_what_the_program_sees() -> None:
    needs_limits("cpuset")
    core = max(os.sched_getaffinity(0))
    program = """
status = dict(line.split(':', 1) for line in open('/proc/self/status').read().splitlines())
result = [sorted(os.sched_getaffinity(0)), status['Cpus_allowed_list'].strip(),
          attempt(os.sched_setaffinity, 0, OTHERS)]"""
    others = sorted(os.sched_getaffinity(0) - {core}) or [core + 1]
    ended = run_python(program.replace("OTHERS", repr(others)), cpuset_cpus=str(core))
    assert ended.stdout.decode().strip() == f'[[{core}], "{core}", "EINVAL"]', ended


@limits_are_there
def test_the_cpuset_moves_while_it_runs() -> None:
    needs_limits("cpuset")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("this machine has a single core")
    with Container("python", BUSY) as container:
        for core in cores[:2]:
            container.set_limits(cpuset_cpus=str(core))
            assert {frozenset(os.sched_getaffinity(pid)) for pid in container.cgroup.pids()} == {
                frozenset({core})
            }


# ---------------------------------------------------------------------- pids


@limits_are_there
def test_too_many_processes_are_refused_and_counted() -> None:
    program = """
import errno, os, time
count = 0
try:
    while True:
        if os.fork() == 0: time.sleep(60)
        count += 1
except OSError as error: print(count, errno.errorcode[error.errno])"""
    ended = python(program, pids_limit=10).run(timeout=60)
    assert ended.stdout == b"8 EAGAIN\n"  # ten, with init and the program
    assert ended.stats
    assert ended.stats.pids_max_events >= 1


@limits_are_there
def test_threads_count_too() -> None:
    program = """
import threading, time
try:
    for count in range(100): threading.Thread(target=time.sleep, args=[60], daemon=True).start()
except RuntimeError: print(count)"""
    assert python(program, pids_limit=10).run(timeout=60).stdout == b"8\n"


@limits_are_there
def test_a_fork_bomb_is_contained_and_ended_at_once() -> None:
    before = everything_of_ours()
    program = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    with Container("python", ["sleep", "60"]) as neighbour:
        with python(program, pids_limit=50, cpus=0.3) as bomb:
            end = time.monotonic() + 30
            while bomb.stats().pids < 50 and time.monotonic() < end:
                time.sleep(0.01)
            assert bomb.stats().pids == 50
            assert neighbour.exec(["true"]).returncode == 0
        assert bomb.wait() == 137
    assert_nothing_left(before, 5)


def test_a_list_that_is_longer_than_a_page_is_read_whole() -> None:
    """The kernel hands out one page for each read; a group of a thousand processes fills several."""
    path = "/proc/self/smaps"
    assert len(cgroups.read(path)) > 3 * os.sysconf("SC_PAGE_SIZE")
    assert cgroups.read(path).rstrip().splitlines()[-1].startswith("VmFlags")


RUN_AWAY = """
import os, time
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        while True:
            try:
                if os.fork(): os._exit(0)
            except BlockingIOError: pass
            time.sleep(0.002)
"""


def run_away(inner: bool, kill: bool) -> list[str]:
    """In a child: a group of processes that never stay, perhaps in a group inside it; it is killed, or we end."""
    made = lab.group("away")
    made.set(Limits(pids=40))
    for path in set(made.paths.values()) if inner else ():
        os.mkdir(f"{path}/inner")
    if os.fork() == 0:
        made.add(os.getpid())
        for path in set(made.paths.values()) if inner else ():
            Path(path, "inner", "cgroup.procs").write_text("0")
        exec(RUN_AWAY)
        os._exit(0)
    os.wait()
    assert len(cgroups.members(made)) >= 4
    if kill:
        cgroup_v2.kill_all_frozen(made)
        end = time.monotonic() + 5
        while cgroups.members(made) and time.monotonic() < end:
            time.sleep(0.01)
        assert cgroups.members(made) == set()
    return list(made.paths.values())


@limits_are_there
@pytest.mark.parametrize("inner", [False, True])
def test_who_forks_and_ends_all_the_time_is_killed(inner: bool) -> None:
    """The way of version 1, and of version 2 before Linux 5.14; a group inside the group is killed with it."""
    children.in_child(run_away, inner, True, timeout=60)


@limits_are_there
@pytest.mark.parametrize("inner", [False, True])
def test_such_a_group_is_gone_with_the_child_that_made_it(inner: bool) -> None:
    paths = children.in_child(run_away, inner, False, timeout=60)
    end = time.monotonic() + 20
    while any(os.path.isdir(path) for path in paths) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(os.path.isdir(path) for path in paths)


def in_group() -> tuple[list[str], dict[str, str]]:
    made = lab.group("where")
    made.add(os.getpid())
    found = [str(cgroups.directory_of("self", name)) for name in ("pids", "freezer", "memory")]
    return found, made.paths


@limits_are_there
def test_the_directory_of_a_processs_group_is_found() -> None:
    found, paths = children.in_child(in_group)
    assert found == [paths.get(name) or paths[""] for name in ("pids", "freezer", "memory")]


def test_a_process_that_has_ended_is_in_no_group() -> None:
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
        with pytest.raises((FileNotFoundError, ProcessLookupError)):
            cgroups.directory_of(ended.pid, "pids")


# ---------------------------------------------------------------------- input and output


def disk_of(path: Path) -> str | None:
    """The block device below a directory, by its name; None where there is none."""
    number = disks.below(path)
    name = number and Path(f"/sys/dev/block/{number}").resolve().name
    return f"/dev/{name}" if name and Path(f"/dev/{name}").exists() else None


@limits_are_there
@pytest.mark.parametrize("way", ["read", "write"])
def test_a_disk_is_read_and_written_at_the_given_rate(home: Path, way: str) -> None:
    needs_limits("io")
    disk = disk_of(home)
    if disk is None:
        pytest.skip(f"{home} lies on no block device of its own")
    program = f"""
import mmap, os, time
fd = os.open('/tmp/x', os.O_RDWR | os.O_CREAT | os.O_DIRECT)
block = mmap.mmap(-1, 1 << 18)
begin = time.monotonic()
for _ in range(16): os.write(fd, block)
os.lseek(fd, 0, os.SEEK_SET)
if {way == "read"}:
    begin = time.monotonic()
    for _ in range(16): os.readv(fd, [block])
print(time.monotonic() - begin)"""
    limit: Any = {f"device_{way}_bps": {disk: "2M"}}
    ended = python(program, **limit).run(timeout=60)
    assert ended.returncode == 0, ended
    assert 1.6 < float(ended.stdout) < 3.0  # 4 MiB at 2 MiB/s
    assert ended.stats
    assert getattr(ended.stats, f"io_{way}_bytes") >= 4 * MIB
    assert float(python(program).run(timeout=60).stdout) < 1.6


@limits_are_there
def test_a_device_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="/dev/nosuch"):
        Container("python", ["true"], device_write_bps={"/dev/nosuch": "1M"})
    for path in ("/dev/null", str(tmp_path)):
        with pytest.raises((BadOption, OSError), match=path):
            Container("python", ["true"], device_write_bps={path: "1M"}).run()


# ---------------------------------------------------------------------- all of a group


@limits_are_there
def test_freeze_stops_all_and_thaw_lets_them_go_on() -> None:
    with Container("python", ["sh", "-c", "while :; do :; done & while :; do :; done"]) as container:
        time.sleep(0.1)
        container.pause()
        assert share(container, 0.3) < 0.01
        container.unpause()
        assert share(container, 0.3) > 0.2


@limits_are_there
def test_kill_ends_all_of_a_group_those_that_fork_included() -> None:
    program = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    with python(program, pids_limit=30, cpus=0.3) as container:
        time.sleep(0.3)
        container.cgroup.kill()
        assert container.wait(20) == 137


@limits_are_there
def test_what_is_written_is_what_the_kernel_says() -> None:
    with Container(
        "python", ["sleep", "60"], memory="64M", cpus=0.5, pids_limit=32, cpu_weight=50
    ) as container:
        before = container.cgroup.limits_written()
        written = container.set_limits(memory="48M", cpus=0.25, pids_limit=16, cpu_weight=200)
        after = container.cgroup.limits_written()
    assert written
    assert before != after
    for path, text in written:
        assert after[path] == text
        assert f"/{state.PREFIX}" in path


@limits_are_there
def test_what_was_made_in_advance_for_another_has_only_its_own_limits() -> None:
    """Each container here is like the one before but for its limits, which its group may have already."""
    turns: list[dict[str, Any]] = [
        {"cpu_weight": 50}, {}, {"memory": "64M"}, {"memory": "200M", "memory_swap": "300M"},
        {"cpus": 0.5, "pids_limit": 9}, {"memory": "1G"},
    ]  # fmt: skip

    def written(options: dict[str, Any]) -> set[tuple[str, str]]:
        with Container("python", ["sleep", "60"], **options) as container:
            return {(Path(path).name, text) for path, text in container.cgroup.limits_written().items()}

    for options in turns:
        children.close_launcher()
        expected = written(options)
        for before in turns:
            written(before)
            time.sleep(0.1)  # the next one is made and given the limits of the last
            assert written(options) == expected, f"{options} after {before}"


@limits_are_there
@pytest.mark.parametrize(
    "nonsense", [{"cpus": -1}, {"cpu_weight": 0}, {"cpuset_cpus": "none"}, {"pids_limit": 0}]
)
def test_a_limit_that_is_refused_while_it_runs_leaves_all_as_they_were(nonsense: dict[str, Any]) -> None:
    with Container("python", ["sleep", "60"], memory="64M", cpus=0.5) as container:
        before = container.cgroup.limits_written()
        with pytest.raises(BadOption):
            container.set_limits(memory="48M", **nonsense)
        assert container.cgroup.limits_written() == before


@limits_are_there
def test_pressure_is_a_share() -> None:
    with Container("python", ["sleep", "60"]) as container:
        pressure = container.cgroup.pressure()
    if not Path("/proc/pressure/cpu").exists():
        pytest.skip("this kernel does not count pressure")
    assert set(pressure) == {"cpu", "memory", "io"}
    assert all(0 <= value <= 100 for value in pressure.values())


@limits_are_there
def test_the_group_goes_with_the_container() -> None:
    core = "0" if "cpuset" in facts()["controllers"] else None
    container = Container("python", ["sleep", "60"], cpuset_cpus=core).start()
    paths = list(container.cgroup.paths.values())
    assert all(os.path.isdir(path) for path in paths)
    container.kill()
    assert not any(os.path.isdir(path) for path in paths)


@limits_are_there
def test_a_process_that_was_sent_into_the_group_from_outside_does_not_keep_it() -> None:
    """Somebody moves a process of the host into our group; the group has to go all the same."""
    guest = subprocess.Popen(["sleep", "60"])
    try:
        container = Container("python", ["sleep", "60"]).start()
        with contextlib.suppress(PermissionError):
            container.cgroup.add(guest.pid)
        paths = list(container.cgroup.paths.values())
        container.kill()
        assert not any(os.path.isdir(path) for path in paths)
    finally:
        guest.kill()
        guest.wait()


@limits_are_there
def test_a_limit_that_the_kernel_refuses_leaves_nothing() -> None:
    """Checked values are refused before; here the kernel itself refuses, and what was made is removed."""
    children.launcher()
    before = everything_of_ours()
    container = Container("python", ["true"], memory="64M")
    container.spec = container.spec._replace(limits=Limits(memory=64 * MIB, cpus=1e9))
    with pytest.raises(OSError, match="write"):
        container.run()
    assert state.records() == []
    assert_nothing_left(before, 5)


def test_where_no_limit_can_be_set_one_that_is_asked_for_is_refused_in_words() -> None:
    if facts()["cgroup_version"] is not None:
        pytest.skip("limits can be set here")
    with pytest.raises(OSError, match="memory") as caught:
        Container("python", ["true"], memory="64M").run()
    assert facts()["no_cgroup"] in str(caught.value)
    assert Container("python", ["true"]).run().returncode == 0  # the defaults are left out
    with Container("python", ["sleep", "60"]) as container, pytest.raises(CgroupUnavailable):
        container.stats()


class MemoryOnly(cgroups.CgroupParent):
    """A place that was handed to us with one controller; no group is made in it."""

    controllers = frozenset({"memory"})

    def create(self, name: str) -> cgroups.Cgroup:
        raise NotImplementedError

    def open(self, name: str) -> cgroups.Cgroup:
        raise NotImplementedError

    def names(self, prefix: str) -> list[str]:
        return []


def test_where_one_controller_is_missing_the_limits_of_the_others_are_set() -> None:
    here = Launcher.__new__(Launcher)
    here.parent, here.no_cgroup = MemoryOnly(), ""
    assert here._limits(Container("python", ["true"]).spec) == Limits(memory=512 * MIB)
    assert here._limits(Container("python", ["true"], memory="64M").spec) == Limits(memory=64 * MIB)
    with pytest.raises(CgroupUnavailable, match=r"\(pids\) .* the controllers pids are not handed to us"):
        here._limits(Container("python", ["true"], memory="64M", pids_limit=10).spec)


# ---------------------------------------------------------------------- reading what the kernel says


HYBRID = r"""24 18 0:22 / /sys/fs/cgroup/unified rw,nosuid shared:5 - cgroup2 cgroup2 rw
25 18 0:23 / /sys/fs/cgroup/systemd rw shared:6 - cgroup cgroup rw,xattr,name=systemd
26 18 0:24 /docker/x /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct
27 18 0:25 / /proc rw - proc proc rw
"""


def test_mounts_of_a_hybrid_machine() -> None:
    two, systemd, cpu = cgroups.mounts(HYBRID)
    assert (two.version, two.point, two.controllers) == (2, "/sys/fs/cgroup/unified", frozenset())
    assert (systemd.version, "name=systemd" in systemd.controllers) == (1, True)
    assert (cpu.version, cpu.root, {"cpu", "cpuacct"} <= cpu.controllers) == (1, "/docker/x", True)


def test_a_path_below_a_mount_that_shows_only_a_part() -> None:
    _, _, cpu = cgroups.mounts(HYBRID)
    assert cgroups.below_mount(cpu, "/docker/x/inner") == Path("/sys/fs/cgroup/cpu,cpuacct/inner")
    assert cgroups.below_mount(cpu, "/docker/x") == Path("/sys/fs/cgroup/cpu,cpuacct")


def test_own_paths_are_the_kernels() -> None:
    paths = cgroups.own_paths()
    assert len(Path("/proc/self/cgroup").read_text().splitlines()) <= len(paths)
    assert all(path.startswith("/") for path in paths.values())


def test_flat_keyed_files_and_pressure() -> None:
    assert cgroups.numbers("a 1\nb 22\nodd\n") == {"a": 1, "b": 22}
    text = "some avg10=1.50 avg60=0.00 avg300=0.00 total=5\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
    assert cgroups.parse_pressure([("cpu", text), ("io", "")]) == {"cpu": 1.5}


def test_the_files_of_version_2() -> None:
    given = Limits(
        memory=1, memory_high=2, memory_swap=0, cpus=0.5, cpu_weight=7, cpuset_cpus="0-1", pids=3,
        read_bps={"8:0": 4}, write_bps={"8:0": 5},
    )  # fmt: skip
    assert dict(cgroup_v2.settings(given)[:-1]) == {
        "memory.max": "1", "memory.high": "2", "memory.swap.max": "0", "cpu.max": "50000 100000", "cpu.weight": "7",
        "cpuset.cpus": "0-1", "pids.max": "3", "io.max": "8:0 rbps=4",
    }  # fmt: skip
    assert cgroup_v2.settings(given)[-1] == ("io.max", "8:0 wbps=5")
    assert cgroup_v2.settings(Limits()) == []


def test_errors_name_the_file_and_the_text(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"write '5' to .*/nosuch: No such file"):
        cgroups.write(tmp_path / "nosuch", "5")
    assert cgroups.read(tmp_path / "nosuch") == ""


def test_clone3_into_a_group_of_version_2() -> None:
    """The child is in its group from its first moment on."""
    tree = next((mounted for mounted in cgroups.mounts() if mounted.version == 2), None)
    if tree is None:
        pytest.skip("no cgroup v2 tree is mounted here")
    place = cgroups.below_mount(tree, cgroups.own_paths()[""]) / f"{state.PREFIX}test"
    try:
        place.mkdir()
    except OSError as error:
        pytest.skip(f"{place}: {error.strerror}")

    def work(path: str) -> str:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        read, write = os.pipe()
        pid, pidfd = syscalls.clone3(0, fd)
        if pid == 0:
            os.write(write, Path("/proc/self/cgroup").read_bytes())
            os._exit(0)
        os.waitpid(pid, 0)
        os.close(pidfd)
        return os.read(read, 10000).decode()

    try:
        assert f"0::{cgroups.own_paths()['']}".rstrip("/") + f"/{place.name}\n" in children.in_child(
            work, str(place)
        )
    finally:
        place.rmdir()


@limits_are_there
def test_a_group_with_other_processes_in_it_is_left_as_it_was() -> None:
    """Version 2 divides no group that has processes of its own: the attempt leaves neither a group nor us in one."""
    if facts()["cgroup_version"] != 2:
        pytest.skip("the controllers are not with cgroup v2 here")

    def attempt() -> tuple[str, list[str]]:
        tree = next(mounted for mounted in cgroups.mounts() if mounted.version == 2)
        place = cgroups.below_mount(tree, cgroups.own_paths()[""]).parent / f"{state.PREFIX}test"
        place.mkdir()
        code = "from labkernel.linux import cgroups; cgroups.parent()"
        command = f"echo $$ > {place}/cgroup.procs && {sys.executable} -c {shlex.quote(code)}"
        variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        try:
            ended = subprocess.run(["sh", "-c", command], env=variables, stderr=subprocess.PIPE, text=True)
            return ended.stderr, [path.name for path in place.iterdir() if path.is_dir()]
        finally:
            cgroups.at({"": str(place)}).remove()  # type: ignore[union-attr]

    said, left = children.in_child(attempt)
    assert "is not ours to divide: other processes are in it" in said
    assert left == []
