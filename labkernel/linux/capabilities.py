"""Capabilities: root's power in 41 pieces, and the five sets in which a process holds them.

permitted: what it may use; effective: what is in use now; inheritable and ambient: what outlives an execve;
bounding: what no execve, not even of a setuid-root program, can bring back.
Source: man 7 capabilities, man 2 capget, man 2 prctl, <linux/capability.h>.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

from labkernel.linux import syscalls
from labkernel.linux.syscalls import PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, PR_CAPBSET_DROP, libc

MAN = "https://man7.org/linux/man-pages/"
DOCKER = "https://github.com/moby/moby/blob/v28.3.0/oci/caps/defaults.go"
"""The list that the default set is compared with: what Docker keeps."""


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


class Choice(NamedTuple):
    """What the default set does with one capability, and why."""

    capability: Capability
    kept: bool
    allows: str
    reason: str
    source: str
    """Where one can read up what is said."""


def _kept(name: str, allows: str, reason: str, source: str) -> Choice:
    return Choice(Capability["CAP_" + name], True, allows, reason, _address(source))


def _dropped(name: str, allows: str, reason: str, source: str) -> Choice:
    return Choice(Capability["CAP_" + name], False, allows, reason, _address(source))


def _address(source: str) -> str:
    """`chown(2)` is a man page; what begins with https:// is an address already."""
    name, _, section = source.removesuffix(")").partition("(")
    return source if "://" in source else f"{MAN}man{section}/{name}.{section}.html"


