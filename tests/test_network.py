"""Networks made of network namespaces of the tests' own, as root and as an ordinary user's root."""

from __future__ import annotations

import encodings.idna
import errno
import http.server
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyroute2.nftables.expressions
import pyroute2.nftables.main
import pytest

from labkernel.linux import network, syscalls
from labkernel.linux.network import LabNetwork, entered

IMPORTED_BEFORE = (encodings.idna, pyroute2.nftables.expressions, pyroute2.nftables.main)
"""A stranger may not be able to read them when they are needed."""

STRANGER = 54321
"""The id of an ordinary user who owns nothing."""


def in_new_namespace(function: Callable[[], Any], user: str) -> Any:
    """Call a function in a child in a new network namespace; returns or raises what it does."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if user == "ordinary" and os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(STRANGER, STRANGER, STRANGER)
                os.setresuid(STRANGER, STRANGER, STRANGER)
                syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)  # its own /proc/self is root's otherwise
            uid = os.getuid()
            syscalls.unshare(syscalls.CLONE_NEWNET | (syscalls.CLONE_NEWUSER if uid else 0))
            if uid:
                with open("/proc/self/uid_map", "wb") as file:
                    file.write(b"0 %d 1" % uid)
            answer = ("value", function())
        except BaseException as error:
            answer = ("error", error)
        with open(write, "wb") as file_back:
            pickle.dump(answer, file_back)
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file_there:
        kind, value = pickle.load(file_there)
    os.waitpid(pid, 0)
    if kind == "error":
        raise value
    return value


either_user = pytest.mark.parametrize("user", ["root", "ordinary"])


@contextmanager
def namespace() -> Iterator[int]:
    """A descriptor of a new network namespace with its loopback on."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        syscalls.unshare(syscalls.CLONE_NEWNET)
        network.loopback_up()
        os.write(tell, b".")
        signal.pause()
    os.close(tell)
    assert os.read(ready, 1), "no new network namespace"
    fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    os.kill(pid, signal.SIGKILL)  # the descriptor keeps the namespace
    os.waitpid(pid, 0)
    try:
        yield fd
    finally:
        os.close(fd)
        os.close(ready)


def listener(netns: int, address: str, port: int = 80) -> socket.socket:
    with entered(netns):
        return socket.create_server((address, port))


def connect(netns: int, address: str, port: int = 80) -> socket.socket:
    with entered(netns):
        return socket.create_connection((address, port), timeout=1)


def lay_uplink(outside: int) -> None:
    """A cable from here, 192.0.2.1, to a namespace that plays the outside, 192.0.2.2."""
    network.add_veth("lk-up", "eth0", outside)
    network.add_address("lk-up", "192.0.2.1/24")
    network.set_up("lk-up")
    with entered(outside):
        network.add_address("eth0", "192.0.2.2/24")
        network.set_up("eth0")
        network.wait_until_it_carries("eth0")
    network.wait_until_it_carries("lk-up")


def test_importing_the_module_imports_no_netlink_library() -> None:
    code = "import sys, labkernel.linux.network; print('pyroute2' in sys.modules, 'asyncio' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "False"]


@either_user
def test_a_new_namespace_has_a_loopback_that_is_off_until_it_is_switched_on(user: str) -> None:
    def work() -> tuple[int | None, tuple[str, ...]]:
        refusal = None
        try:
            socket.create_connection(("127.0.0.1", 9), timeout=1)
        except OSError as error:
            refusal = error.errno
        network.loopback_up()
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname()).close()
        lo = next(one for one in network.interfaces() if one.name == "lo")
        return refusal, lo.addresses

    refusal, addresses = in_new_namespace(work, user)
    assert refusal == errno.ENETUNREACH
    assert "127.0.0.1/8" in addresses


