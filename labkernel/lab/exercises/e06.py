"""The checks of notebook 06: an overlay of two layers, marks made without mounting, and a diff as a layer tarball."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from labkernel.image.layer import OPAQUE, WHITEOUT
from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.scratch import temporary
from labkernel.lab.watch import watched
from labkernel.linux import mounts, syscalls

Tree = dict[str, tuple[str, Any]]
"""What is at each path: its kind, and its content, target or mode."""


@exercise(
    "06.1", looks_at="what is mounted on merged, what it shows, and where something written there ends up"
)
def stack(answer: Callable[[], Any]) -> str:
    """Two layers, the patch above the base, and changes in a third directory."""
    with _place() as place:
        run_answer(_judge_stack, answer, place)
    return "the patch lies over the base, and what is written ends up in upper and nowhere else."


@exercise("06.2", looks_at="an overlay with your upper directory, mounted over files that you have not seen")
def delete(answer: Callable[[str], Any]) -> str:
    """A whiteout and an opaque directory, made by hand."""
    with _place() as place:
        run_answer(_judge_delete, answer, place)
    return "the secret is gone, the cache is there and empty, and all the rest is as it was."


@exercise(
    "06.3", looks_at="what comes out when your tarball is laid over the files that the container started from"
)
def layer(answer: Callable[[str, str], Any]) -> str:
    """The diff of an overlay as a layer: everything changed, and a mark for everything deleted."""
    with _place() as place:
        count = run_answer(_judge_layer, answer, place)
    return f"{count} entries, and laid over the lower layer they give what the container had."


def _judge_stack(answer: Callable[[], Any], place: Path) -> None:
    words = {name: secrets.token_hex(4) for name in ("base", "patch", "new")}
    _fill(place / "base", {"both": words["base"], "base-only": words["base"]})
    _fill(place / "patch", {"both": words["patch"], "patch-only": words["patch"]})
    before = {name: _tree(place / name) for name in ("base", "patch")}
    _own_mounts()

    def mount() -> None:
        _own_mounts()
        os.chdir(place)
        answer()

    with watched(mount) as go_on:
        pid = go_on()
        merged = Path(f"/proc/{pid}/root{place}/merged")
        if not any(mount.mount_point == f"{place}/merged" for mount in mounts.mountinfo(pid)):
            raise NotYet("nothing is mounted on merged")
        seen = _tree(merged)
        if missing := {"both", "base-only", "patch-only"} - set(seen):
            raise NotYet(f"in merged there is no {' and no '.join(sorted(missing))}")
        if seen["both"] != before["patch"]["both"]:
            raise NotYet("the file that is in both layers should be the one of patch")
        try:
            (merged / "written").write_text(words["new"])
        except OSError as error:
            raise NotYet(f"nothing can be written there: {os.strerror(error.errno or 0)}") from None
        if {name: _tree(place / name) for name in before} != before:
            raise NotYet("what is written into merged ends up in base or patch: they should stay as they are")
        if "written" not in _tree(place / "upper"):
            raise NotYet("what is written into merged does not end up in upper")


def _judge_delete(answer: Callable[[str], Any], place: Path) -> None:
    cached, kept = secrets.token_hex(4), secrets.token_hex(4)
    _fill(
        place / "base",
        {"etc/secret": "x", f"etc/{kept}": "x", f"cache/{cached}": "x", f"cache/d/{cached}": "x"},
    )
    _own_mounts()
    os.chdir(place)
    answer(str(place / "upper"))
    os.chdir(place)
    try:
        mounts.overlay("merged", ["base"], "upper", "work")
    except OSError as error:
        raise NotYet(f"with that upper directory the mount fails: {error.strerror}") from None
    seen = _tree(Path("merged"))
    if "etc/secret" in seen:
        raise NotYet("etc/secret is still there")
    if seen.get("cache", ("", None))[0] != "directory":
        raise NotYet("there is no directory cache any more: it should be there, and empty")
    if any(name.startswith("cache/") for name in seen):
        raise NotYet("there is still something in cache")
    if f"etc/{kept}" not in seen:
        raise NotYet("another file in etc, which should have stayed, is gone")
    if strange := set(seen) - {"etc", "cache", f"etc/{kept}"}:
        raise NotYet(f"{', '.join(sorted(strange))}: that was not there before")


def _judge_layer(answer: Callable[[str, str], Any], place: Path) -> int:
    one, two, three = (secrets.token_hex(4) for _ in range(3))
    old = {f"cache/{one}": "old", f"cache/{two}/x": "old", "etc/passwd": "old", f"etc/{three}": "old"}
    _fill(place / "base", old | {"deep/er/gone": "old", "deep/er/stays": "old", "top": "old"})
    before, layer = _tree(place / "base"), place / "layer.tar"
    with watched(lambda: _live(place, one, three)) as go_on:
        merged = f"/proc/{go_on()}/root{place}/merged"
        wanted = _tree(Path(merged))
        answer(str(place / "upper"), str(layer))
    if not layer.is_file():
        raise NotYet("there is no tarball")
    try:
        with tarfile.open(layer) as tar:
            entries = [(e, tar.extractfile(e) if e.isreg() else None) for e in tar.getmembers()]
            read = [(entry, file.read() if file else b"") for entry, file in entries]
    except tarfile.TarError as error:
        raise NotYet(f"it is no tarball: {error}") from None
    found = _applied(before, read)
    _compare(found, wanted)
    if "deep/er/stays" in (_name(entry) for entry, _ in read):
        raise NotYet("deep/er/stays is in it, which the container never touched: that is the lower layer's")
    return len(read)


def _live(place: Path, one: str, three: str) -> None:
    """What the container does: it changes, adds, deletes, and makes a directory anew."""
    _own_mounts()
    os.chdir(place)
    mounts.overlay("merged", ["base"], "upper", "work")
    os.chdir("merged")
    Path("etc/passwd").write_text("changed")
    Path("etc", three).unlink()
    Path("deep/er/gone").unlink()
    Path("new/er").mkdir(parents=True)
    Path("new/er/file").write_bytes(b"\0new")
    Path("new/er/file").chmod(0o755)
    Path("new/link").symlink_to("er/file")
    Path("top").unlink()
    shutil.rmtree("cache")
    Path("cache").mkdir()
    Path("cache", one).write_text("new, under an old name")


def _applied(below: Tree, entries: list[tuple[tarfile.TarInfo, bytes]]) -> Tree:
    """The tree below with a layer laid over it, by the rules of the OCI image specification (layer.md)."""
    tree = dict(below)
    for name in (_name(entry) for entry, _ in entries):  # whiteouts are about the layers below only
        directory, base = os.path.split(name)
        if base == OPAQUE:
            _forget(tree, directory, itself=False)
        elif base.startswith(WHITEOUT):
            _forget(tree, os.path.join(directory, base.removeprefix(WHITEOUT)), itself=True)
    for entry, content in entries:
        name = _name(entry)
        if name == "." or os.path.basename(name).startswith(WHITEOUT):
            continue
        if name.startswith(("/", "../")):
            raise NotYet(f"an entry leads out of the root file system: {entry.name}")
        if entry.isdev():
            raise NotYet(f"{name} is a device in it: the kernel's mark, which a layer tarball does not use")
        if entry.isdir():
            tree[name] = ("directory", stat.S_IMODE(entry.mode))
        elif entry.issym():
            tree[name] = ("link", entry.linkname)
        elif entry.isreg():
            tree[name] = ("file", (content, stat.S_IMODE(entry.mode)))
        for parent in Path(name).parents:
            tree.setdefault(str(parent), ("directory", 0o755))
    tree.pop(".", None)
    return tree


def _forget(tree: Tree, name: str, *, itself: bool) -> None:
    for path in list(tree):
        if path.startswith(f"{name}/" if name else "") or (itself and path == name):
            del tree[path]


def _compare(found: Tree, wanted: Tree) -> None:
    if more := sorted(set(found) - set(wanted)):
        raise NotYet(f"{more[0]} is there after it, which the container had deleted")
    if less := sorted(set(wanted) - set(found)):
        raise NotYet(f"{less[0]} is not there after it, and the container had it")
    if other := sorted(name for name in wanted if wanted[name] != found[name]):
        raise NotYet(f"{other[0]} is not as the container had it: its content, its kind or its mode")


def _name(entry: tarfile.TarInfo) -> str:
    return os.path.normpath(entry.name)


@contextlib.contextmanager
def _place() -> Iterator[Path]:
    """A directory with empty base, patch, upper, work and merged, where overlay can write."""
    with temporary() as place:
        for name in ("base", "patch", "upper", "work", "merged"):
            (place / name).mkdir()
        yield place


def _fill(directory: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def _tree(root: Path) -> Tree:
    tree: Tree = {}
    for directory, directories, files in os.walk(root):
        for path in (Path(directory, name) for name in (*directories, *files)):
            status, name = path.lstat(), str(path.relative_to(root))
            mode = stat.S_IMODE(status.st_mode)
            if stat.S_ISLNK(status.st_mode):
                tree[name] = ("link", os.readlink(path))
            elif stat.S_ISDIR(status.st_mode):
                tree[name] = ("directory", mode)
            elif stat.S_ISREG(status.st_mode):
                tree[name] = ("file", (path.read_bytes(), mode))
            else:
                tree[name] = ("device", status.st_rdev)
    return tree


def _own_mounts() -> None:
    syscalls.unshare(syscalls.CLONE_NEWNS)
    mounts.set_propagation("/", "private")
