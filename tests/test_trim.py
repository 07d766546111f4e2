"""Trimming: what goes and what stays, what is made, proved and undone, and what is said where it does not work."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labkernel import images, state
from labkernel.container import Container
from labkernel.image import elf, exchange, store, trim
from labkernel.image.closure import closure, merged
from labkernel.image.oci import Layout
from labkernel.image.pack import Compression, pack
from labkernel.image.trim import TrimError
from labkernel.image.unpack import unpack
from labkernel.image.weigh import weigh
from tests.helpers import own_home
from tests.ordinary_user import PYTHON, copy_package, needs_root, ordinary_user

ROOT = Path(__file__).parent.parent
REPORT = """#!/bin/sh
if [ "$1" = Tuesday ]; then cat /app/tuesday; else read -r line < /app/other; echo "$line"; fi
"""
MONDAY, TUESDAY = ["/app/report", "Monday"], ["/app/report", "Tuesday"]


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        for name in ("images", "rootfs"):  # shared with other tests, who count what is in it
            (place / name).unlink()
        yield place


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with a shell, three programs, an application, and what nobody runs."""
    content = closure(["sh", "cat", "grep", "ls"])
    for path, text in {
        "/app/other": "other days\n", "/app/tuesday": "tuesday\n", "/usr/share/doc/x/README": "x" * 5000,
        "/usr/share/doc/x/copyright": "mine\n", "/usr/include/x.h": "x" * 300, "/usr/share/zoneinfo/UTC": "UTC",
        "/var/lib/dpkg/status": "x" * 2000, "/usr/share/locale/de/x.mo": "x", "/opt/big/data": "x" * 100_000,
    }.items():  # fmt: skip
        content.file(path, text.encode(), "a test")
    content.file("/app/report", REPORT.encode(), "a test", 0o755)
    content.directory("/app/empty")
    place = tmp_path_factory.mktemp("original")
    pack(content, place / "tree.tar", compression="none")
    unpack(place / "tree.tar", place / "tree")
    os.link(place / "tree/app/other", place / "tree/opt/second-name")
    (place / "tree/app/report").chmod(0o4755)
    return place / "tree"


@pytest.fixture
def tree(original: Path, tmp_path: Path) -> Path:
    """A copy of our own."""
    pack(original, tmp_path / "t.tar", compression="none")
    unpack(tmp_path / "t.tar", tmp_path / "tree", allow_setuid=True)
    (tmp_path / "t.tar").unlink()
    return tmp_path / "tree"


def labkernel(*words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "labkernel", "trim", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **settings)


def groups(plan: trim.Plan) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for group in plan.groups:
        found.setdefault(group.name, set()).update(group.paths)
    return found


def planned(root: Path, *commands: list[str], **options: Any) -> trim.Plan:
    with trim.studied(str(root), commands or [MONDAY], **options) as study:
        return study.plan


# ---------------------------------------------------------------------- what goes


def test_what_stays_and_what_goes_and_why(tree: Path) -> None:
    plan = planned(tree)
    found = groups(plan)
    assert {"/app/report", "/app/other"} <= found["used"]
    assert found["beside"] == {"/app/tuesday"}  # a Tuesday may need it
    assert "/usr/share/doc/x/copyright" in found["licences"]
    assert "/etc/passwd" in found["base"]
    gone = plan.gone
    assert gone["/usr/share/doc/x/README"] == "documentation"
    assert gone["/usr/include/x.h"] == "building"
    assert gone["/var/lib/dpkg/status"] == "packages"
    assert gone["/usr/share/locale/de/x.mo"] == "languages"
    assert gone["/usr/bin/grep"] == "programs"
    assert gone["/opt/big/data"] == "elsewhere"
    before, after = plan.bytes
    assert before == sum(weight.bytes for weight in weigh(tree))
    assert after == before - sum(group.bytes for group in plan.groups if group.goes)


def test_what_the_kernel_opens_itself_stays(tree: Path) -> None:
    """The interpreter of the ELF file and that of the script, which no call has named."""
    plan = planned(tree, only_observed=True)
    shell = elf.read_elf((tree / "usr/bin/ls").resolve())
    assert shell and shell.interpreter and merged(shell.interpreter) in plan.keep
    assert any(path.endswith(("/dash", "/bash", "/sh", "/busybox")) for path in plan.keep)
    assert "/app/tuesday" in plan.gone


