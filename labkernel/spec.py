"""What a container shall be: plain data, checked before anything is started.

Names and units are those of `docker run` (https://docs.docker.com/reference/cli/docker/container/run/).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from labkernel.linux import disks
from labkernel.linux.cgroups import Limits
from labkernel.linux.namespaces import FLAGS

MEMORY_MIN = 6 << 20
"""Docker's own lower bound for --memory: with less, hardly a program starts."""

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NAMESPACES = tuple(FLAGS)
NETWORKS = ("none", "bridge", "host")
DIGITS = re.compile(r"[0-9]{1,18}")
"""A whole number as the kernel reads one: int() would also take "1_000", and digits of other scripts."""
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class BadOption(ValueError):
    """An option with a value that cannot be meant; the text names the option, the value, and what is allowed."""


class Volume(NamedTuple):
    """A directory of the host that is seen inside: --volume SRC:DST[:ro]."""

    source: str
    target: str
    read_only: bool = False

    @classmethod
    def parse(cls, text: str) -> Volume:
        """Read "SRC:DST" or "SRC:DST:ro". Raises BadOption, also when SRC is not there."""
        source, _, rest = text.partition(":")
        target, _, mode = rest.partition(":")
        if (
            mode not in ("", "ro", "rw")
            or not target.startswith("/")
            or os.path.normpath(target) == "/"
            or ".." in target.split("/")
        ):
            raise BadOption(
                f"--volume {text!r}: write SRC:DST or SRC:DST:ro, with DST an absolute path inside, not / itself"
            )
        if not os.path.exists(source):
            raise BadOption(f"--volume {text!r}: there is no {source!r} on this machine")
        return cls(os.path.realpath(source), os.path.normpath(target), mode == "ro")


class Process(NamedTuple):
    """A program to be run inside, and as whom."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    workdir: str = "/"
    user: str = "0:0"
    tty: bool = False
    capabilities: frozenset[int] = frozenset()
    seccomp: bytes | None = None
    """The compiled filter program, or None for no filter (`--security-opt seccomp=unconfined`)."""
    no_new_privs: bool = True
    rlimits: tuple[tuple[int, int], ...] = ()
    """(resource, value) pairs for setrlimit, soft and hard alike; man 2 setrlimit."""
    init_too: bool = False
    """Whether init can live behind the same walls: a filter that somebody wrote may forbid what it does."""
    observed: bytes | None = None
    """A filter program that asks whoever started it about some of its calls (see `labkernel.observe`)."""

    def as_record(self) -> dict[str, Any]:
        """What a further program of the container starts from, for JSON: all but the command and its terminal."""
        return {
            "environment": dict(self.environment),
            "workdir": self.workdir,
            "user": self.user,
            "capabilities": sorted(self.capabilities),
            "seccomp": None if self.seccomp is None else self.seccomp.hex(),
            "no_new_privs": self.no_new_privs,
            "rlimits": self.rlimits,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], command: tuple[str, ...], tty: bool) -> Process:
        """A further program, with what `as_record` has kept of the first one."""
        return cls(
            command=command,
            tty=tty,
            environment=record["environment"],
            workdir=record["workdir"],
            user=record["user"],
            capabilities=frozenset(record["capabilities"]),
            seccomp=None if record["seccomp"] is None else bytes.fromhex(record["seccomp"]),
            no_new_privs=record["no_new_privs"],
            rlimits=tuple((limit, value) for limit, value in record["rlimits"]),
        )


class Spec(NamedTuple):
    """Everything that the launcher needs to start a container."""

    id: str
    name: str
    rootfs: str
    process: Process
    hostname: str
    limits: Limits = Limits()
    limits_required: frozenset[str] = frozenset()
    """The limits (fields of `Limits`) that were asked for; the others are our defaults, left out where they must be."""
    read_only: bool = False
    volumes: tuple[Volume, ...] = ()
    network: str = "none"
    publish: tuple[str, ...] = ()
    namespaces: frozenset[str] = frozenset(NAMESPACES)
    masked_paths: bool = True
    remove: bool = True
    detach: bool = False

    @property
    def directory(self) -> Path:
        """Where the container's record, writable layer and log are."""
        from labkernel import state

        return state.containers() / self.id

    @property
    def ground(self) -> tuple[str, frozenset[str], bool, frozenset[int]]:
        """What is built before the order comes: containers that have it in common are alike."""
        return self.rootfs, self.namespaces, self.masked_paths, self.process.capabilities


class Order(NamedTuple):
    """What an empty container is told to become: descriptors, which are sent to its first process."""

    spec: int
    """The file with the pickled request: the `Spec`, and which streams go to the container's log."""
    channel: int
    stdio: tuple[int, int, int]
    volumes: tuple[int, ...]

    def descriptors(self) -> tuple[int, ...]:
        """All of them, in the order in which `received` takes them."""
        return (self.spec, self.channel, *self.stdio, *self.volumes)

    @classmethod
    def received(cls, fds: Sequence[int]) -> Order:
        """The same order, by the numbers that the descriptors have with the one who got them."""
        stdin, stdout, stderr = fds[2:5]
        return cls(fds[0], fds[1], (stdin, stdout, stderr), tuple(fds[5:]))


