"""The table of limit files: what it says is what is written, for the version that this machine does not have too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkernel import in_child, lab, spec
from labkernel.lab.limit_files import UNITS, limit_files
from labkernel.linux.cgroups import CONTROLLERS
from labkernel.spec import BadOption
from tests.helpers import needs_limits, own_home

EVERYTHING = {
    "memory": "64M", "memory_reservation": "32M", "memory_swap": "96M", "cpus": 0.5, "cpu_weight": 200,
    "cpuset_cpus": "0", "pids_limit": 32,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


def test_both_versions_stand_side_by_side() -> None:
    rows = {row.option: (row.version_2, row.version_1) for row in limit_files(**EVERYTHING)}
    assert rows == {
        "memory = 64M": ([("memory.max", "67108864")], [("memory.limit_in_bytes", "67108864")]),
        "memory_reservation = 32M": (
            [("memory.high", "33554432")], [("memory.soft_limit_in_bytes", "33554432")],
        ),
        "memory_swap = 96M": (
            [("memory.swap.max", "33554432")], [("memory.memsw.limit_in_bytes", "100663296")],
        ),
        "cpus = 0.5": (
            [("cpu.max", "50000 100000")], [("cpu.cfs_period_us", "100000"), ("cpu.cfs_quota_us", "50000")],
        ),
        "cpu_weight = 200": ([("cpu.weight", "200")], [("cpu.shares", "2048")]),
        "cpuset_cpus = 0": ([("cpuset.cpus", "0")], [("cpuset.cpus", "0")]),
        "pids_limit = 32": ([("pids.max", "32")], [("pids.max", "32")]),
    }  # fmt: skip


def test_a_rate_for_a_disk(tmp_path: Path) -> None:
    disks = [
        f"/dev/{path.name}" for path in Path("/sys/block").iterdir() if Path(f"/dev/{path.name}").exists()
    ]
    if not disks:
        pytest.skip("there is no block device here")
    status = os.stat(disks[0])
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    read, write = limit_files(device_read_bps={disks[0]: "1M"}, device_write_bps={disks[0]: "2M"})
    assert read.option == f"device_read_bps = {disks[0]} 1M"
    assert read.version_2 == [("io.max", f"{number} rbps=1048576")]
    assert write.version_1 == [("blkio.throttle.write_bps_device", f"{number} 2097152")]
    assert read.version_1[0][0] in UNITS


def test_a_rate_for_any_disk() -> None:
    pids, read, write = limit_files(
        pids_limit=20, device_read_bps={"DISK": "1M"}, device_write_bps={"DISK": "2M"}
    )
    assert (read.option, pids.option) == ("device_read_bps = DISK 1M", "pids_limit = 20")
    assert read.version_2 == [("io.max", "DISK rbps=1048576")]
    assert write.version_1 == [("blkio.throttle.write_bps_device", "DISK 2097152")]
    with pytest.raises(BadOption, match="--device-read-bps"):
        limit_files(device_read_bps={"DISK": "fast"})


def test_as_text_the_arrows_stand_below_each_other() -> None:
    lines = [line for line in repr(limit_files(**EVERYTHING)).splitlines() if "←" in line]
    assert len({line.index("←") for line in lines}) == 1


def test_every_limit_is_in_the_table_and_every_file_has_a_unit() -> None:
    fields = spec.make_limits(**EVERYTHING).given()  # type: ignore[arg-type]
    assert fields.keys() | {"read_bps", "write_bps"} == CONTROLLERS.keys()
    table = limit_files(**EVERYTHING)
    assert len(list(table)) == len(fields)
    names = table.names(2) | table.names(1)
    assert names <= UNITS.keys()
    for name in names:
        assert UNITS[name] in repr(table)
        assert UNITS[name].replace("'", "&#x27;") in table._repr_html_()


def test_nonsense_is_refused_here_too() -> None:
    with pytest.raises(BadOption, match="--cpu-weight 0"):
        limit_files(cpu_weight=0)


def written_and_read() -> list[tuple[str, str, str]]:
    group = lab.group("test")
    limits = spec.make_limits(cpus=0.5, cpu_weight=200, pids_limit=32, memory="64M", memory_reservation="32M")
    return [(Path(path).name, text, Path(path).read_text().strip()) for path, text in group.set(limits)]


def test_it_says_what_the_kernel_gets() -> None:
    needs_limits("cpu", "memory", "pids")
    table = limit_files(cpus=0.5, cpu_weight=200, pids_limit=32, memory="64M", memory_reservation="32M")
    said = [
        sorted(file for row in table for file in row.version_2),
        sorted(file for row in table for file in row.version_1),
    ]
    written = in_child(written_and_read)
    assert sorted((name, text) for name, text, _ in written) in said
    assert all(text == back for _, text, back in written)
