"""Containers that are still empty: a directory, a control group, new namespaces with a root built in them, and a
process that waits for its order.

Making them takes most of a container's start, and is the same for all that stand on the same ground. So the launcher
makes one in advance while it has nothing else to do, for the next container that is like the last.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import socket
from collections.abc import Iterator
from functools import cached_property
from typing import NoReturn

from labkernel import state, walls
from labkernel.linux import cgroups, mounts, namespaces, syscalls, users
from labkernel.processes import end_now, fork
from labkernel.spec import Order, Spec

UMASK = 0o022
"""Of a container's processes, as Docker has it, and not the caller's: 077 would close the container to its users."""


class Empty:
    """An empty container: whoever has it gives the order, or ends it."""

    def __init__(
        self, like: Spec, image: tuple[int, int], pid: int, pidfd: int, orders: socket.socket,
        group: cgroups.Cgroup | None, name: str, limits: cgroups.Limits,
    ) -> None:  # fmt: skip
        self.like = like
        """The container that it is like."""
        self.image = image
        """Which directory its root stands on, by device and inode: another may come to have the same path."""
        self.pid, self.pidfd = pid, pidfd
        self.init = state.ProcessKey.of(pid)
        self.orders = orders
        with namespaces.opened(pid, "mnt") as fd:
            self.mounts = os.dup(fd)
        """Its mount namespace. While somebody has it open, its processes need not take it apart when they end."""
        self.group = group
        self.name = name
        """What its group is called, or would be."""
        self.limits = limits
        """Those that its group has."""

    @cached_property
    def built(self) -> bytes:
        """What it says when it has built its root: b"built" or b"failed"; nothing if it was killed before that."""
        return self.orders.recv(16)

    def limit(self, limits: cgroups.Limits) -> None:
        """Set the limits of its group, where it has others."""
        if self.group and limits != self.limits:
            self.group.set(limits)
            self.limits = limits

    def fits(self, spec: Spec) -> bool:
        """Whether it can become this container, and still waits: somebody may have killed it."""
        with contextlib.suppress(OSError):
            alike = self.like.ground == spec.ground and self.image == identity(spec.rootfs)
            return alike and self.built == b"built" and not select.select([self.pidfd], [], [], 0)[0]
        return False

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Keep it off the processor that we run on, where it has another, until the block ends.

        Else what we send would let it run after us and not beside us: whoever waits for a message is woken on the
        processor of its sender, who is taken to go to sleep then (WF_SYNC in kernel/sched/fair.c). But we go on.
        """
        allowed: set[int] = set()
        with contextlib.suppress(OSError):  # killed
            allowed, ours = os.sched_getaffinity(self.pid), syscalls.getcpu()
            if len(allowed) > 1:
                os.sched_setaffinity(self.pid, allowed - {ours})
        yield
        with contextlib.suppress(OSError):
            os.sched_setaffinity(self.pid, allowed)

    def give(self, order: Order) -> None:
        """Let it become the container of this order, all but its program."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # killed: its end will be told
            socket.send_fds(self.orders, [b"order"], order.descriptors())

    def go(self) -> None:
        """Let the program run. Whoever is built is sure to end with us."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if self.built:
                self.orders.send(b"go")
        self.orders.close()

    def end(self) -> None:
        """Kill it, and remove its group."""
        end_now(self.pid, self.pidfd)
        os.close(self.pidfd)
        os.close(self.mounts)
        self.orders.close()
        if self.group:
            self.group.remove()


def make(
    like: Spec,
    directory: str,
    id_maps: tuple[users.IdMap, ...],
    parent: cgroups.CgroupParent | None,
    name: str,
    limits: cgroups.Limits,
) -> Empty:
    """Make an empty container in `directory`, its group called `name` where groups are to be had. Raises OSError.

    Its first process is in all its namespaces from birth but the cgroup's, which it takes once it is in its group.
    """
    with contextlib.ExitStack() as undo, contextlib.ExitStack() as closing:
        lay_out(directory, id_maps[0].outside if id_maps else 0)
        group = parent.open(name) if parent else None
        doors: tuple[int, ...] = ()
        into = None
        if parent and group:
            undo.callback(group.remove)  # also what was made of it, where making it fails in the middle
            parent.create(name)
            group.set(limits)  # before anybody is in it: a cpuset takes nobody until it is filled
            into, doors = group.into_fd, group.door_fds()
            for fd in (*doors, *([] if into is None else [into])):
                closing.callback(os.close, fd)
        # Opened here, since the child could not walk there itself: our directories are closed to its ids.
        image = identity(like.rootfs)
        rootfs = copied_mount(like.rootfs)
        closing.callback(os.close, rootfs)
        writable = copied_mount(directory)
        closing.callback(os.close, writable)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        undo.callback(ours.close)
        closing.callback(theirs.close)
        words = pickle.dumps({"spec": like, "logged": []})
        flags = namespaces.flags(like.namespaces - {"cgroup"})

        def first() -> NoReturn:
            os.umask(UMASK)
            walls.put_up(theirs, doors, like, words, rootfs, writable)

        pid, pidfd = fork(first, flags, into)
        undo.callback(os.close, pidfd)
        undo.callback(end_now, pid, pidfd)
        if "user" in like.namespaces:
            users.write_maps(pid, id_maps)
        made = Empty(like, image, pid, pidfd, ours, group, name, limits)
        ours.send(b"mapped")
        undo.pop_all()
    return made


def lay_out(directory: str, owner: int) -> None:
    """Make the writable layer, with the files that will say the container's name."""
    os.chmod(directory, 0o755)  # whatever our caller's umask is
    for name in ("upper", "work", "upper/etc"):
        os.mkdir(f"{directory}/{name}")
        os.chmod(f"{directory}/{name}", 0o755)
        os.chown(f"{directory}/{name}", owner, owner)
    for name in ("hostname", "hosts"):
        fd = os.open(f"{directory}/upper/etc/{name}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.fchmod(fd, 0o644)
        os.fchown(fd, owner, owner)
        os.close(fd)


def copied_mount(path: str) -> int:
    """A detached copy of the mount at `path`, a private one: what is mounted on it is not for the host to see."""
    tree = syscalls.open_tree(path, syscalls.OPEN_TREE_CLONE)
    syscalls.mount_setattr(tree, propagation=mounts.PROPAGATION["private"])
    return tree


def identity(path: str) -> tuple[int, int]:
    """Which file a path leads to."""
    status = os.stat(path)
    return status.st_dev, status.st_ino