def parse_size(text: str | int, option: str, minimum: int = 0, maximum: int | None = None) -> int:
    """Bytes from "64M", "1.5g", "4096" or a number. Raises BadOption with the allowed range."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([bkmgt]?)(?:i?b)?", str(text).strip().lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else -1
    if size < minimum or (maximum is not None and size > maximum):
        upper = f" to {human(maximum)} (what this machine has)" if maximum is not None else " or more"
        raise BadOption(
            f"{option} {text!r}: give bytes, or a number with K, M or G, from {human(minimum)}{upper}"
        )
    return size


def human(size: float) -> str:
    """Bytes in the largest unit that leaves a number of at least 1, as `--memory` takes them: 64M."""
    units = ["", "K", "M", "G", "T"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f}{units[0]}" if size >= 1000 else f"{size:.3g}{units[0]}"


def machine_memory() -> int:
    """The machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def make_limits(
    *,
    memory: str | int | None = None,
    memory_reservation: str | int | None = None,
    memory_swap: str | int | None = None,
    cpus: float | str | None = None,
    cpu_weight: int | None = None,
    cpuset_cpus: str | None = None,
    pids_limit: int | None = None,
    device_read_bps: Mapping[str, str | int] | None = None,
    device_write_bps: Mapping[str, str | int] | None = None,
) -> Limits:
    """Check the limits and turn them into the kernel's units. Raises BadOption.

    memory_swap is memory and swap together, as for Docker; memory_reservation is the soft limit (memory.high).
    """
    whole = machine_memory()
    size = None if memory is None else parse_size(memory, "--memory", MEMORY_MIN, whole)
    soft = None
    if memory_reservation is not None:
        soft = parse_size(memory_reservation, "--memory-reservation", MEMORY_MIN, size or whole)
    swap = None
    if memory_swap is not None:
        if size is None:
            raise BadOption(
                f"--memory-swap {memory_swap!r}: it is memory and swap together, so give --memory too"
            )
        swap = parse_size(memory_swap, "--memory-swap", size) - size
    return Limits(
        memory=size,
        memory_high=soft,
        memory_swap=swap,
        cpus=None if cpus is None else _cpus(cpus),
        cpu_weight=None if cpu_weight is None else _whole(cpu_weight, "--cpu-weight", 1, 10_000),
        cpuset_cpus=None if cpuset_cpus is None else _cpuset(cpuset_cpus),
        # One is the container's init.
        pids=None if pids_limit is None else _whole(pids_limit, "--pids-limit", 2, pid_max()),
        read_bps=_rates(device_read_bps, "--device-read-bps"),
        write_bps=_rates(device_write_bps, "--device-write-bps"),
    )


@cache
def pid_max() -> int:
    """The most pids that the machine gives out."""
    return int(Path("/proc/sys/kernel/pid_max").read_text())


def _cpus(value: float | str) -> float:
    have = os.cpu_count() or 1
    try:
        cpus = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        cpus = -1.0
    if not 0.01 <= cpus <= have:
        raise BadOption(f"--cpus {value!r}: give cores from 0.01 to {have} (what this machine has)")
    return cpus


def _whole(value: int, option: str, low: int, high: int) -> int:
    text = str(value).strip()
    number = int(text) if DIGITS.fullmatch(text) else low - 1
    if not low <= number <= high:
        raise BadOption(f"{option} {value!r}: give a whole number from {low} to {high}")
    return number


def _cpuset(text: str) -> str:
    have = os.cpu_count() or 1
    parts = [part.split("-") for part in str(text).split(",")]
    good = all(len(p) in (1, 2) and all(DIGITS.fullmatch(n) and int(n) < have for n in p) for p in parts)
    if not good or any(int(p[0]) > int(p[-1]) for p in parts):
        raise BadOption(
            f'--cpuset-cpus {text!r}: give cores from 0 to {have - 1}, as in "0" or "0-1" or "0,2"'
        )
    return str(text)


def _rates(rates: Mapping[str, str | int] | None, option: str) -> dict[str, int]:
    """Bytes a second for each block device, by its number; a partition counts as its whole disk."""
    sizes = {device: parse_size(rate, f"{option} {device}", 1) for device, rate in (rates or {}).items()}
    return {_disk(device, option): size for device, size in sizes.items()}


def _disk(device: str, option: str) -> str:
    """The number "major:minor" of the disk that a block device is, or is a part of."""
    try:
        status = os.stat(device)
    except OSError as error:
        raise BadOption(
            f"{option} {device!r}: {error.strerror}; name a block device such as /dev/sda"
        ) from None
    if not stat.S_ISBLK(status.st_mode):
        raise BadOption(f"{option} {device!r}: this is no block device; name one such as /dev/sda")
    return disks.whole(f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")
