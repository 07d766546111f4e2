"""OCI runtime bundles: a container as a directory that any runtime can start, a root file system and config.json.

The configuration says in the standard's words what `labkernel.walls` does in ours, setting for setting. What
it has no words for is left to whoever calls the runtime: a network with anything in it (Docker and Kubernetes do
that before or after), the writable layer (they mount the overlay themselves), and an init beside the program.

Source: https://github.com/opencontainers/runtime-spec/blob/main/config.md, and config-linux.md beside it.
"""

from __future__ import annotations

import json
import os
import platform
import resource
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from labkernel.linux import capabilities, mounts, seccomp
from labkernel.linux.cgroups import CPU_PERIOD_USEC, Limits
from labkernel.linux.users import IdMap
from labkernel.spec import BadOption, Process, Spec, Volume

VERSIONS = {"1.0": "1.0.2", "1.1": "1.1.0"}
"""Of the specification. Only 1.1 has a word for the time namespace, and runc before 1.2 refuses to read it."""

NAMESPACES = {
    "mnt": "mount", "uts": "uts", "ipc": "ipc", "pid": "pid", "net": "network", "user": "user", "cgroup": "cgroup",
    "time": "time",
}  # fmt: skip
"""The standard's names of the kinds."""

SEALED = ("nosuid", "noexec", "nodev")

MOUNTS: Sequence[tuple[str, str, str, tuple[str, ...]]] = (
    ("/proc", "proc", "proc", SEALED),
    ("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
    ("/dev/pts", "devpts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620")),
    ("/dev/shm", "tmpfs", "shm", (*SEALED, "mode=1777", "size=65536k")),
    ("/dev/mqueue", "mqueue", "mqueue", SEALED),
    ("/sys", "sysfs", "sysfs", (*SEALED, "ro")),
)
"""Where, what kind, from what, and with which options: what `mounts.minimal_dev`, `proc` and `sysfs` mount."""

_LIMIT_NAMES = {
    number: name
    for name, number in vars(resource).items()
    if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE"
}
_ARCHITECTURES = {"x86_64": ["X86_64", "X86"], "aarch64": ["AARCH64", "ARM"]}
_ACTIONS = {
    seccomp.ALLOW: "ALLOW", seccomp.ERRNO: "ERRNO", seccomp.LOG: "LOG", seccomp.TRAP: "TRAP",
    seccomp.KILL_THREAD: "KILL_THREAD", seccomp.KILL_PROCESS: "KILL_PROCESS",
}  # fmt: skip


def config(
    spec: Spec,
    *,
    ids: tuple[int, int, Sequence[int]],
    maps: Sequence[IdMap],
    profile: seccomp.Profile | None,
    cgroup_version: int = 2,
    version: str = "1.1",
) -> dict[str, Any]:
    """The config.json of a container that is described by `spec`, as a dictionary.

    `ids`: the program's uid, gid and further groups, as numbers. `maps`: of the user namespace. `profile`: of
    system calls, None for no filter. `cgroup_version`: limits that only v2 has are written by the names of its files.
    `version`: of the specification; with 1.0 the time namespace is left out.
    Raises BadOption for what the standard cannot say.
    """
    if spec.network == "bridge" or spec.publish:
        raise BadOption(
            "--network bridge, --publish: a bundle cannot say this. A runtime makes an empty network, and who calls "
            "it puts something in; write none or host"
        )
    kinds = [kind for kind in NAMESPACES if kind in spec.namespaces and (kind != "time" or version != "1.0")]
    linux: dict[str, Any] = {
        "namespaces": [{"type": NAMESPACES[kind]} for kind in kinds],
        "resources": resources(spec.limits, cgroup_version),
        "rootfsPropagation": "private",
        "maskedPaths": list(mounts.MASKED_PATHS) if spec.masked_paths else [],
        "readonlyPaths": list(mounts.READONLY_PATHS) if spec.masked_paths else [],
    }
    if "user" in kinds:
        linux["uidMappings"] = linux["gidMappings"] = [
            {"containerID": one.inside, "hostID": one.outside, "size": one.count} for one in maps
        ]
    if profile is not None:
        linux["seccomp"] = system_calls(profile, spec.process.capabilities)
    found: dict[str, Any] = {
        "ociVersion": VERSIONS[version],
        "root": {"path": "rootfs", "readonly": spec.read_only},
        "process": process(spec.process, ids),
        "mounts": [*_mounts(spec.namespaces), *(_volume(volume) for volume in spec.volumes)],
        "linux": linux,
    }
    if "uts" in kinds:
        found["hostname"] = spec.hostname
    return found


