"""The lab's own network: a process that holds a network namespace with a bridge, to which containers are attached.

Nothing of it is in the host's network, so nothing is left there when this process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from typing import Any, NoReturn

from labkernel import walls
from labkernel.linux import namespaces, syscalls
from labkernel.processes import fork

ANSWERS_WITHIN = 60.0
"""Seconds; the first answer waits for the import of the netlink library."""


class Helper:
    """The launcher's side: attach containers by their pid, and detach them."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid, self._pidfd = fork(lambda: _serve(theirs))
        theirs.close()
        self._socket.settimeout(ANSWERS_WITHIN)

    def attach(self, pid: int, name: str, hostname: str) -> None:
        """Give the network namespace of process `pid` an interface on the bridge. Raises OSError."""
        with namespaces.opened(pid, "net") as fd:
            socket.send_fds(self._socket, [f"attach {name}".encode()], [fd])
        self._answer()

    def detach(self, name: str) -> None:
        """Forget the container `name`; its interface has gone with its namespace."""
        self._socket.send(f"detach {name}".encode())
        self._answer()

    def close(self) -> None:
        """End the process, and with it the network."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)
        os.close(self._pidfd)
        self._socket.close()

    def _answer(self) -> None:
        answer = self._socket.recv(4096).decode()
        if answer != "ok":
            raise OSError(f"the lab's network: {answer or 'its process has ended'}")


def _serve(asked: socket.socket) -> NoReturn:
    """In the helper process: make the network, then do what is asked until the launcher is gone."""
    walls.keep_only((asked.fileno(),))
    syscalls.block_signals(0)
    network: Any = None
    while True:
        data, fds, _, _ = socket.recv_fds(asked, 4096, 1)
        if not data:
            os._exit(0)
        verb, _, name = data.decode().partition(" ")
        try:
            if network is None:
                from labkernel.linux.network import LabNetwork

                syscalls.unshare(syscalls.CLONE_NEWNET)
                network = LabNetwork()
            network.attach(name, fds[0]) if verb == "attach" else network.detach(name)
            asked.send(b"ok")
        except Exception as error:
            asked.send(f"{type(error).__name__}: {error}"[:4000].encode())
        for fd in fds:
            os.close(fd)