@either_user
def test_a_veth_pair_by_hand(user: str) -> None:
    def work() -> None:
        with namespace() as other:
            network.add_veth("lk-left", "lk-right")
            network.move("lk-right", other)
            assert "lk-right" not in [one.name for one in network.interfaces()]
            network.add_address("lk-left", "10.1.0.1/24")
            network.set_up("lk-left")
            with entered(other):
                network.add_address("lk-right", "10.1.0.2/24")
                network.set_up("lk-right")
                network.wait_until_it_carries("lk-right")
            network.wait_until_it_carries("lk-left")
            with listener(other, "10.1.0.2") as server, socket.create_connection(("10.1.0.2", 80), timeout=1):
                assert server.accept()[1][0] == "10.1.0.1"
            left = next(one for one in network.interfaces() if one.name == "lk-left")
            assert (left.kind, left.up, left.bridge) == ("veth", True, None)
            network.set_down("lk-left")
            with pytest.raises(OSError):
                socket.create_connection(("10.1.0.2", 80), timeout=0.2)
            network.delete("lk-left")
            with entered(other):
                assert "lk-right" not in [one.name for one in network.interfaces()]

    in_new_namespace(work, user)


@either_user
def test_netlink_tells_which_ends_belong_together(user: str) -> None:
    def work() -> None:
        own = os.open("/proc/self/ns/net", os.O_RDONLY)
        with namespace() as one, namespace() as two:
            for netns in (one, two):  # as many interfaces in both, so that their numbers are the same
                network.add_veth(f"lk-{netns}", "eth0", netns)
            with entered(one):
                network.add_veth("lk-across", "eth1", two)
            network.add_veth("lk-left", "lk-right")
            assert network.cables({"two": two, "one": one}) == [(("two", "eth1"), ("one", "lk-across"))]
            assert network.cables({"here": own, "one": one, "two": two}) == [
                (("here", f"lk-{one}"), ("one", "eth0")),
                (("here", f"lk-{two}"), ("two", "eth0")),
                (("here", "lk-right"), ("here", "lk-left")),
                (("one", "lk-across"), ("two", "eth1")),
            ]
            bridgeless = {found.name: found.peer for found in network.interfaces()}
            assert bridgeless["lo"] is None

    in_new_namespace(work, user)


@either_user
def test_containers_on_the_bridge_fetch_from_each_other(user: str) -> None:
    def work() -> Any:
        lab = LabNetwork()
        with namespace() as one, namespace() as two:
            lab.attach("one", one)
            lab.attach("two", two)
            assert lab.hosts() == "10.213.0.2\tone\n10.213.0.3\ttwo\n"
            with entered(one):
                server = http.server.HTTPServer(("0.0.0.0", 80), Answer)
            thread = threading.Thread(target=server.handle_request)
            thread.start()
            with entered(two):
                body = urllib.request.urlopen("http://10.213.0.2/", timeout=1).read()
                eth0 = next(found for found in network.interfaces() if found.name == "eth0")
                routes = network.routes()
            thread.join()
            server.server_close()
            return body, eth0, routes

    body, eth0, routes = in_new_namespace(work, user)
    assert json.loads(body) == {"client": "10.213.0.3"}
    assert "10.213.0.3/24" in eth0.addresses
    assert eth0.tx_packets >= 3 and eth0.tx_bytes > 100 and eth0.rx_packets >= 3
    assert network.Route("default", "10.213.0.1", "eth0") in routes