CHOICES: tuple[Choice, ...] = (
    _kept("CHOWN", "give files to any owner and group",
          "package managers and start scripts hand data directories to the service's user", "chown(2)"),
    _kept("DAC_OVERRIDE", "read, write and enter regardless of file modes",
          "root's scripts expect it; it reaches only the files in the container's own mounts",
          "path_resolution(7)"),
    _dropped("DAC_READ_SEARCH", "read any file, and open files by handle",
             "open_by_handle_at finds files of the host's disk outside the container: a known way out",
             "open_by_handle_at(2)"),
    _kept("FOWNER", "change modes and times of files that belong to others",
          "unpacking archives and installing packages sets modes on files of other owners", "chmod(2)"),
    _kept("FSETID", "keep the set-user-id and set-group-id bits when a file is changed",
          "packages contain such files, and installing them must not lose the bits", "chmod(2)"),
    _kept("KILL", "send signals to processes of other users",
          "an init or supervisor stops services that run as other users; it sees the container's pids only",
          "kill(2)"),
    _kept("SETGID", "become any group", "services start as root and then step down", "setgid(2)"),
    _kept("SETUID", "become any user", "services start as root and then step down; su and sudo", "setuid(2)"),
    _kept("SETPCAP", "remove capabilities from the bounding set, add inheritable ones",
          "programs that step down drop capabilities too; it cannot create any", "capabilities(7)"),
    _dropped("LINUX_IMMUTABLE", "set the immutable and append-only flags of files",
             "such files cannot be removed by the container's owner afterwards", "ioctl_iflags(2)"),
    _kept("NET_BIND_SERVICE", "listen on ports below 1024",
          "web and mail servers do; the port is one of the container's own network namespace", "ip(7)"),
    _dropped("NET_BROADCAST", "nothing: the kernel never checks it", "nobody needs it", "capabilities(7)"),
    _dropped("NET_ADMIN", "configure interfaces, routes and firewall",
             "the container's network is set up from outside; inside it could take a neighbour's address",
             "netdevice(7)"),
    _kept("NET_RAW", "open raw and packet sockets",
          "ping and traceroute; the price is that forged packets reach the bridge, so many drop it",
          "https://github.com/moby/moby/issues/41886"),
    _dropped("IPC_LOCK", "lock memory without limit", "locked memory cannot be taken back from a container",
             "mlock(2)"),
    _dropped("IPC_OWNER", "use System V objects regardless of their modes", "programs use the modes instead",
             "sysvipc(7)"),
    _dropped("SYS_MODULE", "load code into the kernel", "one kernel serves all: this is the whole machine",
             "init_module(2)"),
    _dropped("SYS_RAWIO", "reach I/O ports, /dev/mem and raw device commands", "this is the whole machine",
             "iopl(2)"),
    _kept("SYS_CHROOT", "call chroot, and enter mount namespaces",
          "some services lock themselves up with it; after pivot_root there is nothing above to escape to",
          "chroot(2)"),
    _dropped("SYS_PTRACE", "look into and control any process",
             "one's own processes can be traced without it; with it also those of other users", "ptrace(2)"),
    _dropped("SYS_PACCT", "switch process accounting on and off", "it is the whole machine's", "acct(2)"),
    _dropped("SYS_ADMIN", "mount, setns, unshare, and some hundred other things",
             "half of root's power is behind it, and so are most of the known ways out",
             "https://lwn.net/Articles/486306/"),
    _dropped("SYS_BOOT", "reboot, and load a new kernel", "it is the whole machine's", "reboot(2)"),
    _dropped("SYS_NICE", "raise priorities, real-time scheduling, move memory between nodes",
             "a container could starve its neighbours; CPU shares are the cgroup's matter", "sched(7)"),
    _dropped("SYS_RESOURCE", "exceed resource limits and disk quotas", "limits are set to be kept",
             "getrlimit(2)"),
    _dropped("SYS_TIME", "set the clocks", "the wall clock is the whole machine's: no namespace holds it",
             "time_namespaces(7)"),
    _dropped("SYS_TTY_CONFIG", "vhangup, and privileged settings of terminals", "terminals are the host's",
             "vhangup(2)"),
    _kept("MKNOD", "make device nodes",
          "archives contain them; what may be opened is decided elsewhere, and in a user namespace the "
          "kernel refuses devices all the same", "mknod(2)"),
    _dropped("LEASE", "take leases on files of others", "a lease delays everybody else who opens the file",
             "fcntl(2)"),
    _kept("AUDIT_WRITE", "write to the kernel's audit log", "login, sshd and sudo record what they do",
          "https://github.com/moby/moby/pull/7179"),
    _dropped("AUDIT_CONTROL", "change audit rules", "the log is the whole machine's", "capabilities(7)"),
    _kept("SETFCAP", "give capabilities to files",
          "packages contain such files; those from a user namespace count only within it",
          "user_namespaces(7)"),
    _dropped("MAC_OVERRIDE", "overrule Smack", "the access rules are the whole machine's",
             "https://docs.kernel.org/admin-guide/LSM/Smack.html"),
    _dropped("MAC_ADMIN", "configure Smack", "the access rules are the whole machine's",
             "https://docs.kernel.org/admin-guide/LSM/Smack.html"),
    _dropped("SYSLOG", "read the kernel's log and its addresses", "its addresses help to attack the kernel",
             "syslog(2)"),
    _dropped("WAKE_ALARM", "wake the machine from sleep", "its sleep is not a container's matter",
             "timerfd_create(2)"),
    _dropped("BLOCK_SUSPEND", "keep the machine from sleeping", "its sleep is not a container's matter",
             "epoll_ctl(2)"),
    _dropped("AUDIT_READ", "read the audit log", "it tells about the whole machine", "capabilities(7)"),
    _dropped("PERFMON", "trace and measure the whole machine", "it shows what the neighbours do",
             "https://docs.kernel.org/admin-guide/perf-security.html"),
    _dropped("BPF", "load privileged BPF programs", "they run in the kernel, for the whole machine", "bpf(2)"),
    _dropped("CHECKPOINT_RESTORE", "choose pids, and look into processes to restore them",
             "only checkpoint and restore tools need it, and they work from outside", "clone(2)"),
)  # fmt: skip
"""The default set with its reasons: every capability once, in the order of their numbers. It is Docker's."""

DOCKER_DEFAULT: frozenset[int] = frozenset(choice.capability.value for choice in CHOICES if choice.kept)
ALL: frozenset[int] = frozenset(member.value for member in Capability)


class CapabilitySets(NamedTuple):
    """The five sets of one process, by number."""

    permitted: frozenset[int]
    effective: frozenset[int]
    inheritable: frozenset[int]
    bounding: frozenset[int]
    ambient: frozenset[int]


def read(pid: int | str = "self") -> CapabilitySets:
    """The sets of process `pid`, from /proc/PID/status. Raises FileNotFoundError if there is none."""
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        return decode(file.read())


