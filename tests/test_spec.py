"""Options: what they mean in the kernel's units, and that nonsense is refused before anything is made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labkernel import children, spec
from labkernel.container import Container
from labkernel.linux.cgroups import Limits
from labkernel.spec import BadOption, Process, Volume, human, make_limits, parse_size
from tests.helpers import assert_nothing_left, own_home, snapshot

CORES = os.cpu_count() or 1


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096), (4096, 4096), ("1k", 1024), ("64M", 64 << 20), ("64m", 64 << 20), ("1.5g", 3 << 29),
        ("1GiB", 1 << 30), ("1gb", 1 << 30), ("1T", 1 << 40), (" 5b ", 5), ("0", 0), ("0.5K", 512),
    ],
)  # fmt: skip
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text, "--memory") == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-1",
        "-64M",
        "64X",
        "M",
        "64 M B",
        "1e9",
        "nan",
        "inf",
        "0x10",
        "1,5G",
        None,
        [],
        1.5,
        "1.2.3",
    ],
)
def test_sizes_that_are_none(text: Any) -> None:
    if text == 1.5:  # a fraction of a byte: as the text "1.5" it is rounded down
        assert parse_size(text, "--memory") == 1
        return
    with pytest.raises(BadOption, match="--memory"):
        parse_size(text, "--memory")


def test_the_range_is_named_with_the_value() -> None:
    with pytest.raises(BadOption, match=r"--memory '5M': .* from 6M to 1G \(what this machine has\)"):
        parse_size("5M", "--memory", 6 << 20, 1 << 30)
    with pytest.raises(BadOption, match=r"--memory '2G'"):
        parse_size("2G", "--memory", 6 << 20, 1 << 30)
    assert parse_size("6M", "--memory", 6 << 20, 1 << 30) == 6 << 20
    assert parse_size("1G", "--memory", 6 << 20, 1 << 30) == 1 << 30


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"),
        (1023, "1023"),
        (1024, "1K"),
        (64 << 20, "64M"),
        (3 << 29, "1.5G"),
        (1 << 50, "1024T"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert human(size) == text


@pytest.mark.parametrize("size", [1, 1 << 10, 6 << 20, 64 << 20, 1 << 30, 5 << 40])
def test_sizes_for_people_can_be_read_back(size: int) -> None:
    assert parse_size(human(size), "--memory") == size


# ---------------------------------------------------------------------- limits


def test_limits_in_the_kernels_units() -> None:
    limits = make_limits(
        memory="64M", memory_reservation="32M", memory_swap="96M", cpus="0.5", cpu_weight=50, cpuset_cpus="0",
        pids_limit=32,
    )  # fmt: skip
    assert limits == Limits(64 << 20, 32 << 20, 32 << 20, 0.5, 50, "0", 32)
    assert make_limits() == Limits()
    assert Limits().given() == {}
    assert set(limits.given()) == {
        "memory",
        "memory_high",
        "memory_swap",
        "cpus",
        "cpu_weight",
        "cpuset_cpus",
        "pids",
    }


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"memory": "1"}, "--memory '1'", "6M"),
    ({"memory": 0}, "--memory 0", "6M"),
    ({"memory": -1}, "--memory -1", "6M"),
    ({"memory": "-64M"}, "--memory '-64M'", "6M"),
    ({"memory": "5.9M"}, "--memory '5.9M'", "6M"),
    ({"memory": "100T"}, "--memory '100T'", "what this machine has"),
    ({"memory": "much"}, "--memory 'much'", "bytes"),
    ({"memory": ""}, "--memory ''", "bytes"),
    ({"memory": "64M", "memory_reservation": "65M"}, "--memory-reservation '65M'", "64M"),
    ({"memory_swap": "64M"}, "--memory-swap '64M'", "--memory"),
    ({"memory": "64M", "memory_swap": "32M"}, "--memory-swap '32M'", "64M"),
    ({"cpus": 0}, "--cpus 0", "0.01"),
    ({"cpus": -1}, "--cpus -1", "0.01"),
    ({"cpus": CORES + 1}, f"--cpus {CORES + 1}", f"to {CORES}"),
    ({"cpus": CORES + 0.01}, "--cpus", f"to {CORES}"),
    ({"cpus": 0.001}, "--cpus 0.001", "0.01"),
    ({"cpus": "half"}, "--cpus 'half'", "0.01"),
    ({"cpus": float("nan")}, "--cpus nan", "0.01"),
    ({"cpus": float("inf")}, "--cpus inf", "0.01"),
    ({"cpus": True}, "--cpus True", "0.01"),
    ({"cpus": [1]}, "--cpus [1]", "0.01"),
    ({"cpus": "0,5"}, "--cpus '0,5'", "0.01"),
    ({"cpu_weight": -100}, "--cpu-weight -100", "from 1 to 10000"),
    ({"cpu_weight": "1_00"}, "--cpu-weight '1_00'", "whole"),
    ({"cpu_weight": "١٠٠"}, "--cpu-weight '١٠٠'", "whole"),
    ({"cpu_weight": "9" * 30}, "--cpu-weight '999", "from 1 to 10000"),
    ({"cpu_weight": 0}, "--cpu-weight 0", "from 1 to 10000"),
    ({"cpu_weight": 10001}, "--cpu-weight 10001", "from 1 to 10000"),
    ({"cpu_weight": 1.5}, "--cpu-weight 1.5", "whole"),
    ({"pids_limit": 0}, "--pids-limit 0", "from 2 to"),
    ({"pids_limit": 1}, "--pids-limit 1", "from 2 to"),
    ({"pids_limit": -1}, "--pids-limit -1", "from 2 to"),
    ({"pids_limit": 10**12}, "--pids-limit 1000000000000", "from 2 to"),
    ({"pids_limit": "many"}, "--pids-limit 'many'", "whole"),
    ({"pids_limit": True}, "--pids-limit True", "whole"),
    ({"cpuset_cpus": ""}, "--cpuset-cpus ''", "0"),
    ({"cpuset_cpus": str(CORES)}, f"--cpuset-cpus '{CORES}'", f"to {CORES - 1}"),
    ({"cpuset_cpus": "-1"}, "--cpuset-cpus '-1'", f"to {CORES - 1}"),
    ({"cpuset_cpus": "0-"}, "--cpuset-cpus '0-'", f"to {CORES - 1}"),
    ({"cpuset_cpus": "1-0"}, "--cpuset-cpus '1-0'", f"to {CORES - 1}"),
    ({"cpuset_cpus": "0 1"}, "--cpuset-cpus '0 1'", f"to {CORES - 1}"),
    ({"cpuset_cpus": "²"}, "--cpuset-cpus '²'", f"to {CORES - 1}"),
    ({"cpuset_cpus": "0,"}, "--cpuset-cpus '0,'", f"to {CORES - 1}"),
    ({"cpuset_cpus": "all"}, "--cpuset-cpus 'all'", f"to {CORES - 1}"),
    ({"cpuset_cpus": "0\n"}, "--cpuset-cpus", f"to {CORES - 1}"),
    ({"device_write_bps": {"/dev/null": "-5"}}, "--device-write-bps", "'-5'"),
    ({"device_write_bps": {"/dev/null": "fast"}}, "'fast'", "from 1 or more"),
    ({"device_write_bps": {"/dev/null": "0"}}, "--device-write-bps", "/dev/null"),
    ({"device_read_bps": {"/dev/nosuch": "1M"}}, "--device-read-bps '/dev/nosuch'", "block device"),
]


@pytest.mark.parametrize(
    ("options", "value", "allowed"), REFUSED, ids=lambda case: str(case) if isinstance(case, dict) else ""
)
def test_nonsense_is_refused_with_value_and_range_before_anything_is_made(
    options: dict[str, Any], value: str, allowed: str
) -> None:
    children.close_launcher()
    before = snapshot()
    with pytest.raises(BadOption) as caught:
        Container("python", ["true"], **options)
    assert value in str(caught.value)
    assert allowed in str(caught.value)
    assert_nothing_left(before)


@pytest.mark.parametrize(
    "options",
    [{"memory": "6M"}, {"memory": spec.machine_memory()}, {"cpus": 0.01}, {"cpus": CORES}, {"cpus": str(CORES)},
     {"cpu_weight": 1}, {"cpu_weight": 10000}, {"pids_limit": 2}, {"cpuset_cpus": f"0-{CORES - 1}"}, {"cpuset_cpus": 0},
     {"memory": "64M", "memory_swap": "64M"}, {"memory": "64M", "memory_reservation": "64M"}],
)  # fmt: skip
def test_the_ends_of_the_ranges_are_allowed(options: dict[str, Any]) -> None:
    assert make_limits(**options).given()


def test_every_limit_has_a_controller() -> None:
    from labkernel.linux.cgroups import CONTROLLERS

    assert set(Limits._fields) == CONTROLLERS.keys()


def test_only_what_was_asked_for_is_insisted_on() -> None:
    """Memory and swap together may be given alone: the default of the memory is taken from it."""
    assert Container("python").spec.limits_required == frozenset()
    together = Container("python", memory_swap=spec.machine_memory() + (1 << 30), pids_limit=10).spec
    assert together.limits_required == {"memory_swap", "pids"}


def test_the_defaults_put_a_limit_on_everything() -> None:
    limits = Container("python").spec.limits
    assert limits.memory
    assert limits.cpus
    assert limits.pids


# ---------------------------------------------------------------------- volumes


def test_volumes(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert Volume.parse(f"{tmp_path}:/v") == Volume(str(tmp_path), "/v", False)
    assert Volume.parse(f"{tmp_path}/:/v//w/:ro") == Volume(str(tmp_path), "/v/w", True)
    assert Volume.parse(f"{tmp_path}/link:/v:rw") == Volume(str(tmp_path), "/v", False)


def test_a_volume_may_be_named_from_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Volume.parse(".:/v").source == str(tmp_path)


@pytest.mark.parametrize("target", ["v", "../v", "/a/../../v", "", "/v/.."])
def test_targets_that_are_no_place_inside(target: str, tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="absolute path inside"):
        Volume.parse(f"{tmp_path}:{target}")


def test_a_source_that_is_not_there_is_named() -> None:
    with pytest.raises(BadOption, match="/no/such/place"):
        Volume.parse("/no/such/place:/v")


# ---------------------------------------------------------------------- programs


def test_what_a_record_keeps_of_a_program_survives_json() -> None:
    first = Container(
        "python", ["true"], env={"A": "ä"}, workdir="/tmp", user="1:2", cap_drop=["ALL"]
    ).spec.process
    for one in (first, first._replace(seccomp=None, no_new_privs=False)):
        kept = json.loads(json.dumps(one.as_record()))
        again = Process.from_record(kept, ("ls", "-l"), tty=True)
        assert again == one._replace(command=("ls", "-l"), tty=True, init_too=False)  # init is there already
