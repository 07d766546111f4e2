"""The monitor, against the kernel's own totals: real containers with known work in them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from labkernel import monitor
from labkernel.container import Container
from labkernel.monitor import COLUMNS, CgroupSource, Monitor, ProcessSource, Recording, Sample
from tests.helpers import emulated, needs_limits, on_a_disk, own_home

SOON = 60.0
"""Seconds: a slow virtual machine must get there too."""


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


@pytest.fixture
def limits() -> None:
    """Skip where no container has a control group."""
    needs_limits()


def python(code: str, **options: object) -> Container:
    return Container("python", ["python3", "-c", code], **options)  # type: ignore[arg-type]


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that is bound to happen."""
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def said(container: Container, word: str) -> bool:
    return word in container.logs().decode().split()


# At its end it says what the kernel has counted for it, and for the container's init, which the group counts too.
TOTALS = """
import resource, time
def total():
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    init = open("/proc/1/stat").read().rpartition(")")[2].split()
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime + (int(init[11]) + int(init[12])) / 100
"""


def test_cpu_time_is_the_kernels_own_total_within_2_percent(limits: None) -> None:
    # os._exit: what Python does at its end would come on top of what it has counted.
    container = python(TOTALS + "import os\nwhile total() < 3: pass\nos._exit(0)").start()
    with Monitor(container, hz=20) as watching:
        assert container.wait(SOON) == 0
    counted = watching.recording.samples[-1].cpu_usec / 1e6
    assert counted == pytest.approx(3, rel=0.02)


def test_memory_peak_is_that_of_the_work_within_2_percent(limits: None) -> None:
    """The same program, once with 100 MiB more: what the two differ by."""
    code = "import sys\nblock = bytearray(b'x') * (int(sys.argv[1]) << 20)"
    peaks = []
    for size in ("0", "100"):
        container = Container("python", ["python3", "-c", code, size], memory="256M").start()
        with Monitor(container, hz=50) as watching:
            assert container.wait(SOON) == 0
        peaks.append(watching.recording.samples[-1].memory_peak_bytes)
    assert peaks[1] - peaks[0] == pytest.approx(100 << 20, rel=0.02)