def decode(status: str) -> CapabilitySets:
    """The sets that stand in the text of such a file: each a number in hexadecimal, with bit n for capability n."""
    lines = (line.split() for line in status.splitlines() if line.startswith("Cap"))
    masks = {name: _members(int(mask, 16)) for name, mask in lines}
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


def limit_to(keep: Iterable[int], until_execve: Iterable[int] = ()) -> None:
    """Hold `keep` and no more, now and after any execve: bounding, permitted and effective become `keep`.

    Those in `until_execve` are held as well, but not by a program that is executed. The inheritable set becomes
    empty, and with it the ambient one, as in Docker since CVE-2022-24769: root gets the bounding set at execve,
    everybody else nothing. Raises OSError EPERM without CAP_SETPCAP, or if a set holds something that this process
    does not.
    """
    kept = frozenset(keep)
    drop_bounding(kept)
    held = kept.union(until_execve)
    capset(permitted=held, effective=held)


# ---------------------------------------------------------------------- on files

FILE_ATTRIBUTE = "security.capability"
"""The extended attribute that holds a program file's capabilities."""

VFS_CAP_REVISION_2, VFS_CAP_REVISION_3, VFS_CAP_FLAGS_EFFECTIVE = 0x02000000, 0x03000000, 0x1


class FileCapabilities(NamedTuple):
    """What a program file brings along at execve: struct vfs_cap_data of <linux/capability.h>, man 7 capabilities."""

    permitted: frozenset[int] = frozenset()
    inheritable: frozenset[int] = frozenset()
    effective: bool = True
    """A single bit: whether all of it is in use at once, or the program has to switch it on."""
    rootid: int | None = None
    """Version 3: root of which user namespace has given it, as a uid; it counts only where that one is root."""

    def pack(self) -> bytes:
        """As the extended attribute takes it: little-endian words of 32 bits."""
        p, i = _mask(self.permitted), _mask(self.inheritable)
        low = 0xFFFFFFFF
        revision = VFS_CAP_REVISION_2 if self.rootid is None else VFS_CAP_REVISION_3
        words = [revision | self.effective, p & low, i & low, p >> 32, i >> 32]
        words += [] if self.rootid is None else [self.rootid]
        return struct.pack(f"<{len(words)}I", *words)

    @classmethod
    def unpack(cls, raw: bytes) -> FileCapabilities:
        """Read such an attribute. Raises ValueError for one that is neither of version 2 nor 3."""
        if len(raw) not in (20, 24):
            raise ValueError(f"{FILE_ATTRIBUTE} has 20 or 24 bytes, and this has {len(raw)}")
        magic, p_low, i_low, p_high, i_high, *rest = struct.unpack(f"<{len(raw) // 4}I", raw)
        if magic & ~VFS_CAP_FLAGS_EFFECTIVE != (VFS_CAP_REVISION_3 if rest else VFS_CAP_REVISION_2):
            raise ValueError(f"{FILE_ATTRIBUTE} of {len(raw)} bytes with the version {magic:#x}")
        permitted, inheritable = _members(p_high << 32 | p_low), _members(i_high << 32 | i_low)
        return cls(permitted, inheritable, bool(magic & VFS_CAP_FLAGS_EFFECTIVE), *rest)


def set_on_file(path: syscalls.PathLike | int, given: FileCapabilities) -> None:
    """Give capabilities to a program file. man 7 capabilities, man 2 setxattr.

    Needs CAP_SETFCAP over the file. A write to the file, and a change of its owner, takes them away again.
    """
    try:
        os.setxattr(path, FILE_ATTRIBUTE, given.pack())
    except OSError as error:
        raise syscalls.explained(error.errno or 0, "setxattr", FILE_ATTRIBUTE) from None


def on_file(path: syscalls.PathLike | int) -> FileCapabilities | None:
    """The capabilities of a program file; None where it has none, or its file system cannot keep any."""
    try:
        return FileCapabilities.unpack(os.getxattr(path, FILE_ATTRIBUTE))
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise


def _mask(numbers: Iterable[int]) -> int:
    mask = 0
    for number in numbers:
        mask |= 1 << number
    return mask


def _members(mask: int) -> frozenset[int]:
    return frozenset(number for number in range(mask.bit_length()) if mask >> number & 1)
