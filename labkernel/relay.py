"""The published port: a small process that carries connections from the host into one container.

A socket belongs to the network namespace in which it was made, wherever its process goes afterwards. So the
relay makes its listening sockets outside, enters the container's namespaces, and from there connects to
127.0.0.1 once for each connection that it accepts. No firewall rule and no interface of the host is
touched, and root is not needed.

Source: man 7 network_namespaces, man 2 setns, man 7 tcp.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import selectors
import signal
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from selectors import EVENT_READ, EVENT_WRITE

from labkernel.linux import capabilities, namespaces, syscalls
from labkernel.linux.syscalls import PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG

NOBODY = 65534
CHUNK = 256 * 1024
"""Bytes read at once: the most that ever waits in the relay for one direction of one connection."""
BACKLOG = 512


@dataclass(frozen=True)
class Publish:
    """A port of the host, and the port of the container that it leads to. Host port 0: the kernel chooses."""

    host_ip: str
    host_port: int
    container_port: int

    def text(self, host_port: int) -> str:
        """As `parse_publish` reads it, with the port of the host that it has come to be."""
        return f"{self.host_ip}:{host_port}:{self.container_port}"


def parse_publish(text: str) -> Publish:
    """Read "HOST_IP:HOST_PORT:PORT", "HOST_PORT:PORT" or "PORT", with "/tcp" or without, as docker run does.

    Without HOST_IP it is 127.0.0.1, so that nobody else's machine can connect (Docker takes 0.0.0.0); without
    HOST_PORT the kernel chooses one. Raises ValueError.
    """
    found = re.fullmatch(
        r"(?:(?:(?P<ip>[0-9.]+):)?(?P<host>\d*):)?(?P<port>\d+)(?:/(?P<protocol>\w+))?", text
    )
    if not found:
        raise ValueError(
            f"{text!r}: write PORT, HOST_PORT:PORT or HOST_IP:HOST_PORT:PORT, with an IPv4 address"
        )
    if found["protocol"] not in (None, "tcp"):
        raise ValueError(f"{text!r}: only tcp can be published")
    publish = Publish(found["ip"] or "127.0.0.1", int(found["host"] or 0), int(found["port"]))
    try:
        socket.inet_pton(socket.AF_INET, publish.host_ip)
    except OSError:
        raise ValueError(f"{text!r}: {publish.host_ip} is not an IPv4 address") from None
    if publish.host_port > 65535 or not 1 <= publish.container_port <= 65535:
        raise ValueError(f"{text!r}: ports are between 1 and 65535")
    return publish


def listen(publish: Publish) -> socket.socket:
    """Make the listening socket; to be called in the host's network namespace.

    Raises OSError that says what to do: EADDRINUSE, EACCES for a low port, EADDRNOTAVAIL.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # old connections in TIME_WAIT do not matter
        listener.bind((publish.host_ip, publish.host_port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _explained(error, publish) from None
    return listener


def _explained(error: OSError, publish: Publish) -> OSError:
    port = publish.host_port
    remedies = {
        errno.EADDRINUSE: "another program listens there already: stop it "
        f"(`ss -ltnp sport = :{port}` names it), or publish another port of the host",
        errno.EACCES: "ports below /proc/sys/net/ipv4/ip_unprivileged_port_start need CAP_NET_BIND_SERVICE: "
        "choose a higher one",
        errno.EADDRNOTAVAIL: "this machine has no such address",
    }
    remedy = remedies.get(error.errno or 0, "")
    text = f"bind({publish.host_ip}:{port}): {error.strerror}" + (f": {remedy}" if remedy else "")
    return OSError(error.errno, text)


def serve(listeners: Iterable[tuple[Publish, socket.socket]], container_pid: int) -> None:
    """Carry connections until the container's init, `container_pid`, has ended, or our own parent.

    To be called in a process of its own with a single thread, that does nothing afterwards: it enters the
    container's user and network namespaces and gives up what rights it has.
    """
    parent = os.getppid()
    pidfd = os.pidfd_open(container_pid)
    namespaces.enter(container_pid, ("user", "net"))
    _give_up_rights()
    # Changing ids clears this setting, so it comes last; the parent may have died before it.
    syscalls.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:
        Relay(listeners, pidfd).run()


def _give_up_rights() -> None:
    """Become the container's nobody, if it has one, without any capability."""
    syscalls.prctl(PR_SET_DUMPABLE, 0)  # nobody inside may look into this process
    with contextlib.suppress(OSError):  # in a map of a single id there is no other to become
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    capabilities.capset((), ())
    syscalls.prctl(PR_SET_NO_NEW_PRIVS, 1)


@dataclass(eq=False)
class End:
    """One of a connection's two sockets, and what is to be sent on it."""

    socket: socket.socket
    connecting: bool = False
    waiting: memoryview = field(default_factory=lambda: memoryview(b""))
    """Read from the other end, not yet sent."""
    ended: bool = False
    """It will send us nothing more."""
    finished: bool = False
    """We have told it that nothing more comes."""
    watched: int = 0
    other: End = field(init=False)


class Relay:
    """The loop over all connections: pairs of `End`s. A side is read only when all it sent is delivered."""

    def __init__(self, listeners: Iterable[tuple[Publish, socket.socket]], pidfd: int) -> None:
        self.selector = selectors.DefaultSelector()
        self.buffer = bytearray(CHUNK)
        self.listeners = [(listener, publish.container_port) for publish, listener in listeners]
        self.pidfd = pidfd
        self.selector.register(pidfd, EVENT_READ)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self.room = (hard - 64) // 2  # connections for which there are descriptors
        self.accepting = False
        self._accept_while_room()

    def run(self) -> None:
        """Serve until the container ends."""
        while True:
            for key, events in self.selector.select():
                if key.fd == self.pidfd:
                    return
                if isinstance(key.data, End):
                    self._end_event(key.data, events)
                else:
                    self._accept(key.fileobj, key.data)  # type: ignore[arg-type]

    def _accept_while_room(self) -> None:
        """Listen exactly as long as another connection can be held; the rest wait in the kernel's queue."""
        if self.accepting == (self.room > 0):
            return
        self.accepting = not self.accepting
        for listener, port in self.listeners:
            if self.accepting:
                self.selector.register(listener, EVENT_READ, port)
            else:
                self.selector.unregister(listener)

    def _accept(self, listener: socket.socket, port: int) -> None:
        try:
            outer, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError:  # the client has gone again; or the machine is out of descriptors: not in a busy loop
            time.sleep(0.01)
            return
        with contextlib.ExitStack() as undo:
            undo.enter_context(outer)
            inner = undo.enter_context(
                socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            )
            outer.setblocking(False)
            for one in (outer, inner):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # the sender has chosen its packets
            if inner.connect_ex(("127.0.0.1", port)) not in (0, errno.EINPROGRESS):
                _reset_at_close(outer)  # nothing listens inside: the client hears it at once
                return
            undo.pop_all()
        client, server = End(outer), End(inner, connecting=True)
        client.other, server.other = server, client
        self.room -= 1
        self._accept_while_room()
        self._watch(client)
        self._watch(server)

    def _end_event(self, end: End, events: int) -> None:
        if end.socket.fileno() == -1:  # closed by an earlier event of the same round
            return
        try:
            if end.connecting:
                end.connecting = False
                if problem := end.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    raise OSError(problem, os.strerror(problem))
            elif events & EVENT_WRITE:
                end.waiting = end.waiting[end.socket.send(end.waiting) :]
            if events & EVENT_READ:
                self._read(end)
            self._pass_on_the_end(end)
            self._pass_on_the_end(end.other)
        except BlockingIOError:
            pass
        except OSError:  # reset by one side: reset the other
            self._close(end, abort=True)
            return
        if end.finished and end.other.finished:
            self._close(end)
        else:
            self._watch(end)
            self._watch(end.other)

    def _read(self, end: End) -> None:
        """Read a chunk, and hand it on as far as the other side takes it."""
        size = end.socket.recv_into(self.buffer)
        if size == 0:
            end.ended = True
            return
        view = memoryview(self.buffer)[:size]
        sent = 0
        if not end.other.connecting:
            with contextlib.suppress(BlockingIOError):
                sent = end.other.socket.send(view)
        if sent < size:
            end.other.waiting = memoryview(bytes(view[sent:]))

    @staticmethod
    def _pass_on_the_end(end: End) -> None:
        """When the other side has ended and all is delivered, tell this one: half the connection is over."""
        if end.other.ended and not end.waiting and not end.connecting and not end.finished:
            end.finished = True
            end.socket.shutdown(socket.SHUT_WR)

    def _watch(self, end: End) -> None:
        """Wait for just what can be used: otherwise a socket that is always ready would keep us spinning."""
        wanted = EVENT_WRITE if end.waiting or end.connecting else 0
        if not end.ended and not end.connecting and not end.other.waiting:
            wanted |= EVENT_READ
        if wanted == end.watched:
            return
        if not end.watched:
            self.selector.register(end.socket, wanted, end)
        elif not wanted:
            self.selector.unregister(end.socket)
        else:
            self.selector.modify(end.socket, wanted, end)
        end.watched = wanted

    def _close(self, end: End, abort: bool = False) -> None:
        for one in (end, end.other):
            if one.watched:
                self.selector.unregister(one.socket)
            if abort:
                _reset_at_close(one.socket)
            one.socket.close()
        self.room += 1
        self._accept_while_room()


def _reset_at_close(one: socket.socket) -> None:
    """Let close send a reset rather than an orderly end: a linger time of 0. man 7 socket."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
