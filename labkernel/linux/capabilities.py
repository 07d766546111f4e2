"""Capabilities: root's power in 41 pieces, and the five sets in which a process holds them.

permitted: what it may use; effective: what is in use now; inheritable and ambient: what outlives an execve;
bounding: what no execve, not even of a setuid-root program, can bring back.
Source: man 7 capabilities, man 2 capget, man 2 prctl, <linux/capability.h>.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from labkernel.linux import syscalls
from labkernel.linux.syscalls import PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, PR_CAPBSET_DROP, libc

MAN = "https://man7.org/linux/man-pages/man7/capabilities.7.html"
DOCKER = "https://docs.docker.com/engine/containers/run/#runtime-privilege-and-linux-capabilities"


class Capability(IntEnum):
    """Every capability by the kernel's name and number; the last three came with Linux 5.8 and 5.9."""

    CAP_CHOWN = 0
    CAP_DAC_OVERRIDE = 1
    CAP_DAC_READ_SEARCH = 2
    CAP_FOWNER = 3
    CAP_FSETID = 4
    CAP_KILL = 5
    CAP_SETGID = 6
    CAP_SETUID = 7
    CAP_SETPCAP = 8
    CAP_LINUX_IMMUTABLE = 9
    CAP_NET_BIND_SERVICE = 10
    CAP_NET_BROADCAST = 11
    CAP_NET_ADMIN = 12
    CAP_NET_RAW = 13
    CAP_IPC_LOCK = 14
    CAP_IPC_OWNER = 15
    CAP_SYS_MODULE = 16
    CAP_SYS_RAWIO = 17
    CAP_SYS_CHROOT = 18
    CAP_SYS_PTRACE = 19
    CAP_SYS_PACCT = 20
    CAP_SYS_ADMIN = 21
    CAP_SYS_BOOT = 22
    CAP_SYS_NICE = 23
    CAP_SYS_RESOURCE = 24
    CAP_SYS_TIME = 25
    CAP_SYS_TTY_CONFIG = 26
    CAP_MKNOD = 27
    CAP_LEASE = 28
    CAP_AUDIT_WRITE = 29
    CAP_AUDIT_CONTROL = 30
    CAP_SETFCAP = 31
    CAP_MAC_OVERRIDE = 32
    CAP_MAC_ADMIN = 33
    CAP_SYSLOG = 34
    CAP_WAKE_ALARM = 35
    CAP_BLOCK_SUSPEND = 36
    CAP_AUDIT_READ = 37
    CAP_PERFMON = 38
    CAP_BPF = 39
    CAP_CHECKPOINT_RESTORE = 40


@dataclass(frozen=True)
class Choice:
    """What the default set does with one capability, and why."""

    capability: Capability
    kept: bool
    allows: str
    reason: str
    source: str


def _kept(name: str, allows: str, reason: str) -> Choice:
    return Choice(Capability["CAP_" + name], True, allows, reason, DOCKER)


def _dropped(name: str, allows: str, reason: str) -> Choice:
    return Choice(Capability["CAP_" + name], False, allows, reason, MAN)


