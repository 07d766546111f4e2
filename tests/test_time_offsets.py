"""set_time_offsets: two clocks of a time namespace moved, and the kernel's refusals in words."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labkernel.children import in_child
from labkernel.lab.fork import in_fork
from labkernel.linux import capabilities, namespaces, syscalls
from tests.helpers import own_home

CLOCKS = {"realtime": time.CLOCK_REALTIME, "monotonic": time.CLOCK_MONOTONIC, "boottime": time.CLOCK_BOOTTIME}
YEAR = 365 * 86400


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


def read_clocks() -> dict[str, float]:
    return {name: time.clock_gettime(clock) for name, clock in CLOCKS.items()}


def moved(**offsets: float) -> dict[str, float]:
    """By how much each clock is ahead in a namespace with these offsets, in seconds; the wall clock tells when."""

    def work() -> tuple[dict[str, float], dict[str, float]]:
        syscalls.unshare(syscalls.CLONE_NEWTIME)
        namespaces.set_time_offsets(**offsets)
        return read_clocks(), in_fork(read_clocks)

    outside, inside = in_child(work)
    passed = inside["realtime"] - outside["realtime"]
    return {name: inside[name] - outside[name] - passed for name in ("monotonic", "boottime")}


@pytest.mark.parametrize("offset", [0.0, YEAR, 1.5, -1.25, 0.999999999, -0.25])
@pytest.mark.parametrize("clock", ["monotonic", "boottime"])
def test_one_clock_is_moved_and_the_other_is_not(clock: str, offset: float) -> None:
    other = {"monotonic": "boottime", "boottime": "monotonic"}[clock]
    found = moved(**{clock: offset})
    assert found[clock] == pytest.approx(offset, abs=0.01)
    assert found[other] == pytest.approx(0, abs=0.01)


def test_the_file_says_what_was_written() -> None:
    def work() -> list[str]:
        syscalls.unshare(syscalls.CLONE_NEWTIME)
        namespaces.set_time_offsets(monotonic=-1.25, boottime=YEAR)
        return Path("/proc/self/timens_offsets").read_text().split()

    assert in_child(work) == ["monotonic", "-2", "750000000", "boottime", str(YEAR), "0"]


def test_the_uptime_is_the_boot_clock() -> None:
    def work() -> tuple[float, float]:
        syscalls.unshare(syscalls.CLONE_NEWTIME)
        namespaces.set_time_offsets(boottime=YEAR)
        return uptime(), in_fork(uptime)

    outside, inside = in_child(work)
    assert inside - outside == pytest.approx(YEAR, abs=30)


def uptime() -> float:
    return float(Path("/proc/uptime").read_text().split()[0])


def refused(how: str) -> Any:
    """Try what the kernel refuses; the error's number and text."""

    def work() -> tuple[int | None, str]:
        syscalls.unshare(syscalls.CLONE_NEWTIME)
        if how == "too late":
            in_fork(uptime)
        if how == "without power":
            held = capabilities.read().permitted
            capabilities.limit_to(held - {capabilities.Capability.CAP_SYS_TIME})
        with pytest.raises(OSError) as caught:
            namespaces.set_time_offsets(boottime={"below zero": -1e12, "beyond": 1e12}.get(how, 1))
        return caught.value.errno, str(caught.value)

    return in_child(work)


@pytest.mark.parametrize(
    ("how", "name", "words"),
    [
        ("too late", "EACCES", "somebody lives in this time namespace already"),
        ("without power", "EPERM", "CAP_SYS_TIME"),
        ("below zero", "ERANGE", "below zero"),
        ("beyond", "ERANGE", "146 years"),
    ],
)
def test_refusals_are_explained(how: str, name: str, words: str) -> None:
    _, text = refused(how)
    assert f"timens_offsets: {name}, " in text
    assert words in text


def test_it_agrees_with_the_real_unshare() -> None:
    program = shutil.which("unshare")
    if (
        not program
        or "--boottime" not in subprocess.run([program, "--help"], capture_output=True, text=True).stdout
    ):
        pytest.skip("there is no unshare here that knows --boottime")

    def real() -> str:
        command = [program, "--time", "--monotonic", "-5", "--boottime", str(YEAR), "--fork", "cat"]
        done = subprocess.run(
            [*command, "/proc/self/timens_offsets"], capture_output=True, text=True, check=True
        )
        return done.stdout

    def ours() -> str:
        syscalls.unshare(syscalls.CLONE_NEWTIME)
        namespaces.set_time_offsets(monotonic=-5, boottime=YEAR)
        return in_fork(Path("/proc/self/timens_offsets").read_text)

    assert in_child(real) == in_child(ours)