# The child burns CPU, ends and is waited for, while the monitor looks elsewhere.
SHORT_LIVED = """
import os, sys, time
if os.fork() == 0:
    while time.process_time() < 0.5: pass
    os._exit(0)
os.wait()
print("done", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["cgroup", "processes"])
def test_a_child_that_ends_between_two_samples_is_not_lost(kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "cgroup":
        request.getfixturevalue("limits")
    with python(SHORT_LIVED) as container:
        assert container.pid
        source = ProcessSource(container.pid) if kind == "processes" else monitor.source(container)
        assert isinstance(source, ProcessSource) == (kind == "processes")
        before = source.sample()
        until(lambda: said(container, "done"))
        after = source.sample()
    assert after.pids == 2  # the init and the parent: the child has gone
    assert after.cpu_usec - before.cpu_usec >= 490_000


def test_an_orphan_that_ends_between_two_samples_is_not_lost() -> None:
    """Nobody's child but the init's, which waits for it."""
    code = SHORT_LIVED.replace("() == 0:", "() == 0:\n    if os.fork(): os._exit(0)")
    with python(code) as container:
        assert container.pid
        source = ProcessSource(container.pid)
        until(lambda: said(container, "done"))
        until(lambda: source.sample().cpu_usec >= 490_000 and source.sample().pids == 2)


def test_the_two_sources_agree(limits: None) -> None:
    code = (
        TOTALS
        + "block = bytearray(b'x') * (200 << 20)\nwhile total() < 1: pass\nprint('done', flush=True)\ntime.sleep(600)"
    )
    with python(code) as container:
        assert container.pid
        until(lambda: said(container, "done"))
        group, processes = (
            CgroupSource(container.cgroup, container.pid).sample(),
            ProcessSource(container.pid).sample(),
        )
    assert processes.cpu_usec == pytest.approx(group.cpu_usec, rel=0.05)
    assert processes.memory_anon_bytes == pytest.approx(group.memory_anon_bytes, rel=0.1)
    assert processes.pids == group.pids == 2


def test_processes_and_threads_are_counted(limits: None) -> None:
    code = "import os, threading, time\nfor _ in range(3):\n  if os.fork() == 0: time.sleep(600)\n"
    code += (
        "threading.Thread(target=time.sleep, args=(600,)).start()\nprint('done', flush=True)\ntime.sleep(600)"
    )
    with python(code, pids_limit=20) as container:
        assert container.pid
        until(lambda: said(container, "done"))
        assert monitor.source(container).sample().pids == 6
        assert ProcessSource(container.pid).sample().pids == 6


WRITE = """import os, time
with open('/data/f', 'wb') as f: f.write(os.urandom(8 << 20)); f.flush(); os.fsync(f.fileno())
"""


def test_what_reaches_the_disk_is_counted(limits: None) -> None:
    code = WRITE + "print('done', flush=True); time.sleep(600)"
    with on_a_disk() as place, python(code, volumes=[f"{place}:/data"]) as container:
        assert container.pid
        until(lambda: said(container, "done"))
        group, processes = monitor.source(container).sample(), ProcessSource(container.pid).sample()
    assert processes.io_write_bytes == pytest.approx(8 << 20, rel=0.02)
    assert group.io_write_bytes == pytest.approx(8 << 20, rel=0.05)


def test_what_a_program_that_was_started_later_writes_is_counted(limits: None) -> None:
    """While it runs, and after: by the group with version 2, and where that does not know it, by its processes."""
    code = WRITE + "open('/data/done', 'w')\nwhile not os.path.exists('/data/end'): time.sleep(0.01)"
    nothing = "import time; time.sleep(600)"
    with on_a_disk() as place, python(nothing, volumes=[f"{place}:/data"]) as container:
        source = monitor.source(container)
        other = threading.Thread(target=container.exec, args=(["python3", "-c", code],))
        other.start()
        until((place / "done").exists)
        during = source.sample()
        (place / "end").touch()
        other.join()
        after = source.sample()
        assert not getattr(source, "_started_later", list)()  # nobody is taken for such a one who is none
    assert during.io_write_bytes == pytest.approx(8 << 20, rel=0.05)
    assert after.io_write_bytes == pytest.approx(8 << 20, rel=0.05)


def test_the_containers_network_is_counted_and_not_ours() -> None:
    code = """
import socket, threading, time
listener = socket.create_server(("127.0.0.1", 0))
def receive():
    with listener.accept()[0] as connection:
        while connection.recv(1 << 16): pass
    print("done", flush=True)
threading.Thread(target=receive).start()
with socket.create_connection(listener.getsockname()) as connection:
    connection.sendall(b"x" * (4 << 20))
