"""The options of a container, and what they mean to `Container`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from labkernel.cli.common import option, together

LIMITS = together(
    option("--memory", "-m", metavar="BYTES", teaches="16-memory", help='Memory limit, as in "64M".'),
    option("--memory-reservation", metavar="BYTES", teaches="16-memory",
           help="Soft limit: above it memory is taken back."),
    option("--memory-swap", metavar="BYTES", teaches="16-memory", help="Limit of memory and swap together."),
    option("--cpus", metavar="NUMBER", teaches="15-cpu", help='Cores, as in "0.5".'),
    option("--cpu-weight", metavar="1-10000", teaches="15-cpu",
           help="Share of a busy machine; others have 100."),
    option("--cpuset-cpus", metavar="LIST", teaches="15-cpu", help='Which cores, as in "0-1" or "0,2".'),
    option("--pids-limit", metavar="NUMBER", teaches="17-pids-io-freezer", help="Most processes and threads."),
    option("--device-read-bps", metavar="DEVICE:RATE", multiple=True, teaches="17-pids-io-freezer",
           help='Most bytes read a second, as in "/dev/sda:1M".'),
    option("--device-write-bps", metavar="DEVICE:RATE", multiple=True, teaches="17-pids-io-freezer",
           help="Most bytes written a second."),
)  # fmt: skip


WALLS = together(
    option("--hostname", metavar="NAME", teaches="07-uts", help="Host name inside."),
    option("--network", metavar="none|bridge|host", default="none", teaches="10-network",
           help="A network of its own, alone (the default) or with a bridge, which the containers of one notebook "
           "share; or the host's."),
    option("--publish", "-p", metavar="[[IP:]PORT:]PORT", multiple=True, teaches="10-network",
           help="Make a port of the container one of this machine; without IP, of 127.0.0.1."),
    option("--volume", "-v", "volumes", metavar="SRC:DST[:ro]", multiple=True, teaches="04-mount-namespace",
           help="Show SRC of this machine as DST inside."),
    option("--read-only", is_flag=True, teaches="04-mount-namespace", help="A root file system nobody can write to."),
    option("--cap-drop", metavar="CAP|ALL", multiple=True, teaches="18-capabilities", help="Take a capability away."),
    option("--cap-add", metavar="CAP|ALL", multiple=True, teaches="18-capabilities", help="Give a capability."),
    option("--security-opt", metavar="WALL=VALUE", multiple=True, teaches="19-seccomp",
           help="seccomp=unconfined, seccomp=FILE, or no-new-privileges=false."),
)  # fmt: skip


PROGRAM = together(
    option("--env", "-e", metavar="KEY=VALUE", multiple=True, teaches="01-process",
           help="Set a variable; KEY alone copies ours."),
    option("--user", "-u", metavar="USER[:GROUP]", teaches="11-user", help="Who the program is, by name or number."),
    option("--workdir", "-w", metavar="DIR", teaches="03-chroot", help="Directory in which it starts."),
    option("--interactive", "-i", is_flag=True, teaches="23-python-container", help="Let it read our standard input."),
    option("--tty", "-t", is_flag=True, teaches="23-python-container", help="Give it a terminal of its own."),
)  # fmt: skip


def for_container(image: str, command: tuple[str, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """What `Container` is to be called with. What nobody says is as an imported image wants it, else as ever."""
    from labkernel.image import store

    wanted = dict((store.read_record(image) or {}).get("settings") or {})
    inside = dict(item.partition("=")[::2] for item in wanted.get("Env", ()))
    found = dict(options) | _security(options["security_opt"])
    del found["security_opt"]
    found["user"] = options["user"] or wanted.get("User") or "0:0"
    found["workdir"] = options["workdir"] or wanted.get("WorkingDir") or "/"
    found["env"] = inside | environment(options["env"])
    for name in ("device_read_bps", "device_write_bps"):
        found[name] = _rates("--" + name.replace("_", "-"), options[name])
    words = [*wanted.get("Entrypoint", ()), *(command or wanted.get("Cmd", ()))]
    return found | {"command": words or ["python3"]}


def environment(items: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE sets, KEY alone copies ours, where we have it."""
    from labkernel.spec import BadOption

    found = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not key:
            raise BadOption(f"--env {item!r}: write KEY=VALUE, or KEY to copy ours")
        if equals or key in os.environ:
            found[key] = value if equals else os.environ[key]
    return found


def _security(items: Sequence[str]) -> dict[str, Any]:
    """The two walls that --security-opt can change."""
    from labkernel.spec import BadOption

    found: dict[str, Any] = {}
    for item in items:
        wall, _, value = item.partition("=")
        if wall == "seccomp" and value:
            found["seccomp"] = value
        elif wall == "no-new-privileges" and value in ("", "true", "false"):
            found["no_new_privs"] = value != "false"
        else:
            allowed = "seccomp=unconfined, seccomp=FILE, no-new-privileges=true or no-new-privileges=false"
            raise BadOption(f"--security-opt {item!r}: give {allowed}")
    return found


def _rates(name: str, items: Sequence[str]) -> dict[str, str] | None:
    """DEVICE:RATE for each device; None where nothing is asked for."""
    from labkernel.spec import BadOption

    for item in items:
        if not item.rpartition(":")[0]:
            raise BadOption(f'{name} {item!r}: write DEVICE:RATE, as in "/dev/sda:1M"')
    return {item.rpartition(":")[0]: item.rpartition(":")[2] for item in items} or None
