"""Landlock: a process gives up access to files by their paths, and needs no privilege for it.

A seccomp filter sees numbers; a path is only the address of one. Landlock is asked where the kernel has the file
already. A ruleset names the kinds of access that it is about. All of these are refused from then on, but below the
directories for which a rule allows them. It holds for the process and its descendants, for ever, and can be narrowed
again. What is open stays open.

Source: man 7 landlock, https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import ctypes
import enum
import os
import struct
from collections.abc import Mapping

from labkernel.linux import syscalls

# The same numbers on every architecture. <asm/unistd.h>
SYS_landlock_create_ruleset = 444
SYS_landlock_add_rule = 445
SYS_landlock_restrict_self = 446

LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1


class Access(enum.IntFlag):
    """LANDLOCK_ACCESS_FS_… of <linux/landlock.h>: what can be given up in version 1 of the interface (Linux 5.13)."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12


READ = Access.EXECUTE | Access.READ_FILE | Access.READ_DIR
ALL = Access((1 << 13) - 1)


def version() -> int:
    """The version of the kernel's interface, or 0 where it has none, or has it switched off."""
    found: int = syscalls.libc.syscall(
        SYS_landlock_create_ruleset, None, ctypes.c_size_t(0), ctypes.c_uint(LANDLOCK_CREATE_RULESET_VERSION)
    )
    return max(found, 0)


def create_ruleset(handled: Access) -> int:
    """A descriptor of a new ruleset about these kinds of access. man 2 landlock_create_ruleset.

    Raises OSError ENOSYS or EOPNOTSUPP where the kernel has no Landlock.
    """
    attributes = struct.pack("=Q", handled)
    size = ctypes.c_size_t(len(attributes))
    result = syscalls.libc.syscall(SYS_landlock_create_ruleset, attributes, size, ctypes.c_uint(0))
    return syscalls.check(result, "landlock_create_ruleset", f"{handled!r}")


def add_rule(ruleset: int, path: syscalls.PathLike, allowed: Access) -> None:
    """Allow these kinds of access to a file, or to all that is below a directory. man 2 landlock_add_rule.

    Raises OSError EINVAL for what the ruleset is not about, or what makes no sense for a file, such as READ_DIR.
    """
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        attributes = struct.pack("=Qi", allowed, place)
        result = syscalls.libc.syscall(
            SYS_landlock_add_rule, ruleset, LANDLOCK_RULE_PATH_BENEATH, attributes, ctypes.c_uint(0)
        )
        syscalls.check(result, "landlock_add_rule", f"{os.fspath(path)}, {allowed!r}")
    finally:
        os.close(place)


def restrict_self(ruleset: int) -> None:
    """Put the calling thread under the ruleset. man 2 landlock_restrict_self.

    Needs no_new_privs or CAP_SYS_ADMIN; raises OSError EPERM without.
    """
    result = syscalls.libc.syscall(SYS_landlock_restrict_self, ruleset, ctypes.c_uint(0))
    syscalls.check(result, "landlock_restrict_self", f"fd {ruleset}")


def confine(paths: Mapping[str, Access]) -> None:
    """Give up all access to files, but for these kinds of it below these paths; sets no_new_privs."""
    ruleset = create_ruleset(ALL)
    try:
        for path, allowed in paths.items():
            add_rule(ruleset, path, allowed)
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        restrict_self(ruleset)
    finally:
        os.close(ruleset)