CHOICES: tuple[Choice, ...] = (
    _kept("CHOWN", "give files to any owner and group",
          "package managers and start scripts hand data directories to the service's user"),
    _kept("DAC_OVERRIDE", "read, write and enter regardless of file modes",
          "root's scripts expect it; it reaches only the files in the container's own mounts"),
    _dropped("DAC_READ_SEARCH", "read any file, and open files by handle",
             "open_by_handle_at finds files of the host's disk outside the container: a known way out"),
    _kept("FOWNER", "change modes and times of files that belong to others",
          "unpacking archives and installing packages sets modes on files of other owners"),
    _kept("FSETID", "keep the set-user-id and set-group-id bits when a file is changed",
          "packages contain such files, and installing them must not lose the bits"),
    _kept("KILL", "send signals to processes of other users",
          "an init or supervisor stops services that run as other users; it sees the container's pids only"),
    _kept("SETGID", "become any group", "services start as root and then step down"),
    _kept("SETUID", "become any user", "services start as root and then step down; su and sudo"),
    _kept("SETPCAP", "remove capabilities from the bounding set, add inheritable ones",
          "programs that step down drop capabilities too; it cannot create any"),
    _dropped("LINUX_IMMUTABLE", "set the immutable and append-only flags of files",
             "such files cannot be removed by the container's owner afterwards"),
    _kept("NET_BIND_SERVICE", "listen on ports below 1024",
          "web and mail servers do; the port is one of the container's own network namespace"),
    _dropped("NET_BROADCAST", "nothing: the kernel never checks it", "nobody needs it"),
    _dropped("NET_ADMIN", "configure interfaces, routes and firewall",
             "the container's network is set up from outside; inside it could take a neighbour's address"),
    _kept("NET_RAW", "open raw and packet sockets",
          "ping and traceroute; the price is that forged packets reach the bridge, so many drop it"),
    _dropped("IPC_LOCK", "lock memory without limit", "locked memory cannot be taken back from a container"),
    _dropped("IPC_OWNER", "use System V objects regardless of their modes", "programs use the modes instead"),
    _dropped("SYS_MODULE", "load code into the kernel", "one kernel serves all: this is the whole machine"),
    _dropped("SYS_RAWIO", "reach I/O ports, /dev/mem and raw device commands", "this is the whole machine"),
    _kept("SYS_CHROOT", "call chroot, and enter mount namespaces",
          "some services lock themselves up with it; after pivot_root there is nothing above to escape to"),
    _dropped("SYS_PTRACE", "look into and control any process",
             "one's own processes can be traced without it; with it also those of other users"),
    _dropped("SYS_PACCT", "switch process accounting on and off", "it is the whole machine's"),
    _dropped("SYS_ADMIN", "mount, setns, unshare, and some hundred other things",
             "half of root's power is behind it, and so are most of the known ways out"),
    _dropped("SYS_BOOT", "reboot, and load a new kernel", "it is the whole machine's"),
    _dropped("SYS_NICE", "raise priorities, real-time scheduling, move memory between nodes",
             "a container could starve its neighbours; CPU shares are the cgroup's matter"),
    _dropped("SYS_RESOURCE", "exceed resource limits and disk quotas", "limits are set to be kept"),
    _dropped("SYS_TIME", "set the clocks", "the wall clock is the whole machine's: no namespace holds it"),
    _dropped("SYS_TTY_CONFIG", "vhangup, and privileged settings of terminals", "terminals are the host's"),
    _kept("MKNOD", "make device nodes",
          "archives contain them; what may be opened is decided elsewhere, and in a user namespace the "
          "kernel refuses devices all the same"),
    _dropped("LEASE", "take leases on files of others", "a lease delays everybody else who opens the file"),
    _kept("AUDIT_WRITE", "write to the kernel's audit log", "login, sshd and sudo record what they do"),
    _dropped("AUDIT_CONTROL", "change audit rules", "the log is the whole machine's"),
    _kept("SETFCAP", "give capabilities to files",
          "packages contain such files; those from a user namespace count only within it"),
    _dropped("MAC_OVERRIDE", "overrule Smack", "the access rules are the whole machine's"),
    _dropped("MAC_ADMIN", "configure Smack", "the access rules are the whole machine's"),
    _dropped("SYSLOG", "read the kernel's log and its addresses", "its addresses help to attack the kernel"),
    _dropped("WAKE_ALARM", "wake the machine from sleep", "its sleep is not a container's matter"),
    _dropped("BLOCK_SUSPEND", "keep the machine from sleeping", "its sleep is not a container's matter"),
    _dropped("AUDIT_READ", "read the audit log", "it tells about the whole machine"),
    _dropped("PERFMON", "trace and measure the whole machine", "it shows what the neighbours do"),
    _dropped("BPF", "load privileged BPF programs", "they run in the kernel, for the whole machine"),
    _dropped("CHECKPOINT_RESTORE", "choose pids, and look into processes to restore them",
             "only checkpoint and restore tools need it, and they work from outside"),
)  # fmt: skip
"""The default set with its reasons: every capability once, in the order of their numbers. It is Docker's."""

DOCKER_DEFAULT: frozenset[int] = frozenset(choice.capability.value for choice in CHOICES if choice.kept)
ALL: frozenset[int] = frozenset(member.value for member in Capability)


@dataclass(frozen=True)
class CapabilitySets:
    """The five sets of one process, by number."""

    permitted: frozenset[int]
    effective: frozenset[int]
    inheritable: frozenset[int]
    bounding: frozenset[int]
    ambient: frozenset[int]


def read(pid: int | str = "self") -> CapabilitySets:
    """The sets of process `pid`, from /proc/PID/status. Raises FileNotFoundError if there is none."""
    masks = {}
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("Cap"):
                name, mask = line.split()
                masks[name] = _members(int(mask, 16))
    return CapabilitySets(
        masks["CapPrm:"], masks["CapEff:"], masks["CapInh:"], masks["CapBnd:"], masks["CapAmb:"]
    )


