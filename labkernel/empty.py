"""Containers that are still empty: a control group, new namespaces, and a first process that waits for its order.

Making them takes a third of a container's start, and is the same for most containers. So the launcher makes one in
advance while it has nothing else to do, for the next container that is like most.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from dataclasses import dataclass

from labkernel import walls
from labkernel.linux import cgroups, namespaces, users
from labkernel.processes import end_now, fork
from labkernel.spec import Order


@dataclass(frozen=True)
class Empty:
    """An empty container: whoever has it gives the order, or ends it."""

    pid: int
    pidfd: int
    orders: socket.socket
    group: cgroups.Cgroup | None
    name: str
    """What its group is called, or would be."""
    kinds: frozenset[str]
    """Its new namespaces."""

    def alive(self) -> bool:
        """Whether it still waits: somebody may have killed it."""
        return not select.select([self.pidfd], [], [], 0)[0]

    def give(self, order: Order) -> None:
        """Let it become the container of this order, once it is sure to end with us. Raises ProcessLookupError."""
        if not self.orders.recv(16):
            raise ProcessLookupError(
                errno.ESRCH, "the container's first process was killed before it was in its place"
            )
        socket.send_fds(self.orders, [b"order"], order.descriptors())
        self.orders.close()

    def end(self) -> None:
        """Kill it, and remove its group."""
        end_now(self.pid, self.pidfd)
        os.close(self.pidfd)
        self.orders.close()
        if self.group:
            self.group.remove()


def make(
    kinds: frozenset[str],
    id_maps: tuple[users.IdMap, ...],
    parent: cgroups.CgroupParent | None,
    name: str,
    limits: cgroups.Limits,
) -> Empty:
    """Make an empty container, its group called `name` where groups are to be had. Raises OSError.

    Its first process is in all its namespaces from birth but the cgroup's, which it takes once it is in its group.
    """
    with contextlib.ExitStack() as undo, contextlib.ExitStack() as closing:
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
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        undo.callback(ours.close)
        closing.callback(theirs.close)
        flags = namespaces.flags(kinds - {"cgroup"})
        pid, pidfd = fork(lambda: walls.put_up(theirs, kinds, doors), flags, into)
        undo.callback(end_now, pid, pidfd)
        if "user" in kinds:
            users.write_maps(pid, id_maps)
        ours.send(b"mapped")
        undo.pop_all()
    return Empty(pid, pidfd, ours, group, name, kinds)
