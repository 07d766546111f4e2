"""The benchmark measures what it says: each subject really runs, a failure is noticed, the table tells the truth."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers import own_home

PROGRAM = Path(__file__).parent.parent / "bench" / "bench.py"


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    found = importlib.util.spec_from_file_location("bench", PROGRAM)
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    sys.modules["bench"] = module
    found.loader.exec_module(module)
    return module


def test_every_subject_runs(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "bench.json")
    assert (
        bench.main(["--rounds", "2", "--only", "start-to-exit", "--only", "in_child", "--only", "import"])
        == 0
    )
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert all(set(row) == {"benchmark", "subject", "median_ms", "runs"} for row in rows)
    assert all(row["runs"] == 2 for row in rows)
    # The import is told as a difference, which two noisy rounds may well make 0.
    assert all(row["median_ms"] > 0 for row in rows if row["benchmark"] != "import")
    printed = capsys.readouterr().out
    seen = {row["subject"] for row in rows if row["benchmark"] == "start-to-exit"}
    for name in ("labkernel", "labkernel-cli", "crun", "runc", "bwrap", "unshare", "bare-c"):
        assert (name in seen) != (f"left out: {name}: " in printed), f"{name}: {printed}"
    tools = {name for name in ("crun", "runc", "bwrap", "unshare") if bench.find(name)}
    if bench.os.geteuid() == 0:
        assert tools <= seen, printed
    if shutil.which("cc"):
        assert "bare-c" in seen, printed


def test_a_failure_is_noticed(bench: ModuleType) -> None:
    with bench.Runner() as runner:
        assert runner.start([shutil.which("true")]) > 0
        with pytest.raises(bench.Failed, match="exit status 1"):
            runner.start([shutil.which("false")])
        with pytest.raises(bench.Failed, match="could not be started"):
            runner.start(["/no/such/program"])


def test_a_subject_that_does_not_work_here_is_left_out_by_name(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> float:
        raise bench.Failed("crun run x: exit status 1")

    rows = bench.take_turns("start-to-exit", {"labkernel": lambda: 2.0, "crun": broken}, 3)
    assert [(row.subject, row.runs) for row in rows] == [("labkernel", 3)]
    assert "left out: crun: crun run x: exit status 1" in capsys.readouterr().out
    with pytest.raises(bench.Failed):
        bench.take_turns("start-to-exit", {"labkernel": broken}, 3)


def test_the_table_says_whether_the_aims_are_met(bench: ModuleType) -> None:
    medians = {"labkernel": 5.0, "crun": 11.0, "bwrap": 4.0}
    rows = [bench.Row("start-to-exit", name, ms, 25) for name, ms in medians.items()]
    rows += [bench.Row("in_child", "labkernel", 12.0, 25), bench.Row("import", "labkernel", 9.0, 25)]
    lines = bench.table(rows).splitlines()
    (crun,), (bwrap,) = ([line for line in lines if name in line] for name in ("crun", "bwrap"))
    assert "0.45, aim 0.5: met" in crun and "1.25, aim 1: MISSED" in bwrap
    assert any("cell's child" in line and "aim 10: MISSED" in line for line in lines)
    assert any("import" in line and "aim 50: met" in line for line in lines)


def test_packing_is_compared_with_tar(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "bench.json")
    monkeypatch.setattr(bench, "TREE", 5 << 20)
    assert bench.main(["--rounds", "1", "--only", "pack"]) == 0
    found = {(row["benchmark"], row["subject"]) for row in json.loads((tmp_path / "bench.json").read_text())}
    assert {("pack", "labkernel"), ("unpack", "labkernel"), ("memory, MiB", "unpack 250MB")} <= found
    if bench.find("zstd"):
        assert {("pack", "tar"), ("unpack", "tar")} <= found
    printed = capsys.readouterr().out
    assert "aim 1.3" in printed and "memory to pack 250 MB" in printed
