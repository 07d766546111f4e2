"""Capabilities, changed in children and tried: each forbidden thing is attempted."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from labkernel.lab.reasons import label, reasons
from labkernel.linux import capabilities, syscalls, users
from labkernel.linux.capabilities import (
    ALL,
    CHOICES,
    DOCKER_DEFAULT,
    Capability,
    FileCapabilities,
    docker_set,
    parse,
    read,
)


def as_root_of_a_namespace(function: Callable[[], Any]) -> Any:
    """Call a function in a child that is root, with all capabilities, of a new user namespace.

    It is in new mount, network, IPC and UTS namespaces too, so that what succeeds does no harm.
    """
    read_end, write_end = os.pipe()
    mapped, go = os.pipe()
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            kinds = (
                syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS
            )
            syscalls.unshare(syscalls.CLONE_NEWUSER | kinds)
            os.write(tell, b".")
            os.read(mapped, 1)
            with contextlib.suppress(PermissionError):
                os.setgroups([])
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            answer = ("value", function())
        except BaseException as error:
            answer = ("error", error)
        with open(write_end, "wb") as back:
            pickle.dump(answer, back)
        os._exit(0)
    os.close(tell)
    assert os.read(ready, 1), "no new user namespace"
    root = os.geteuid() == 0
    users.write_maps(
        pid, (users.IdMap(0, users.ROOT_BASE if root else os.getuid(), users.RANGE if root else 1),)
    )
    os.write(go, b".")
    os.close(write_end)
    with open(read_end, "rb") as there:
        kind, value = pickle.load(there)
    os.waitpid(pid, 0)
    for fd in (mapped, go, ready):
        os.close(fd)
    if kind == "error":
        raise value
    return value


needs_ids = pytest.mark.skipif(
    os.geteuid() != 0, reason="other users inside need a range of ids, and this test takes root's"
)


# ---------------------------------------------------------------------- the list


def test_the_list_is_the_kernels() -> None:
    header = Path("/usr/include/linux/capability.h")
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    assert max(Capability) <= last or last < 40, "this list is newer than the kernel: only before Linux 5.9"
    if not header.exists():
        pytest.skip("no kernel headers on this machine to compare the names with")
    lines = [line.split() for line in header.read_text().splitlines() if line.startswith("#define CAP_")]
    numbers = {line[1]: int(line[2]) for line in lines if len(line) > 2 and line[2].isdigit()}
    assert {member.name: member.value for member in Capability} == numbers


def test_no_capability_of_the_kernel_is_missing_in_the_list() -> None:
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    assert set(range(last + 1)) <= {choice.capability for choice in CHOICES}


def test_every_capability_is_decided_once_with_a_reason_and_a_source() -> None:
    assert [choice.capability for choice in CHOICES] == list(Capability)
    assert all(choice.allows and choice.reason for choice in CHOICES)
    man = re.compile(r"https://man7\.org/linux/man-pages/man([2-8])/\w+\.\1\.html")
    other = re.compile(r"https://(docs\.kernel\.org|lwn\.net|github\.com/moby)/[\w./-]+")
    sources = [choice.source for choice in CHOICES]
    assert [source for source in sources if not man.fullmatch(source) and not other.fullmatch(source)] == []


def test_the_table_says_all_of_it_once() -> None:
    table = reasons()
    assert table == CHOICES
    page, text = table._repr_html_(), repr(table)
    for choice in CHOICES:
        word = "kept" if choice.kept else "dropped"
        assert f'{choice.capability.name}</th><td style="text-align:left"><b>{word}</b>' in page
        assert page.count(f'"{choice.source}"') == [other.source for other in CHOICES].count(choice.source)
        assert f"\n{choice.capability.name[4:]:<18} {word:<8} {choice.allows}\n" in f"\n{text}"
        assert choice.reason in text
    assert reasons(CHOICES[:2]) == CHOICES[:2]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("https://man7.org/linux/man-pages/man2/chown.2.html", "chown(2)"),
        ("https://github.com/moby/moby/issues/41886", "moby #41886"),
        ("https://lwn.net/Articles/486306/", "lwn.net: 486306"),
        ("https://docs.kernel.org/admin-guide/LSM/Smack.html", "docs.kernel.org: Smack"),
    ],
)
def test_a_source_has_a_short_name(source: str, name: str) -> None:
    assert label(source) == name


def test_the_default_is_dockers() -> None:
    expected = """CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP
    NET_BIND_SERVICE SYS_CHROOT KILL AUDIT_WRITE"""
    assert parse(expected.split()) == DOCKER_DEFAULT


def test_names_are_read_with_and_without_their_prefix() -> None:
    assert parse(["NET_RAW", "CAP_CHOWN", "kill", "cap_setuid"]) == {0, 5, 7, 13}
    assert parse(["ALL"]) == ALL
    assert parse([]) == frozenset()
    with pytest.raises(ValueError, match=r"'NET_RAWW'.*NET_RAW,"):
        parse(["NET_RAWW"])
    assert capabilities.names({13, 0, 99}) == ["CAP_CHOWN", "CAP_NET_RAW", "CAP_99"]


@pytest.mark.parametrize(
    ("add", "drop", "expected"),
    [
        ([], [], DOCKER_DEFAULT),
        (["SYS_TIME"], ["KILL"], (DOCKER_DEFAULT | {25}) - {5}),
        (["KILL"], ["KILL"], DOCKER_DEFAULT),
        (["KILL"], ["ALL"], {5}),
        (["ALL"], ["SYS_ADMIN", "KILL"], ALL - {21, 5}),
        ([], ["ALL"], set()),
    ],
)
def test_added_and_dropped_as_docker_does(add: list[str], drop: list[str], expected: set[int]) -> None:
    assert docker_set(add, drop) == expected


def test_all_cannot_be_added_and_dropped() -> None:
    with pytest.raises(ValueError, match="not both"):
        docker_set(["ALL"], ["ALL"])


# ---------------------------------------------------------------------- on files


@pytest.mark.parametrize(
    ("given", "raw"),
    [
        # as `setcap cap_net_bind_service=ep` and `getfattr -e hex` show them
        (FileCapabilities(frozenset({10})), "0100000200040000000000000000000000000000"),
        (FileCapabilities(frozenset({0, 40}), frozenset({32}), effective=False),
         "0000000201000000000000000001000001000000"),
        (FileCapabilities(frozenset({13}), rootid=100000), "010000030020000000000000" + "00" * 8 + "a0860100"),
    ],
)  # fmt: skip
def test_the_attribute_of_a_file_is_packed_as_the_kernel_has_it(given: FileCapabilities, raw: str) -> None:
    assert given.pack().hex() == raw
    assert FileCapabilities.unpack(bytes.fromhex(raw)) == given


@pytest.mark.parametrize("raw", [b"", bytes(19), bytes(20), b"\0\0\0\3" + bytes(16), b"\0\0\0\2" + bytes(20)])
def test_what_is_no_such_attribute_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=capabilities.FILE_ATTRIBUTE):
        FileCapabilities.unpack(raw)


# ---------------------------------------------------------------------- the sets


def test_all_five_sets_after_limiting() -> None:
    def work() -> tuple[capabilities.CapabilitySets, capabilities.CapabilitySets]:
        capabilities.capset(ALL, ALL, inheritable={13})
        capabilities.raise_ambient({13})
        before = read()
        capabilities.limit_to(DOCKER_DEFAULT)
        return before, read()

    before, after = as_root_of_a_namespace(work)
    assert before.permitted == before.effective == before.bounding == frozenset(range(len(before.bounding)))
    assert before.inheritable == before.ambient == {13}
    assert after.permitted == after.effective == after.bounding == DOCKER_DEFAULT
    assert after.inheritable == after.ambient == frozenset()


def test_the_sets_survive_execve_by_root() -> None:
    def work() -> str:
        capabilities.limit_to({5, 13})
        return subprocess.check_output(["cat", "/proc/self/status"], text=True)

    status = dict(line.split(":\t", 1) for line in as_root_of_a_namespace(work).splitlines())
    assert [int(status[f"Cap{name}"], 16) for name in ("Prm", "Eff", "Bnd")] == [1 << 5 | 1 << 13] * 3
    assert int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0


@needs_ids
def test_who_leaves_root_has_nothing_left() -> None:
    def work() -> capabilities.CapabilitySets:
        capabilities.limit_to(DOCKER_DEFAULT)
        os.setresuid(1000, 1000, 1000)
        return read()

    sets = as_root_of_a_namespace(work)
    assert not sets.permitted | sets.effective | sets.ambient
    assert sets.bounding == DOCKER_DEFAULT


def test_another_process_is_read_too() -> None:
    assert read(os.getpid()) == read("self") == read()
    with pytest.raises(FileNotFoundError):
        read(2**22 + 1)


def test_nothing_can_be_added_and_the_message_names_it() -> None:
    def work() -> None:
        capabilities.limit_to({5, 8})
        with pytest.raises(PermissionError, match=r"capset.*CAP_CHOWN"):
            capabilities.capset({0, 5, 8}, {0, 5, 8})
        capabilities.limit_to({5})
        with pytest.raises(PermissionError, match="CAP_SETPCAP"):
            capabilities.drop_bounding(())

    as_root_of_a_namespace(work)


@needs_ids
def test_a_child_with_nothing_may_do_nothing_of_this() -> None:
    def work() -> list[str]:
        capabilities.limit_to(())
        return [name for name, attempt in ATTEMPTS.items() if not refused(attempt)]

    assert as_root_of_a_namespace(work) == []


# ---------------------------------------------------------------------- what each allows


def refused(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except PermissionError:
        return True
    return False


def _temporary(mode: int = 0o600) -> str:
    """A file in a tmpfs of this namespace."""
    path = "/proc/self/fd/"
    fd = os.memfd_create("labkernel-test")
    os.fchmod(fd, mode)
    return f"{path}{fd}"


def chown() -> None:
    os.chown(_temporary(), 1, 1)


def bind_low_port() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 1))


def raw_socket() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()


def packet_socket() -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()


def chroot() -> None:
    os.chroot("/")


def setuid() -> None:
    os.setresuid(1, 1, 1)


def setgid() -> None:
    os.setresgid(1, 1, 1)


def mount() -> None:
    syscalls.mount("none", "/mnt", "tmpfs")


def sethostname() -> None:
    socket.sethostname("other")


def loopback() -> None:
    from labkernel.linux.network import loopback_up

    loopback_up()


def drop_bounding() -> None:
    syscalls.prctl(syscalls.PR_CAPBSET_DROP, Capability.CAP_CHOWN)


ATTEMPTS: dict[str, Callable[[], None]] = {
    "CHOWN": chown, "NET_BIND_SERVICE": bind_low_port, "NET_RAW": raw_socket, "SYS_CHROOT": chroot,
    "SETUID": setuid, "SETGID": setgid, "SYS_ADMIN": mount, "SYS_ADMIN (hostname)": sethostname,
    "NET_ADMIN": loopback, "SETPCAP": drop_bounding, "NET_RAW (packet)": packet_socket,
}  # fmt: skip
"""What needs a capability of the user namespace, so that it can be tried without harm."""


@needs_ids
@pytest.mark.parametrize("name", ATTEMPTS)
def test_it_takes_exactly_this_capability(name: str) -> None:
    capability = parse([name.split()[0]])

    def with_it() -> bool:
        capabilities.capset(capability, capability)
        return refused(ATTEMPTS[name])

    def with_all_others() -> bool:
        capabilities.capset(ALL - capability, ALL - capability)
        return refused(ATTEMPTS[name])

    assert not as_root_of_a_namespace(with_it)
    assert as_root_of_a_namespace(with_all_others)


libc = syscalls.libc
SYS_REBOOT = 169 if os.uname().machine == "x86_64" else 142  # asked for what is harmless: Ctrl-Alt-Del off
ONE = (ctypes.c_ulong * 2)(1, 1)

DENIED_BY_DEFAULT: dict[str, Callable[[], object]] = {
    "mount": mount,
    "sethostname": sethostname,
    "configure the network": loopback,
    "set the clock": lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()),
    "raise a priority": lambda: os.setpriority(os.PRIO_PROCESS, 0, -5),
    "exceed a limit": lambda: syscalls.check(libc.setrlimit(resource.RLIMIT_CORE, ONE), "setrlimit"),
    "read the kernel's log": lambda: syscalls.check(
        libc.klogctl(3, ctypes.create_string_buffer(64), 64), "syslog"
    ),
    "swap": lambda: syscalls.check(libc.swapoff(b"/nowhere"), "swapoff"),
    "reboot": lambda: syscalls.check(libc.syscall(SYS_REBOOT, 0xFEE1DEAD, 672274793, 0, 0), "reboot"),
    "switch accounting on": lambda: syscalls.check(libc.acct(b"/nowhere"), "acct"),
}


@pytest.mark.parametrize("name", DENIED_BY_DEFAULT)
def test_the_default_set_does_not_allow(name: str) -> None:
    def work() -> bool:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        capabilities.limit_to(DOCKER_DEFAULT)
        return refused(DENIED_BY_DEFAULT[name])

    assert as_root_of_a_namespace(work)


@needs_ids
def test_killing_a_process_of_another_user_takes_cap_kill() -> None:
    def attempt(kept: frozenset[int]) -> bool:
        victim = os.fork()
        if victim == 0:
            os.setresuid(1, 1, 1)
            time.sleep(0.5)  # no PR_SET_PDEATHSIG: a parent who may not kill us cannot when it dies either
            os._exit(0)
        time.sleep(0.05)
        capabilities.capset(kept, kept)
        return refused(lambda: os.kill(victim, signal.SIGKILL))

    assert not as_root_of_a_namespace(lambda: attempt(parse(["KILL"])))
    assert as_root_of_a_namespace(lambda: attempt(frozenset(ALL - parse(["KILL"]))))


@needs_ids
def test_a_file_that_nobody_may_read_takes_dac_override() -> None:
    with tempfile.TemporaryDirectory(prefix="labkernel-") as directory:
        os.chmod(directory, 0o755)
        _try_to_read(Path(directory) / "secret")


def _try_to_read(secret: Path) -> None:
    secret.write_text("x")
    os.chown(secret, users.ROOT_BASE + 1, users.ROOT_BASE + 1)
    secret.chmod(0)

    def attempt(kept: frozenset[int]) -> bool:
        capabilities.limit_to(kept)
        return refused(secret.read_text)

    assert not as_root_of_a_namespace(lambda: attempt(DOCKER_DEFAULT))
    assert as_root_of_a_namespace(lambda: attempt(DOCKER_DEFAULT - parse(["DAC_OVERRIDE"])))
