"""Namespaces: which are new, which are shared, told by the inode numbers in /proc/PID/ns, from both sides."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkernel import children
from labkernel.children import in_child
from labkernel.container import Container
from labkernel.lab.fork import in_fork, waiting
from labkernel.lab.look import program_of
from labkernel.linux import mounts, namespaces, syscalls
from labkernel.spec import BadOption
from tests.helpers import inside, own_home, rootless

KINDS = tuple(namespaces.FLAGS)
OPTIONAL = tuple(kind for kind in KINDS if kind not in ("mnt", "pid"))


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


def test_the_kernel_has_eight() -> None:
    assert namespaces.supported() == list(KINDS)
    assert len(KINDS) == 8
    here = {name for name in os.listdir("/proc/self/ns") if not name.endswith("_for_children")}
    assert here == set(KINDS)


def test_inodes_are_the_numbers_of_the_links() -> None:
    for kind, number in namespaces.inodes().items():
        assert os.readlink(f"/proc/self/ns/{kind}") == f"{kind}:[{number}]"


# ---------------------------------------------------------------------- a container's


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_new_and_looks_the_same_from_both_sides(kind: str) -> None:
    with Container("python", ["sleep", "60"]) as container:
        assert container.pid
        outside = namespaces.inodes(container.pid)[kind]
        ended = container.exec(["python3", "-c", f"import os; print(os.stat('/proc/self/ns/{kind}').st_ino)"])
    assert int(ended.stdout) == outside
    assert outside != namespaces.inodes()[kind]


@pytest.mark.parametrize("kind", OPTIONAL)
def test_the_one_that_is_left_out_is_shared_and_only_that(kind: str) -> None:
    left = [other for other in KINDS if other != kind]
    with Container("python", ["sleep", "60"], namespaces=left) as container:
        assert container.pid
        shared = namespaces.shared(children.launcher().process.pid, container.pid)
        ended = container.exec(["python3", "-c", f"import os; print(os.stat('/proc/self/ns/{kind}').st_ino)"])
    assert [name for name, same in shared.items() if same] == [kind]
    assert int(ended.stdout) == namespaces.inodes(children.launcher().process.pid)[kind]
    if not rootless():
        assert int(ended.stdout) == namespaces.inodes()[kind]


@pytest.mark.parametrize("kind", ["mnt", "pid"])
def test_two_are_always_needed(kind: str) -> None:
    with pytest.raises(BadOption, match=f"namespaces.*{kind}"):
        Container("python", namespaces=[other for other in KINDS if other != kind])


def test_two_containers_share_none() -> None:
    with Container("python", ["sleep", "60"]) as one, Container("python", ["sleep", "60"]) as other:
        assert one.pid
        assert other.pid
        assert not any(namespaces.shared(one.pid, other.pid).values())


def test_all_processes_of_a_container_share_all() -> None:
    with Container("python", ["python3", "-c", "import time; time.sleep(60)"]) as container:
        assert container.pid
        pids = [
            int(p) for p in Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()
        ]
        assert len(pids) == 1
        assert all(namespaces.shared(container.pid, pids[0]).values())


def test_host_network_shares_the_network_only() -> None:
    with Container("python", ["sleep", "60"], network="host") as container:
        assert container.pid
        shared = namespaces.shared(children.launcher().process.pid, container.pid)
    assert [kind for kind, same in shared.items() if same] == ["net"]


# ---------------------------------------------------------------------- what each one separates


def test_uts_separates_host_names() -> None:
    assert inside("result = socket.gethostname()", hostname="box") == "box"
    assert socket.gethostname() != "box"
    kinds = [kind for kind in KINDS if kind != "uts"]
    assert inside("result = socket.gethostname()", hostname="box", namespaces=kinds) == socket.gethostname()


def test_ipc_separates_shared_memory() -> None:
    key, create = 0x1ABC0000 + os.getpid() % 0xFFFF, 0o1000 | 0o666
    libc = syscalls.libc
    identity = libc.shmget(key, 4096, create)
    assert identity >= 0
    try:
        program = f"result = call('shmget', {key}, 4096, 0)"
        assert inside(program) == "ENOENT"
        kinds = [kind for kind in KINDS if kind not in ("ipc", "user")]
        if not rootless():
            assert inside(program, namespaces=kinds) == "done"
    finally:
        libc.shmctl(identity, 0, None)


def test_pid_separates_processes() -> None:
    assert inside(f"result = [os.getppid(), os.path.exists('/proc/{os.getpid()}/cmdline')]")[0] == 1


def test_net_separates_ports() -> None:
    """The same port twice on this machine, once here and once in a container."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"result = attempt(socket.socket().bind, ('127.0.0.1', {port}))"
        assert inside(program) == "done"
        assert inside(program, network="host") == "EADDRINUSE"


