"""Tarballs that are the same bits each time, their weights, and the store that keeps them."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from notebook_tools import ROOT

import labkernel
from labkernel.image.closure import Closure, closure
from labkernel.image.pack import Compression, pack
from labkernel.image.store import build
from labkernel.image.tarball import BadTarball, Limits
from labkernel.image.unpack import unpack
from labkernel.image.weigh import by_directory, weigh

COMPRESSIONS: tuple[Compression, ...] = ("zstd", "gzip", "none")


@pytest.fixture(scope="module")
def shell() -> Closure:
    return closure(["sh", "ls"])


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "sub").mkdir(parents=True)
    (root / "sub-way").write_text("sorts between sub and what is in it, if one is careless")
    (root / "sub/file").write_text("content")
    (root / "sub/hard").hardlink_to(root / "sub/file")
    (root / "link").symlink_to("/nowhere/at/all")
    (root / ("long" * 40)).write_text("a name that needs a pax header")
    Path(os.fsdecode(os.fsencode(root) + b"/not-utf-8-\xff")).write_text("x")
    (root / "sub/file").chmod(0o4755)
    (root / "sub").chmod(0o1750)
    return root


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_digest_is_that_of_the_file(shell: Closure, tmp_path: Path, compression: Compression) -> None:
    digest = pack(shell, tmp_path / "a", compression=compression)
    assert digest == "sha256:" + hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert subprocess.run(["tar", "-tf", tmp_path / "a"], capture_output=True).returncode == 0


# Packs as another user would, from another place: what is imported lazily is imported before the rights go.
ELSEWHERE = """
import os, sys
from pathlib import Path
import zstandard
from labkernel.image.closure import closure
from labkernel.image.pack import pack
shell = closure(["sh", "ls"])
if sys.argv[2:] == ["nobody"]:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
os.umask(0o077)
for compression in ("zstd", "gzip", "none"):
    print(pack(shell, Path(sys.argv[1]) / "x", compression=compression))
"""


def test_the_same_bits_for_everybody_everywhere(shell: Closure, tmp_path: Path) -> None:
    here = [pack(shell, tmp_path / "x", compression=compression) for compression in COMPRESSIONS]
    elsewhere = tmp_path / "another/checkout"
    shutil.copytree(
        Path(labkernel.__file__).parent, elsewhere / "labkernel", ignore=lambda *_: ["__pycache__"]
    )
    output = tmp_path / "output"
    output.mkdir()
    output.chmod(0o777)
    for directory in (tmp_path, *tmp_path.parents[:2]):  # pytest makes them for their owner only
        directory.chmod(0o755)
    environment = os.environ | {"LC_ALL": "C", "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7", "HOME": "/nowhere"}
    environment |= {"PYTHONPATH": str(elsewhere), "PYTHONDONTWRITEBYTECODE": "1"}
    # Root becomes nobody; an ordinary user becomes root, of a user namespace.
    command = [sys.executable, "-c", ELSEWHERE, str(output)]
    command = [*command, "nobody"] if os.geteuid() == 0 else ["unshare", "-Ur", *command]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (here, "")


def test_entries_are_sorted_and_nameless(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "t.tar", compression="none")
    with tarfile.open(tmp_path / "t.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == sorted((m.name for m in members), key=lambda name: name.split("/"))
    assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members} == {(0, 0, "", "", 315532800)}
    assert {m.name: m.linkname for m in members if m.islnk()} == {"sub/hard": "sub/file"}


def test_time_is_that_of_source_date_epoch(
    shell: Closure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1234567890")
    pack(shell, tmp_path / "t.tar", compression="none")
    with tarfile.open(tmp_path / "t.tar") as tar:
        assert {member.mtime for member in tar} == {1234567890}


def test_a_tree_comes_back_as_it_was(tree: Path, tmp_path: Path) -> None:
    digest = pack(tree, tmp_path / "t.tar.zst")
    unpack(tmp_path / "t.tar.zst", tmp_path / "again", allow_setuid=True)
    assert pack(tmp_path / "again", tmp_path / "u.tar.zst") == digest
    again = tmp_path / "again"
    assert (again / "sub/file").stat().st_mode & 0o7777 == 0o4755
    assert (again / "sub").stat().st_mode & 0o7777 == 0o1750
    assert (again / "sub/hard").stat().st_ino == (again / "sub/file").stat().st_ino
    assert sorted(map(str, again.rglob("*"))) == sorted(
        str(again / p.relative_to(tree)) for p in tree.rglob("*")
    )


def test_a_closure_and_its_unpacked_tree_have_the_same_digest(tmp_path: Path) -> None:
    shell = closure(["sh", "ls"])
    shell.file("/usr/lib-x", b"sorts between lib and what is in it, if one is careless", "a trap")
    digest = pack(shell, tmp_path / "t.tar.zst")
    unpack(tmp_path / "t.tar.zst", tmp_path / "root")
    assert pack(tmp_path / "root", tmp_path / "u.tar.zst") == digest


def test_what_fails_leaves_nothing(tree: Path, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "sub/zz"))
    with pytest.raises(ValueError, match="sub/zz: neither file"):
        pack(tree, tmp_path / "t.tar")
    (tree / "sub/zz").unlink()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(tree, tmp_path / "t.tar", progress=interrupt)
    assert set(tmp_path.iterdir()) == before


def test_progress_is_told_to_the_end(shell: Closure, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    pack(shell, tmp_path / "t", progress=lambda *step: told.append(step))
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1] == ("pack", shell.size, shell.size)


MEMORY = """
import sys
from pathlib import Path
from labkernel.image.pack import pack
from labkernel.image.tarball import Limits
from labkernel.image.unpack import unpack
from tests.helpers import peak_memory
tree = Path(sys.argv[1])
def there_and_back(name):
    pack(tree / name, tree / f"{name}.tar.zst")
    unpack(tree / f"{name}.tar.zst", tree / f"{name}.out", limits=Limits(ratio=1 << 20))
