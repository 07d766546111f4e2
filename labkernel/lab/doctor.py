"""What this machine allows, found out by trying: each thing is done once, in a child or a container, and undone.

Versions and settings are read only to explain a "no", never to predict one. Where the answer is no, a finding says
what failed, why, and what to do about it.
"""

from __future__ import annotations

import ctypes
import errno
import html
import mmap
import os
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkernel import children, state
from labkernel.container import Container
from labkernel.lab import calm
from labkernel.lab.group import group
from labkernel.lab.scratch import temporary
from labkernel.linux import disks, landlock, namespaces, syscalls, users
from labkernel.linux.cgroups import Limits

KINDS = tuple(kind for kind in namespaces.FLAGS if kind != "user")
NAMESPACES = tuple(f"namespace:{kind}" for kind in KINDS)
CONTROLLERS = tuple(f"cgroup:{name}" for name in ("cpu", "memory", "pids", "cpuset"))
WITH_FILES = ("overlay", "seccomp", "cgroup", *CONTROLLERS, "network", "publish")
"""What is tried in a directory of the lab's."""
PROBES: dict[str, dict[str, Any]] = {
    "cpu": {"cpus": 0.5},
    "memory": {"memory": "64M"},
    "pids": {"pids_limit": 16},
}
"""The limit that is set to try each controller; the rest follow in `_controllers`."""

DISK = "cgroup:io"
"""Tried only when it is asked for: it takes a disk, and a quarter of a second."""
DISK_RATE, DISK_BLOCK, DISK_BLOCKS = 1 << 20, 1 << 16, 6
"""What is written, directly, to see whether a limit holds: bytes a second, bytes, and how often."""

AS_ROOT = "run the lab as root (sudo), or in the VM that comes with it"
NO_NAMESPACES = "the machine does not let you make user namespaces"
NOTHING_TO_DO = "nothing to do"
PROBE_SECONDS = 10.0