def test_the_libraries_of_what_is_kept_for_another_day_stay(tree: Path) -> None:
    """They were not loaded: only reading the program tells of them."""
    plan = planned(tree, ["sh", "-c", ":"], keep=["/usr/bin/grep"], only_observed=True)
    found = groups(plan)
    assert "/usr/bin/grep" in found["asked for"]
    assert plan.gone["/usr/bin/ls"] == "programs"


def test_two_names_of_a_file_are_one(tree: Path) -> None:
    assert {"/app/other", "/opt/second-name"} <= planned(tree).keep


def test_more_observed_more_kept(tree: Path) -> None:
    assert {"/app/tuesday", "/usr/bin/cat"} <= planned(tree, MONDAY, TUESDAY, only_observed=True).keep


# ---------------------------------------------------------------------- what is made


def test_a_dry_run_makes_nothing(tree: Path) -> None:
    before = sorted(tree.parent.iterdir())
    done = labkernel(str(tree), "--", *MONDAY)
    assert done.returncode == 0, done.stderr
    assert "goes    documentation" in done.stdout and "nothing is changed" in done.stdout
    assert sorted(tree.parent.iterdir()) == before
    rows = json.loads(labkernel(str(tree), "--json", "--list", "--", *MONDAY).stdout)
    assert rows["made"] is None and rows["trimmed_bytes"] < rows["bytes"]
    assert "/opt/big/data" in [path for group in rows["groups"] if group["goes"] for path in group["paths"]]


def test_a_directory(tree: Path) -> None:
    as_it_was = pack(tree, tree.parent / "before.tar")
    done = labkernel(str(tree), "--apply", "--", *MONDAY)
    assert done.returncode == 0, done.stderr
    made = tree.with_name("tree-trimmed")
    assert (made / "app/report").stat().st_mode & 0o7777 == 0o4755
    assert (made / "app/other").samefile(made / "opt/second-name")
    assert (made / "app/empty").is_dir() and (made / "proc").is_dir()
    assert not (made / "usr/share/zoneinfo").exists() and not (made / "usr/bin/grep").exists()
    report = json.loads(tree.with_name("tree-trimmed.json").read_text())
    assert report["commands"] == [MONDAY] and "/usr/bin/grep" in report["gone"]
    assert (
        labkernel(str(tree), "--apply", "--only-observed", "--", *MONDAY).returncode == 0
    )  # once more, with less
    assert not (made / "app/tuesday").exists()
    assert labkernel(str(tree), "--undo").returncode == 0
    assert sorted(path.name for path in tree.parent.iterdir()) == ["before.tar", "tree"]
    assert pack(tree, tree.parent / "after.tar") == as_it_was


@pytest.mark.parametrize(
    ("suffix", "compression", "mark"),
    [(".tar.zst", "zstd", b"\x28\xb5\x2f\xfd"), (".tar.gz", "gzip", b"\x1f\x8b"), (".tar", "none", b"app")],
)
def test_a_tarball(tree: Path, suffix: str, compression: Compression, mark: bytes) -> None:
    tarball = tree.parent / f"x{suffix}"
    pack(tree, tarball, compression=compression)
    with trim.studied(str(tarball), [MONDAY]) as study:
        made = trim.apply(study)
    assert made == tree.parent / f"x-trimmed{suffix}"
    assert made.read_bytes().startswith(mark)
    assert {weight.path for weight in weigh(made)} <= {weight.path for weight in weigh(tarball)}
    assert made.stat().st_size < tarball.stat().st_size
    assert trim.undo(str(tarball)) and not made.exists() and tarball.exists()


def test_an_image(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "x.tar")
    exchange.import_image(tmp_path / "x.tar", "mine")
    with trim.studied("mine", [MONDAY]) as study:
        trim.apply(study)
    image = store.whole("mine-trimmed")
    assert image and image.gzip_bytes and image.bytes == study.plan.bytes[1]
    assert Container("mine-trimmed", MONDAY).run(timeout=30).stdout == b"other days\n"
    with trim.studied("mine", [MONDAY]) as study:
        trim.apply(study)
    assert store.whole("mine-trimmed") == image  # the same bits
    assert trim.undo("mine")
    assert store.whole("mine-trimmed") is None and store.whole("mine")
    assert not list((state.home() / "rootfs").glob("mine-trimmed-*"))
    images.remove("mine")


