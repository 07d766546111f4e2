"""The system calls of containers, by their own names, through libc and ctypes.

Each wrapper does three things: call, compare, and raise `OSError` that says which call failed, with which
arguments, and what usually causes it. Constants are named as the kernel's headers name them.
Sources: man 2 clone, unshare, setns, mount, umount2, pivot_root, prctl, open_tree, move_mount, mount_setattr.
"""

from __future__ import annotations

import ctypes
import errno as errnos
import os
from collections.abc import Mapping

# <linux/sched.h>
CLONE_NEWTIME = 0x00000080
CLONE_PIDFD = 0x00001000
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_INTO_CGROUP = 0x200000000

# <linux/mount.h>
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_MOVE = 0x2000
MS_REC = 0x4000
MS_UNBINDABLE = 0x20000
MS_PRIVATE = 0x40000
MS_SLAVE = 0x80000
MS_SHARED = 0x100000
MS_STRICTATIME = 0x1000000
MNT_DETACH = 0x2

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
OPEN_TREE_CLONE = 0x1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_IDMAP = 0x100000

# <signal.h>: a set is 1024 bits wide for libc, of which the kernel knows 64
SIG_SETMASK = 2
ALL_SIGNALS = (1 << 64) - 1
SignalSet = ctypes.c_ulong * 16

# <linux/prctl.h>
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_SET_SECCOMP = 22
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_IS_SET = 1
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4

MACHINE = os.uname().machine
"""Of what kind the processor is: "x86_64" or "aarch64"."""

# Numbers of calls that glibc before 2.36 does not wrap. The newer ones are the same on every architecture;
# pivot_root is older than that agreement. <asm/unistd.h>
SYS_open_tree = 428
SYS_move_mount = 429
SYS_clone3 = 435
SYS_close_range = 436
SYS_mount_setattr = 442
SYS_seccomp = {"x86_64": 317, "aarch64": 277}.get(MACHINE, 317)
SYS_rt_sigaction = {"x86_64": 13, "aarch64": 134}.get(MACHINE, 13)
SYS_pivot_root = {"x86_64": 155, "aarch64": 41}.get(MACHINE, 155)

# What usually lies behind an errno, for the calls whose man pages list many reasons.
USUAL_CAUSES: Mapping[tuple[str, int], str] = {
    ("unshare", errnos.EPERM): "needs CAP_SYS_ADMIN here: be root, or unshare CLONE_NEWUSER first; "
    "inside a chroot CLONE_NEWUSER is refused too",
    ("unshare", errnos.EINVAL): "CLONE_NEWUSER is refused to a process with several threads; use a child",
    ("unshare", errnos.ENOSPC): "the limit in /proc/sys/user/max_*_namespaces is reached (0 forbids them)",
    (
        "clone3",
        errnos.EPERM,
    ): "needs CAP_SYS_ADMIN, or CLONE_NEWUSER among the flags, and a machine that allows it",
    ("clone3", errnos.ENOSPC): "the limit in /proc/sys/user/max_*_namespaces is reached (0 forbids them)",
    (
        "clone3",
        errnos.EBUSY,
    ): "the cgroup has child groups with controllers enabled: no processes are allowed in it",
    (
        "setns",
        errnos.EPERM,
    ): "needs CAP_SYS_ADMIN in the user namespace that owns the target namespace, and in your own",
    (
        "setns",
        errnos.EINVAL,
    ): "not a namespace of that type, or a process with threads enters a user or mount namespace",
    ("mount", errnos.EPERM): "needs CAP_SYS_ADMIN in the user namespace that owns this mount namespace; "
    "for proc and sysfs also one that is fully visible already, and a pid or network namespace of our own",
    (
        "mount",
        errnos.EINVAL,
    ): "an option that this file system does not know, or for overlay an upperdir on a file "
    "system without extended attributes (overlay itself, NFS): put it on a tmpfs or a disk",
    (
        "bind mount",
        errnos.EINVAL,
    ): "the source is unbindable, or locked to what is mounted below it in a namespace above",
    ("bind mount", errnos.EPERM): "needs CAP_SYS_ADMIN in the user namespace that owns this mount namespace",
    ("mount", errnos.ENODEV): "this kernel has no such file system",
    ("mount", errnos.EBUSY): "the target or the source is in use already",
    ("umount2", errnos.EINVAL): "not a mount point, or one that is locked to a mount namespace above",
    ("umount2", errnos.EBUSY): "in use; MNT_DETACH unmounts once nobody uses it any more",
    (
        "pivot_root",
        errnos.EINVAL,
    ): "new_root must be a mount point (bind it onto itself), put_old must lie below it, "
    "and neither may be in a shared mount: make the tree private first",
    ("pivot_root", errnos.EBUSY): "new_root or put_old is the root that is in use already",
    ("pivot_root", errnos.EPERM): "needs CAP_SYS_ADMIN in the user namespace that owns this mount namespace",
    (
        "mount_setattr",
        errnos.EINVAL,
    ): "this file system knows no id-mapped mounts, or the mount is in use already",
    (
        "mount_setattr",
        errnos.EPERM,
    ): "needs CAP_SYS_ADMIN where the file system was mounted; and flags that are "
    "locked from a namespace above cannot be cleared",
    ("seccomp", errnos.EACCES): "set no_new_privs first, or hold CAP_SYS_ADMIN",
    ("seccomp", errnos.EINVAL): "the kernel refuses this filter program, or has no seccomp filters",
    (
        "setxattr",
        errnos.EOPNOTSUPP,
    ): "this file system keeps no such attributes beside its files: use a tmpfs or a disk",
    (
        "setxattr",
        errnos.EPERM,
    ): "an attribute security.capability needs CAP_SETFCAP, over a file whose owner and group "
    "are in the map of this user namespace",
    ("prctl", errnos.EPERM): "a capability that is not held, or a set that is locked",
}

