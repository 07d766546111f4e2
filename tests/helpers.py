"""What the tests share: a home of their own, and a look at everything that the lab may have left behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from labkernel import children, images, state
from labkernel.container import Completed, Container
from labkernel.linux import cgroups, mounts, syscalls

ROOT = Path(__file__).parent.parent

SETTLES_WITHIN = 15.0
"""Seconds in which what was killed has to be gone."""


# ---------------------------------------------------------------------- a disk, and memory


@contextlib.contextmanager
def on_a_disk() -> Iterator[Path]:
    """A directory that all may write to, containers too. Not below /tmp: that may be memory."""
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as place:
        os.chmod(place, 0o777)
        yield Path(place)


def peak_memory() -> int:
    """The most memory that this process has had, in KiB (VmHWM in man 5 proc).

    Not ru_maxrss: that one begins with what the process had before its exec, and that is what its parent has.
    """
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


# ---------------------------------------------------------------------- a home of the tests' own


@contextlib.contextmanager
def own_home(
    factory: pytest.TempPathFactory, *, descriptors: bool = True, images_too: bool = True
) -> Iterator[Path]:
    """An empty LABKERNEL_HOME, a launcher that ends with it, and the proof that both are left without a trace.

    Temporary files go there too, so that those of others who work with the lab are not taken for ours.

    The image and its unpacked root file system are shared by all homes of this run of the tests; a test that counts
    images wants none of them (`images_too`).
    """
    shared = factory.getbasetemp() / "shared"
    place = factory.mktemp("home")
    with environment(LABKERNEL_HOME=str(shared)):
        children.close_launcher()
        images.rootfs()
        children.close_launcher()
    if images_too:
        link_images(shared, place)
    (place / "tmp").mkdir()
    with environment(LABKERNEL_HOME=str(place), TMPDIR=str(place / "tmp")):
        tempfile.tempdir = None  # so that TMPDIR is looked at
        before = snapshot(descriptors=descriptors)
        yield place
        children.close_launcher()
        assert_nothing_left(before)
    tempfile.tempdir = None


def link_images(shared: Path, place: Path) -> None:
    """Let the home `place` have the images and the unpacked root file systems of the home `shared`."""
    place.mkdir(exist_ok=True)
    for name in ("images", "rootfs"):
        (place / name).symlink_to(shared / name)


@contextlib.contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Variables of the environment, set (or with None taken away) and put back."""
    before = {name: os.environ.get(name) for name in values}
    try:
        _set(values)
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def rootless() -> bool:
    """Whether the tests are run by an ordinary user."""
    return os.geteuid() != 0


def emulated() -> bool:
    """Whether the processor is a program: slow, and its time is not what it seems."""
    return "QEMU TCG" in Path("/proc/cpuinfo").read_text()


def facts() -> dict[str, Any]:
    """What the launcher has to work with on this machine."""
    return children.launcher().facts


def needs_limits(*controllers: str) -> None:
    """Skip the test, with the launcher's own reason, where no limits can be set."""
    if facts()["cgroup_version"] is None:
        pytest.skip(f"no limits here: {facts()['no_cgroup']}")
    missing = set(controllers) - set(facts()["controllers"])
    if missing:
        pytest.skip(f"no limits here: the controllers {', '.join(sorted(missing))} are not handed to us")


def needs_ids() -> None:
    """Skip the test where a container has one user id only."""
    if facts()["container_map"]["count"] < 65536:
        pytest.skip("a container has a single user id here: the user has no range in /etc/subuid")


def answers(port: int) -> None:
    """Wait until a server of this machine accepts connections: JupyterLab tells its address a moment before."""
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.1)


def inside(program: str, **options: Any) -> Any:
    """Run a Python program in a container; what it assigns to `result` comes back, by JSON."""
    ended = run_python(program, **options)
    assert ended.returncode == 0, f"status {ended.returncode}: {ended.stdout!r} {ended.stderr.decode()}"
    return json.loads(ended.stdout)


def run_python(program: str, **options: Any) -> Completed:
    """Run a Python program in a container, with a few modules imported, and `result` printed as JSON at the end."""
    command = ["python3", "-c", PREAMBLE + program + "\nprint(json.dumps(result))"]
    return Container("python", command, **options).run(timeout=60)


def logged(container: Container, end: str) -> str:
    """What a container has logged, once that ends with `end`."""
    until = time.monotonic() + 30
    while not (log := container.logs().decode()).rstrip("\n").endswith(end):
        assert time.monotonic() < until, f"the log did not end with {end!r} in 30 s: {log!r}"
        time.sleep(0.01)
    return log


PREAMBLE = """
import ctypes, errno, json, os, signal, socket, stat, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
result = None
def call(function, *arguments):
    'The name of the errno with which a function of libc fails, or "done".'
    ctypes.set_errno(0)
    answer = getattr(libc, function)(*arguments)
    return errno.errorcode[ctypes.get_errno()] if answer == -1 else "done"
def attempt(function, *arguments):
    'The name of the errno with which a function of Python fails, or "done".'
    try:
        function(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    return "done"
"""


# ---------------------------------------------------------------------- what is left behind


@dataclass(frozen=True)
class Snapshot:
    """Everything of ours on this machine at one moment, a text each."""

    processes: frozenset[str]
    """All descendants of this process, orphans included."""
    mounts: frozenset[str]
    cgroups: frozenset[str]
    interfaces: frozenset[str]
    rules: frozenset[str]
    directories: frozenset[str]
    descriptors: frozenset[str]
    """Of this very process."""

    def since(self, before: Snapshot) -> dict[str, list[str]]:
        """What is here and was not then, by kind."""
        new = {f.name: sorted(getattr(self, f.name) - getattr(before, f.name)) for f in fields(self)}
        return {kind: texts for kind, texts in new.items() if texts}