def test_an_image_is_run_as_it_says(tree: Path, tmp_path: Path) -> None:
    """As by `labkernel run`: observed, and proved; who says something else means that."""
    pack(tree, tmp_path / "x.tar")
    layout = Layout.create(tmp_path / "l")
    settings = {"Env": ["COLOUR=blue"], "WorkingDir": "/app", "User": "7:8"}
    layer = layout.add_layer(tmp_path / "x.tar")
    layout.add_image([layer], settings, created="1980-01-01T00:00:00Z", history=[""], tag="x")
    exchange.import_image(tmp_path / "l", "says")
    script = '[ "$COLOUR $PWD" = "{} /app" ] && read -r line < other && grep -q "^Uid:.{}" /proc/self/status'
    done = labkernel("says", "--apply", "--", "sh", "-c", script.format("blue", 7))
    assert done.returncode == 0, done.stderr
    with trim.studied(
        "says", [["sh", "-c", script.format("red", 0)]], env={"COLOUR": "red"}, user="0"
    ) as study:
        assert "/app/other" in study.plan.keep
    trim.undo("says")
    images.remove("says")


def test_the_copy_of_where_we_are_lies_beside_it(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree / "app")
    assert trim.trimmed_name("..") == trim.trimmed_name("../") == tree.with_name("tree-trimmed")
    before = sorted(tree.rglob("*"))
    with trim.studied("..", [MONDAY]) as study:
        assert trim.apply(study) == tree.with_name("tree-trimmed")
    assert tree.with_name("tree-trimmed").is_dir() and sorted(tree.rglob("*")) == before
    assert trim.undo("..") and [path.name for path in tree.parent.iterdir()] == ["tree"]


