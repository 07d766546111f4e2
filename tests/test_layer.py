"""Layers: the diff that an overlay keeps, as a tarball, with the marks for what was deleted."""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from labkernel.children import in_child
from labkernel.image.layer import is_opaque, is_whiteout, pack_layer
from labkernel.linux import mounts, syscalls
from tests.helpers import own_home, rootless


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


def changed(place: Path, change: Callable[[], None], data: str = "userxattr") -> Path:
    """Change a tree through an overlay; returns its upper directory."""
    for name in ("upper", "work", "merged", "lower/etc/below", "lower/cache"):
        (place / name).mkdir(parents=True)
    for name in ("etc/passwd", "etc/below/file", "cache/one", "cache/two", "top"):
        (place / "lower" / name).write_text(name)

    def work() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        mounts.set_propagation("/", "private")
        os.chdir(place)
        syscalls.mount(
            "overlay", "merged", "overlay", 0, f"lowerdir=lower,upperdir=upper,workdir=work,{data}"
        )
        os.chdir("merged")
        os.umask(0o022)
        change()

    in_child(work)
    return place / "upper"


def everything() -> None:
    """Change, add, delete, and make anew."""
    Path("etc/passwd").write_text("changed")
    Path("etc/passwd").chmod(0o640)
    Path("top").unlink()
    Path("new").mkdir(0o700)
    Path("new/file").write_bytes(b"new")
    Path("new/link").symlink_to("/etc/passwd")
    os.link("new/file", "new/other")
    Path("etc/below/file").unlink()
    Path("etc/below").rmdir()
    for name in ("cache/one", "cache/two"):
        Path(name).unlink()
    Path("cache").rmdir()
    Path("cache").mkdir()
    Path("cache/fresh").write_text("fresh")


def entries(tarball: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(tarball) as tar:
        return tar.getmembers()


def test_every_kind_of_change(tmp_path: Path) -> None:
    upper = changed(tmp_path, everything)
    in_child(pack_layer, upper, tmp_path / "layer.tar")
    found = entries(tmp_path / "layer.tar")
    assert [entry.name for entry in found] == [
        *(".wh.top", "cache", "etc", "new", "cache/.wh..wh..opq", "cache/fresh"),
        *("etc/.wh.below", "etc/passwd", "new/file", "new/link", "new/other"),
    ]
    by_name = {entry.name: entry for entry in found}
    assert by_name["etc/passwd"].mode == 0o640
    assert by_name["new"].mode == 0o700
    assert (by_name["new/link"].type, by_name["new/link"].linkname) == (tarfile.SYMTYPE, "/etc/passwd")
    assert (by_name["new/other"].type, by_name["new/other"].linkname) == (tarfile.LNKTYPE, "new/file")
    assert all(entry.size == 0 and entry.isreg() for name, entry in by_name.items() if ".wh." in name)
    assert not any(entry.isdev() for entry in found)


def test_twice_the_same_bits(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        upper = changed(tmp_path / name, everything)
        digests.append(in_child(pack_layer, upper, tmp_path / f"{name}.tar"))
        os.utime(upper / "new/file")
    assert digests[0] == digests[1]
    assert digests[0].startswith("sha256:")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


def test_a_layer_without_changes_is_empty(tmp_path: Path) -> None:
    upper = changed(tmp_path, lambda: None)
    pack_layer(upper, tmp_path / "layer.tar")
    assert entries(tmp_path / "layer.tar") == []


def test_what_is_a_whiteout(tmp_path: Path) -> None:
    in_child(os.mknod, tmp_path / "gone", stat.S_IFCHR, os.makedev(0, 0))
    (tmp_path / ".wh.gone").touch()
    (tmp_path / "link").symlink_to("gone")
    assert {path.name for path in tmp_path.iterdir() if is_whiteout(path)} == {"gone"}
    assert not is_whiteout(Path("/dev/null"))


@pytest.mark.skipif(rootless(), reason="trusted attributes are for root of the machine")
def test_the_mark_that_root_of_the_machine_gets(tmp_path: Path) -> None:
    """Without "userxattr" the mark is in the other name space of attributes."""
    upper = changed(tmp_path, everything, data="redirect_dir=off")
    assert "trusted.overlay.opaque" in os.listxattr(upper / "cache")
    assert is_opaque(upper / "cache")
    assert not is_opaque(upper / "etc")