def test_user_separates_ids() -> None:
    program = "result = open('/proc/self/uid_map').read().split()"
    numbers = [int(word) for word in inside(program)]  # three a line; a user's range makes two lines
    base = children.launcher().facts["container_map"]
    assert (numbers[0], numbers[1], sum(numbers[2::3])) == (base["inside"], base["outside"], base["count"])


def test_cgroup_hides_the_place_in_the_tree() -> None:
    """Without it the container reads the name of its group; with it "/"."""
    program = "result = open('/proc/self/cgroup').read()"
    assert "labkernel-" not in inside(program)
    if children.launcher().facts["cgroup_version"] is not None:
        assert "labkernel-" in inside(program, namespaces=[kind for kind in KINDS if kind != "cgroup"])


def test_time_has_offsets_of_its_own() -> None:
    """The file of offsets is there, and zero: a clock of one's own that is not set differs from nothing."""
    offsets = inside("result = open('/proc/self/timens_offsets').read().split()")
    assert offsets == ["monotonic", "0", "0", "boottime", "0", "0"]
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    between = inside("result = time.clock_gettime(time.CLOCK_BOOTTIME)")
    assert before < between < time.clock_gettime(time.CLOCK_BOOTTIME)


def test_mnt_separates_mounts() -> None:
    ours = {line.split()[0] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    theirs = set(inside("result = [line.split()[0] for line in open('/proc/self/mountinfo')]"))
    assert ours & theirs == set()


# ---------------------------------------------------------------------- the functions


def test_flags() -> None:
    assert namespaces.flags([]) == 0
    assert namespaces.flags(["uts", "net"]) == syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWNET
    with pytest.raises(KeyError, match="moon"):
        namespaces.flags(["moon"])


def test_children_of_a_process_may_be_elsewhere_than_itself() -> None:
    def work() -> list[str]:
        syscalls.unshare(syscalls.CLONE_NEWPID | syscalls.CLONE_NEWTIME)
        own, childrens = namespaces.inodes(), namespaces.inodes(children=True)
        return [kind for kind in own if childrens.get(kind) != own[kind]]

    assert in_child(work) == ["pid", "time"]


def test_of_a_process_that_is_not_there() -> None:
    with pytest.raises(ProcessLookupError, match="999999999"):
        namespaces.inodes(999999999)
    with pytest.raises(ProcessLookupError):
        namespaces.shared("self", 999999999)


def test_of_a_process_of_somebody_else() -> None:
    if not rootless():
        pytest.skip("root may look at every process")
    with pytest.raises(PermissionError):
        namespaces.inodes(1)


@pytest.mark.parametrize("kinds", [("uts",), ("uts", "net", "ipc"), KINDS])
def test_enter_a_containers_namespaces(kinds: tuple[str, ...]) -> None:
    if rootless() and "user" not in kinds:
        kinds = ("user", *kinds)

    def work(pid: int) -> list[str]:
        target = namespaces.inodes(pid)
        namespaces.enter(pid, kinds)
        read, write = os.pipe()
        child, _ = syscalls.clone3(0)  # for pid and time, which hold for children only
        if child == 0:
            # In the container's mounts "self" is found by the pid there, in the host's by the pid here.
            own = {kind: os.stat(f"/proc/self/ns/{kind}").st_ino for kind in target}
            os.write(write, " ".join(kind for kind in own if own[kind] == target[kind]).encode())
            os._exit(0)
        os.waitpid(child, 0)
        return os.read(read, 1000).decode().split()

    with Container("python", ["sleep", "60"], hostname="box") as container:
        assert container.pid
        assert set(in_child(work, container.pid)) == set(kinds)


def test_nsenter_leads_to_where_enter_does() -> None:
    """The real tool, from util-linux; it too is run by a child of the lab, which has the power over the container."""

    def by_nsenter(pid: int, kind: str) -> str:
        command = ["nsenter", f"--target={pid}", f"--{kind}", "readlink", f"/proc/self/ns/{kind}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def by_hand(pid: int, kind: str) -> str:
        namespaces.enter(pid, [kind])
        return os.readlink(f"/proc/self/ns/{kind}")

    with Container("python", ["sleep", "60"]) as container:
        pid = program_of(container)
        for kind in ("uts", "ipc", "net", "cgroup"):
            assert in_child(by_nsenter, pid, kind) == in_child(by_hand, pid, kind)


def test_entering_where_one_is_already_does_nothing() -> None:
    assert in_child(lambda: namespaces.enter(os.getpid())) is None


def test_a_namespace_lives_as_long_as_somebody_holds_it() -> None:
    def work() -> tuple[str, int, int]:
        read, write = os.pipe()
        pid, _ = syscalls.clone3(syscalls.CLONE_NEWUTS)
        if pid == 0:
            socket.sethostname("kept")
            os.write(write, b".")
            time.sleep(60)
        os.read(read, 1)
        with namespaces.opened(pid, "uts") as fd:
            number = os.fstat(fd).st_ino
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            syscalls.setns(fd, syscalls.CLONE_NEWUTS)
            return socket.gethostname(), number, namespaces.inodes()["uts"]

    name, then, now = in_child(work)
    assert (name, then) == ("kept", now)


def test_lsns_agrees_with_the_real_one() -> None:
    """In a pid namespace of its own, where nobody comes and goes; each of the two is one more process in there."""
    if not shutil.which("lsns"):
        pytest.skip("there is no lsns (package util-linux)")
    columns = "NS,TYPE,NPROCS,PID"

    def both() -> tuple[str, dict[tuple[str, int], list[int]]]:
        mounts.proc("/proc")
        first = waiting(lambda: syscalls.unshare(syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWNET))
        waiting(lambda: namespaces.enter(first, ["uts"]), lambda: syscalls.unshare(syscalls.CLONE_NEWIPC))
        waiting()
        command = ["lsns", "--noheadings", "--raw", "--output", columns]
        return subprocess.run(command, capture_output=True, text=True).stdout, in_fork(namespaces.lsns)

    def work() -> tuple[str, dict[tuple[str, int], list[int]]]:
        syscalls.unshare(syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNS)
        mounts.set_propagation("/", "private")
        return in_fork(both)

    theirs, ours = in_child(work)
    lines = {(str(inode), kind, str(len(pids)), str(pids[0])) for (kind, inode), pids in ours.items()}
    assert {tuple(line.split()) for line in theirs.splitlines()} == lines
    kinds = [kind for kind, _ in ours]
    assert {kind: kinds.count(kind) for kind in ("uts", "net", "ipc", "user")} == {
        "uts": 2, "net": 2, "ipc": 2, "user": 1,
    }  # fmt: skip


def test_lsns_leaves_out_what_no_process_is_in() -> None:
    def work() -> tuple[bool, bool]:
        pid = waiting(lambda: syscalls.unshare(syscalls.CLONE_NEWUTS))
        with namespaces.opened(pid, "uts") as fd:
            key = ("uts", os.fstat(fd).st_ino)
            before = namespaces.lsns().get(key) == [pid]
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            return before, key in namespaces.lsns()

    assert in_child(work) == (True, False)
