"""The relay, between this namespace and a network namespace of the test's own."""

from __future__ import annotations

import errno
import hashlib
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from labkernel import relay
from labkernel.linux import namespaces, network, syscalls, users
from labkernel.relay import Publish, parse_publish

PORT = 80


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8000:80", Publish("127.0.0.1", 8000, 80)),
        ("127.0.0.1:8000:80/tcp", Publish("127.0.0.1", 8000, 80)),
        ("0.0.0.0:8000:80", Publish("0.0.0.0", 8000, 80)),
        ("80", Publish("127.0.0.1", 0, 80)),
        ("127.0.0.1::80", Publish("127.0.0.1", 0, 80)),
    ],
)
def test_a_published_port_is_written_as_docker_writes_it(text: str, expected: Publish) -> None:
    assert parse_publish(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "eighty", "8000:80/udp", "8000:0", "70000:80", "8000:70000", "1.2.3:8000:80", "-1:80", "1:2:3:4"],
)
def test_what_cannot_be_meant_is_refused_with_the_text_in_the_message(text: str) -> None:
    with pytest.raises(ValueError, match=text or "write PORT"):
        parse_publish(text)


def test_a_port_in_use_says_so_and_what_to_do() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"127.0.0.1:{port}.*another program listens") as caught:
            relay.listen(Publish("127.0.0.1", port, 80))
    assert caught.value.errno == errno.EADDRINUSE


def test_an_address_of_somebody_else_says_so() -> None:
    with pytest.raises(OSError, match="no such address"):
        relay.listen(Publish("192.0.2.1", 8000, 80))


# ---------------------------------------------------------------------- with a relay

Server = Callable[[socket.socket], None]