def process(program: Process, ids: tuple[int, int, Sequence[int]]) -> dict[str, Any]:
    """The program, as whom it runs, and what it may do."""
    uid, gid, groups = ids
    kept = capabilities.names(program.capabilities)
    return {
        "terminal": program.tty,
        "user": {"uid": uid, "gid": gid, "additionalGids": list(groups)},
        "args": list(program.command),
        "env": [f"{name}={value}" for name, value in program.environment.items()],
        "cwd": program.workdir,
        # The inheritable and the ambient set are empty: see capabilities.limit_to.
        "capabilities": {
            "bounding": kept,
            "effective": kept,
            "permitted": kept,
            "inheritable": [],
            "ambient": [],
        },
        "rlimits": [
            {"type": _LIMIT_NAMES[number], "soft": value, "hard": value} for number, value in program.rlimits
        ],
        "noNewPrivileges": program.no_new_privs,
    }


def resources(limits: Limits, cgroup_version: int = 2) -> dict[str, Any]:
    """The limits of the control group. Swap is counted together with memory here, as cgroup v1 does."""
    memory: dict[str, int] = {}
    cpu: dict[str, Any] = {}
    unified: dict[str, str] = {}
    found: dict[str, Any] = {}
    if limits.memory is not None:
        memory["limit"] = limits.memory
        if limits.memory_swap is not None:
            memory["swap"] = limits.memory + limits.memory_swap
    if limits.cpus is not None:
        cpu |= {"quota": int(limits.cpus * CPU_PERIOD_USEC), "period": CPU_PERIOD_USEC}
    if limits.cpuset_cpus is not None:
        cpu["cpus"] = limits.cpuset_cpus
    if cgroup_version == 1:
        if limits.memory_high is not None:
            memory["reservation"] = limits.memory_high
        if limits.cpu_weight is not None:
            cpu["shares"] = max(2, limits.cpu_weight * 1024 // 100)
    else:
        if limits.memory_high is not None:
            unified["memory.high"] = str(limits.memory_high)
        if limits.cpu_weight is not None:
            unified["cpu.weight"] = str(limits.cpu_weight)
    if limits.pids is not None:
        found["pids"] = {"limit": limits.pids}
    disks = {"throttleReadBpsDevice": limits.read_bps, "throttleWriteBpsDevice": limits.write_bps}
    rates = {name: [_rate(*item) for item in given.items()] for name, given in disks.items() if given}
    parts = {"memory": memory, "cpu": cpu, "unified": unified, "blockIO": rates}
    return found | {name: part for name, part in parts.items() if part}


def system_calls(profile: seccomp.Profile, kept: Iterable[int]) -> dict[str, Any]:
    """The filter. What depends on capabilities is decided here: a runtime gets rules, and no conditions on those.

    Calls that are newer than the list fail with ENOSYS under our filter, and under runc's; crun refuses them as it
    does those that the list leaves out.
    """
    held = frozenset(kept)
    rules = [rule for rule in profile.rules if rule.needs <= held and not rule.unless & held]
    action, number = _action(profile.default)
    found: dict[str, Any] = {
        "defaultAction": action,
        "architectures": [f"SCMP_ARCH_{name}" for name in _ARCHITECTURES[platform.machine()]],
        "syscalls": [_rule(rule) for rule in rules],
    }
    return found | ({} if number is None else {"defaultErrnoRet": number})


def make(
    directory: Path, spec: Spec, tarball: Path, *, profile: str = "default", version: str = "1.0"
) -> dict[str, Any]:  # fmt: skip
    """Make the bundle in a new or empty directory: the image's tarball unpacked as `rootfs`, and config.json.

    The files get the ids that the user namespace has for them. `profile` is of system calls: "default", "unconfined",
    or a file. Returns what is in config.json. Raises FileExistsError, BadOption, and what `image.unpack` raises.
    """
    from labkernel import children
    from labkernel.cleanup import remove_tree

    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise FileExistsError(f"{directory} is there already, and not empty")
    facts = children.launcher().facts
    base = facts["container_map"]
    # An ordinary user's container has the ids that the user was given, and the user is its root.
    maps = [IdMap(**one) for one in facts["id_maps"] or [base]]
    content = config(
        spec, ids=(0, 0, ()), maps=maps, profile=seccomp.named(profile), version=version,
        cgroup_version=facts["cgroup_version"] or 2,
    )  # fmt: skip
    rootfs = directory / "rootfs"
    try:
        children.in_child(_unpack, tarball, rootfs, base["outside"], base["count"])
        uid, gid, groups = children.in_child(_ids_of, spec.process.user, rootfs)
    except BaseException:
        for path in directory.iterdir():  # a child that was killed has left what it was unpacking to
            children.in_child(remove_tree, str(path))
        raise
    content["process"]["user"] = {"uid": uid, "gid": gid, "additionalGids": groups}
    (directory / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    return content


def _unpack(tarball: Path, place: Path, owner_base: int, owner_count: int) -> None:
    from labkernel.image.unpack import unpack
    from labkernel.images import ANY_SIZE

    unpack(
        tarball, place, same_owner=owner_count > 1, owner_base=owner_base, owner_count=owner_count, allow_setuid=True,
        limits=ANY_SIZE,
    )  # fmt: skip


def _ids_of(user: str, rootfs: Path) -> tuple[int, int, list[int]]:
    """The numbers behind a user's name, by the files in `rootfs`. For a child of the lab: it changes its root."""
    from labkernel.walls import look_up_user

    os.chroot(rootfs)
    return look_up_user(user)


def _mounts(kinds: frozenset[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"destination": place, "type": kind, "source": source, "options": list(options)}
        for place, kind, source, options in MOUNTS
        if place != "/dev/mqueue" or "ipc" in kinds
    ]
    if "net" not in kinds:  # a new sysfs takes power over the network namespace, so the host's is shown
        found[-1] = _bind("/sys", "/sys", ())
    return found


def _volume(volume: Volume) -> dict[str, Any]:
    return _bind(volume.source, volume.target, ("nosuid", "nodev", *(["ro"] if volume.read_only else [])))


def _bind(source: str, target: str, options: Sequence[str]) -> dict[str, Any]:
    return {"destination": target, "type": "bind", "source": source, "options": ["rbind", *options]}


def _rate(device: str, rate: int) -> dict[str, int]:
    major, minor = map(int, device.split(":"))
    return {"major": major, "minor": minor, "rate": rate}


def _action(answer: int) -> tuple[str, int | None]:
    kind = answer & seccomp.ACTION
    number = answer & 0xFFFF if kind == seccomp.ERRNO else None
    return f"SCMP_ACT_{_ACTIONS[kind]}", number


def _rule(rule: seccomp.Rule) -> dict[str, Any]:
    action, number = _action(rule.action)
    found: dict[str, Any] = {"names": list(rule.calls), "action": action}
    if number is not None:
        found["errnoRet"] = number
    if rule.conditions:
        found["args"] = [_condition(one) for one in rule.conditions]
    return found


def _condition(one: seccomp.Comparison) -> dict[str, Any]:
    found = {"index": one.argument, "value": one.value, "op": f"SCMP_CMP_{one.operator}"}
    if one.operator == "MASKED_EQ":  # here the mask comes first
        found |= {"value": one.mask, "valueTwo": one.value}
    return found
