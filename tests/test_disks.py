"""Block devices: which one is below a directory, compared with what the machine's own tools say."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from labkernel.linux import disks


def test_below_a_directory_is_the_disk_that_findmnt_and_lsblk_name() -> None:
    if not (shutil.which("findmnt") and shutil.which("lsblk")):
        pytest.skip("no findmnt or lsblk here to compare with")
    place = Path(__file__).parent
    words = ["findmnt", "--noheadings", "--output", "SOURCE", "--target", str(place)]
    source = (
        subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip().partition("[")[0]
    )
    if not source.startswith("/dev/"):
        assert disks.below(place) is None
        return
    words = ["lsblk", "--noheadings", "--inverse", "--output", "MAJ:MIN,TYPE", source]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split("\n")
    numbers = [line.split()[-2] for line in lines if line.strip()]
    kinds = [line.split()[-1] for line in lines if line.strip()]
    assert disks.below(place) == (numbers[1] if kinds[0] == "part" else numbers[0])


@pytest.mark.parametrize("path", ["/proc", "/sys", "/dev/shm"])
def test_what_lies_in_memory_lies_on_no_disk(path: str) -> None:
    if not os.path.isdir(path):
        pytest.skip(f"no {path} here")
    assert disks.below(path) is None


def test_what_is_not_there_is_told() -> None:
    with pytest.raises(FileNotFoundError, match="nosuch"):
        disks.below("/nosuch")


def test_the_disk_of_each_partition_is_the_device_that_it_is_listed_in() -> None:
    parts = [place.parent for place in Path("/sys/class/block").glob("*/partition")]
    for part in parts:
        number = (part / "dev").read_text().strip()
        assert disks.whole(number) == (part.resolve().parent / "dev").read_text().strip()
    if not parts:
        pytest.skip("no disk here has partitions")


def test_a_whole_disk_is_its_own_answer() -> None:
    for place in Path("/sys/block").iterdir():
        number = (place / "dev").read_text().strip()
        assert disks.whole(number) == number


def test_a_file_system_with_a_number_of_its_own_is_found_by_its_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As with btrfs: st_dev is no device's number, and the list of mounts has the device in another column."""
    drive = next((p for p in Path("/sys/block").iterdir() if Path("/dev", p.name).exists()), None)
    if drive is None:
        pytest.skip("no block device here")
    line = f"30 1 0:99 / /mnt rw - btrfs /dev/{drive.name} rw\n"
    real_stat, real_text = os.stat, Path.read_text

    def stat(path: os.PathLike[str], *args: object, **more: object) -> object:
        found = real_stat(path, *args, **more)  # type: ignore[arg-type]
        return os.stat_result((*found[:2], os.makedev(0, 99), *found[3:10])) if path == tmp_path else found

    def read_text(self: Path, *args: object) -> str:
        return line if str(self) == "/proc/self/mountinfo" else real_text(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert disks.below(tmp_path) == (drive / "dev").read_text().strip()