@contextmanager
def child(work: Callable[[], None]) -> Iterator[int]:
    """A child process of a process with threads: it must not use what those hold."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextmanager
def container(serve: Server | None) -> Iterator[int]:
    """A process with a user and a network namespace, in which every connection to PORT goes to `serve`."""
    ready, tell = os.pipe()
    mapped, go = os.pipe()

    def inside() -> None:
        syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNET)
        os.write(tell, b".")
        os.read(mapped, 1)
        network.loopback_up()
        if serve is None:
            os.write(tell, b".")
            signal.pause()
            return
        with socket.create_server(("127.0.0.1", PORT), backlog=512) as listener:
            os.write(tell, b".")
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=serve, args=(connection,)).start()

    with child(inside) as pid:
        os.close(tell)  # so that the end of a child that fails is noticed
        assert os.read(ready, 1), "no new namespaces"
        if os.geteuid() == 0:
            users.write_maps(pid, (users.IdMap(0, users.ROOT_BASE, users.RANGE),))
        else:
            users.write_maps(pid, (users.IdMap(0, os.getuid(), 1),))
        os.write(go, b".")
        assert os.read(ready, 1), "no server"
        yield pid
    for fd in (ready, mapped, go):
        os.close(fd)


@contextmanager
def published(serve: Server | None) -> Iterator[tuple[int, int, int]]:
    """A container and its relay: (port on the host, pid of the container, pid of the relay)."""
    publish = Publish("127.0.0.1", 0, PORT)
    with container(serve) as pid, closing(relay.listen(publish)) as listener:
        port = listener.getsockname()[1]
        with child(lambda: relay.serve([(publish, listener)], pid)) as relay_pid:
            listener.close()
            yield port, pid, relay_pid


def client(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def everything(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(1 << 18):
        parts.append(part)
    return b"".join(parts)


def echo(connection: socket.socket) -> None:
    with connection:
        while part := connection.recv(1 << 18):
            connection.sendall(part)


def answer_after_the_end(connection: socket.socket) -> None:
    """Says nothing before the client has said all."""
    with connection:
        connection.sendall(hashlib.sha256(everything(connection)).digest())


def send_a_lot(connection: socket.socket) -> None:
    with connection:
        connection.sendall(BULK)


BULK = os.urandom(1 << 20) * 50


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def descriptors(pid: int) -> int:
    """How many it has; 0 for who may not look: the relay shows itself to root only."""
    return len(os.listdir(f"/proc/{pid}/fd")) if os.geteuid() == 0 else 0


def descriptors_come_back_to(number: int, pid: int) -> bool:
    deadline = time.monotonic() + 5
    while descriptors(pid) > number and time.monotonic() < deadline:
        time.sleep(0.01)
    return descriptors(pid) == number


def settled(port: int, pid: int) -> int:
    """How many descriptors the relay has when it serves and holds no connection."""
    client(port).close()
    number = 0
    while number != (number := descriptors(pid)):
        time.sleep(0.05)
    return number


def ends(pid: int) -> bool:
    """Whether the child `pid` ends within five seconds; it is left for its parent to wait for."""
    with closing_fd(os.pidfd_open(pid)) as pidfd:
        return bool(select.select([pidfd], [], [], 5)[0])


@contextmanager
def closing_fd(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def test_the_container_is_reached_and_knows_nothing_of_the_host() -> None:
    with published(echo) as (port, pid, relay_pid):
        assert not namespaces.shared("self", pid)["net"]
        with client(port) as connection:
            connection.sendall(b"hello")
            assert connection.recv(5) == b"hello"
        if os.geteuid() == 0:  # nobody else may look
            assert namespaces.shared(pid, relay_pid)["net"]


def test_fifty_megabytes_each_way_arrive_unchanged() -> None:
    with published(echo) as (port, _, _), client(port) as connection:
        received: list[bytes] = []
        reader = threading.Thread(target=lambda: received.append(everything(connection)))
        reader.start()
        connection.sendall(BULK)
        connection.shutdown(socket.SHUT_WR)
        reader.join(20)
        assert hashlib.sha256(received[0]).digest() == hashlib.sha256(BULK).digest()


def test_a_half_closed_connection_still_brings_the_answer() -> None:
    with published(answer_after_the_end) as (port, _, _), client(port) as connection:
        connection.sendall(b"question")
        connection.shutdown(socket.SHUT_WR)
        assert everything(connection) == hashlib.sha256(b"question").digest()


def test_two_hundred_connections_at_once() -> None:
    with published(echo) as (port, _, relay_pid):
        before = settled(port, relay_pid)
        connections = [client(port) for _ in range(200)]
        for number, connection in enumerate(connections):
            connection.sendall(f"message {number:3}".encode() * 1000)
            connection.shutdown(socket.SHUT_WR)
        for number, connection in enumerate(connections):
            assert everything(connection) == f"message {number:3}".encode() * 1000
            connection.close()
        assert descriptors_come_back_to(before, relay_pid)


def test_a_reader_who_does_not_read_holds_the_sender_back_and_nobody_else() -> None:
    with published(send_a_lot) as (port, _, relay_pid), client(port) as slow:
        with client(port) as quick:
            assert len(everything(quick)) == len(BULK)
        resident = int(Path(f"/proc/{relay_pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        before = cpu_seconds(relay_pid)
        time.sleep(0.5)
        assert cpu_seconds(relay_pid) - before < 0.05, "spins while nothing can be sent"
        own = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        assert resident < own + (20 << 20), "what nobody reads piles up in the relay"
        assert hashlib.sha256(everything(slow)).digest() == hashlib.sha256(BULK).digest()


def test_idle_and_half_closed_connections_cost_no_time() -> None:
    def hold(connection: socket.socket) -> None:
        connection.shutdown(socket.SHUT_WR)
        time.sleep(60)

    with published(hold) as (port, _, relay_pid):
        connections = [client(port) for _ in range(20)]
        for connection in connections[:10]:
            assert connection.recv(1) == b""
        time.sleep(0.1)
        before = cpu_seconds(relay_pid)
        time.sleep(0.5)
        assert cpu_seconds(relay_pid) - before < 0.05
        for connection in connections:
            connection.close()


def test_nothing_listens_inside() -> None:
    with published(None) as (port, _, _):
        start = time.monotonic()
        with (
            pytest.raises(ConnectionResetError),
            client(port) as connection,
        ):  # the reset may overtake connect()
            connection.recv(1)
        assert time.monotonic() - start < 10  # at once, and not when a patience has run out


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_reset_is_passed_on_and_survived(side: str) -> None:
    def reset(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    def serve(connection: socket.socket) -> None:
        if connection.recv(1) == b"r":
            reset(connection)
        else:
            echo(connection)

    with published(serve) as (port, _, relay_pid):
        before = settled(port, relay_pid)
        for _ in range(20):
            connection = client(port)
            if side == "server":
                connection.sendall(b"r")
                with pytest.raises(ConnectionResetError):
                    connection.recv(1)
            else:
                connection.sendall(b"ehello")
                reset(connection)
        with client(port) as connection:
            connection.sendall(b"e" + b"still here")
            connection.shutdown(socket.SHUT_WR)
            assert everything(connection) == b"still here"
        assert descriptors_come_back_to(before, relay_pid)


def test_it_ends_with_the_container() -> None:
    with published(echo) as (port, pid, relay_pid):
        client(port).close()
        os.kill(pid, signal.SIGKILL)
        assert ends(relay_pid)


def test_it_ends_with_its_parent() -> None:
    publish = Publish("127.0.0.1", 0, PORT)
    with container(None) as pid, closing(relay.listen(publish)) as listener:
        read, write = os.pipe()

        def parent() -> None:
            if os.fork() == 0:
                os.close(read)
                relay.serve([(publish, listener)], pid)  # keeps the pipe open as long as it lives
                os._exit(0)
            signal.pause()

        with child(parent):
            os.close(write)
            with client(listener.getsockname()[1]) as connection, pytest.raises(ConnectionResetError):
                connection.recv(1)  # by now it serves
        assert select.select([read], [], [], 5)[0], "it lives on"
        os.close(read)


def test_it_has_no_rights() -> None:
    with published(echo) as (port, _, relay_pid):
        client(port).close()
        time.sleep(0.1)
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{relay_pid}/status").read_text().splitlines()
        )
        assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == 0
        assert status["NoNewPrivs"] == "1"
        if os.geteuid() == 0:
            assert set(status["Uid"].split()) == {str(users.ROOT_BASE + relay.NOBODY)}
            assert set(status["Gid"].split()) == {str(users.ROOT_BASE + relay.NOBODY)}
