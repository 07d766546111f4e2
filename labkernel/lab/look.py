"""What a process sees and may touch, read from /proc: the facts behind the table and the picture of the walls."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from labkernel.children import in_child
from labkernel.container import Container
from labkernel.linux import cgroups, namespaces

FALLBACK_DEVICES = frozenset(
    ("tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0")
)
"""Devices that some kernels put into every new network namespace (net.core.fb_tunnels_only_for_init_net)."""


@dataclass(frozen=True)
class Sight:
    """What one process sees and may touch."""

    root: tuple[int, int]
    """Device and inode number of its root directory."""
    hostname: str
    pid: int
    """Its own pid, as it sees it itself: in the innermost of its pid namespaces."""
    processes: int | None
    """How many processes its /proc lists; None where it has no /proc."""
    mounts: tuple[str, ...]
    """Its mount points, sorted."""
    interfaces: tuple[str, ...]
    uid: int
    """Its user id, as it sees it itself."""
    cgroup: str
    """Its /proc/PID/cgroup, as the lab sees it."""
    cgroup_seen: str
    """The same file, as it is seen from its own cgroup namespace."""
    limited: bool
    """Whether its group limits something. Only known where somebody outside of its walls was there to look."""
    capabilities: frozenset[int]
    """The effective set, by number."""
    seccomp: bool
    no_new_privs: bool
    namespaces: dict[str, int]
    """The inode number of each namespace."""


Subject = Container | Sight | int | Callable[..., Any] | None
"""What can be looked at: a container, a pid, a function (it is run in a child), or nothing (a plain child)."""


def look(pid: int | None = None, proc: int | None = None) -> Sight:
    """Look at this process, or at process `pid` of our pid namespace.

    `proc` is a descriptor of a /proc opened before the process locked itself away from it. To see what another
    process sees, its UTS and cgroup namespaces are entered, so with `pid` call this in a child.
    Raises ProcessLookupError, PermissionError.
    """
    fd = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY) if proc is None else proc
    try:
        who = "self" if pid is None else str(pid)
        status = _status(_text(fd, f"{who}/status"))
        root = os.stat(f"{who}/root/", dir_fd=fd)
        seen = Sight(
            root=(root.st_dev, root.st_ino),
            hostname="",
            pid=int(status.get("NSpid", status["Pid"]).split()[-1]),
            processes=_processes(fd, who),
            mounts=tuple(sorted(line.split()[4] for line in _text(fd, f"{who}/mountinfo").splitlines())),
            interfaces=_interfaces(_text(fd, f"{who}/net/dev")),
            uid=os.getuid() if pid is None else _inside_uid(fd, who, int(status["Uid"].split()[0])),
            cgroup=_text(fd, f"{who}/cgroup"),
            cgroup_seen=_text(fd, f"{who}/cgroup"),
            limited=pid is not None and _limited(pid),
            capabilities=_members(int(status["CapEff"], 16)),
            seccomp=status.get("Seccomp", "0") != "0",
            no_new_privs=status.get("NoNewPrivs", "0") != "0",
            namespaces=_namespaces(fd, who),
        )
        if pid is None:
            cgroup, limited = _told_by_witness()
            seen = replace(seen, cgroup=cgroup or seen.cgroup, limited=limited)
        else:
            namespaces.enter(pid, ["uts", "cgroup"])
            seen = replace(seen, cgroup_seen=_text(fd, f"{who}/cgroup"))
        return replace(seen, hostname=os.uname().nodename)
    finally:
        if proc is None:
            os.close(fd)


def look_at(subject: Subject, *arguments: Any) -> Sight:
    """Look at a subject from a child of the launcher; a function is run there first, with these arguments.

    Where the function returns a Sight, because what is to be seen is in a child of its own, that one counts.
    """
    if isinstance(subject, Sight):
        return subject
    if isinstance(subject, Container):
        return in_child(look, program_of(subject))
    if isinstance(subject, int):
        return in_child(look, subject)
    return in_child(_run_and_look, subject, arguments)


def program_of(container: Container) -> int:
    """The pid of a container's program. Its init, pid 1, is closed to looks. Raises ProcessLookupError."""
    if container.pid is None:
        raise ProcessLookupError(f"container {container.name} has not been started")
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == container.pid:
                return int(entry)
    raise ProcessLookupError(f"the program of container {container.name} has ended")


def _run_and_look(function: Callable[..., Any] | None, arguments: tuple[Any, ...]) -> Sight:
    """In the child: keep a way to /proc, run the function, and look at what has become of this process."""
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    _start_witness()
    returned = function(*arguments) if function else None
    return returned if isinstance(returned, Sight) else look(proc=proc)