def test_an_image_and_a_directory_of_the_same_name(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is the image's, for what is made and for what is undone; with a slash it is the directory's."""
    monkeypatch.chdir(tree.parent)
    pack(tree, Path("x.tar"))
    exchange.import_image(Path("x.tar"), "tree")
    with trim.studied("tree", [MONDAY]) as study:
        trim.apply(study)
    assert store.whole("tree-trimmed") and not Path("tree-trimmed").exists()
    with trim.studied("./tree", [MONDAY]) as study:
        trim.apply(study)
    assert store.whole("tree-trimmed") and Path("tree-trimmed").is_dir()
    assert trim.undo("tree")
    assert store.whole("tree-trimmed") is None and Path("tree-trimmed").is_dir()
    assert trim.undo("./tree") and not Path("tree-trimmed").exists()
    images.remove("tree")


# ---------------------------------------------------------------------- what does not work


def test_the_file_that_is_needed_on_tuesdays(tree: Path) -> None:
    words = ["--only-observed", "--apply", "--proof", shlex.join(TUESDAY)]
    done = labkernel(str(tree), *words, "--", *MONDAY)
    assert done.returncode == 125
    assert "in the trimmed root" in done.stderr and "/usr/bin/cat (group programs)" in done.stderr
    assert not tree.with_name("tree-trimmed").exists()
    kept = labkernel(str(tree), *words, "--keep", "/usr/bin/cat", "--keep", "/app/*", "--", *MONDAY)
    assert kept.returncode == 0, kept.stderr
    assert labkernel(str(tree), *words, "--also", shlex.join(TUESDAY), "--", *MONDAY).returncode == 0


def test_a_name_that_only_the_program_tells(tree: Path) -> None:
    """A directory was listed, and no file was asked for: then what the program says is searched."""
    script = "for f in /app/*; do [ $f = /app/tuesday ] && exit 0; done; echo \"no module named 'tuesday'\" >&2; exit 1"
    with trim.studied(str(tree), [MONDAY], only_observed=True) as study, pytest.raises(TrimError) as caught:
        trim.apply(study, [["sh", "-c", script]])
    assert "/app/tuesday (group beside)" in str(caught.value)


def test_a_program_that_fails_already(tree: Path) -> None:
    with pytest.raises(TrimError, match=r"exit status 2 in the untrimmed root already: .*no such luck"):
        planned(tree, ["sh", "-c", "echo no such luck >&2; exit 2"])
    with pytest.raises(TrimError, match=r"exit status 127 .*cannot run 'nothing'"):
        planned(tree, ["nothing"])


def test_a_program_that_does_not_end(tree: Path) -> None:
    server = ["sh", "-c", "while :; do read -r line < /app/other; done"]
    with pytest.raises(
        TrimError, match="still running after 1 s; for a program that does not end, say --seconds"
    ):
        planned(tree, server, timeout=1)
    with trim.studied(str(tree), [server], enough=0.5, only_observed=True) as study:
        assert trim.apply(study).is_dir()
        assert "/app/tuesday" in study.plan.gone
    trim.undo(str(tree))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/nothing/here", "--", "true"], "neither a directory nor a tarball"),
        (["no-such-image", "--", "true"], "no image 'no-such-image'"),
        (["/", "--", "true"], "the root of the machine itself"),
        (["no-such-image"], "say what has to run in it"),
        (["no-such-image", "--undo"], "nothing to undo"),
        (["/etc/passwd", "--", "true"], "/etc/passwd is neither a directory nor a tarball"),
    ],
)
def test_what_cannot_be_meant(words: list[str], said: str) -> None:
    done = labkernel(*words)
    assert done.returncode == 125
    assert said in done.stderr


def test_what_is_in_the_way_is_left_alone(tree: Path) -> None:
    tree.with_name("tree-trimmed").mkdir()
    with trim.studied(str(tree), [MONDAY]) as study, pytest.raises(FileExistsError, match="is there already"):
        trim.apply(study)
    with pytest.raises(FileNotFoundError, match="not made by trimming"):
        trim.undo(str(tree))
    assert tree.with_name("tree-trimmed").is_dir()


def test_a_report_is_of_one_copy_and_nobody_elses_file_is_one(tree: Path) -> None:
    mine, report = tree.with_name("tree-trimmed.tar.zst"), tree.with_name("tree-trimmed.json")
    mine.write_text("mine")
    with trim.studied(str(tree), [MONDAY]) as study:
        for text in ("mine", '["trimmed"]', "7"):
            report.write_text(text)
            with pytest.raises(FileExistsError, match="is there already, and is no trimmed copy"):
                trim.apply(study)
            assert report.read_text() == text and not tree.with_name("tree-trimmed").exists()
        report.unlink()
        trim.apply(study)
    with pytest.raises(FileNotFoundError, match="not made by trimming"):
        trim.undo(f"{tree}.tar.zst")
    assert mine.read_text() == "mine"
    assert trim.undo(str(tree)) and not report.exists()


def test_a_device_has_no_place_in_an_image(tree: Path) -> None:
    os.mkfifo(tree / "app/pipe")
    with pytest.raises(ValueError, match="neither file, directory nor symbolic link"):
        planned(tree)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_it_is_told_to_end(tree: Path, number: int) -> None:
    command = [sys.executable, "-m", "labkernel", "trim", str(tree), "--", "sh", "-c", "while :; do :; done"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        until = time.monotonic() + 30
        while not list((state.home() / "builds").glob("*/tree")) and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.3)
        running.send_signal(number)
        assert running.wait(30) == 128 + number
    assert not list((state.home() / "builds").glob("*"))
    with contextlib.suppress(FileNotFoundError):
        assert not list(state.containers().glob("*-*"))


@needs_root
def test_an_ordinary_user(tree: Path) -> None:
    with ordinary_user() as user:
        variables = copy_package(user)
        pack(tree, user.home / "x.tar.gz", compression="gzip")
        user.gets(user.home / "x.tar.gz")

        def lab(*words: str) -> str:
            done = user.run(
                PYTHON, "-m", "labkernel", "trim", "x.tar.gz", *words, variables=variables, timeout=180
            )
            assert done.returncode == 0, done.stderr.decode()
            return str(done.stdout.decode())

        assert "x-trimmed.tar.gz is made" in lab("--only-observed", "--apply", "--", *MONDAY)
        paths = {weight.path for weight in weigh(user.home / "x-trimmed.tar.gz")}
        assert "/app/other" in paths and "/usr/bin/grep" not in paths
        lab("--undo")