@dataclass(frozen=True)
class Finding:
    """One answer: whether the machine allows something, what was seen, and what to do where it does not."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    optional: bool = False
    """Nothing needs it; the lab shows more where it is there."""


class Findings(list[Finding]):
    """The doctor's answers: a list, which a notebook shows as a table."""

    def __repr__(self) -> str:
        width = max((len(finding.name) for finding in self), default=0)
        lines = []
        for finding in self:
            lines.append(f"{finding.name:<{width}}  {_answer(finding):<3}  {finding.detail}")
            if finding.remedy:
                lines.append(f"{'':<{width}}       -> {finding.remedy}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = []
        for finding in self:
            remedy = f"<br><b>What to do:</b> {html.escape(finding.remedy)}" if finding.remedy else ""
            answer = _answer(finding)
            rows.append(
                f'<tr><th scope="row" style="text-align:left">{html.escape(finding.name)}</th>'
                f"<td>{answer if finding.ok else f'<b>{answer}</b>'}</td>"
                f'<td style="text-align:left">{html.escape(finding.detail)}{remedy}</td></tr>'
            )
        head = "<tr><th>what</th><th>here?</th><th style='text-align:left'>seen by trying</th></tr>"
        return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def examine() -> Findings:
    """Try everything; takes about half a second. Never raises, and leaves nothing behind."""
    found = Findings([_root()])
    try:
        facts = children.launcher().facts
        children.in_child(os.getpid, timeout=PROBE_SECONDS)
    except Exception as error:
        return Findings(
            [*found, *_nothing_can_be_tried(error), _guarded("psi", _psi), _guarded("landlock", _landlock)]
        )
    found.append(Finding("children", True, "a child process can be started, in which a cell's function runs"))
    userns = _guarded("userns", lambda: _user_namespace(facts))
    found += [userns, _guarded("subuid", lambda: _subuid(facts, userns))]
    found += _guarded_list(NAMESPACES, _namespaces, userns)
    try:
        with temporary() as place:
            found += _with_containers(_empty_rootfs(place), facts, userns)
    except OSError as error:
        remedy = "make room there, or let LABKERNEL_HOME name another directory of yours"
        found += [
            Finding(name, False, f"the lab cannot keep files: {_words(error)}", remedy) for name in WITH_FILES
        ]
    found += [_guarded("psi", _psi), _guarded("landlock", _landlock)]
    return found


def _with_containers(rootfs: Path, facts: dict[str, Any], userns: Finding) -> Findings:
    """Try what takes a container, or its network."""
    overlay = _guarded("overlay", lambda: _container("overlay", rootfs, userns))
    found = Findings([overlay, _guarded("seccomp", lambda: _seccomp(rootfs, overlay))])
    found += _guarded_list(["cgroup", *CONTROLLERS], lambda _: _controllers(facts, rootfs, overlay), userns)
    found.append(_guarded("network", lambda: _network(userns)))
    found.append(_guarded("publish", lambda: _publish(rootfs, overlay)))
    return found


def _nothing_can_be_tried(error: Exception) -> Iterator[Finding]:
    """Without children there is no more to try: for instance inside a container whose filter hides clone3."""
    remedy = "if this is inside a container, use the machine itself; else report this"
    if isinstance(error, OSError) and "LABKERNEL_HOME" in str(error):
        remedy = f"let LABKERNEL_HOME name a directory of yours; now it is {state.home()}"
    yield Finding("children", False, f"no child process can be started: {_words(error)}", remedy)
    for name in ("userns", "subuid", *NAMESPACES, *WITH_FILES):
        yield Finding(name, False, "cannot be tried without a child", "see children")


def missing(requires: Sequence[str]) -> list[str]:
    """What this machine lacks of `requires` (names of findings), each with the reason and the remedy in one line.

    Where several of them fail for the same reason ("see cgroup"), that reason is told, and once.
    """
    if not requires:
        return []
    found = {finding.name: finding for finding in examine() if requires != [DISK]}
    if DISK in requires:
        found[DISK] = _guarded(DISK, _disk)
    lacking: dict[str, None] = {}  # in the order in which they were met
    for name in requires:
        finding = found.get(name) or Finding(name, False, "the doctor knows no such thing")
        while finding.remedy.startswith("see "):
            finding = found[finding.remedy.removeprefix("see ")]
        if not finding.ok:
            remedy = f" What to do: {finding.remedy}." if finding.remedy else ""
            lacking[f"{finding.name}: {finding.detail}.{remedy}"] = None
    return list(lacking)


# ---------------------------------------------------------------------- users and namespaces


def _root() -> Finding:
    if os.geteuid() == 0:
        return Finding("root", True, "you are root")
    return Finding(
        "root", False, "you are an ordinary user", f"{NOTHING_TO_DO}: a user namespace does instead", True
    )


def _user_namespace(facts: dict[str, Any]) -> Finding:
    """Making one is not enough: AppArmor may let it be made and then allow nothing in it."""
    name = "userns"
    made = children.in_child(_try_user_namespace, timeout=PROBE_SECONDS)
    if made is not None:
        return Finding(name, False, f"{NO_NAMESPACES}: {made}", _why_no_user_namespace(made))
    if os.geteuid() != 0 and not facts["id_maps"]:
        children.close_launcher()  # it may have been started before the machine was mended
        return Finding(name, False, f"{NO_NAMESPACES}, or gives no ids in them", _why_no_user_namespace(""))
    return Finding(name, True, "a user namespace can be made, and its root has power in it")


def _try_user_namespace() -> str | None:
    """In a child: make one, become its root, and use a capability. None when all went well, else what failed."""
    uid, gid = os.getuid(), os.getgid()
    try:
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        for file, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            Path(f"/proc/self/{file}").write_text(text)
        syscalls.unshare(syscalls.CLONE_NEWUTS)
        socket.sethostname("doctor")
    except OSError as error:
        return calm.in_words(error)
    return None


def _why_no_user_namespace(words: str) -> str:
    """The remedy, from the settings that are known to forbid it."""
    settings = (
        ("/proc/sys/user/max_user_namespaces", "0", "sudo sysctl user.max_user_namespaces=15000"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "0", "sudo sysctl kernel.unprivileged_userns_clone=1"),
        (
            "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu's AppArmor takes the power out of "
            "user namespaces; to keep the setting, write it to /etc/sysctl.d/90-labkernel.conf)",
        ),
    )
    for path, forbids, remedy in settings:
        if _read(path) == forbids:
            return f"{remedy}, or {AS_ROOT}"
    if "ENOSPC" in words:
        return f"raise user.max_user_namespaces where it is 0: perhaps outside this container; or {AS_ROOT}"
    return (
        "if this is inside another container, its seccomp filter probably forbids it (docker run "
        f"--security-opt seccomp=unconfined lifts it); else {AS_ROOT}"
    )


def _subuid(facts: dict[str, Any], userns: Finding) -> Finding:
    if not userns.ok:
        return Finding("subuid", False, "no user namespace, so no ids in it", "see userns")
    count = facts["container_map"]["count"]
    if count >= users.RANGE:
        return Finding("subuid", True, f"a container gets {users.RANGE} ids of its own")
    lacking = [tool for tool in ("newuidmap", "newgidmap") if not shutil.which(tool)]
    ranges = "sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 $USER"
    remedy = "sudo apt install uidmap" if lacking else ranges
    why = (
        f"{' and '.join(lacking)} not installed"
        if lacking
        else "no range for you in /etc/subuid and /etc/subgid"
    )
    return Finding(
        "subuid", False, f"a container gets {count} id(s): {why}", f"{remedy}; then restart the lab"
    )


def _namespaces(userns: Finding) -> Iterator[Finding]:
    """Each of the other seven, in a child of its own."""
    for kind in KINDS:
        name = f"namespace:{kind}"
        try:
            children.in_child(syscalls.unshare, namespaces.FLAGS[kind], timeout=PROBE_SECONDS)
        except OSError as error:
            if error.errno == errno.EPERM and not userns.ok:
                yield Finding(name, False, "no user namespace, so no other kind either", "see userns")
            elif error.errno == errno.EINVAL:
                yield Finding(
                    name, False, "this kernel has no such namespace", "a newer kernel, or the lab's VM"
                )
            else:
                yield Finding(name, False, _words(error), AS_ROOT)
        else:
            yield Finding(name, True, f"unshare({syscalls.flag_names(namespaces.FLAGS[kind])}) works")


# ---------------------------------------------------------------------- containers


def _empty_rootfs(place: Path) -> Path:
    """A root file system with nothing in it but the places where a container mounts something."""
    place.chmod(0o755)
    for name in ("proc", "dev", "sys", "tmp", "etc"):
        (place / name).mkdir()
    return place


def _start(rootfs: Path, *, seccomp: str = "unconfined", **options: Any) -> None:
    """Start a container for real. It ends at once: all walls are up before its program turns out to be missing."""
    Container(rootfs, ["/nothing"], seccomp=seccomp, **options).run(timeout=PROBE_SECONDS)


def _container(name: str, rootfs: Path, userns: Finding) -> Finding:
    try:
        _start(rootfs)
    except OSError as error:
        remedy = (
            "see userns" if not userns.ok else "a kernel with overlayfs (modprobe overlay), 5.12 or newer"
        )
        return Finding(name, False, f"no container starts: {_words(error)}", remedy)
    return Finding(name, True, "a container starts, on a writable layer over a read-only root file system")


def _seccomp(rootfs: Path, overlay: Finding) -> Finding:
    if not overlay.ok:
        return Finding("seccomp", False, "no container starts", "see overlay")
    try:
        _start(rootfs, seccomp="default")
    except OSError as error:
        return Finding(
            "seccomp",
            False,
            _words(error),
            "a kernel with CONFIG_SECCOMP_FILTER; sudo apt install libseccomp2",
        )
    return Finding("seccomp", True, "a container starts behind its filter of system calls")


def _controllers(facts: dict[str, Any], rootfs: Path, overlay: Finding) -> Iterator[Finding]:
    """The cgroup version, and each controller: a container is started with a limit of that kind."""
    version, reason = facts["cgroup_version"], facts["no_cgroup"]
    remedy = _delegation()
    if version:
        yield Finding("cgroup", True, f"version {version}; groups of our own can be made")
    else:
        yield Finding("cgroup", False, f"no group of our own can be made: {calm.scrub(reason)}", remedy)
    probes: dict[str, dict[str, Any]] = {
        **PROBES,
        "cpuset": {"cpuset_cpus": str(min(os.sched_getaffinity(0)))},
    }
    for controller, limit in probes.items():
        name, option = f"cgroup:{controller}", next(iter(limit))
        if not version or not overlay.ok:
            why = ("no container starts", "see overlay") if version else ("no group of our own", "see cgroup")
            yield Finding(name, False, *why)
            continue
        try:
            _start(rootfs, **limit)
        except OSError as error:
            yield Finding(name, False, f"{option} cannot be set: {_words(error)}", remedy)
        except Exception as error:
            yield Finding(name, False, _words(error), "report this")
        else:
            yield Finding(name, True, f"a container runs with {option} set")


def _disk() -> Finding:
    """Whether the disk behind the lab's directory is written no faster than a group of ours may."""
    facts = children.launcher().facts
    if not facts["cgroup_version"]:
        why = f"no group of our own can be made: {calm.scrub(facts['no_cgroup'])}"
        return Finding(DISK, False, why, _delegation())
    with temporary() as place:
        number = disks.below(place)
        if number is None:
            remedy = "let LABKERNEL_HOME name a directory on a disk"
            return Finding(DISK, False, "the lab's directory lies on no disk that can be limited", remedy)
        if "io" not in facts["controllers"]:
            return Finding(DISK, False, "the controller io is not handed to us", _delegation())
        try:
            seconds = children.in_child(_write_limited, number, str(place / "file"), timeout=60)
        except OSError as error:
            remedy = "let LABKERNEL_HOME name a directory on another disk, with ext4, xfs or btrfs"
            return Finding(DISK, False, f"the disk cannot be limited: {_words(error)}", remedy)
    if seconds < DISK_BLOCK * DISK_BLOCKS / DISK_RATE / 3:
        remedy = "another disk, or a kernel with CONFIG_BLK_DEV_THROTTLING"
        return Finding(DISK, False, "a limit can be set for the disk, and nothing heeds it", remedy)
    return Finding(DISK, True, "the disk behind the lab's directory is written no faster than a limit says")


def _write_limited(number: str, path: str) -> float:
    """In a child: write to the disk, past the page cache, in a group with a limit; the seconds that it took."""
    made = group("disk")
    made.set(Limits(write_bps={number: DISK_RATE}))
    made.add(os.getpid())
    block = mmap.mmap(-1, DISK_BLOCK)  # its memory lies as O_DIRECT wants it: man 2 open
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
    begin = time.monotonic()
    for _ in range(DISK_BLOCKS):
        os.write(fd, block)
    return time.monotonic() - begin


def _delegation() -> str:
    """How this user gets control groups."""
    if os.geteuid() == 0:
        return "mount the cgroup file system: mount -t cgroup2 none /sys/fs/cgroup"
    if Path("/run/systemd/system").is_dir() and Path("/sys/fs/cgroup/cgroup.controllers").exists():
        return (
            "sudo mkdir -p /etc/systemd/system/user@.service.d; write the lines [Service] and "
            "Delegate=cpu cpuset io memory pids to delegate.conf there; sudo systemctl daemon-reload; log in anew"
        )
    return f"without systemd and cgroup v2 ordinary users get no groups: {AS_ROOT}"


# ---------------------------------------------------------------------- network

RTM_NEWLINK, NLM_F_REQUEST, NLM_F_ACK, NLM_F_CREATE_EXCL = 16, 1, 4, 0x600
IFLA_IFNAME, IFLA_LINKINFO, IFLA_INFO_KIND, NLMSG_ERROR = 3, 18, 1, 2


def _network(userns: Finding) -> Finding:
    """A bridge and a pair of virtual cables, in a network namespace of a child's own."""
    try:
        children.in_child(_try_links, timeout=PROBE_SECONDS)
    except OSError as error:
        if error.errno == errno.EPERM and not userns.ok:
            return Finding("network", False, "no network namespace", "see userns")
        return Finding(
            "network", False, _words(error), "sudo modprobe -a bridge veth, or a kernel that has them"
        )
    return Finding("network", True, "a bridge and a veth pair can be made")


def _try_links() -> None:
    syscalls.unshare(syscalls.CLONE_NEWNET)
    for kind in ("bridge", "veth"):
        _new_link(f"lk-{kind}", kind)


def _new_link(name: str, kind: str) -> None:
    """One netlink message by hand: pyroute2 alone would take half of the doctor's time to import. man 7 rtnetlink."""

    def attribute(number: int, value: bytes) -> bytes:
        return struct.pack("HH", 4 + len(value), number) + value + b"\0" * (-len(value) % 4)

    info = attribute(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, kind.encode()))
    body = struct.pack("BxHiII", 0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, name.encode() + b"\0") + info
    flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE_EXCL
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as link:
        link.send(struct.pack("IHHII", 16 + len(body), RTM_NEWLINK, flags, 1, 0) + body)
        answer = link.recv(4096)
    if struct.unpack_from("H", answer, 4)[0] == NLMSG_ERROR and (
        number := -struct.unpack_from("i", answer, 16)[0]
    ):
        raise syscalls.explained(number, "netlink", f"new {kind}")