def snapshot(*, descriptors: bool = True) -> Snapshot:
    """Look at processes, mounts, cgroups, interfaces, nftables tables, directories and, if asked to, descriptors.

    From the first call on this process adopts the orphans among its descendants (man 2 prctl,
    PR_SET_CHILD_SUBREAPER), so that a process which outlived its launcher is still known as ours, and others
    may work with the lab on the same machine.
    """
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    reap_orphans()
    open_here = _descriptors() if descriptors else []
    groups, spares = _spares()
    pids = [pid for pid in descendants() if pid not in spares]
    return Snapshot(
        frozenset(f"{pid} {_words(pid)}" for pid in pids if _words(pid)),
        frozenset(_mounts()),
        frozenset(path for path in _cgroups(pids) if os.path.basename(path) not in groups),
        frozenset(name for _, name in socket.if_nameindex()),
        frozenset(_tables()),
        frozenset(_directories()),
        frozenset(open_here),
    )


def assert_nothing_left(before: Snapshot, within: float = SETTLES_WITHIN) -> None:
    """Fail with a list of what was not there `before` and does not go away."""
    end = time.monotonic() + within
    while left := snapshot(descriptors=bool(before.descriptors)).since(before):
        if time.monotonic() > end:
            raise AssertionError(f"left behind: {json.dumps(left, indent=1)}")
        time.sleep(0.01)


def reap_orphans() -> None:
    """Wait for the dead that we adopted, as pid 1 would: a pid namespace lasts until all in it are reaped.

    What was started by this process is told apart by its session and pid namespace, and left to whoever waits.
    """
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                state_, parent, _, session, *_ = file.read().rpartition(b")")[2].split()
                if state_ == b"Z" and int(parent) == os.getpid():
                    nested = "NSpid:\t" + name + "\t" in Path(f"/proc/{name}/status").read_text()
                    if nested or int(session) not in (int(name), os.getsid(0)):
                        os.waitpid(int(name), 0)


def descendants(of: int | None = None) -> list[int]:
    """The pids of all processes below `of` (this one), without zombies, parents before children."""
    below: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                rest = file.read().rpartition(b")")[2].split()
                # A zombie's children have been given to somebody else, so it hides nobody.
                if rest[0] not in (b"Z", b"X"):
                    below.setdefault(int(rest[1]), []).append(int(name))
    found, todo = [], [of or os.getpid()]
    while todo:
        children_of = below.get(todo.pop(), [])
        found += children_of
        todo += children_of
    return found


def inits(below: int) -> list[int]:
    """The pid-1 processes of containers among the descendants of `below`."""
    found = []
    for pid in descendants(below):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
            if len(numbers) > 2 and numbers[-1] == "1":
                found.append(pid)
    return found


def launcher_of(client: int) -> int | None:
    """The launcher of another process, or None."""
    for pid in descendants(client):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == "labkernel" and os.getsid(pid) == pid:
                return pid
    return None


def seed() -> int:
    """A number for `random`, a new one each run; LABKERNEL_TEST_SEED repeats a run."""
    return int(os.environ.get("LABKERNEL_TEST_SEED") or random.randrange(1 << 32))


def remove_home(place: Path) -> None:
    """Remove a home whose containers' directories may be closed to us."""
    shutil.rmtree(place, ignore_errors=True)


def _spares() -> tuple[set[str], set[int]]:
    """The groups and processes of empty containers that launchers keep in readiness: they end with the launcher."""
    groups, pids = set(), set()
    for path in state.launchers().glob("*.spare"):
        with contextlib.suppress(OSError, ValueError):
            group, pid = (path / "group").read_text().split()
            if state.ProcessKey.of(int(path.stem)):
                groups.add(group)
                pids |= {int(pid), *descendants(int(pid))}
    return groups, pids


def _words(pid: int) -> str:
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
    return f"{name}: {words[:200]}".strip()


def _mounts() -> list[str]:
    home = str(state.home().resolve())
    return [
        f"{m.fstype} {m.source} {m.root} on {m.mount_point}"
        for m in mounts.mountinfo()
        if any(word in text for word in (home, "labkernel") for text in (m.root, m.mount_point, m.source))
        or any(option.startswith("upperdir=/proc/self/fd") for option in m.super_options)
    ]


def _cgroups(ours: list[int]) -> list[str]:
    """Directories with our prefix in all hierarchies; not those in and below which only others' processes are."""
    found = []
    for mounted in cgroups.mounts():
        for directory, names, _ in os.walk(mounted.point):
            for name in names:
                path = os.path.join(directory, name)
                if name.startswith(state.PREFIX):
                    below = (place for place, _, _ in os.walk(path))
                    pids = {
                        int(pid) for place in below for pid in cgroups.read(f"{place}/cgroup.procs").split()
                    }
                    if not pids or pids & {os.getpid(), *ours}:
                        found.append(path)
    return found


def _tables() -> list[str]:
    """The nftables tables of the host's own network namespace."""
    if os.geteuid() != 0:  # an ordinary user may neither make them nor see them
        return []
    from pyroute2.nftables.main import NFTables

    with NFTables(nfgen_family=0) as nft:
        return [f"table {table.get_attr('NFTA_TABLE_NAME')}" for table in nft.get_tables()]


def _directories() -> list[str]:
    ours = [str(path) for kind in (state.containers(), state.launchers()) for path in kind.glob("*")]
    ours = [path for path in ours if not path.endswith(".spare")]
    places = (state.home(), Path(tempfile.gettempdir()))
    return ours + [str(path) for place in places for path in place.glob(f"{state.PREFIX}*")]


def _descriptors() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return [text for text in found if not text.endswith(f"/proc/{os.getpid()}/fd")]
