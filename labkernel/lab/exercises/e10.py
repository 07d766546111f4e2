"""The checks of notebook 10: a cable between two networks, a box that is cut off at the switch, and a way out."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.fork import waiting
from labkernel.linux import namespaces, network, syscalls

SOON = 1.5
"""Seconds within which a connection has to be made, or is taken to be impossible."""
AT_ONCE = 0.5
"""Seconds for a connection that must not come about, between neighbours who would make it in a millisecond."""

PORT = 80
UPLINK, OUTSIDE = "192.0.2.1", "192.0.2.2"


def _empty() -> int:
    """A process in a network namespace of its own; its pid."""

    def alone() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        network.loopback_up()

    return waiting(alone)


@contextlib.contextmanager
def _in(pid: int) -> Iterator[None]:
    with namespaces.opened(pid, "net") as door, network.entered(door):
        yield


def _reaches(caller: int, called: int, address: str, within: float = SOON) -> str | None:
    """Connect from one network to a server in another; the address from which it came, None where it does not come."""
    with contextlib.ExitStack() as held:
        with _in(called):
            server = held.enter_context(socket.create_server(("", PORT)))
        with _in(caller):
            client = held.enter_context(socket.socket())
            client.settimeout(within)
            try:
                client.connect((address, PORT))
            except OSError:
                return None
        server.settimeout(within)
        try:
            connection, peer = server.accept()
        except TimeoutError:  # somebody else has answered
            return None
        connection.close()
        return str(peer[0])


def _interfaces(pid: int) -> dict[str, network.Interface]:
    with _in(pid):
        return {one.name: one for one in network.interfaces()}


def _settle(pid: int, *names: str) -> None:
    """Wait until the cables carry packets."""
    with _in(pid):
        for name in names:
            network.wait_until_it_carries(name)


def _judged(judge: Callable[..., str], answer: Callable[..., Any]) -> str:
    """In the child: leave the machine's network, so that an answer finds nothing there, and then judge."""
    syscalls.unshare(syscalls.CLONE_NEWNET)
    return judge(answer)


# ---------------------------------------------------------------------- 10.1


@exercise("10.1", looks_at="the interfaces of both networks, and connections from each to the other")
def connect_two(answer: Callable[[int, int], Any]) -> str:
    """A cable leads from one network to the other, and connections go both ways."""
    if problem := run_answer(_judged, _try_connect, answer):
        raise NotYet(problem)
    return "each of the two reaches the other, and nothing of the cable is left where your function ran."


def _try_connect(answer: Callable[[int, int], Any]) -> str:
    one, other = _empty(), _empty()
    answer(one, other)
    for which, pid, address in (("first", one, "10.9.0.1"), ("second", other, "10.9.0.2")):
        found = [end for end in _interfaces(pid).values() if end.name != "lo"]
        if not found:
            return f"in the {which} process's network there is still only the loopback"
        holders = [end for end in found if any(a.split("/")[0] == address for a in end.addresses)]
        if not holders:
            return f"no interface in the {which} process's network has the address {address}"
        if not holders[0].up:
            return f"the interface of {address} is switched off"
    if left := [end.name for end in network.interfaces() if end.name != "lo"]:
        return f"an interface is left where your function ran: {', '.join(left)}"
    time.sleep(0.05)  # the kernel notices in the background that the cable is whole
    if _reaches(one, other, "10.9.0.2") != "10.9.0.1":
        return "the first process does not reach the second one at 10.9.0.2"
    if _reaches(other, one, "10.9.0.1") != "10.9.0.2":
        return "the second process does not reach the first one at 10.9.0.1"
    return ""


# ---------------------------------------------------------------------- 10.2


@exercise("10.2", looks_at="who reaches whom on the switch, and the interface in the box that is cut off")
def cut_off(answer: Callable[[int, int], Any]) -> str:
    """One of three is cut off at the switch; the others talk; it can be plugged in again."""
    if problem := run_answer(_judged, _try_cut_off, answer):
        raise NotYet(problem)
    return "it reaches nobody and nobody reaches it, the others talk, and it can be plugged in again."


