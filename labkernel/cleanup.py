"""Finishing what a killed launcher could not: processes, control groups, directories.

Everything that the lab makes is written down before it is made (see `labkernel.state`), so whatever is left can be
found again, by the next launcher that starts or by `labkernel clean`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from labkernel import state
from labkernel.linux import cgroups

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

PATIENCE = 10.0
"""Seconds that removing one directory, or a launcher of a child's that tidies up, may keep others waiting.

What is left then is removed another time."""


def clean(parent: cgroups.CgroupParent | None) -> list[str]:
    """Remove what killed launchers have left behind; returns what was removed, in words."""
    removed = []
    for path in sorted(state.launchers().glob("*.json")) if state.launchers().is_dir() else ():
        key = _launcher_key(path)
        if key and key.alive():
            continue
        with contextlib.suppress(OSError):  # what cannot be removed must not keep a launcher from starting
            if key and _session_may_be_left(key) and (killed := end_session(key.pid)):
                removed.append(f"{killed} processes of launcher {key.pid}")
            if forget_launcher(path, key):  # what else it has left, `_remove_forgotten` finds
                removed.append(f"the record of launcher {path.stem}")
    for record in state.records():
        if record["state"] == "dead" and not _will_be_tidied_up(record):
            with contextlib.suppress(OSError):
                removed += remove_leftovers(record, parent)
    with contextlib.suppress(OSError):
        removed += remove_groups_of_ended_children(parent)
    with contextlib.suppress(OSError):
        removed += _remove_unfinished()
    with contextlib.suppress(OSError):
        removed += _remove_forgotten(parent)
    return removed


def _will_be_tidied_up(record: Mapping[str, Any]) -> bool:
    """Whether its launcher lives: it does it itself, and has only not come to it yet."""
    try:
        return state.ProcessKey(**record["launcher"]).alive()
    except (KeyError, TypeError):
        return False


def _session_may_be_left(launcher: state.ProcessKey) -> bool:
    """Whether a dead launcher's pid can still name its session: the kernel gives it to nobody while somebody is in
    that session, so where another process has it by now, its session is another one too."""
    if launcher.boot != state.boot_id():
        return False
    with contextlib.suppress(ProcessLookupError):
        return state.start_time(launcher.pid) == launcher.started
    return True


def remember_launcher(record: Path, key: state.ProcessKey) -> None:
    """Write down that a launcher lives. Nobody removes it for being half written (see `forget_launcher`)."""
    with state.locked(record.parent):
        record.write_text(json.dumps(key._asdict()))


def forget_launcher(record: Path, key: state.ProcessKey | None) -> bool:
    """Remove the record of a launcher, unless it is another's by now, who has the pid; whether it was removed."""
    with contextlib.suppress(FileNotFoundError), state.locked(record.parent):  # the whole home may be gone
        if _launcher_key(record) == key:
            record.unlink(missing_ok=True)
            return True
    return False


CHILD_GROUPS = state.PREFIX + "child-"


def groups_of_child(pid: int) -> str:
    """How the names of those control groups begin that a child of a launcher has made by hand (`lab.group`)."""
    return f"{CHILD_GROUPS}{pid}-"


def remove_groups_of_ended_children(parent: cgroups.CgroupParent | None) -> list[str]:
    """Remove the groups that were made by a child that was killed with its launcher, or by one that outlived both."""
    removed = []
    for name in parent.names(CHILD_GROUPS) if parent else ():
        child = _child_of_group(name)
        if child and not _lives(child):
            removed += remove_groups_of_child(child, parent)
    for path in _groups_in_other_places():
        child = _child_of_group(path.name)
        if child and not _lives(child):
            removed += _remove_group_by_path(path)
    return removed


def _child_of_group(name: str) -> int:
    """The pid of the child that made the group, or 0 where somebody else has called one like ours."""
    number = name.removeprefix(CHILD_GROUPS).partition("-")[0]
    return int(number) if number.isdecimal() and number.isascii() else 0


def _groups_in_other_places() -> list[Path]:
    """Those that somebody else's runtime has made for a child: by its own rules, in trees that we do not use, too."""
    paths = cgroups.own_paths()
    places: set[Path] = set()
    for mounted in cgroups.mounts():
        places.add(Path(mounted.point))
        for name in mounted.controllers or {""}:
            if name in paths:
                places.add(cgroups.below_mount(mounted, paths[name]))
    return sorted(path for place in places for path in place.glob(f"{CHILD_GROUPS}*"))


def _remove_group_by_path(path: Path) -> list[str]:
    for directory, _, _ in os.walk(path, topdown=False):
        for pid in cgroups.read(f"{directory}/cgroup.procs").split():
            with contextlib.suppress(ProcessLookupError):
                if int(pid):  # 0 is one whom our pid namespace does not show
                    os.kill(int(pid), signal.SIGKILL)
        cgroups.remove_directory(Path(directory), timeout=5)
    return [f"group {path.name}"]


