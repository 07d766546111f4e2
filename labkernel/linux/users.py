"""User namespaces: the maps between ids inside and outside, and the ranges that a user may map.

Source: man 7 user_namespaces, man 5 subuid, man 1 newuidmap.
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import NamedTuple

from labkernel.linux import syscalls

RANGE = 65536
"""How many ids a container gets: as many as the field gives, so that uid 65534 (nobody) exists inside."""

ROOT_BASE = 0x6F000000
"""Where root's containers are mapped to: in the range that systemd sets aside for containers' ids
(524288 to 1879048191, https://systemd.io/UIDS-GIDS/), near its end, where nobody else begins."""


class IdMap(NamedTuple):
    """`count` ids from `inside` on are `outside`, `outside`+1, … in the parent user namespace."""

    inside: int
    outside: int
    count: int  # type: ignore[assignment]  # instead of the tuple's method

    def line(self) -> str:
        """As /proc/PID/uid_map takes it."""
        return f"{self.inside} {self.outside} {self.count}\n"


def write_maps(pid: int, maps: tuple[IdMap, ...]) -> None:
    """Write the same map for users and groups of process `pid`'s user namespace.

    Without CAP_SETGID outside, `setgroups` has to be given up first: dropping a group could grant access.
    """
    text = "".join(entry.line() for entry in maps)
    if len(maps) == 1 and maps[0].count == 1:
        _write(f"/proc/{pid}/setgroups", "deny")
    _write(f"/proc/{pid}/uid_map", text)
    _write(f"/proc/{pid}/gid_map", text)


def subid_range(path: Path = Path("/etc/subuid")) -> tuple[int, int] | None:
    """(first, count) of the range that the administrator gave to this user, or None. man 5 subuid."""
    uid = os.getuid()
    try:
        names = {pwd.getpwuid(uid).pw_name, str(uid)}
    except KeyError:
        names = {str(uid)}
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, *numbers = line.strip().split(":")
        if name in names and len(numbers) == 2 and all(number.isdigit() for number in numbers):
            return int(numbers[0]), int(numbers[1])
    return None


def become_root_of_own_namespace() -> tuple[IdMap, ...]:
    """Move this (single-threaded) process into a user namespace in which it is root; returns the map in force.

    With a range in /etc/subuid and /etc/subgid and the setuid helpers `newuidmap` and `newgidmap`, the reader's own
    id becomes 0 and the range follows it; without, 0 is the only id there is. Raises OSError where the machine
    forbids it.
    """
    import shutil
    import subprocess

    uid, gid = os.getuid(), os.getgid()
    uids, gids = subid_range(), subid_range(Path("/etc/subgid"))
    ready_read, ready_write = os.pipe()
    done_read, done_write = os.pipe()
    pid = os.getpid()
    with_helpers = bool(uids and gids and shutil.which("newuidmap") and shutil.which("newgidmap"))
    helper = os.fork() if with_helpers else None
    if helper == 0:  # the helper stays outside, where newuidmap's word counts
        os.close(ready_write)
        os.read(ready_read, 1)
        assert uids and gids
        ok = all(
            subprocess.run([tool, str(pid), "0", str(own), "1", "1", str(first), str(count)]).returncode == 0
            for tool, own, (first, count) in (("newuidmap", uid, uids), ("newgidmap", gid, gids))
        )
        os.write(done_write, b"y" if ok else b"n")
        os._exit(0)
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    for fd in (ready_read, ready_write, done_write):
        os.close(fd)
    mapped = with_helpers and os.read(done_read, 1) == b"y"
    os.close(done_read)
    if helper is not None:
        os.waitpid(helper, 0)
    if mapped:
        assert uids and gids
        return (IdMap(0, uid, 1), IdMap(1, uids[0], min(uids[1], gids[1])))
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"0 {uid} 1\n")
    _write("/proc/self/gid_map", f"0 {gid} 1\n")
    return (IdMap(0, uid, 1),)


def own_map() -> tuple[IdMap, ...]:
    """The map of the user namespace that we are in; empty in the machine's first one, where every id is itself."""
    rows = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    maps = tuple(IdMap(int(inside), int(outside), int(count)) for inside, outside, count in rows)
    return () if maps == (IdMap(0, 0, 0xFFFFFFFF),) else maps


def container_map(own: tuple[IdMap, ...]) -> tuple[IdMap, ...]:
    """The map of a container's user namespace, as its parent namespace (the launcher's) counts ids.

    `own` is the launcher's own map, empty for real root. Real root's containers get ids that nobody has; an
    ordinary user's container sees what the user was given, with the user as its root. Each line has to lie within
    one line of the map above (map_id_range_down in kernel/user_namespace.c), so there are as many.
    """
    if not own:
        return (IdMap(0, ROOT_BASE, RANGE),)
    maps = [IdMap(e.inside, e.inside, min(e.count, RANGE - e.inside)) for e in own if e.inside < RANGE]
    return tuple(maps)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        raise OSError(
            error.errno,
            f"write {text.strip()!r} to {path}: {error.strerror}: "
            "a map may name only ids that the writer owns or was given (man 5 subuid), and is written once",
        ) from None
    finally:
        os.close(fd)
