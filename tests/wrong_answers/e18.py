"""Answers that somebody might give to the exercises of notebook 18; each must fail."""

RUN = "    os.execvp(command[0], command)"
ONE = "{Capability.CAP_NET_BIND_SERVICE}"
BOUND = f"    capabilities.drop_bounding({ONE})\n"
GROUPS = "    os.setgroups([])\n    os.setresgid(65534, 65534, 65534)\n"


def leave_root(uid: int, keep: str) -> str:
    """The lines that step down with these capabilities."""
    return (
        f"    keep = {keep}\n    syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 1)\n    os.setresuid({uid}, {uid}, {uid})\n"
        "    capabilities.capset(keep, keep, keep)\n    capabilities.raise_ambient(keep)\n"
    )


SERVE = "def serve(command):\n"
EACH = "def needs(operation):\n    found = set()\n    for one in Capability:\n"

WRONG: dict[str, list[str]] = {
    "18.1": [
        f"{SERVE}    pass",
        f"{SERVE}{GROUPS}    os.setresuid(65534, 65534, 65534)\n{RUN}",
        f"{SERVE}{BOUND}{GROUPS}{leave_root(1000, ONE)}{RUN}",
        f"{SERVE}{GROUPS}{leave_root(65534, 'ALL')}{RUN}",
        f"{SERVE}{BOUND}{GROUPS}{leave_root(65534, ONE + ' | {Capability.CAP_NET_RAW}')}{RUN}",
        f"{SERVE}{GROUPS}{leave_root(65534, ONE)}{RUN}",
        f"{SERVE}{BOUND}{leave_root(65534, ONE)}{RUN}",
        f"{SERVE}{BOUND}    os.setgroups([0])\n    os.setresgid(65534, 65534, 65534)\n{leave_root(65534, ONE)}{RUN}",
        f"{SERVE}    capabilities.limit_to({ONE})\n{RUN}",
        f"{SERVE}    capabilities.limit_to({ONE})\n{GROUPS}{RUN}",
        f"{SERVE}    Path('/proc/sys/net/ipv4/ip_unprivileged_port_start').write_text('0')\n"
        f"    capabilities.drop_bounding(())\n{GROUPS}    os.setresuid(65534, 65534, 65534)\n{RUN}",
        f"{SERVE}{BOUND}    server = socket.socket()\n    server.bind(('127.0.0.1', 80))\n    server.listen()\n"
        f"{GROUPS}{leave_root(65534, ONE)}    signal.pause()",
        f"{SERVE}    command[-1] = '8080'\n{BOUND}{GROUPS}{leave_root(65534, ONE)}{RUN}",
    ],
    "18.2": [
        "def needs(operation):\n    return None",
        "def needs(operation):\n    return set()",
        "def needs(operation):\n    return {Capability.CAP_CHOWN}",
        "def needs(operation):\n    return set(ALL)",
        "def needs(operation):\n    return {'CAP_CHOWN'}",
        f"{EACH}        capabilities.capset(ALL, ALL - {{one}})\n"
        "        if attempt(operation) != 'done':\n            found.add(one)\n    return found",
        "def needs(operation):\n    for one in Capability:\n        capabilities.capset(ALL, {one})\n"
        "        if attempt(operation) == 'done':\n            return {one}\n    return set()",
        f"{EACH}        capabilities.capset(ALL, {{one}})\n"
        "        if attempt(operation) == 'done':\n            found.add(one)\n    return found",
    ],
    "18.3": [
        "def give_up():\n    capabilities.capset((), ())",
        "def give_up():\n    capabilities.capset(ALL, ())",
        "def give_up():\n    capabilities.drop_bounding(())",
        "def give_up():\n    os.setresuid(1000, 1000, 1000)",
        "def give_up():\n    capabilities.limit_to({Capability.CAP_CHOWN})",
        "def give_up():\n    capabilities.capset(ALL, ALL, ALL)\n    capabilities.drop_bounding(())\n"
        "    capabilities.capset((), (), ALL)",
        "def give_up():\n    capabilities.capset((), ())\n    capabilities.drop_bounding(())",
        "def give_up():\n    print('I hold nothing any more')",
    ],
}
