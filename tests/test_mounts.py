"""Mounts: each function of `labkernel.linux.mounts` in a mount namespace of its own, and what is seen of it outside."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from labkernel.children import in_child
from labkernel.linux import capabilities, mounts, syscalls
from tests.helpers import own_home


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


@pytest.fixture(autouse=True)
def outside_nothing_changes() -> Iterator[None]:
    before = Path("/proc/self/mountinfo").read_text()
    yield
    assert Path("/proc/self/mountinfo").read_text() == before


def apart(function: Callable[..., Any], *arguments: Any, new: int = 0) -> Any:
    """Call a function in a child with mounts of its own, and an empty tmpfs at /tmp to work in."""

    def work() -> Any:
        syscalls.unshare(syscalls.CLONE_NEWNS | new)
        mounts.set_propagation("/", "private")
        mounts.tmpfs("/tmp")
        os.chdir("/tmp")
        for name in ("a", "b", "c"):
            os.mkdir(name)
        return function(*arguments)

    return in_child(work)


def error_of(function: Callable[..., Any], *arguments: Any) -> str:
    try:
        function(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


# ---------------------------------------------------------------------- propagation


@pytest.mark.parametrize(
    ("kind", "tag"), [("shared", "shared:"), ("private", ""), ("unbindable", "unbindable"), ("slave", "")]
)
def test_the_kind_of_propagation_is_in_mountinfo(kind: str, tag: str) -> None:
    def work() -> list[str]:
        mounts.tmpfs("a")
        mounts.set_propagation("a", kind)
        return [
            word
            for mount in mounts.mountinfo()
            if mount.mount_point == "/tmp/a"
            for word in mount.propagation
        ]

    found = apart(work)
    assert [word.startswith(tag) for word in found] == ([True] if tag else [])


@pytest.mark.parametrize(
    ("kind", "seen"), [("shared", "both"), ("slave", "from the first"), ("private", "neither")]
)
def test_what_two_copies_of_a_tree_see_of_each_other(kind: str, seen: str) -> None:
    def work() -> tuple[bool, bool]:
        mounts.tmpfs("a")
        for name in ("a/one", "a/two"):
            os.mkdir(name)
        mounts.set_propagation("a", "shared")
        mounts.bind("a", "b")
        mounts.set_propagation("b", kind)
        mounts.tmpfs("a/one")
        mounts.tmpfs("b/two")
        points = [mount.mount_point for mount in mounts.mountinfo()]
        return "/tmp/b/one" in points, "/tmp/a/two" in points

    assert (
        apart(work)
        == {"both": (True, True), "from the first": (True, False), "neither": (False, False)}[seen]
    )


def test_unbindable_cannot_be_bound() -> None:
    def work() -> str:
        mounts.tmpfs("a")
        mounts.set_propagation("a", "unbindable")
        return error_of(mounts.bind, "a", "b")

    assert apart(work) == "EINVAL"


def test_a_kind_that_is_none() -> None:
    with pytest.raises(KeyError, match="public"):
        mounts.set_propagation("/", "public")


# ---------------------------------------------------------------------- bind, tmpfs


def test_bind_shows_the_same_files() -> None:
    def work() -> tuple[str, bool]:
        mounts.bind("a", "b")
        Path("b/file").write_text("x")
        return Path("a/file").read_text(), os.stat("a").st_ino == os.stat("b").st_ino

    assert apart(work) == ("x", True)


def test_bind_read_only_is_so_on_one_side() -> None:
    def work() -> tuple[str, str]:
        mounts.bind("a", "b", read_only=True)
        return error_of(Path("b/file").write_text, "x"), error_of(Path("a/file").write_text, "x")

    assert apart(work) == ("EROFS", "done")


@pytest.mark.parametrize(("recursive", "below"), [(False, "not there"), (True, "EROFS")])
def test_mounts_below_a_read_only_bind(recursive: bool, below: str) -> None:
    """They are left out, or read-only as well; never left writable."""

    def work() -> tuple[str, str]:
        os.mkdir("a/below")
        mounts.tmpfs("a/below")
        Path("a/below/file").write_text("x")
        mounts.bind("a", "b", recursive=recursive, read_only=True)
        seen = (
            error_of(Path("b/below/new").write_text, "x") if os.path.exists("b/below/file") else "not there"
        )
        return seen, error_of(Path("a/below/new").write_text, "x")

    assert apart(work) == (below, "done")


def test_a_file_on_a_file() -> None:
    def work() -> str:
        Path("one").write_text("1")
        Path("two").write_text("2")
        mounts.bind("one", "two")
        return Path("two").read_text()

    assert apart(work) == "1"


def test_tmpfs_has_size_mode_and_flags() -> None:
    def work() -> tuple[str, int, int, list[str]]:
        mounts.tmpfs("a", mode=0o1777, size=1 << 20)
        too_much = error_of(Path("a/file").write_bytes, bytes(2 << 20))
        options = next(mount.options for mount in mounts.mountinfo() if mount.mount_point == "/tmp/a")
        return too_much, stat.S_IMODE(os.stat("a").st_mode), os.path.getsize("a/file"), list(options)

    too_much, mode, size, options = apart(work)
    assert (too_much, mode, size) == ("ENOSPC", 0o1777, 1 << 20)
    assert {"nosuid", "nodev"} <= set(options)


# ---------------------------------------------------------------------- proc, sys


def test_proc_shows_the_pid_namespace_that_one_is_in() -> None:
    def work() -> list[str]:
        read, write = os.pipe()
        pid, _ = syscalls.clone3(syscalls.CLONE_NEWPID)
        if pid == 0:
            mounts.proc("/proc")
            os.write(write, " ".join(name for name in os.listdir("/proc") if name.isdigit()).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        return os.read(read, 1000).decode().split()

    assert apart(work) == ["1"]


def test_sys_shows_the_network_namespace_and_is_read_only() -> None:
    def work() -> tuple[list[str], str]:
        mounts.sysfs("a")
        return os.listdir("a/class/net"), error_of(Path("a/class/net/lo/mtu").write_text, "1500")

    names, answer = apart(work, new=syscalls.CLONE_NEWNET)
    assert "lo" in names
    assert "eth0" not in names
    assert answer == "EROFS"


# ---------------------------------------------------------------------- overlay


def layers(work: Callable[[], Any]) -> Any:
    """`work` in a directory with an overlay at "c", of lower "low/one" over "low/two", and upper "up"."""

    def prepare() -> Any:
        for name in ("low/one", "low/two", "up", "work"):
            os.makedirs(name)
        Path("low/one/both").write_text("one")
        Path("low/two/both").write_text("two")
        Path("low/two/file").write_text("below")
        os.mkdir("low/two/directory")
        Path("low/two/directory/old").write_text("old")
        mounts.overlay("c", ["low/one", "low/two"], "up", "work")
        return work()

    return apart(prepare)


def test_overlay_the_topmost_wins() -> None:
    assert layers(lambda: (Path("c/both").read_text(), Path("c/file").read_text())) == ("one", "below")


def test_overlay_copies_up_and_leaves_the_lower_alone() -> None:
    def work() -> tuple[str, str, list[str]]:
        with open("c/file", "a") as file:
            file.write(" and above")
        return Path("c/file").read_text(), Path("low/two/file").read_text(), os.listdir("up")

    assert layers(work) == ("below and above", "below", ["file"])


def test_overlay_what_is_deleted_is_still_below() -> None:
    def work() -> tuple[bool, str, bool]:
        os.unlink("c/file")
        status = os.lstat("up/file")
        whiteout = stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
        marked = "user.overlay.whiteout" in os.listxattr("up/file", follow_symlinks=False)
        return os.path.exists("c/file"), Path("low/two/file").read_text(), whiteout or marked

    assert layers(work) == (False, "below", True)


def test_overlay_a_directory_made_anew_is_opaque() -> None:
    def work() -> tuple[list[str], bool]:
        os.unlink("c/directory/old")
        os.rmdir("c/directory")
        os.mkdir("c/directory")
        return os.listdir("c/directory"), "user.overlay.opaque" in os.listxattr("up/directory")

    assert layers(work) == ([], True)


# ---------------------------------------------------------------------- dev


def test_a_minimal_dev_works() -> None:
    def work() -> tuple[Any, ...]:
        mounts.minimal_dev("a")
        nodes = sorted(n for n in os.listdir("a") if stat.S_ISCHR(os.lstat(f"a/{n}").st_mode))
        Path("a/null").write_text("gone")
        master = os.open("a/pts/ptmx", os.O_RDWR | os.O_NOCTTY)
        terminals = sorted(os.listdir("a/pts"))
        os.close(master)
        Path("a/shm/x").write_text("x")
        return (
            nodes, Path("a/null").read_text(), open("a/zero", "rb").read(3), len(open("a/urandom", "rb").read(8)),
            error_of(open("a/full", "w", buffering=1).write, "x\n"), terminals,
            {name: os.readlink(f"a/{name}") for name in ("fd", "stdin", "stdout", "stderr", "ptmx")},
        )  # fmt: skip

    nodes, null, zero, random, full, terminals, links = apart(work, new=syscalls.CLONE_NEWIPC)
    assert nodes == sorted(mounts.DEVICES)
    assert (null, zero, random, full, terminals) == ("", b"\0\0\0", 8, "ENOSPC", ["0", "ptmx"])
    assert links["fd"] == "/proc/self/fd"


# ---------------------------------------------------------------------- hide, close


def test_mask_a_file_and_a_directory_and_nothing() -> None:
    def work() -> tuple[bytes, list[str], str, str]:
        Path("a/file").write_text("secret")
        Path("secret").write_text("secret")
        for path in ("a", "secret", "nosuch"):
            mounts.mask(path)
        return (
            Path("secret").read_bytes(),
            os.listdir("a"),
            error_of(Path("a/x").write_text, "x"),
            str(os.path.exists("nosuch")),
        )

    assert apart(work) == (b"", [], "EROFS", "False")


def test_make_read_only_with_all_below() -> None:
    def work() -> tuple[str, str, str]:
        os.mkdir("a/below")
        Path("a/file").write_text("x")
        mounts.make_read_only("a")
        mounts.make_read_only("nosuch")
        options = next(mount.options for mount in mounts.mountinfo() if mount.mount_point == "/tmp/a")
        return (
            error_of(Path("a/below/x").write_text, "x"),
            error_of(os.unlink, "a/file"),
            str("nosuid" in options),
        )

    assert apart(work) == ("EROFS", "EROFS", "True")


# ---------------------------------------------------------------------- pivot_root


def test_pivot_root_leaves_nothing_of_the_old_root(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")

    def work() -> tuple[list[str], str, bool, int]:
        mounts.tmpfs("a")
        for name in ("proc", "mine"):
            os.mkdir(f"a/{name}")
        mounts.bind("/proc", "a/proc", recursive=True)
        mounts.pivot_root_into("a")
        here = os.getcwd()
        for _ in range(30):
            os.chdir("..")
        escaped = os.path.exists("." + str(secret)) or os.path.exists(secret)
        outside = [
            m for m in mounts.mountinfo() if m.mount_point != "/" and not m.mount_point.startswith("/proc")
        ]
        return sorted(os.listdir("/")), here, escaped, len(outside)

    assert apart(work) == (["mine", "proc"], "/", False, 0)


def test_pivot_root_into_what_is_no_mount_is_told() -> None:
    assert apart(lambda: error_of(mounts.pivot_root_into, "b")) == "EINVAL"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("nothing", ""),
        ("stacked", ""),
        ("no mount point", "new_root is not a mount point"),
        ("put_old elsewhere", "put_old does not lie below new_root"),
        ("a file", "must be directories"),
        ("shared", "is shared"),
        ("shared above", "is shared"),
        ("the root itself", "lies in the mount that is the root now"),
        ("in a chroot", "the root of this process is not a mount point"),
        ("no power", "CAP_SYS_ADMIN"),
    ],
)
def test_what_stands_in_the_way_of_pivot_root(case: str, words: str) -> None:
    """The list and the kernel agree: where the list is empty, and only there, the call goes through."""

    def work() -> tuple[list[str], str]:
        os.mkdir("a/old")
        new_root, put_old = "a", "a/old"
        if case != "no mount point":
            mounts.tmpfs("a")
            os.mkdir("a/old")
        match case:
            case "stacked":
                put_old = "a"
            case "put_old elsewhere":
                mounts.tmpfs("b")
                put_old = "b"
            case "a file":
                Path("a/file").write_text("x")
                put_old = "a/file"
            case "shared":
                mounts.set_propagation("a", "shared")
            case "shared above":
                mounts.set_propagation(".", "shared", recursive=False)
            case "the root itself":
                new_root = put_old = "/"
            case "in a chroot":
                os.mkdir("proc")
                mounts.bind("/proc", "proc", recursive=True)
                mounts.bind("/tmp", "b", recursive=True)
                os.mkdir("c/jail")
                os.mkdir("c/jail/proc")
                mounts.bind("/proc", "c/jail/proc", recursive=True)
                os.mkdir("c/jail/new")
                mounts.tmpfs("c/jail/new")
                os.chroot("c/jail")
                os.chdir("/")
                new_root = put_old = "new"
            case "no power":
                capabilities.capset(frozenset(), frozenset())
        found = mounts.pivot_root_obstacles(new_root, put_old)
        return found, error_of(syscalls.pivot_root, new_root, put_old)

    found, answer = apart(work)
    assert any(words in text for text in found) if words else not found
    assert (answer == "done") == (not found), (found, answer)


def test_the_number_of_a_mount() -> None:
    def work() -> tuple[bool, bool]:
        mounts.tmpfs("a")
        numbers = {mount.mount_point: mount.mount_id for mount in mounts.mountinfo()}
        return mounts.mount_id("a") == numbers["/tmp/a"], mounts.mount_id("b") == numbers["/tmp"]

    assert apart(work) == (True, True)


# ---------------------------------------------------------------------- mountinfo


def test_mountinfo_reads_every_field_and_undoes_the_octal() -> None:
    def work() -> tuple[Any, ...]:
        name = "a b\tc\\d\ne"
        os.mkdir(name)
        mounts.tmpfs(name, size=1 << 20)
        found = next(mount for mount in mounts.mountinfo() if mount.mount_point == f"/tmp/{name}")
        status = os.stat(name)
        device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
        return (
            found.fstype, found.source, found.root, found.device == device,
            "size=1024k" in found.super_options, "rw" in found.options, found.propagation,
            found.parent_id in {mount.mount_id for mount in mounts.mountinfo()},
        )  # fmt: skip

    assert apart(work) == ("tmpfs", "tmpfs", "/", True, True, True, (), True)


def test_mountinfo_of_another_process() -> None:
    assert mounts.mountinfo(os.getpid()) == mounts.mountinfo()
    with pytest.raises(FileNotFoundError):
        mounts.mountinfo(999999999)