there_and_back("small")
before = peak_memory()
there_and_back("big")
print(peak_memory() - before)
"""


def test_memory_does_not_grow_with_the_image(tmp_path: Path) -> None:
    for name, size in (
        ("small", 100 << 20),
        ("big", 400 << 20),
    ):  # with less, zstd's threads do not fill theirs
        (tmp_path / name).mkdir()
        with (tmp_path / name / "file").open("wb") as file:
            file.truncate(size)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 60 << 10  # KiB, not 300 MiB
    for name in ("small.out", "big.out"):
        shutil.rmtree(tmp_path / name)


def test_weights_of_closure_tarball_and_tree_agree(shell: Closure, tmp_path: Path) -> None:
    pack(shell, tmp_path / "t.tar.zst")
    unpack(tmp_path / "t.tar.zst", tmp_path / "root")
    weights = weigh(shell)
    assert weights == weigh(tmp_path / "t.tar.zst") == weigh(tmp_path / "root")
    assert sum(weight.bytes for weight in weights) == shell.size == sum(by_directory(weights, 1).values())
    assert list(by_directory(weights, 1)) == ["/usr", "/etc"]


def test_hard_links_weigh_once(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "t.tar")
    for image in (tree, tmp_path / "t.tar"):
        assert [weight.path for weight in weigh(image) if "sub/" in weight.path] == ["/sub/file"]


def test_no_tarball_weighs_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("this is no tarball" * 100)
    with pytest.raises(BadTarball, match="checksum"):
        weigh(tmp_path / "x")


def test_the_store_builds_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKERNEL_HOME", str(tmp_path / "home"))
    tool = tmp_path / "tool"
    shutil.copy(Path(shutil.which("sh") or ""), tool)
    image = build("tiny", [str(tool)])
    assert weigh(image.tarball) and image.files == len(weigh(image.tarball))
    assert image.bytes == sum(weight.bytes for weight in weigh(image.tarball))
    written = image.tarball.stat().st_mtime_ns
    start = time.perf_counter()
    assert build("tiny", [str(tool)]) == image
    assert time.perf_counter() - start < 0.05
    assert image.tarball.stat().st_mtime_ns == written

    with tool.open("ab") as file:  # another version of the program is installed
        file.write(b"\0")
    assert build("tiny", [str(tool)]).bytes == image.bytes + 1
    image.tarball.write_bytes(b"cut short")
    assert build("tiny", [str(tool)]).tarball.stat().st_size > 100_000
    assert build("tiny", [str(tool), shutil.which("ls") or ""]).bytes > image.bytes + 1
    (tmp_path / "home/images/tiny.json").write_text("{")
    assert build("tiny", [str(tool)]).zstd_bytes > 100_000
    assert sorted(path.name for path in (tmp_path / "home/images").iterdir()) == ["tiny.json", "tiny.tar.zst"]


def test_a_ratio_that_is_honest_is_let_through(shell: Closure, tmp_path: Path) -> None:
    pack(shell, tmp_path / "t.tar.zst")
    assert unpack(tmp_path / "t.tar.zst", tmp_path / "root", limits=Limits(ratio=10)).bytes == shell.size
