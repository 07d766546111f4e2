"""A box to play root in: a function runs as root over users, mounts, processes and a network that are its own.

For notebook 18, where it counts what a process *may* do: in the box that depends on nothing else than its
capabilities, whoever runs the lab, and whatever it does there reaches nothing outside.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar, cast

from labkernel.children import in_child, memory_file
from labkernel.images import rootfs
from labkernel.lab.fork import tell, told
from labkernel.linux import mounts, namespaces, network, syscalls, users
from labkernel.walls import become

T = TypeVar("T")

KINDS = ("user", "mnt", "uts", "ipc", "pid", "net")
ROOT = "/tmp"
"""Where the box's root is put together; hidden from the box alone."""


def in_box(function: Callable[..., T], *arguments: object) -> T:
    """Run a function in a box, print what it prints, and return its value. Raises what the function raises.

    In the box the function is process 1 and root, with every capability. Its root directory is the lab's image, read
    only; /tmp is empty and honours set-user-id bits and file capabilities; the loopback is up. When the function
    ends, the box is gone with everything in it.
    """
    return cast(T, in_child(boxed, str(rootfs()), function, *arguments))


def boxed(image: str, function: Callable[..., T], *arguments: object) -> T:
    """The same from inside a child of the lab (`in_child`), with the root file system in `image`.

    Raises ChildFailed when the process was killed, or ended without a value.
    """
    sys.stdout.flush()
    tree = syscalls.open_tree(image, syscalls.OPEN_TREE_CLONE)
    result = memory_file(b"")
    ready, go = os.pipe()
    pid, _ = syscalls.clone3(namespaces.flags(KINDS))
    if pid == 0:
        os.close(go)  # so that we end if the other one does
        _be_first(tree, ready, result, function, arguments)
    os.close(tree)
    users.write_maps(pid, (strangers(users.own_map()),))
    os.write(go, b"!")
    for fd in (ready, go):
        os.close(fd)
    return cast(T, told(pid, result))


def strangers(own: tuple[users.IdMap, ...]) -> users.IdMap:
    """The map of a box: none of its ids, not even its root's, is one that whoever runs the lab has.

    `own` is the lab's own map, empty for root of the machine. Raises OSError where there is only one id to give.
    """
    if not own:
        return users.IdMap(0, users.ROOT_BASE, users.RANGE)
    most = max(own, key=lambda entry: entry.count)
    first = max(most.inside, 1)
    count = min(most.inside + most.count - first, users.RANGE)
    if count < 2:
        raise OSError("a box needs a range of ids, see subuid in the doctor's list")
    return users.IdMap(0, first, count)


def _be_first(
    tree: int, ready: int, result: int, function: Callable[..., object], arguments: tuple[object, ...]
) -> NoReturn:
    """Process 1 of the box: wait for the map, build the root, run the function, tell its value."""
    try:
        if not os.read(ready, 1):
            os._exit(1)
        become(0, 0)
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        tell(result, _in_place, tree, function, arguments)
    finally:
        os._exit(1)


def _in_place(tree: int, function: Callable[..., object], arguments: tuple[object, ...]) -> object:
    socket.sethostname("box")
    network.loopback_up()
    mounts.set_propagation("/", "private")
    syscalls.move_mount(tree, ROOT)
    os.close(tree)
    syscalls.mount_setattr(syscalls.AT_FDCWD, ROOT, attr_set=syscalls.MOUNT_ATTR_RDONLY)
    mounts.proc(f"{ROOT}/proc")
    mounts.minimal_dev(f"{ROOT}/dev")
    mounts.tmpfs(f"{ROOT}/tmp", mode=0o1777, flags=0)
    mounts.pivot_root_into(ROOT)
    _import_from_the_image()
    os.environ["PATH"] = "/usr/bin:/bin"
    return function(*arguments)


def _import_from_the_image() -> None:
    """Find what the function still imports where the image has it: the same Python, at another place."""
    here = os.path.dirname(os.__file__)
    there = f"/usr/lib/python{sys.version_info.major}.{sys.version_info.minor}"
    if not Path(there).is_dir():
        return
    sys.path[:] = [there, f"{there}/lib-dynload"]
    for module in list(sys.modules.values()):
        if isinstance(path := getattr(module, "__path__", None), list):
            path[:] = [
                there + place.removeprefix(here) if place.startswith(here) else place for place in path
            ]
