"""Answers that somebody might give to the exercises of notebook 10; each must fail."""

OPEN = "with namespaces.opened(one, 'net') as here, namespaces.opened(other, 'net') as there:"
HERE = "        with network.entered(here):\n            network.add_veth('eth0', 'eth0', there)\n"
FIRST = "            network.add_address('eth0', '10.9.0.1/24')\n            network.set_up('eth0')\n"
SECOND = (
    "        with network.entered(there):\n"
    "            network.add_address('eth0', '10.9.0.2/24')\n            network.set_up('eth0')\n"
)
SWITCH = "with namespaces.opened(router, 'net') as there, network.entered(there):"
INSIDE = "with namespaces.opened(box, 'net') as there, network.entered(there):"
ROUTE = f"{INSIDE}\n        network.add_route('default', '10.9.0.1')"

WRONG: dict[str, list[str]] = {
    "10.1": [
        "def connect_two(one, other):\n    network.add_veth('lk-left', 'lk-right')",
        f"def connect_two(one, other):\n    {OPEN}\n{HERE}",
        f"def connect_two(one, other):\n    {OPEN}\n{HERE}{FIRST}",
        f"def connect_two(one, other):\n    {OPEN}\n{HERE}{FIRST}{SECOND.replace('0.2/24', '0.2/32')}",
        f"def connect_two(one, other):\n    {OPEN}\n{HERE}{FIRST}"
        "        with network.entered(there):\n            network.add_address('eth0', '10.9.0.2/24')",
        f"def connect_two(one, other):\n    {OPEN}\n"
        "        for end, address in ((here, '10.9.0.1/24'), (there, '10.9.0.2/24')):\n"
        "            with network.entered(end):\n                network.add_address('lo', address)",
        f"def connect_two(one, other):\n    {OPEN}\n"
        "        network.add_bridge('lk-br0')\n        network.set_up('lk-br0')\n"
        "        for name, end, address in (('a', here, '10.9.0.1/24'), ('b', there, '10.9.0.2/24')):\n"
        "            network.add_veth(name, 'eth0', end)\n            network.plug(name, 'lk-br0')\n"
        "            network.set_up(name)\n            with network.entered(end):\n"
        "                network.add_address('eth0', address)\n                network.set_up('eth0')",
    ],
    "10.2": [
        f"def cut_off(router, box):\n    {INSIDE}\n        network.set_down('eth0')",
        f"def cut_off(router, box):\n    {INSIDE}\n        network.delete('eth0')",
        f"def cut_off(router, box):\n    {SWITCH}\n        network.set_down('lk-switch')",
        "def cut_off(router, box):\n    os.kill(box, signal.SIGKILL)",
        f"def cut_off(router, box):\n    {SWITCH}\n"
        "        ports = [one.name for one in network.interfaces() if one.bridge]\n"
        "        network.set_down(ports[1])",
        f"def cut_off(router, box):\n    {SWITCH}\n"
        "        for one in network.interfaces():\n            if one.bridge:\n"
        "                network.set_down(one.name)",
        "def cut_off(router, box):\n"
        "    with namespaces.opened(router, 'net') as switch, namespaces.opened(box, 'net') as inside:\n"
        "        for cable in network.cables({'router': switch, 'box': inside}):\n"
        "            with network.entered(switch):\n                network.delete(dict(cable)['router'])",
    ],
    "10.3": [
        f"def way_out(box, router):\n    {ROUTE}",
        f"def way_out(box, router):\n    {ROUTE}\n    {SWITCH}\n        network.forward()",
        f"def way_out(box, router):\n    {ROUTE}\n    {SWITCH}\n        network.masquerade('lk-up')",
        f"def way_out(box, router):\n    {SWITCH}\n        network.forward()\n        network.masquerade('lk-up')",
        f"def way_out(box, router):\n    {ROUTE}\n    {SWITCH}\n        network.forward()\n"
        "        network.masquerade('lk-in')",
        f"def way_out(box, router):\n    {INSIDE}\n        network.add_address('eth0', '192.0.2.2/24')",
        f"def way_out(box, router):\n    {INSIDE}\n        network.add_route('default', '192.0.2.1')",
    ],
}