def remove_groups_of_child(pid: int, parent: cgroups.CgroupParent | None) -> list[str]:
    """Remove the control groups that a child made by hand, with who is still in them, and the groups inside them."""
    removed: list[str] = []
    if parent is None:
        return removed
    for name in parent.names(groups_of_child(pid)):
        group = parent.open(name)
        with contextlib.suppress(OSError):
            group.kill()  # at once: one after the other would be slower than who forks
        with contextlib.suppress(OSError):
            group.thaw()  # in cgroup v1, who is frozen does not even die
        for path in dict.fromkeys(group.paths.values()):
            for directory, _, _ in os.walk(path, topdown=False):
                cgroups.remove_directory(Path(directory), timeout=5)
        removed.append(f"group {name}")
    return removed


def remove_leftovers(record: Mapping[str, Any], parent: cgroups.CgroupParent | None) -> list[str]:
    """Kill and remove all of one container whose launcher is gone, or that has ended."""
    if record.get("init"):
        init = state.ProcessKey(**record["init"])
        if init.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(init.pid, signal.SIGKILL)
    name = record.get("group")
    group = cgroups.at(record.get("cgroup")) or (parent.open(name) if parent and name else None)
    if group and any(os.path.isdir(path) for path in group.paths.values()):
        with contextlib.suppress(OSError):
            group.kill()
        group.remove()
    state.free_name(record["name"], record["id"])
    remove_tree(record["directory"], PATIENCE)
    return [f"container {record['name']}"]


def end_session(session: int) -> int:
    """Kill every process of a launcher's session but the launcher, and our own orphans where it is ours.

    An orphan that is a launcher itself, which one of our children has started, is asked to end, and has some time for
    it: killed, it would leave to nobody what it runs, or what it tidies up just now.

    Returns how many there were.
    """
    met: set[int] = set()
    patience = time.monotonic() + PATIENCE
    while (now := time.monotonic()) < patience + 1:
        members = [
            pid
            for pid in _pids()
            if pid not in (session, os.getpid())
            and (_session_of(pid) == session or session == os.getpid() == _parent_of(pid))
        ]
        if not members:
            break
        launchers = _launchers() if now < patience else set()
        for pid in members:
            if pid in launchers & met:
                continue
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGTERM if pid in launchers else signal.SIGKILL)
                met.add(pid)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.005)
    return len(met)


def _launchers() -> set[int]:
    """The pids of the launchers that live."""
    keys = map(_launcher_key, state.launchers().glob("*.json"))
    return {key.pid for key in keys if key and key.alive()}


def remove_spare(directory: Path, parent: cgroups.CgroupParent | None) -> None:
    """Remove the group and directory of a launcher's empty container; its processes end with the launcher, or now."""
    with contextlib.suppress(OSError, ValueError):
        name = (directory / "group").read_text().split()[:1]
        if parent and name and name[0].startswith(state.PREFIX) and "/" not in name[0]:
            group = parent.open(name[0])
            with contextlib.suppress(OSError):
                group.kill()
            group.remove()
    remove_tree(str(directory), PATIENCE)


def remove_tree(path: str, seconds: float = math.inf) -> bool:
    """Remove a container's directory, and leave what cannot be removed; False where the time was up before the end.

    What is in there, the container's programs have made. A link of theirs may lead to any file of the host: no link
    is followed. Directories may lie deeper than a path can say, or than `shutil.rmtree` can call itself: not all the
    way down is held open. So another container, which was given a descriptor, may move them while we are in them.
    Then what is above them may be the host's, and we begin again at the top; and none is entered twice, or they could
    lead us in circles. Some forbid to be listed, as one does that overlay leaves: they are opened up first. Nothing
    that is mounted in there is entered.
    """
    end = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        fd = os.open(path, DIRECTORY)
        try:
            mounted = _mount(fd)
            top = Level(path, _identity(fd), _remove_files(fd, end))
            way = [top]
            passed = {top.identity}  # those on our way
            while way != [top] or top.directories:
                if time.monotonic() > end:
                    return False
                here = way[-1]
                if here.directories:
                    name = here.directories.pop()
                    with contextlib.suppress(OSError):
                        fd = _exchanged(fd, _opened_up(name, fd, mounted, passed))
                        way.append(Level(name, _identity(fd), _remove_files(fd, end)))
                        passed.add(way[-1].identity)
                elif (above := _above(fd, way[-2])) is not None:
                    fd = _exchanged(fd, above)
                    passed.discard(way.pop().identity)
                    with contextlib.suppress(OSError):
                        os.rmdir(here.name, dir_fd=fd)
                else:
                    fd = _exchanged(fd, os.open(path, DIRECTORY))
                    if _identity(fd) != top.identity:
                        break
                    del way[1:]
                    passed = {top.identity}
        finally:
            os.close(fd)
        os.rmdir(path)
    return time.monotonic() <= end


