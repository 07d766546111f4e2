"""System calls: what they do, and that a failure says what was tried and why it was refused."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from labkernel.children import in_child
from labkernel.linux import capabilities, namespaces, syscalls
from tests.helpers import own_home

ALL_NEW = sum(namespaces.FLAGS.values())


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


def failure(function: Callable[..., Any], *arguments: Any, powerless: bool = False) -> OSError:
    """The OSError with which a call fails in a child; `powerless`: without any capability."""

    def attempt() -> OSError | None:
        if powerless:
            capabilities.capset(frozenset(), frozenset())
        try:
            function(*arguments)
        except OSError as error:
            return OSError(error.errno, error.strerror)
        return None

    error = in_child(attempt)
    assert error is not None, "it did not fail"
    return error


# ---------------------------------------------------------------------- what an error says


def text_of(error: OSError) -> str:
    return str(error.strerror)


def test_unshare_without_rights() -> None:
    error = failure(syscalls.unshare, syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWNET, powerless=True)
    assert error.errno == errno.EPERM
    assert text_of(error).startswith(
        "unshare(CLONE_NEWUTS|CLONE_NEWNET): EPERM, Operation not permitted: needs"
    )
    assert "CLONE_NEWUSER" in text_of(error)


def test_unshare_with_threads() -> None:
    def work() -> None:
        threading.Thread(target=time.sleep, args=[5], daemon=True).start()
        syscalls.unshare(syscalls.CLONE_NEWUSER)

    error = failure(work)
    assert error.errno == errno.EINVAL
    assert "unshare(CLONE_NEWUSER): EINVAL" in text_of(error)
    assert "several threads" in text_of(error)


@pytest.mark.parametrize("call", ["unshare", "clone3"])
def test_the_limit_of_namespaces(call: str) -> None:
    """The number of namespaces that a user namespace may have is a switch in it; here it is turned to 0."""

    def work() -> None:
        uid = os.geteuid()
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/sys/user/max_uts_namespaces").write_text("0")
        getattr(syscalls, call)(syscalls.CLONE_NEWUTS)

    error = failure(work)
    assert error.errno == errno.ENOSPC
    assert text_of(error).startswith(f"{call}(CLONE_NEWUTS): ENOSPC")
    assert "/proc/sys/user/max_*_namespaces" in text_of(error)


def test_setns_of_another_kind() -> None:
    def work() -> None:
        fd = os.open("/proc/self/ns/uts", os.O_RDONLY)
        syscalls.setns(fd, syscalls.CLONE_NEWNET)

    error = failure(work)
    assert error.errno == errno.EINVAL
    assert re.match(
        r"setns\(fd \d+, CLONE_NEWNET\): EINVAL, Invalid argument: not a namespace of that type",
        text_of(error),
    )


def test_setns_without_rights() -> None:
    def work() -> None:
        capabilities.capset(frozenset(), frozenset())
        syscalls.setns(os.open("/proc/self/ns/uts", os.O_RDONLY), 0)

    error = failure(work)
    assert error.errno == errno.EPERM
    assert "any kind): EPERM" in text_of(error)
    assert "needs CAP_SYS_ADMIN" in text_of(error)


def test_setns_of_nothing() -> None:
    assert failure(syscalls.setns, 999).errno == errno.EBADF
    assert text_of(failure(syscalls.setns, 999)) == "setns(fd 999, any kind): EBADF, Bad file descriptor"


def test_clone3_refused() -> None:
    error = failure(syscalls.clone3, syscalls.CLONE_NEWPID, powerless=True)
    assert error.errno == errno.EPERM
    assert text_of(error).startswith(
        "clone3(CLONE_NEWPID): EPERM, Operation not permitted: needs CAP_SYS_ADMIN"
    )


def test_clone3_with_flags_that_exclude_each_other() -> None:
    CLONE_FS = 0x200
    error = failure(syscalls.clone3, syscalls.CLONE_NEWNS | CLONE_FS)
    assert (error.errno, text_of(error)) == (errno.EINVAL, "clone3(CLONE_NEWNS): EINVAL, Invalid argument")


def in_own_mounts(function: Callable[..., Any], *arguments: Any) -> Any:
    def work() -> Any:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_PRIVATE | syscalls.MS_REC)
        return function(*arguments)

    return work


@pytest.mark.parametrize(
    ("call", "arguments", "number", "words"),
    [
        ("mount", ("none", "/tmp", "nosuchfs"), errno.ENODEV, ["nosuchfs", "on /tmp", "no such file system"]),
        ("mount", ("none", "/no/such", "tmpfs"), errno.ENOENT, ["tmpfs", "on /no/such", "ENOENT"]),
        (
            "mount",
            ("o", "/tmp", "overlay", 0, "moon=1"),
            errno.EINVAL,
            ["overlay, on /tmp, moon=1", "option"],
        ),
        ("mount", ("none", "/tmp", "tmpfs", 0, "size=many"), errno.EINVAL, ["size=many", "option"]),
        ("umount2", ("/etc",), errno.EINVAL, ["/etc", "not a mount point"]),
        ("umount2", ("/tmp",), errno.EBUSY, ["/tmp", "MNT_DETACH"]),
        ("pivot_root", ("directory", "directory"), errno.EINVAL, ["new_root must be a mount point"]),
        ("pivot_root", ("/", "/"), errno.EBUSY, ["/, /", "in use already"]),
        ("open_tree", ("/no/such", 1), errno.ENOENT, ["/no/such"]),
        ("move_mount", (999, "/tmp"), errno.EBADF, ["fd 999, /tmp"]),
        ("mount_setattr", (syscalls.AT_FDCWD, "/etc"), errno.EINVAL, ["/etc"]),
        ("close_range", (9, 3), errno.EINVAL, ["9, 3"]),
        ("prctl", (9999,), errno.EINVAL, ["option 9999"]),
    ],
)
def test_what_was_tried_and_why_it_failed(
    call: str, arguments: tuple[Any, ...], number: int, words: list[str]
) -> None:
    def attempt() -> None:
        syscalls.mount("none", "/tmp", "tmpfs")
        os.mkdir("/tmp/directory")
        os.chdir("/tmp")
        options = {"attr_set": syscalls.MOUNT_ATTR_RDONLY} if call == "mount_setattr" else {}
        getattr(syscalls, call)(*arguments, **options)

    error = failure(in_own_mounts(attempt))
    assert error.errno == number, error
    assert text_of(error).startswith(f"{call}(")
    assert errno.errorcode[number] in text_of(error)
    assert [word for word in words if word not in text_of(error)] == []


def test_mount_and_pivot_root_without_rights() -> None:
    for call, arguments in (("mount", ("none", "/tmp", "tmpfs")), ("pivot_root", ("/", "/tmp"))):
        error = failure(getattr(syscalls, call), *arguments, powerless=True)
        assert error.errno == errno.EPERM
        assert "needs CAP_SYS_ADMIN in the user namespace that owns this mount namespace" in text_of(error)


def test_a_locked_capability_set() -> None:
    error = failure(syscalls.prctl, syscalls.PR_CAPBSET_DROP, 0, powerless=True)
    assert error.errno == errno.EPERM
    assert "prctl(option 24, 0): EPERM" in text_of(error)
    assert "a capability that is not held" in text_of(error)


def test_an_error_without_a_known_cause_still_says_everything() -> None:
    error = syscalls.explained(errno.EXDEV, "rename", "a, b")
    assert (error.errno, error.strerror) == (errno.EXDEV, "rename(a, b): EXDEV, Invalid cross-device link")
    assert syscalls.explained(12345, "x").strerror == "x(): 12345, Unknown error 12345"


def test_errors_are_of_the_kind_that_python_gives_them() -> None:
    assert isinstance(syscalls.explained(errno.EPERM, "mount"), PermissionError)
    assert isinstance(syscalls.explained(errno.ENOENT, "open_tree"), FileNotFoundError)


def test_check_passes_on_what_is_no_failure() -> None:
    ctypes.set_errno(errno.EPERM)
    assert syscalls.check(0, "x") == 0
    assert syscalls.check(7, "x") == 7
    with pytest.raises(PermissionError, match=r"x\(y\)"):
        syscalls.check(-1, "x", "y")


# ---------------------------------------------------------------------- clone3


def test_clone3_without_namespaces() -> None:
    def work() -> tuple[bool, int, bool, list[bool]]:
        read, write = os.pipe()
        mine = namespaces.inodes()
        pid, pidfd = syscalls.clone3(0)
        if pid == 0:
            same = all(namespaces.inodes()[kind] == number for kind, number in mine.items())
            os.write(write, bytes([same, pidfd == -1]))
            os._exit(5)
        same_process = f"Pid:\t{pid}\n" in Path(f"/proc/self/fdinfo/{pidfd}").read_text()
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        assert result
        inheritable = os.get_inheritable(pidfd)
        return same_process, result.si_status, inheritable, list(map(bool, os.read(read, 2)))

    assert in_child(work) == (True, 5, False, [True, True])


def test_clone3_with_every_namespace() -> None:
    """The child is in eight new ones at once: compared by their inode numbers, in the parent and in the child."""

    def work() -> tuple[dict[str, int], dict[str, int], dict[str, int], int]:
        import json

        read, write = os.pipe()
        go_read, go_write = os.pipe()
        pid, _ = syscalls.clone3(ALL_NEW)
        if pid == 0:
            os.write(write, json.dumps([namespaces.inodes(), os.getpid()]).encode())
            os.read(go_read, 1)
            os._exit(0)
        seen_inside, pid_inside = json.loads(os.read(read, 10000))
        seen_outside = namespaces.inodes(pid)
        os.write(go_write, b".")
        os.waitpid(pid, 0)
        return namespaces.inodes(), seen_outside, seen_inside, pid_inside

    mine, outside, inside, pid_inside = in_child(work)
    assert outside.keys() == mine.keys() == set(namespaces.FLAGS)
    assert [kind for kind in mine if mine[kind] == outside[kind]] == []
    assert inside == outside  # /proc is still the old one, and finds "self" there under its old pid
    assert pid_inside == 1


@pytest.mark.parametrize("kind", namespaces.FLAGS)
def test_clone3_with_one_namespace(kind: str) -> None:
    def work() -> list[str]:
        read, write = os.pipe()
        flags = namespaces.FLAGS[kind] | (0 if os.geteuid() == 0 else syscalls.CLONE_NEWUSER)
        pid, _ = syscalls.clone3(flags)
        if pid == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
        shared = namespaces.shared("self", pid)
        os.close(write)
        os.waitpid(pid, 0)
        return [name for name, same in shared.items() if not same]

    assert in_child(work) == [kind]


def test_the_child_of_clone3_is_a_whole_python() -> None:
    """After two hundred of them: threads, random numbers, output and descriptors are in order."""

    def work() -> tuple[int, int]:
        before = len(os.listdir("/proc/self/fd"))
        good = 0
        for _ in range(200):
            pid, pidfd = syscalls.clone3(0)
            if pid == 0:
                thread = threading.Thread(target=lambda: None)
                thread.start()
                thread.join()
                os._exit(threading.active_count())
            good += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
            os.close(pidfd)
        return good, len(os.listdir("/proc/self/fd")) - before

    assert in_child(work, timeout=60) == (200, 0)


def test_the_parent_hears_of_the_end_by_sigchld() -> None:
    def work() -> int:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        pid, _ = syscalls.clone3(0)
        if pid == 0:
            os._exit(0)
        info = signal.sigtimedwait([signal.SIGCHLD], 10)
        os.waitpid(pid, 0)
        return info.si_pid - pid if info else 1

    assert in_child(work) == 0


# ---------------------------------------------------------------------- the other calls


def test_close_range_closes_a_range() -> None:
    def work() -> list[bool]:
        first = os.dup(0)
        fds = [os.dup2(0, number) for number in range(first + 10, first + 15)]
        syscalls.close_range(fds[1], fds[3])
        return [os.path.exists(f"/proc/self/fd/{fd}") for fd in fds]

    assert in_child(work) == [True, False, False, False, True]


def test_domain_name() -> None:
    def work() -> str:
        syscalls.unshare(syscalls.CLONE_NEWUTS)
        syscalls.setdomainname("example")
        return Path("/proc/sys/kernel/domainname").read_text()

    before = Path("/proc/sys/kernel/domainname").read_text()
    assert in_child(work) == "example\n"
    assert Path("/proc/sys/kernel/domainname").read_text() == before


def test_a_detached_tree_is_attached_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    (tmp_path / "from" / "file").write_text("here")

    def work(place: str) -> tuple[str, bool, str]:
        tree = syscalls.open_tree(f"{place}/from", syscalls.OPEN_TREE_CLONE)
        syscalls.mount_setattr(tree, attr_set=syscalls.MOUNT_ATTR_RDONLY)
        syscalls.move_mount(tree, f"{place}/to")
        try:
            Path(f"{place}/to/new").write_text("x")
        except OSError as error:
            name = errno.errorcode[error.errno or 0]
        return Path(f"{place}/to/file").read_text(), os.get_inheritable(tree), name

    assert in_child(in_own_mounts(work, str(tmp_path))) == ("here", False, "EROFS")
    assert list((tmp_path / "to").iterdir()) == []


def test_flag_names() -> None:
    assert syscalls.flag_names(0) == ""
    assert syscalls.flag_names(syscalls.CLONE_NEWUSER) == "CLONE_NEWUSER"
    assert set(syscalls.flag_names(ALL_NEW).split("|")) == {
        f"CLONE_NEW{kind.upper() if kind != 'mnt' else 'NS'}" for kind in namespaces.FLAGS
    }


HEADERS = ("sched.h", "mount.h", "prctl.h", "fcntl.h")


def test_the_constants_are_the_kernels() -> None:
    """Compared with the headers of the C library's kernel, as far as they are here."""
    defined: dict[str, int] = {}
    for name in HEADERS:
        header = Path("/usr/include/linux", name)
        if header.exists():
            for word, text in re.findall(
                r"^#\s*define\s+(\w+)\s+(\(?[\w<< -]+\)?)", header.read_text(), re.M
            ):
                text = re.sub(r"(?<=[0-9a-fA-F])(U?L{0,2})\b", "", text.strip("()"))
                if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)(\s*<<\s*\d+)?", text):
                    defined[word] = eval(re.sub(r"\b0(\d+)", r"0o\1", text))
    if not defined:
        pytest.skip("the kernel's headers are not installed (package linux-libc-dev)")
    ours = {
        name: value
        for name, value in vars(syscalls).items()
        if re.match(r"(CLONE|MS|MNT|PR|MOUNT|AT|OPEN)_", name)
    }
    compared = ours.keys() & defined.keys()
    assert len(compared) > 30
    assert {name: hex(ours[name]) for name in compared if ours[name] != defined[name]} == {}