def _try_cut_off(answer: Callable[[int, int], Any]) -> str:
    for chosen in (1, 0):
        router = _empty()
        boxes = [_empty() for _ in range(3)]
        addresses = [f"10.9.0.{number}" for number in (2, 3, 4)]
        ports = [f"lk-{secrets.token_hex(4)}" for _ in boxes]
        with _in(router):
            network.add_bridge("lk-switch")
            network.add_address("lk-switch", "10.9.0.1/24")
            network.set_up("lk-switch")
            for box, address, port in zip(boxes, addresses, ports, strict=True):
                _plug_in(box, address, port)
        if problem := _judge_cut(answer, router, boxes, addresses, chosen):
            return problem
    return ""


def _plug_in(box: int, address: str, port: str) -> None:
    with namespaces.opened(box, "net") as door:
        network.add_veth(port, "eth0", door)
        network.plug(port, "lk-switch")
        network.set_up(port)
        with network.entered(door):
            network.add_address("eth0", f"{address}/24")
            network.set_up("eth0")
            network.wait_until_it_carries("eth0")
    network.wait_until_it_carries(port)


def _judge_cut(
    answer: Callable[[int, int], Any], router: int, boxes: list[int], addresses: list[str], chosen: int
) -> str:
    box, address = boxes[chosen], addresses[chosen]
    one, other = (pid for pid in boxes if pid != box)
    others_address = addresses[boxes.index(other)]
    answer(router, box)
    if any(os.waitpid(pid, os.WNOHANG)[0] for pid in (router, *boxes)):
        return "a process has ended: the box is to run on"
    if not _reaches(one, other, others_address):
        return "the other two boxes do not reach each other any more"
    ones_address = addresses[boxes.index(one)]
    if _reaches(one, box, address, AT_ONCE) or _reaches(box, one, ones_address, AT_ONCE):
        return "the box still reaches the others"
    end = _interfaces(box).get("eth0")
    if end is None:
        return "the box's interface has gone, so it cannot be plugged in again"
    if f"{address}/24" not in end.addresses:
        return "the box has lost its address"
    with _in(box):  # who is root in there can do that
        network.set_up("eth0")
    with contextlib.suppress(OSError), _in(box):
        network.wait_until_it_carries("eth0", 0.7)
    if _reaches(box, one, ones_address, AT_ONCE):
        return "the box has switched its own end on again, and is back"
    return ""


# ---------------------------------------------------------------------- 10.3


@exercise(
    "10.3", looks_at="a connection from the box to the outside, and the address from which it comes there"
)
def way_out(answer: Callable[[int, int], Any]) -> str:
    """The box reaches the outside, which sees the router's address."""
    if problem := run_answer(_judged, _try_way_out, answer):
        raise NotYet(problem)
    return "the box reaches the outside, and the outside sees the router only."


def _try_way_out(answer: Callable[[int, int], Any]) -> str:
    box, router, outside = _empty(), _empty(), _empty()
    with _in(router):
        Path("/proc/sys/net/ipv4/ip_forward").write_text("0")  # a new namespace copies the machine's setting
        for name, address, pid, others in (
            ("lk-in", "10.9.0.1", box, "10.9.0.2"),
            ("lk-up", UPLINK, outside, OUTSIDE),
        ):
            with namespaces.opened(pid, "net") as door:
                network.add_veth(name, "eth0", door)
            network.add_address(name, f"{address}/24")
            network.set_up(name)
            with _in(pid):
                network.add_address("eth0", f"{others}/24")
                network.set_up("eth0")
        for pid, name in ((box, "eth0"), (outside, "eth0"), (router, "lk-in"), (router, "lk-up")):
            _settle(pid, name)
    answer(box, router)
    with _in(box):
        destinations = {route.destination for route in network.routes()}
    if len(destinations) < 2:
        return "the box has no route to anything but its neighbours"
    with _in(router):
        if Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() != "1":
            return "the router does not pass packets on"
    seen = _reaches(box, outside, OUTSIDE)
    if seen is None:
        return "the box does not get an answer from the outside: does that one know the way back?"
    if seen != UPLINK:
        return f"the outside sees {seen}, which is not the router"
    return ""