class Answer(http.server.BaseHTTPRequestHandler):
    """Tells the client its address."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"client": self.client_address[0]}).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@either_user
def test_both_ends_of_a_cable_count_the_same_packets(user: str) -> None:
    def work() -> tuple[network.Interface, network.Interface]:
        lab = LabNetwork()
        with namespace() as one, namespace() as two:
            port = lab.attach("one", one).port
            lab.attach("two", two)
            with listener(two, "10.213.0.3") as server, connect(one, "10.213.0.3") as client:
                connection, _ = server.accept()
                client.sendall(b"x" * 100_000)
                client.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass
                connection.close()
            with entered(one):
                inside = next(found for found in network.interfaces() if found.name == "eth0")
            return inside, next(found for found in network.interfaces() if found.name == port)

    inside, outside = in_new_namespace(work, user)
    assert inside.tx_bytes > 100_000
    assert outside.bridge == "lk-br0"
    assert abs(inside.tx_packets - outside.rx_packets) <= 3  # a packet may pass between the two questions


@either_user
def test_a_container_that_is_cut_off_is_reached_no_more_and_its_address_is_free_again(user: str) -> None:
    def work() -> None:
        lab = LabNetwork()
        with namespace() as one, namespace() as two, listener(one, "0.0.0.0"):
            lab.attach("one", one)
            lab.attach("two", two)
            connect(two, "10.213.0.2").close()
            lab.detach("one")
            with pytest.raises(OSError):
                connect(two, "10.213.0.2")
            assert [found.name for found in network.interfaces()] == ["lo", "lk-br0", "lk-v3"]
            assert lab.attach("again", one).address == "10.213.0.2"

    in_new_namespace(work, user)


@either_user
def test_outside_sees_the_address_of_the_uplink_and_reaches_only_what_is_published(user: str) -> None:
    def work() -> None:
        lab = LabNetwork()
        with ExitStack() as stack:
            one, outside = (stack.enter_context(namespace()) for _ in range(2))
            lab.attach("one", one)
            lay_uplink(outside)
            there = stack.enter_context(listener(outside, "192.0.2.2"))
            with pytest.raises(OSError):  # nobody outside knows the way back to 10.213.0.2
                connect(one, "192.0.2.2")
            while select.select([there], [], [], 0)[0]:
                there.accept()[0].close()
            network.masquerade("lk-up")
            connect(one, "192.0.2.2").close()
            assert there.accept()[1][0] == "192.0.2.1"

            here = stack.enter_context(listener(one, "0.0.0.0", 8000))
            with pytest.raises(ConnectionRefusedError):
                connect(outside, "192.0.2.1", 8080)
            lab.publish("lk-up", 8080, "one", 8000)
            connect(outside, "192.0.2.1", 8080).close()
            assert here.accept()[1][0] == "192.0.2.2"
            with pytest.raises(ConnectionRefusedError):
                connect(outside, "192.0.2.1", 8081)
            lab.detach("one")
            with pytest.raises(ConnectionRefusedError):
                connect(outside, "192.0.2.1", 8080)

    in_new_namespace(work, user)


@either_user
def test_a_router_that_is_not_told_to_refuse_lets_everybody_in(user: str) -> None:
    def work() -> None:
        lab = LabNetwork()
        with ExitStack() as stack:
            one, outside = (stack.enter_context(namespace()) for _ in range(2))
            lab.attach("one", one)
            lay_uplink(outside)
            with entered(outside):
                network.add_route("10.213.0.0/16", "192.0.2.1")
            network.masquerade("lk-up")
            stack.enter_context(listener(one, "0.0.0.0"))
            there = stack.enter_context(listener(outside, "192.0.2.2"))

            connect(outside, "10.213.0.2").close()
            network.refuse("lk-up", "10.212.0.0/16")
            network.refuse("lk-up", "10.213.0.3/32")
            connect(outside, "10.213.0.2").close()
            network.refuse("lk-up", "10.213.0.0/30")
            with pytest.raises(TimeoutError):
                connect(outside, "10.213.0.2")
            lab.publish("lk-up", 8080, "one", 80)
            connect(outside, "192.0.2.1", 8080).close()
            connect(one, "192.0.2.2").close()
            assert there.accept()[1][0] == "192.0.2.1"

    in_new_namespace(work, user)


def test_a_full_subnet_says_so() -> None:
    def work() -> None:
        lab = LabNetwork("10.214.0.0/30")
        with namespace() as one, namespace() as two:
            lab.attach("one", one)
            with pytest.raises(OSError, match="all addresses") as caught:
                lab.attach("two", two)
            assert caught.value.errno == errno.EADDRNOTAVAIL
            with pytest.raises(FileExistsError):
                lab.attach("one", one)

    in_new_namespace(work, "root")


def test_failures_say_what_was_tried_and_why_not() -> None:
    def work() -> None:
        network.add_bridge("lk-b")
        with pytest.raises(FileExistsError, match=r"add bridge lk-b: EEXIST.*already"):
            network.add_bridge("lk-b")
        with pytest.raises(OSError, match="no interface lk-none"):
            network.set_up("lk-none")
        with pytest.raises(OSError, match=r"ENETUNREACH.*gateway"):
            network.add_route("default", "10.9.9.9")

    in_new_namespace(work, "root")


def test_without_the_capability_nothing_can_be_configured() -> None:
    def work() -> None:
        from labkernel.linux import capabilities

        capabilities.capset((), ())
        with pytest.raises(PermissionError, match="CAP_NET_ADMIN"):
            network.add_bridge("lk-b")

    in_new_namespace(work, "root")