libc = ctypes.CDLL(None, use_errno=True)
# clone3 returns twice. PyDLL keeps the interpreter's lock over the call, so that the child holds it as well.
_libc_with_gil = ctypes.PyDLL(None, use_errno=True)

for _library in (libc, _libc_with_gil):
    _library.syscall.restype = ctypes.c_long
libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
libc.unshare.argtypes = (ctypes.c_int,)
libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
libc.setdomainname.argtypes = (ctypes.c_char_p, ctypes.c_size_t)

PathLike = str | os.PathLike[str]


def check(result: int, call: str, arguments: str = "") -> int:
    """Return `result`, or raise `OSError` from errno when it is -1.

    The error's text names the call with its arguments, the errno, and the usual cause where one is known.
    """
    if result != -1:
        return result
    number = ctypes.get_errno()
    raise explained(number, call, arguments)


def explained(number: int, call: str, arguments: str = "") -> OSError:
    """The `OSError` for errno `number` of `call`, in words."""
    name = errnos.errorcode.get(number, str(number))
    cause = USUAL_CAUSES.get((call, number))
    text = f"{call}({arguments}): {name}, {os.strerror(number)}" + (f": {cause}" if cause else "")
    return OSError(number, text)


def unshare(flags: int) -> None:
    """Give the calling process new namespaces of the kinds in `flags` (CLONE_NEW…). man 2 unshare."""
    check(libc.unshare(flags), "unshare", flag_names(flags))


def setns(fd: int, flags: int = 0) -> None:
    """Enter the namespace behind `fd` (a /proc/PID/ns file), or those of a pidfd named by `flags`. man 2 setns."""
    check(libc.setns(fd, flags), "setns", f"fd {fd}, {flag_names(flags) or 'any kind'}")


def mount(
    source: str | None, target: PathLike, fstype: str | None, flags: int = 0, data: str | None = None
) -> None:
    """Attach a file system, bind a tree, move one, or change a mount's flags. man 2 mount."""
    result = libc.mount(_bytes(source), os.fsencode(target), _bytes(fstype), flags, _bytes(data))
    if result == -1:
        words = ", ".join(word for word in (fstype or source, f"on {os.fspath(target)}", data) if word)
        check(result, "bind mount" if flags & MS_BIND and not flags & MS_REMOUNT else "mount", words)


def umount2(target: PathLike, flags: int = 0) -> None:
    """Detach the mount at `target`; with MNT_DETACH at once, and freed when nobody uses it. man 2 umount2."""
    check(libc.umount2(os.fsencode(target), flags), "umount2", os.fspath(target))


def pivot_root(new_root: PathLike, put_old: PathLike) -> None:
    """Make `new_root` the root mount of this mount namespace and move the old one to `put_old`.

    `pivot_root(".", ".")` stacks the old root under the new one, ready to be unmounted. man 2 pivot_root.
    """
    result = libc.syscall(SYS_pivot_root, os.fsencode(new_root), os.fsencode(put_old))
    check(result, "pivot_root", f"{os.fspath(new_root)}, {os.fspath(put_old)}")


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """Change or ask for an attribute of the calling process. man 2 prctl."""
    return check(libc.prctl(option, arg2, arg3, arg4, arg5), "prctl", f"option {option}, {arg2}")


def getcpu() -> int:
    """The number of the processor that runs the caller at this moment. man 3 sched_getcpu."""
    return check(libc.sched_getcpu(), "sched_getcpu")