def names(numbers: Iterable[int]) -> list[str]:
    """`["CAP_CHOWN", …]` in the order of the numbers; one that is newer than this list is CAP_41."""
    known = {member.value: member.name for member in Capability}
    return [known.get(number, f"CAP_{number}") for number in sorted(numbers)]


def parse(texts: Iterable[str]) -> frozenset[int]:
    """Capabilities by name, with or without CAP_, in either case; ALL is every one. Raises ValueError."""
    found: set[int] = set()
    for text in texts:
        name = text.strip().upper().removeprefix("CAP_")
        if name == "ALL":
            found |= ALL
        elif f"CAP_{name}" in Capability.__members__:
            found.add(Capability[f"CAP_{name}"].value)
        else:
            raise ValueError(
                f"no capability {text!r}; they are ALL, " + ", ".join(m.name[4:] for m in Capability)
            )
    return frozenset(found)


def docker_set(add: Iterable[str] = (), drop: Iterable[str] = ()) -> frozenset[int]:
    """What `docker run --cap-add … --cap-drop …` gives: single names overrule an ALL.

    Raises ValueError for an unknown name, and for ALL on both sides.
    """
    added, dropped = set(parse(add)), parse(drop)
    if added >= ALL and dropped >= ALL:
        raise ValueError("ALL can be added or dropped, not both")
    if added >= ALL:
        return ALL - dropped
    return frozenset((DOCKER_DEFAULT - dropped) | added)


# ---------------------------------------------------------------------- changing one's own sets
# All of these concern the calling thread only: call them in a process that has just one.


class _Header(ctypes.Structure):
    """struct __user_cap_header_struct, version 3: two 32-bit words a set."""

    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


_HEADER = _Header(0x20080522, 0)
_Words = ctypes.c_uint32 * 6
libc.capset.argtypes = (ctypes.POINTER(_Header), _Words)
# prctl with the two arguments that PR_CAPBSET_DROP looks at: each container's start has thirty of them.
_prctl2 = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_ulong, use_errno=True)(("prctl", libc))


def capset(permitted: Iterable[int], effective: Iterable[int], inheritable: Iterable[int] = ()) -> None:
    """Set three of the five sets. man 2 capset.

    Nothing can be added to the permitted set. What leaves it or the inheritable set leaves the ambient set.
    """
    p, e, i = _mask(permitted), _mask(effective), _mask(inheritable)
    low = 0xFFFFFFFF
    words = _Words(e & low, p & low, i & low, e >> 32, p >> 32, i >> 32)
    if libc.capset(_HEADER, words) == -1:
        missing = names(_members(p) - read().permitted)
        syscalls.check(-1, "capset", f"not held by this process: {', '.join(missing)}" if missing else "")


def drop_bounding(keep: Iterable[int]) -> None:
    """Remove all but `keep` from the bounding set, also those that are newer than this list.

    Dropping what is not there costs no more than asking whether it is. Needs CAP_SETPCAP. man 2 prctl.
    """
    kept = _mask(keep)
    for number in range(64):
        if not kept >> number & 1 and _prctl2(PR_CAPBSET_DROP, number) == -1:
            if ctypes.get_errno() == errno.EINVAL:  # the kernel has no more
                return
            syscalls.check(-1, "prctl", f"PR_CAPBSET_DROP, {number}: needs CAP_SETPCAP")


def raise_ambient(numbers: Iterable[int]) -> None:
    """Let these outlive execve in a process that is not root. They must be permitted and inheritable."""
    for number in numbers:
        syscalls.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number)


def limit_to(keep: Iterable[int]) -> None:
    """Hold `keep` and no more, now and after any execve: bounding, permitted and effective become `keep`.

    The inheritable set becomes empty, and with it the ambient one, as in Docker since CVE-2022-24769: root
    gets the bounding set at execve, everybody else nothing. Raises OSError EPERM without CAP_SETPCAP, or if
    `keep` holds something that this process does not.
    """
    kept = frozenset(keep)
    drop_bounding(kept)
    capset(permitted=kept, effective=kept)


def _mask(numbers: Iterable[int]) -> int:
    mask = 0
    for number in numbers:
        mask |= 1 << number
    return mask


def _members(mask: int) -> frozenset[int]:
    return frozenset(number for number in range(mask.bit_length()) if mask >> number & 1)
