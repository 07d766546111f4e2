"""Network namespaces: interfaces, addresses, routes and address translation, by netlink.

Everything here acts on the network namespace that the calling thread is in; `entered` leads into another.
No program is started, and nothing is imported before it is needed: pyroute2 takes a fifth of a second.

Source: man 7 netlink, man 7 rtnetlink, man 4 veth, man 7 network_namespaces, https://wiki.nftables.org/
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from labkernel.linux import syscalls

SIOCSIFFLAGS = 0x8914  # <linux/sockios.h>
IFF_UP = 0x1  # <linux/if.h>
IFNAMSIZ = 16
RT_TABLE_MAIN = 254  # <linux/rtnetlink.h>
BR_STATE_FORWARDING = 3  # <linux/if_bridge.h>


def loopback_up() -> None:
    """Switch the loopback interface on; the kernel adds 127.0.0.1 and ::1.

    One ioctl, without netlink: every container's start does it. man 7 netdevice.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as anything:
        fcntl.ioctl(anything, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


@contextmanager
def entered(netns: int) -> Iterator[None]:
    """Be in the network namespace behind the descriptor `netns`, and back again afterwards.

    Sockets that are made meanwhile belong to it for ever. It concerns the calling thread only. Raises OSError
    EPERM without CAP_SYS_ADMIN in the user namespaces that own the two network namespaces.
    """
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.setns(netns, syscalls.CLONE_NEWNET)
        try:
            yield
        finally:
            syscalls.setns(own, syscalls.CLONE_NEWNET)
    finally:
        os.close(own)


# ---------------------------------------------------------------------- interfaces, addresses, routes


class Interface(NamedTuple):
    """A network interface, and what has gone through it."""

    number: int
    name: str
    kind: str
    """"veth", "bridge", …; "" for hardware and the loopback."""
    up: bool
    mac: str
    mtu: int
    bridge: str | None
    """The bridge it is a port of."""
    addresses: tuple[str, ...]
    """As "10.213.0.2/24"."""
    rx_packets: int
    rx_bytes: int
    tx_packets: int
    tx_bytes: int
    peer: tuple[int | None, int] | None
    """A veth's other end: the namespace's id, as this one counts others (None: the same one), and its number there."""


End = tuple[str, str]
"""Where an end of a cable is: the name of a namespace, and the interface's."""


class Route(NamedTuple):
    """A line of the main routing table: where packets to `destination` go next."""

    destination: str
    gateway: str | None
    interface: str


def add_bridge(name: str, mac: str | None = None) -> None:
    """Make a bridge: a switch whose ports are interfaces.

    Without a `mac` of its own it takes the lowest of its ports', and another one as they come and go:
    neighbours who remember the old one lose it for a while.
    """
    with _netlink(f"add bridge {name}") as ip:
        ip.link("add", ifname=name, kind="bridge", **({"address": mac} if mac else {}))


def add_veth(name: str, peer: str, netns: int | None = None) -> None:
    """Make a virtual cable: what goes in at `name` comes out at `peer`, which may be in another namespace."""
    where = {} if netns is None else {"net_ns_fd": netns}
    with _netlink(f"add veth {name}, {peer}") as ip:
        ip.link("add", ifname=name, kind="veth", peer={"ifname": peer} | where)


def move(name: str, netns: int) -> None:
    """Hand an interface over to the namespace behind the descriptor `netns`. It loses its addresses."""
    with _netlink(f"move {name}") as ip:
        ip.link("set", index=_index(name), net_ns_fd=netns)


def set_up(name: str) -> None:
    """Switch an interface on."""
    with _netlink(f"set {name} up") as ip:
        ip.link("set", index=_index(name), state="up")


def set_down(name: str) -> None:
    """Switch an interface off."""
    with _netlink(f"set {name} down") as ip:
        ip.link("set", index=_index(name), state="down")


def wait_until_it_carries(name: str, timeout: float = 2) -> None:
    """Wait until packets go through an interface; for a veth both ends must be on.

    The kernel notices in the background that a cable has become whole, and drops what is sent in the few
    milliseconds until then: a lost SYN would cost a second. Raises TimeoutError after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    with _netlink(f"ask for {name}") as ip:
        while time.monotonic() < deadline:
            (link,) = ip.get_links(_index(name))
            if link.get("operstate") == "UP" and _port_state(link) in (None, BR_STATE_FORWARDING):
                return
            time.sleep(0.0005)
    raise TimeoutError(errno.ETIMEDOUT, f"{name} is not connected: is the other end switched on?")


def _port_state(link: Any) -> int | None:
    """The state of a bridge's port, None for what is in no bridge."""
    state = link.get(("linkinfo", "slave_data", "IFLA_BRPORT_STATE"))
    return None if state is None else int(state)


def plug(name: str, bridge: str) -> None:
    """Make an interface a port of a bridge."""
    with _netlink(f"plug {name} into {bridge}") as ip:
        ip.link("set", index=_index(name), master=_index(bridge))


def delete(name: str) -> None:
    """Remove an interface; a veth's other end goes with it."""
    with _netlink(f"delete {name}") as ip:
        ip.link("del", index=_index(name))


def add_address(name: str, address: str) -> None:
    """Give an interface an address with its network's length, as "10.213.0.2/24"."""
    with _netlink(f"add address {address} to {name}") as ip:
        ip.addr("add", index=_index(name), address=address)


def add_route(destination: str, gateway: str) -> None:
    """Send packets to `destination`, a network or "default", by way of `gateway`."""
    with _netlink(f"add route to {destination} via {gateway}") as ip:
        ip.route("add", dst=destination, gateway=gateway)


def interfaces() -> list[Interface]:
    """All interfaces of this namespace with their addresses and counters, in the order of their numbers."""
    with _netlink("list interfaces") as ip:
        links = list(ip.get_links())
        addresses = list(ip.get_addr())
    names = {link["index"]: link.get("ifname") for link in links}
    found = []
    for link in sorted(links, key=lambda link: link["index"]):
        counters = link.get("stats64")
        found.append(
            Interface(
                number=link["index"],
                name=link.get("ifname"),
                kind=link.get(("linkinfo", "kind")) or "",
                up=bool(link["flags"] & IFF_UP),
                mac=link.get("address") or "",
                mtu=link.get("mtu"),
                bridge=names.get(link.get("master")),
                addresses=tuple(
                    f"{one.get('address')}/{one['prefixlen']}"
                    for one in addresses
                    if one["index"] == link["index"]
                ),
                rx_packets=counters["rx_packets"],
                rx_bytes=counters["rx_bytes"],
                tx_packets=counters["tx_packets"],
                tx_bytes=counters["tx_bytes"],
                peer=(link.get("link_netnsid"), link.get("link"))
                if link.get(("linkinfo", "kind")) == "veth"
                else None,
            )
        )
    return found


def cables(netns: Mapping[str, int]) -> list[tuple[End, End]]:
    """The veth pairs that lead from one to another of these namespaces (descriptors, by a name that you give them).

    In a namespace, others have ids: RTM_GETNSID in man 7 rtnetlink tells which is whose. Raises OSError.
    """
    numbers: dict[str, dict[int, Interface]] = {}
    ids: dict[str, dict[int | None, str]] = {}
    for where, fd in netns.items():
        with entered(fd), _netlink("ask for the ids of namespaces") as ip:
            numbers[where] = {one.number: one for one in interfaces()}
            ids[where] = {ip.get_netnsid(fd=other)["nsid"]: name for name, other in netns.items()}
            ids[where][None] = where
    found: list[tuple[End, End]] = []
    for where, ours in numbers.items():
        for one in ours.values():
            there = ids[where].get(one.peer[0]) if one.peer else None
            if one.peer and there and one.peer[1] in numbers[there]:
                end, other = (where, one.name), (there, numbers[there][one.peer[1]].name)
                if (other, end) not in found:
                    found.append((end, other))
    return found


def routes() -> list[Route]:
    """The IPv4 routes of the main table."""
    with _netlink("list routes") as ip:
        names = {link["index"]: link.get("ifname") for link in ip.get_links()}
        found = list(ip.get_routes(family=socket.AF_INET, table=RT_TABLE_MAIN))
    return [
        Route(
            destination=f"{route.get('dst')}/{route['dst_len']}" if route.get("dst") else "default",
            gateway=route.get("gateway"),
            interface=names.get(route.get("oif"), ""),
        )
        for route in found
    ]


def forward() -> None:
    """Let this namespace pass packets on between its interfaces: be a router. man 7 ip."""
    with open("/proc/sys/net/ipv4/ip_forward", "wb") as file:
        file.write(b"1")


# ---------------------------------------------------------------------- address translation (nftables)

TABLE = "labkernel"
POSTROUTING_PRIORITY, PREROUTING_PRIORITY = 100, -100  # NF_IP_PRI_NAT_SRC, NF_IP_PRI_NAT_DST
RAW_PRIORITY = -300  # NF_IP_PRI_RAW: before any address is translated
DROP, ACCEPT = 0, 1  # NF_DROP, NF_ACCEPT
NOT_BELOW, NOT_ABOVE = 5, 3  # NFT_CMP_GTE, NFT_CMP_LTE

Expression = list[Any]


def masquerade(uplink: str) -> None:
    """Let what leaves by `uplink` carry its address: nft's `oifname UPLINK counter masquerade`."""
    from pyroute2.nftables.expressions import masq

    with _nftables(f"masquerade by {uplink}") as nft:
        _nat_chains(nft)
        rule = (_interface_is("NFT_META_OIFNAME", uplink), _expression("counter"), masq())
        nft.rule("add", table=TABLE, chain="postrouting", expressions=rule)


def redirect(uplink: str, port: int, address: str, to_port: int) -> None:
    """Let TCP connections that come in by `uplink` for `port` go to `address`:`to_port`: nft's `dnat to`."""
    tcp = struct.pack("B", socket.IPPROTO_TCP)
    rule = (
        _interface_is("NFT_META_IIFNAME", uplink),
        _expression("meta", dreg=1, key=_meta("NFT_META_L4PROTO")) + _equal(tcp),
        _expression("payload", dreg=1, base=2, offset=2, len=2) + _equal(struct.pack("!H", port)),
        _expression("counter"),
        _expression("immediate", dreg=1, data=_value(socket.inet_aton(address))),
        _expression("immediate", dreg=2, data=_value(struct.pack("!H", to_port))),
        _expression("nat", type=1, family=socket.AF_INET, reg_addr_min=1, reg_proto_min=2),
    )
    with _nftables(f"redirect {uplink}:{port} to {address}:{to_port}") as nft:
        _nat_chains(nft)
        nft.rule("add", table=TABLE, chain="prerouting", expressions=rule)


def refuse(uplink: str, subnet: str) -> None:
    """Drop what comes in by `uplink` and is addressed to `subnet`: nft's `iifname UPLINK ip daddr SUBNET drop`.

    It looks at packets before addresses are translated, so answers and what is published still come through.
    """
    import ipaddress

    from pyroute2.nftables.expressions import verdict

    addresses = ipaddress.IPv4Network(subnet)
    rule = (
        _interface_is("NFT_META_IIFNAME", uplink),
        _expression("payload", dreg=1, base=1, offset=16, len=4),  # the IP header's destination
        _expression("cmp", sreg=1, op=NOT_BELOW, data=_value(addresses[0].packed)),
        _expression("cmp", sreg=1, op=NOT_ABOVE, data=_value(addresses[-1].packed)),
        _expression("counter"),
        verdict(DROP),
    )
    with _nftables(f"refuse packets by {uplink} for {subnet}") as nft:
        nft.table("add", name=TABLE)
        chain = {"name": "refuse", "hook": "prerouting", "type": "filter", "priority": RAW_PRIORITY}
        nft.chain("add", table=TABLE, policy=ACCEPT, **chain)
        nft.rule("add", table=TABLE, chain="refuse", expressions=rule)


def stop_redirecting() -> None:
    """Take all rules of `redirect` away."""
    with _nftables("remove redirections") as nft:
        _nat_chains(nft)
        nft.rule("del", table=TABLE, chain="prerouting")


def _nat_chains(nft: Any) -> None:
    """The table and its two chains; adding what is there already changes nothing."""
    nft.table("add", name=TABLE)
    for hook, priority in (("postrouting", POSTROUTING_PRIORITY), ("prerouting", PREROUTING_PRIORITY)):
        nft.chain("add", table=TABLE, name=hook, hook=hook, type="nat", policy=ACCEPT, priority=priority)


def _expression(name: str, **values: Any) -> Expression:
    from pyroute2.nftables.expressions import genex

    return [genex(name, values)]


def _meta(name: str) -> int:
    from pyroute2.netlink.nfnetlink.nftsocket import Meta

    return int(Meta[name])


def _value(raw: bytes) -> dict[str, Any]:
    return {"attrs": [("NFTA_DATA_VALUE", raw)]}


def _equal(raw: bytes) -> Expression:
    """Go on with the rule only if register 1 holds this."""
    return _expression("cmp", sreg=1, op=0, data=_value(raw))


def _interface_is(key: str, name: str) -> Expression:
    return _expression("meta", dreg=1, key=_meta(key)) + _equal(name.encode().ljust(IFNAMSIZ, b"\0"))


# ---------------------------------------------------------------------- the lab's network


class Attachment(NamedTuple):
    """One container on the lab's network."""

    name: str
    address: str
    port: str
    """The bridge's end of the cable; the container's end is eth0."""


class LabNetwork:
    """A bridge with containers plugged in, in the network namespace of the calling process: the lab's own.

    The bridge has the first address of `subnet` and routes for the containers, who get the following ones.
    All of it goes when the last process in the namespace does.
    """

    BRIDGE = "lk-br0"

    def __init__(self, subnet: str = "10.213.0.0/24") -> None:
        import ipaddress

        self.subnet = ipaddress.IPv4Network(subnet)
        self.gateway = str(self.subnet[1])
        self.attached: dict[str, Attachment] = {}
        self.redirected: list[tuple[str, str, int, int]] = []
        loopback_up()
        add_bridge(self.BRIDGE, "02:42:" + self.subnet[1].packed.hex(":"))  # 02: nobody's, as Docker does it
        add_address(self.BRIDGE, f"{self.gateway}/{self.subnet.prefixlen}")
        set_up(self.BRIDGE)
        forward()

    def attach(self, name: str, netns: int) -> Attachment:
        """Plug in the container with the network namespace `netns` (a descriptor); give it address and route.

        Raises OSError: EEXIST for a name that is attached, EADDRNOTAVAIL when the subnet is full.
        """
        if name in self.attached:
            raise OSError(errno.EEXIST, f"{name} is attached already")
        number, address = self._free_address()
        port = f"lk-v{number}"
        add_veth(port, "eth0", netns)
        try:
            plug(port, self.BRIDGE)
            set_up(port)
            with entered(netns):
                add_address("eth0", f"{address}/{self.subnet.prefixlen}")
                set_up("eth0")
                add_route("default", self.gateway)
                wait_until_it_carries("eth0")
            wait_until_it_carries(port)
        except BaseException:
            with suppress(OSError):
                delete(port)
            raise
        self.attached[name] = Attachment(name, address, port)
        return self.attached[name]

    def detach(self, name: str) -> None:
        """Pull the cable out, if its container has not taken it along already. Raises KeyError."""
        gone = self.attached.pop(name)
        with suppress(OSError):  # the kernel removes it when the container's namespace ends
            delete(gone.port)
        if any(who == name for _, who, _, _ in self.redirected):
            self.redirected = [one for one in self.redirected if one[1] != name]
            self._redirect_all()

    def publish(self, uplink: str, port: int, name: str, to_port: int) -> None:
        """Let connections to `port` that come by the interface `uplink` reach a container."""
        self.redirected.append((uplink, name, port, to_port))
        redirect(uplink, port, self.attached[name].address, to_port)

    def hosts(self) -> str:
        """The attached containers' names, as lines of /etc/hosts."""
        return "".join(f"{one.address}\t{one.name}\n" for one in self.attached.values())

    def _redirect_all(self) -> None:
        stop_redirecting()
        for uplink, name, port, to_port in self.redirected:
            redirect(uplink, port, self.attached[name].address, to_port)

    def _free_address(self) -> tuple[int, str]:
        taken = {one.address for one in self.attached.values()}
        for number in range(2, self.subnet.num_addresses - 1):
            if str(self.subnet[number]) not in taken:
                return number, str(self.subnet[number])
        raise OSError(errno.EADDRNOTAVAIL, f"all addresses of {self.subnet} are taken")


# ---------------------------------------------------------------------- netlink sockets

_CAUSES = {
    errno.EPERM: "needs CAP_NET_ADMIN in the user namespace that owns this network namespace",
    errno.EEXIST: "there is one already",
    errno.ENODEV: "no such interface",
    errno.EOPNOTSUPP: "this kernel has no such kind of interface, or no nftables",
    errno.ENETUNREACH: "the gateway is in no network that an interface is switched on for",
}


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn the library's errors into OSError that says what was tried."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        yield
    except NetlinkError as error:
        number = int(error.code)
        cause = f": {_CAUSES[number]}" if number in _CAUSES else ""
        text = f"{what}: {errno.errorcode.get(number, number)}, {os.strerror(number)}{cause}"
        raise OSError(number, text) from None


@contextmanager
def _netlink(what: str) -> Iterator[Any]:
    from pyroute2 import IPRoute

    with _explained(what), IPRoute() as ip:
        yield ip


@contextmanager
def _nftables(what: str) -> Iterator[Any]:
    from pyroute2.nftables.main import NFTables

    with _explained(what), NFTables() as nft:
        yield nft


def _index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        raise OSError(errno.ENODEV, f"there is no interface {name} in this network namespace") from None