def block_signals(mask: int = ALL_SIGNALS) -> int:
    """Block exactly the signals whose bits are set (bit 0 is signal 1); returns the mask as it was. man 2 sigprocmask.

    What `signal.pthread_sigmask` does, without making an enum member of each of 64 signals, which takes longer than
    the rest of a fork.
    """
    new, old = SignalSet(mask), SignalSet()
    check(libc.sigprocmask(SIG_SETMASK, ctypes.byref(new), ctypes.byref(old)), "sigprocmask")
    return int(old[0])


def default_signal(number: int) -> None:
    """Let a signal do again what it does by itself, where it may have been ignored. man 2 sigaction.

    Past libc, which knows no signal 32 or 33, which it uses itself; but a program may inherit them ignored.
    """
    default = ctypes.create_string_buffer(32)  # struct sigaction: SIG_DFL is 0, no flags, an empty mask
    result = libc.syscall(SYS_rt_sigaction, ctypes.c_int(number), default, None, ctypes.c_size_t(8))
    check(result, "rt_sigaction", f"signal {number}")


def setdomainname(name: str) -> None:
    """Set the NIS domain name of this UTS namespace (the other half of a host's name). man 2 setdomainname."""
    raw = name.encode()
    check(libc.setdomainname(raw, len(raw)), "setdomainname", name)


def close_range(first: int, last: int = 0xFFFFFFFF) -> None:
    """Close every descriptor from `first` to `last` in one call. man 2 close_range."""
    number = libc.syscall(SYS_close_range, ctypes.c_uint(first), ctypes.c_uint(last), ctypes.c_uint(0))
    check(number, "close_range", f"{first}, {last}")


class CloneArgs(ctypes.Structure):
    """struct clone_args of <linux/sched.h>; man 2 clone."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls"),
            *("set_tid", "set_tid_size", "cgroup"),
        )
    ]


def clone3(flags: int, cgroup_fd: int | None = None) -> tuple[int, int]:
    """Make a child with new namespaces, and in another cgroup (v2), in one call.

    Returns (pid, pidfd) in the parent and (0, -1) in the child. Like `os.fork`, it must only be called by a process
    with a single thread; unlike it, libc's fork handlers do not run. man 2 clone.
    """
    pidfd = ctypes.c_int(-1)
    args = CloneArgs(flags=flags | CLONE_PIDFD, pidfd=ctypes.addressof(pidfd), exit_signal=17)
    if cgroup_fd is not None:
        args.flags |= CLONE_INTO_CGROUP
        args.cgroup = cgroup_fd
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = _libc_with_gil.syscall(SYS_clone3, ctypes.byref(args), ctypes.sizeof(args))
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0, -1
    number = ctypes.get_errno()
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid == -1:
        raise explained(number, "clone3", flag_names(flags))
    return pid, pidfd.value


def open_tree(path: PathLike, flags: int, dir_fd: int = AT_FDCWD) -> int:
    """A descriptor of the mount at `path`; with OPEN_TREE_CLONE of a detached copy (a bind mount in waiting).

    man 2 open_tree; Linux 5.2.
    """
    result = libc.syscall(SYS_open_tree, dir_fd, os.fsencode(path), ctypes.c_uint(flags | OPEN_TREE_CLOEXEC))
    return check(result, "open_tree", os.fspath(path))


def move_mount(tree_fd: int, target: PathLike) -> None:
    """Attach the detached mount behind `tree_fd` at `target`. man 2 move_mount; Linux 5.2."""
    result = libc.syscall(
        SYS_move_mount, tree_fd, b"", AT_FDCWD, os.fsencode(target), ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH)
    )
    check(result, "move_mount", f"fd {tree_fd}, {os.fspath(target)}")


class MountAttr(ctypes.Structure):
    """struct mount_attr of <linux/mount.h>; man 2 mount_setattr."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def mount_setattr(
    fd: int, path: PathLike = "", *, attr_set: int = 0, attr_clr: int = 0, propagation: int = 0,
    userns_fd: int = 0, recursive: bool = False,
) -> None:  # fmt: skip
    """Change the attributes of a mount, or of it and all below it in one call. man 2 mount_setattr; Linux 5.12."""
    attr = MountAttr(attr_set, attr_clr, propagation, userns_fd)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    raw = os.fsencode(path)
    result = libc.syscall(
        SYS_mount_setattr,
        fd,
        raw,
        ctypes.c_uint(flags),
        ctypes.byref(attr),
        ctypes.c_size_t(ctypes.sizeof(attr)),
    )
    check(result, "mount_setattr", os.fspath(path) or f"fd {fd}")


def flag_names(flags: int) -> str:
    """`CLONE_NEWNS|CLONE_NEWUTS` for the number that `unshare` and `clone3` take."""
    names = [name for name, value in globals().items() if name.startswith("CLONE_NEW") and flags & value]
    return "|".join(names)


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else os.fsencode(text)