_witness: socket.socket | None = None
"""In a child that looks at itself: the way to a process that has stayed outside."""


def _start_witness() -> None:
    """Leave a process outside that can tell our cgroup: /proc/PID/cgroup shows what its *reader's* namespace shows.

    It is nobody's child here (it is adopted by the launcher), so that the function may wait for children of its own.
    It ends when the last one ends who could ask it.
    """
    global _witness
    _witness, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    there.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    middle = os.fork()
    if middle == 0:
        try:
            if os.fork() == 0:
                _witness.close()
                _be_witness(there)
        finally:
            os._exit(0)
    there.close()
    os.waitpid(middle, 0)


def _be_witness(asked: socket.socket) -> None:
    """Answer each question with the cgroup of who asks, and whether it limits something.

    The kernel says who that is, in our own pids (man 7 unix).
    """
    while True:
        question, credentials, *_ = asked.recvmsg(1, socket.CMSG_SPACE(12))
        if not question:
            return
        pid = struct.unpack("3i", credentials[0][2])[0]
        with open(f"/proc/{pid}/cgroup", "rb") as file:
            asked.send((b"1" if _limited(pid) else b"0") + file.read())


def _told_by_witness() -> tuple[str, bool]:
    """Our cgroup as seen from outside, and whether it limits something; "" where nobody is there to ask."""
    if _witness is None:
        return "", False
    try:
        _witness.send(b"?")
        answer = _witness.recv(1 << 16).decode()
    except OSError:
        return "", False
    return answer[1:], answer[:1] == "1"


NO_LIMITS = frozenset(("cpu.weight", "cpu.shares", "cpu.cfs_period_us", "cpuset.cpus"))
"""Of a group's files: shares of what there is, the period of a quota, and a list that version 1 always fills."""


def _limited(pid: int) -> bool:
    """Whether the group that a process is in, as we see it, limits something; those around it do not count."""
    with contextlib.suppress(OSError):  # no groups here
        version, paths = cgroups.parent().version, cgroups.own_paths(pid)
        places = {
            name: str(cgroups.below_mount(mounted, paths[name]))
            for mounted in cgroups.mounts()
            if mounted.version == version
            for name in mounted.controllers or ("",)
            if name in paths
        }
        if group := cgroups.at(places):
            written = group.limits_written().items()
            return any(_is_limit(text) for file, text in written if os.path.basename(file) not in NO_LIMITS)
    return False


def _is_limit(text: str) -> bool:
    """Whether a limit file's text is one; version 1 writes -1, or the largest number that fits, where there is none."""
    word = text.split()[0]
    return word not in ("max", "-1") and not (word.isdigit() and int(word) >= 1 << 62)


def _text(proc: int, path: str) -> str:
    with open(os.open(path, os.O_RDONLY, dir_fd=proc), encoding="utf-8", errors="replace") as file:
        return file.read()


def _status(text: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: value.strip() for name, _, value in pairs}


def _processes(proc: int, who: str) -> int | None:
    """How many processes the /proc in the process's own tree lists."""
    try:
        fd = os.open(f"{who}/root/proc", os.O_RDONLY | os.O_DIRECTORY, dir_fd=proc)
    except FileNotFoundError:
        return None
    try:
        return sum(name.isdigit() for name in os.listdir(fd)) or None
    finally:
        os.close(fd)


def _interfaces(text: str) -> tuple[str, ...]:
    names = (line.partition(":")[0].strip() for line in text.splitlines()[2:])
    return tuple(sorted(name for name in names if name not in FALLBACK_DEVICES))


def _inside_uid(proc: int, who: str, uid: int) -> int:
    """Translate a uid as we see it into what the process itself sees (man 7 user_namespaces)."""
    if os.stat(f"{who}/ns/user", dir_fd=proc).st_ino == os.stat("self/ns/user", dir_fd=proc).st_ino:
        return uid
    for line in _text(proc, f"{who}/uid_map").splitlines():
        inside, outside, count = map(int, line.split())
        if outside <= uid < outside + count:
            return inside + uid - outside
    return 65534  # what the kernel shows for an id without a name inside


def _namespaces(proc: int, who: str) -> dict[str, int]:
    found = {}
    for kind in namespaces.FLAGS:
        try:
            found[kind] = os.stat(f"{who}/ns/{kind}", dir_fd=proc).st_ino
        except FileNotFoundError:
            continue
    return found


def _members(mask: int) -> frozenset[int]:
    return frozenset(number for number in range(mask.bit_length()) if mask >> number & 1)