class Level(NamedTuple):
    """A directory on our way down: its name, which it is, and the names of the directories that are left in it."""

    name: str
    identity: tuple[int, int]
    directories: list[str]


def _above(fd: int, level: Level) -> int | None:
    """The directory above an open one, or None where it is not the one that we came from."""
    try:
        above = os.open("..", DIRECTORY, dir_fd=fd)
    except OSError:
        return None
    if _identity(above) == level.identity:
        return above
    os.close(above)
    return None


def _mount(fd: int) -> str:
    """By which mount an open file was reached; man 5 proc_pid_fdinfo."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        return next(line for line in file if line.startswith("mnt_id:"))


def _identity(fd: int) -> tuple[int, int]:
    """Which file an open one is: the device, and the number there."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _remove_files(directory: int, end: float) -> list[str]:
    """Remove what is no directory from an open one, until the time is up; the names of the directories in it."""
    directories = []
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        # Not all at once: the memory for a great many names is ours, and no limit of the container's counts it.
        while time.monotonic() < end and (some := list(itertools.islice(entries, 1000))):
            for entry in some:
                if entry.is_dir(follow_symlinks=False):
                    directories.append(entry.name)
                    continue
                with contextlib.suppress(OSError):
                    os.unlink(entry.name, dir_fd=directory)
    return directories


def _opened_up(name: str, parent: int, mounted: str, passed: set[tuple[int, int]]) -> int:
    """A directory, opened after we are let list and change it; O_NOFOLLOW, so that it is that one and no other."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent)
    try:
        if _mount(fd) != mounted:
            raise OSError(errno.EXDEV, f"on {name!r} something is mounted")
        if _identity(fd) in passed:
            raise OSError(errno.ELOOP, f"{name!r} was moved into what it holds")
        with contextlib.suppress(OSError):  # somebody else's; perhaps it does not forbid anything
            os.chmod(f"/proc/self/fd/{fd}", 0o700)
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(fd)


def _exchanged(old: int, new: int) -> int:
    os.close(old)
    return new


def _remove_unfinished() -> list[str]:
    """A container's directory without a record; images and root file systems that were cut short."""
    removed = []
    for directory in (state.containers(), state.home() / "rootfs", state.home() / "images"):
        if not directory.is_dir():
            continue
        with state.locked(directory, wait=directory == state.containers()) as ours:
            for path in sorted(directory.iterdir()) if ours else ():  # else somebody is building there
                if path.name.startswith(".") or (
                    directory == state.containers() and not state.read_record(path)
                ):
                    remove_tree(str(path), PATIENCE) if path.is_dir() else path.unlink(missing_ok=True)
                    removed.append(f"{directory.name}/{path.name}")
    return removed + _remove_unfinished_builds()


def _remove_forgotten(parent: cgroups.CgroupParent | None) -> list[str]:
    """What is left of launchers whose record is gone. Whatever happened to that: a pid that lives keeps what it has."""
    removed = []
    for path in sorted(state.launchers().glob("*")):
        if path.suffix not in (".spare", ".ended") or path.with_suffix(".json").exists():
            continue
        if path.stem.isdecimal() and not _lives(int(path.stem)):
            remove_spare(path, parent) if path.suffix == ".spare" else remove_tree(str(path), PATIENCE)
            if not path.exists():
                removed.append(f"launchers/{path.name}")
    return removed


def _remove_unfinished_builds() -> list[str]:
    """What killed builds have left of their trees; their caches and logs stay (see `labkernel.image.recipes`)."""
    removed = []
    for work in sorted((state.home() / "builds").glob("*/work")):
        with state.locked(work.parent, wait=False) as ours:
            if ours:  # else somebody is building there
                remove_tree(str(work))
                removed.append(f"the unfinished build of {work.parent.name}")
    return removed


def _launcher_key(path: Path) -> state.ProcessKey | None:
    try:
        return state.ProcessKey(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _lives(pid: int) -> bool:
    """Whether a process has not ended; one that has, but whom nobody has reaped, has."""
    return bool(_stat(pid))


def _session_of(pid: int) -> int:
    """A process's session; 0 when it has ended, or has it from outside of our pid namespace."""
    fields = _stat(pid)
    return int(fields[3]) if fields else 0


def _parent_of(pid: int) -> int:
    """A process's parent; 0 when it has ended, or has it from outside of our pid namespace."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _stat(pid: int) -> list[bytes]:
    """What the kernel says of a process after its name; nothing when it has ended. man 5 proc_pid_stat."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in (b"Z", b"X") else fields