def _publish(rootfs: Path, overlay: Finding) -> Finding:
    if not overlay.ok:
        return Finding("publish", False, "no container starts", "see overlay")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        _start(rootfs, publish=[f"127.0.0.1:{port}:80"])
    except OSError as error:
        return Finding("publish", False, _words(error), "free a port on 127.0.0.1")
    return Finding("publish", True, "a port of a container can be published on 127.0.0.1")


# ---------------------------------------------------------------------- what is good to have


def _psi() -> Finding:
    try:
        Path("/proc/pressure/memory").read_text()
    except OSError as error:
        remedy = f"{NOTHING_TO_DO}; the kernel option psi=1 brings it"
        return Finding("psi", False, f"no pressure figures: {_words(error)}", remedy, True)
    return Finding("psi", True, "the kernel tells how long tasks wait (pressure)", optional=True)


def _landlock() -> Finding:
    version = landlock.version()
    if not version:
        remedy = f"{NOTHING_TO_DO}; the kernel option lsm=landlock,… brings it"
        return Finding("landlock", False, os.strerror(ctypes.get_errno()), remedy, True)
    return Finding("landlock", True, f"version {version} of its interface", optional=True)


# ---------------------------------------------------------------------- helpers


def _guarded(name: str, probe: Callable[[], Finding]) -> Finding:
    """A probe that fails in a way nobody thought of is a "no" too."""
    try:
        return probe()
    except Exception as error:
        return Finding(name, False, _words(error), "report this")


def _guarded_list(
    names: Sequence[str], probes: Callable[[Finding], Iterator[Finding]], userns: Finding
) -> list[Finding]:
    try:
        return list(probes(userns))
    except Exception as error:
        return [Finding(name, False, _words(error), "report this") for name in names]


def _answer(finding: Finding) -> str:
    return "yes" if finding.ok else "no" if not finding.optional else "no*"


def _words(error: BaseException) -> str:
    return calm.in_words(error).rstrip(".")


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