time.sleep(600)
"""
    with python(code) as container:
        assert container.pid
        until(lambda: said(container, "done"))
        received, sent = monitor.network_bytes(container.pid)
    assert received == sent  # the loopback's
    # Every packet has a header of its own, and a busy machine sends more and smaller ones.
    assert 4 << 20 <= received < 1.25 * (4 << 20)


def test_it_ends_with_the_container_and_has_its_final_counters(limits: None) -> None:
    container = python("block = bytearray(b'x') * (200 << 20)", memory="32M").start()
    watching = Monitor(container, hz=10).start()
    assert container.wait(SOON) == 137
    assert watching.ended.wait(SOON)
    last = watching.recording.samples[-1]
    assert last.oom_kills == 1
    assert last.memory_peak_bytes == 32 << 20
    assert last.memory_limit_bytes == 32 << 20
    assert [count for _, count in watching.recording.events("oom_kills")] == [1]
    table = watching.recording.columns()
    assert all(
        peak >= now for peak, now in zip(table["memory_peak_bytes"], table["memory_bytes"], strict=True)
    )
    assert table["memory_peak_bytes"] == sorted(table["memory_peak_bytes"])
    assert container.final_stats and last.cpu_usec == container.final_stats.cpu_usec
    length = len(watching.recording.samples)
    assert watching.stop() is watching.stop()
    assert len(watching.recording.samples) == length


def test_stopping_leaves_the_container_running_and_no_thread_or_descriptor_behind() -> None:
    with python("import time; time.sleep(600)") as container:
        threads, descriptors = threading.active_count(), psutil.Process().num_fds()
        with Monitor(container, hz=10) as watching:
            assert threading.active_count() == threads + 1
            until(lambda: len(watching.recording.samples) > 2)
        assert threading.active_count() == threads
        assert psutil.Process().num_fds() == descriptors
        assert container.running()


@pytest.mark.parametrize("hz", [20, 50])
def test_samples_come_in_order_and_at_the_rate_asked_for(hz: int) -> None:
    with python("import time; time.sleep(600)") as container, Monitor(container, hz=hz) as watching:
        until(lambda: watching.recording.samples[-1].seconds > 1)
    seconds = watching.recording.columns()["seconds"]
    steps = [after - before for before, after in pairwise(seconds)]
    assert all(step > 0 for step in steps)
    assert len(seconds) <= seconds[-1] * hz + 2  # never more; fewer on a busy machine
    assert emulated() or len(seconds) > seconds[-1] * hz / 2


def test_a_changed_limit_is_in_the_recording(limits: None) -> None:
    container = python("import time; time.sleep(600)", memory="64M", cpus=0.5, pids_limit=30)
    with container, Monitor(container, hz=50) as watching:
        container.set_limits(memory="48M", cpus=0.25, pids_limit=20)
        changed_at = len(watching.recording.samples)
        until(lambda: len(watching.recording.samples) > changed_at + 1)
    first, last = watching.recording.samples[0], watching.recording.samples[-1]
    assert (first.memory_limit_bytes, first.cpus_limit, first.pids_limit) == (64 << 20, 0.5, 30)
    assert (last.memory_limit_bytes, last.cpus_limit, last.pids_limit) == (48 << 20, 0.25, 20)


def test_throttling_is_recorded(limits: None) -> None:
    container = python(
        "import time\nwhile time.process_time() < 0.6: pass", cpus=0.3, cpu_weight=10_000
    ).start()
    with Monitor(container, hz=20) as watching:
        assert container.wait(SOON) == 0
    first, last = watching.recording.samples[0], watching.recording.samples[-1]
    assert last.cpu_throttled_usec > 0
    assert (last.cpu_usec - first.cpu_usec) / 1e6 / (last.seconds - first.seconds) < 0.3 * 1.2


def test_watching_costs_less_than_1_percent_of_a_core() -> None:
    """Ten samples a second. An emulated processor is some ten times slower, and gets more than that."""
    shares = []
    with python("import time; time.sleep(600)") as container:
        for _ in range(3):  # the least disturbed of three counts
            with Monitor(container, hz=10) as watching:
                until(lambda: watching.recording.samples[-1].seconds > 2)
            shares.append(watching.cpu_seconds / watching.recording.samples[-1].seconds)
    assert min(shares) < (0.2 if emulated() else 0.01)


@pytest.mark.parametrize("hz", [0, -1, 51, float("nan")])
def test_a_rate_that_cannot_be_meant_is_refused(hz: float) -> None:
    with pytest.raises(ValueError, match="samples a second, up to 50"):
        Monitor(python("pass"), hz=hz)


def test_only_a_running_container_can_be_watched() -> None:
    container = python("pass")
    with pytest.raises(RuntimeError, match="not been started"):
        Monitor(container).start()
    container.run()
    with pytest.raises(RuntimeError, match="has ended"):
        Monitor(container).start()


def test_a_recording_survives_the_way_through_a_file(tmp_path: Path) -> None:
    recording = Recording(
        "box", [Sample(0.0, memory_limit_bytes=1 << 20), Sample(0.1, cpu_usec=50_000, cpus_limit=0.5, pids=3)]
    )
    recording.to_csv(tmp_path / "box.csv")
    assert Recording.from_csv(tmp_path / "box.csv") == recording
    header = (tmp_path / "box.csv").read_text().splitlines()[0]
    assert header.split(",") == ["container", *COLUMNS]


def test_rates_and_events_are_differences() -> None:
    recording = Recording(
        "", [Sample(0.0), Sample(0.5, cpu_usec=250_000), Sample(1.0, cpu_usec=250_000, oom_kills=2)]
    )
    assert recording.rate("cpu_usec") == [0.0, 500_000.0, 0.0]
    assert recording.events("oom_kills") == [(1.0, 2)]
    assert recording.rate("cpu_usec", over=1) == [0.0, 250_000.0, 250_000.0]
    assert Recording().rate("cpu_usec") == []
