"""How long things take, measured on this machine: `make bench`, or

    .venv/bin/python bench/bench.py [--rounds N] [--only NAME]...

start-to-exit: from the call until the end of /bin/true, in one root file system, with a network namespace in all.
The subjects take turns in a random order, so that whatever else the machine does hits all of them alike; they have
the same streams (/dev/null twice, and a file for errors), and the exit status of every run is checked. What each of
them puts up besides, as its own defaults have it:

    labkernel      all that a container has: eight namespaces, pivot_root, writable overlay, control group with
                   limits, capabilities, seccomp, no_new_privs, masked paths, init; called from a process that
                   runs already, as a notebook does
    labkernel-cli  the same by the command `labkernel run --rm`: with the start of Python, twice
    crun, runc     what `crun spec` and `runc spec` write: control group, capabilities, masked paths, read-only root;
                   no user namespace, no seccomp filter, no init
    bwrap          --unshare-all: also a user namespace, no_new_privs; no control group, no seccomp filter
    unshare        six namespaces and chroot
    bare-c         bare.c: six namespaces, pivot_root, /proc

The others: in_child (a cell's child process), import (of labkernel, over Python's own start), monitor-cpu (CPU time
of the monitor in a second of watching at 10 Hz; 10 ms are 1 % of a core), 100-containers (the start of each of the
first ten and of the last ten of a hundred that run at once), pack and unpack (a tree of 250 MB, files of this
environment, against tar with zstd at the same level and with as many threads; pinned to the same processors, in turns;
and the memory that packing and unpacking take at most, for 100 MB and for 250 MB: in a row, MiB stand for ms).

The results are printed as a table, and written to build/bench.json: a list of {"benchmark", "subject", "median_ms",
"runs"}. A missed aim is shown and does not fail the run: a busy machine is no fault of the program.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "build" / "bench.json"
PROGRAM = "/bin/true"
SEARCH_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))

PAUSE = 0.01
"""Seconds between two runs: the kernel takes network namespaces down after the process has ended."""

AIMS = {"crun": 0.5, "runc": 0.2, "bwrap": 1.0, "bare-c": 2.5}
"""The most that labkernel's median may be of theirs."""

TAR_AIM = 1.3
"""The most that packing and unpacking may take of what tar takes."""

Start = Callable[[], float]
"""Starts something once, waits for its end, and returns the milliseconds. Raises Failed."""


class Failed(RuntimeError):
    """A run ended with another exit status than 0."""


class Row(NamedTuple):
    """One line of the results."""

    benchmark: str
    subject: str
    median_ms: float
    runs: int


# ---------------------------------------------------------------------- running programs


class Runner:
    """A small process that starts programs and takes the time; forking from the benchmark itself would cost more.

    without: mounts that this process shall not have. crun does not run where cgroup v2 is mounted beside v1.
    """

    def __init__(self, without: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--runner", *without],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(self, command: Sequence[str]) -> float:
        """Run a command; "{}" in it is replaced by another number each time."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"{' '.join(command)}: could not be started")
        answer = json.loads(line)
        if answer["status"]:
            raise Failed(f"{' '.join(command)}: exit status {answer['status']}: {answer['stderr']}")
        return float(answer["ms"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


def serve(without: Sequence[str]) -> None:
    """Be the runner's process."""
    if without:
        from labkernel.linux import mounts, syscalls

        syscalls.unshare(syscalls.CLONE_NEWNS)
        mounts.set_propagation("/", "private")
        for point in without:
            syscalls.umount2(point)
    with tempfile.TemporaryFile() as errors, open(os.devnull, "r+b") as null:
        actions = [(os.POSIX_SPAWN_DUP2, null.fileno(), fd) for fd in (0, 1)]
        actions += [(os.POSIX_SPAWN_DUP2, errors.fileno(), 2)]
        for number, line in enumerate(sys.stdin):
            command = [word.replace("{}", str(number)) for word in json.loads(line)]
            began = time.perf_counter()
            pid = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
            _, status = os.waitpid(pid, 0)
            took = time.perf_counter() - began
            errors.seek(0)
            answer = {
                "ms": took * 1000,
                "status": os.waitstatus_to_exitcode(status),
                "stderr": errors.read().decode(errors="replace"),
            }
            errors.truncate(0)
            errors.seek(0)
            print(json.dumps(answer), flush=True)


# ---------------------------------------------------------------------- the subjects of start-to-exit


def subjects(rootfs: str, work: Path, plain: Runner, hidden: Runner) -> dict[str, Start | str]:
    """What is compared; a text says why one is left out. `hidden` is the runner without cgroup v2 beside v1."""
    user = (
        "" if os.geteuid() == 0 else "an ordinary user needs systemd's help for it: run the benchmark as root"
    )
    namespaces = ["--mount", "--uts", "--ipc", "--pid", "--net", "--cgroup", "--fork"]
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    commands: dict[str, list[str]] = {
        "unshare": ["unshare", *as_root, *namespaces, f"--root={rootfs}", "--mount-proc", PROGRAM],
        "bwrap": [
            "bwrap",
            "--unshare-all",
            "--ro-bind",
            rootfs,
            "/",
            "--proc",
            "/proc",
            "--dev",
            "/dev",
            PROGRAM,
        ],
        "bare-c": [str(work / "bare"), rootfs, PROGRAM],
        "labkernel-cli": [str(Path(sys.executable).with_name("labkernel")), "run", "--rm", PROGRAM],
    }
    found: dict[str, Start | str] = {"labkernel": labkernel_start}
    for name in ("crun", "runc"):
        found[name] = user or "is not installed"
        if (program := find(name)) and not user:
            bundle = make_bundle(program, rootfs, work / name)
            run = [program, "--root", str(work / f"{name}-state"), "run", "--bundle", str(bundle)]
            runner = hidden if name == "crun" else plain
            found[name] = starter(runner, [*run, f"labkernel-bench-{os.getpid()}-{{}}"])
    trouble = compile_bare(work)
    for name, (program, *arguments) in commands.items():
        path = find(program)
        found[name] = starter(plain, [path, *arguments]) if path else "is not installed"
    if trouble:
        found["bare-c"] = trouble
    return found


def starter(runner: Runner, command: list[str]) -> Start:
    """A subject that is a command."""
    return lambda: runner.start(command)


def find(program: str) -> str | None:
    """The path of a program; an ordinary user's PATH may lack the directory of runc."""
    return shutil.which(program, path=SEARCH_PATH)


def labkernel_start() -> float:
    """One container, from the constructor to the exit status, with such streams as the commands have."""
    from labkernel import Container

    with tempfile.TemporaryFile() as errors, open(os.devnull, "r+b") as null:
        began = time.perf_counter()
        container = Container("python", [PROGRAM]).start(null.fileno(), null.fileno(), errors.fileno())
        status = container.wait()
        took = time.perf_counter() - began
        errors.seek(0)
        if status:
            raise Failed(f"labkernel: exit status {status}: {errors.read().decode(errors='replace')}")
    return took * 1000


def compile_bare(work: Path) -> str:
    """Compile bare.c; why that is not possible, or ""."""
    compiler = find("cc") or find("gcc")
    if not compiler:
        return "there is no C compiler"
    command = [compiler, "-O2", "-o", str(work / "bare"), str(Path(__file__).with_name("bare.c"))]
    done = subprocess.run(command, capture_output=True, text=True)
    return f"bare.c was not compiled: {done.stderr.strip()}" if done.returncode else ""


def make_bundle(program: str, rootfs: str, bundle: Path) -> Path:
    """An OCI bundle as the runtime itself proposes it, with our root file system and program."""
    bundle.mkdir()
    subprocess.run([program, "spec"], cwd=bundle, check=True)
    path = bundle / "config.json"
    config = json.loads(path.read_text())
    config["process"] |= {"terminal": False, "args": [PROGRAM]}
    config["root"] = {"path": rootfs, "readonly": True}
    path.write_text(json.dumps(config))
    return bundle


def cgroup2_beside_v1() -> list[str]:
    """Where cgroup v2 is mounted beside v1: crun refuses such a machine."""
    from labkernel.linux import cgroups

    mounted = cgroups.mounts()
    hybrid = {mount.version for mount in mounted} == {1, 2}
    return [mount.point for mount in mounted if mount.version == 2] if hybrid and os.geteuid() == 0 else []


# ---------------------------------------------------------------------- the benchmarks


def start_to_exit(rounds: int) -> list[Row]:
    """All subjects in turn."""
    from labkernel.images import rootfs

    with tempfile.TemporaryDirectory(prefix="labkernel-bench-") as directory:
        work = Path(directory)
        work.chmod(0o755)
        with Runner() as plain, Runner(without=cgroup2_beside_v1()) as hidden:
            starts: dict[str, Start] = {}
            for name, start in subjects(str(rootfs().resolve()), work, plain, hidden).items():
                if isinstance(start, str):
                    say(f"left out: {name}: {start}")
                else:
                    starts[name] = start
            # What set-up and the image have just written reaches the disk first. Who writes to it too, as all do that
            # have a layer or a bundle there, would else wait for it in the middle of this, and bwrap would not.
            os.sync()
            return take_turns("start-to-exit", starts, rounds)


def take_turns(benchmark: str, starts: Mapping[str, Start], rounds: int) -> list[Row]:
    """Run each of `starts` once a round, in another order each time, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in starts}
    order = list(starts)
    shuffled = random.Random(1)
    for number in range(-2, rounds):
        progress(f"{benchmark}: round {max(number + 1, 0)} of {rounds}")
        shuffled.shuffle(order)
        for name in tuple(order):
            time.sleep(PAUSE)
            try:
                took = starts[name]()
            except Failed as failure:
                if number > -2 or name == "labkernel":
                    raise
                say(f"left out: {name}: {failure}")  # it does not work on this machine at all
                order.remove(name)
                del times[name]
                continue
            if number >= 0:
                times[name].append(took)
    return [Row(benchmark, name, statistics.median(took), len(took)) for name, took in times.items()]


def in_child(rounds: int) -> list[Row]:
    """A function in a child of the launcher, from call to value."""
    from labkernel import in_child as run

    def once() -> float:
        began = time.perf_counter()
        if run(os.getpid) == os.getpid():
            raise Failed("in_child: not another process")
        return (time.perf_counter() - began) * 1000

    return take_turns("in_child", {"labkernel": once}, rounds)


def imported(rounds: int) -> list[Row]:
    """`import labkernel`, less what Python needs without it."""
    with Runner() as runner:
        codes = {"python": "pass", "labkernel": "import labkernel"}
        starts = {name: starter(runner, [sys.executable, "-c", code]) for name, code in codes.items()}
        bare, ours = take_turns("import", starts, rounds)
    return [ours._replace(median_ms=max(0.0, ours.median_ms - bare.median_ms))]


def monitor_cpu(rounds: int) -> list[Row]:
    """CPU time of the monitor's thread in a second of watching at 10 Hz."""
    from labkernel import Container
    from labkernel.monitor import Monitor

    spent = []
    with Container("python", ["sleep", "1000"]) as container:
        for number in range(seconds := max(3, rounds // 12)):
            progress(f"monitor-cpu: second {number + 1} of {seconds}")
            monitor = Monitor(container, hz=10)
            began = time.monotonic()
            with monitor:
                time.sleep(1)
            spent.append(monitor.cpu_seconds * 1000 / (time.monotonic() - began))
    return [Row("monitor-cpu", "labkernel", statistics.median(spent), len(spent))]


def hundred_containers(_: int) -> list[Row]:
    """A hundred containers at once: does the last one cost what the first did?"""
    from contextlib import ExitStack

    from labkernel import Container

    labkernel_start()
    took = []
    with ExitStack() as running:
        for number in range(100):
            progress(f"100-containers: {number + 1} of 100")
            began = time.perf_counter()
            container = running.enter_context(Container("python", ["sleep", "1000"], memory="32M"))
            took.append((time.perf_counter() - began) * 1000)
            if not container.running():
                raise Failed(f"100-containers: number {number + 1} does not run")
        progress("100-containers: ending them")
    ten = {"first ten": took[:10], "last ten": took[-10:]}
    return [Row("100-containers", name, statistics.median(some), len(some)) for name, some in ten.items()]


TREE = 250 << 20
"""Bytes of the tree that is packed; two fifths of it for the memory: with less, zstd's threads do not fill theirs."""

# (VmHWM and not ru_maxrss: that one begins with what the process had before its exec, which is what its parent has.)
IN_CHILD = """
import sys, time
from pathlib import Path
import zstandard
from labkernel.image.pack import pack
from labkernel.image.tarball import Limits
from labkernel.image.unpack import unpack
began = time.perf_counter()
source, made = Path(sys.argv[2]), Path(sys.argv[3])
pack(source, made) if sys.argv[1] == "pack" else unpack(source, made, allow_setuid=True)
took, status = time.perf_counter() - began, Path("/proc/self/status").read_text()
print(took * 1000, int(status.partition("VmHWM:")[2].split()[0]) / 1024)
"""


def make_tree(root: Path, size: int) -> None:
    """Copy real files (this environment's) until there are so many bytes."""
    source = Path(sys.prefix)
    for directory, directories, names in os.walk(source):
        directories.sort()
        for name in sorted(names):
            path = Path(directory, name)
            if path.is_symlink() or not path.is_file():
                continue
            copy = root / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
            size -= path.stat().st_size
            if size <= 0:
                return
    raise Failed(f"pack: {source} has too few files for a tree of that size: {size} bytes are missing")


def pack_and_unpack(rounds: int) -> list[Row]:
    """Our tarballs against tar's, and whether memory grows with the size of the image."""
    tar, zstd = find("tar"), find("zstd")
    with tempfile.TemporaryDirectory(prefix="labkernel-bench-") as directory:
        work = Path(directory)
        memory: dict[str, list[float]] = {}

        def ours(what: str, source: Path, made: Path) -> float:
            command = [sys.executable, "-c", IN_CHILD, what, str(source), str(made)]
            done = subprocess.run(
                command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
            )
            if done.returncode:
                raise Failed(f"{what}: {done.stderr}")
            ms, mib = map(float, done.stdout.split())
            memory.setdefault(f"{what} {source.name.partition('.')[0]}", []).append(mib)
            return ms

        def theirs(*command: str) -> float:
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True)
            took = time.perf_counter() - began
            if done.returncode:
                raise Failed(f"{' '.join(command)}: {done.stderr}")
            return took * 1000

        def pack_with_tar() -> float:
            # As many threads and the level that labkernel.image.pack has.
            return theirs("tar", "-I", "zstd -9 -T2", "-cf", f"{work}/theirs.zst", "-C", f"{work}/250MB", ".")

        def unpack_ours(name: str) -> float:
            shutil.rmtree(work / "root", ignore_errors=True)
            return ours("unpack", work / f"{name}.zst", work / "root")

        def unpack_with_tar() -> float:
            shutil.rmtree(work / "root", ignore_errors=True)
            (work / "root").mkdir()
            return theirs("tar", "-I", "zstd", "-xf", f"{work}/250MB.zst", "-C", f"{work}/root")

        for name, size in (("100MB", TREE * 2 // 5), ("250MB", TREE)):
            make_tree(work / name, size)
            ours("pack", work / name, work / f"{name}.zst")
            unpack_ours(name)
        packing: dict[str, Start] = {"labkernel": lambda: ours("pack", work / "250MB", work / "250MB.zst")}
        unpacking: dict[str, Start] = {"labkernel": lambda: unpack_ours("250MB")}
        if tar and zstd:
            packing["tar"], unpacking["tar"] = pack_with_tar, unpack_with_tar
        else:
            say("left out: tar: tar or zstd is not installed")
        few = max(1, rounds // 20)
        rows = [*take_turns("pack", packing, few), *take_turns("unpack", unpacking, few)]
    return [*rows, *(Row("memory, MiB", name, max(some), len(some)) for name, some in memory.items())]


BENCHMARKS: Mapping[str, Callable[[int], list[Row]]] = {
    "start-to-exit": start_to_exit,
    "in_child": in_child,
    "import": imported,
    "monitor-cpu": monitor_cpu,
    "100-containers": hundred_containers,
    "pack": pack_and_unpack,
}


# ---------------------------------------------------------------------- telling


def table(rows: Sequence[Row]) -> str:
    """The medians, and against the aims what they have to be compared with."""
    medians = {(row.benchmark, row.subject): row.median_ms for row in rows}
    ours = medians.get(("start-to-exit", "labkernel"))
    lines = [f"{'benchmark':<16} {'subject':<14} {'median':>10} {'runs':>5}   labkernel is … of it"]
    for row in rows:
        unit = "MiB" if row.benchmark.startswith("memory") else "ms"
        lines.append(f"{row.benchmark:<16} {row.subject:<14} {row.median_ms:>7.2f} {unit:<3} {row.runs:>4}")
        mine = medians.get((row.benchmark, "labkernel"))
        if row.benchmark in ("pack", "unpack") and mine and row.subject == "tar":
            lines[-1] += f"   {mine / row.median_ms:.2f}, aim {verdict(mine / row.median_ms, TAR_AIM)}"
        if row.benchmark == "start-to-exit" and ours and not row.subject.startswith("labkernel"):
            aim = AIMS.get(row.subject)
            lines[-1] += f"   {ours / row.median_ms:.2f}" + (
                f", aim {verdict(ours / row.median_ms, aim)}" if aim else ""
            )
    lines += ["", *other_aims(medians)]
    return "\n".join(lines)


def other_aims(medians: Mapping[tuple[str, str], float]) -> list[str]:
    """The aims that are not ratios of start-to-exit."""
    figures: list[tuple[str, float | None, float, str]] = [
        ("a cell's child, ms", medians.get(("in_child", "labkernel")), 10, ""),
        ("import labkernel over bare Python, ms", medians.get(("import", "labkernel")), 50, ""),
        ("the monitor at 10 Hz, ms of CPU a second", medians.get(("monitor-cpu", "labkernel")), 10, "1 % of a core"),
    ]  # fmt: skip
    first, last = (medians.get(("100-containers", name)) for name in ("first ten", "last ten"))
    if first and last:
        figures.append(("the last ten of a hundred, times the first ten", last / first, 1.5, "linear"))
    for what in ("pack", "unpack"):
        small, big = (medians.get(("memory, MiB", f"{what} {name}")) for name in ("100MB", "250MB"))
        if small and big:
            figures.append(
                (f"memory to {what} 250 MB, times that for 100 MB", big / small, 1.3, f"{big:.0f} MiB")
            )
    return [
        f"{what}: {value:.2f}, aim {verdict(value, aim)}" + (f" ({remark})" if remark else "")
        for what, value, aim, remark in figures
        if value is not None
    ]


def verdict(value: float, aim: float) -> str:
    """The aim, and whether it is met."""
    return f"{aim:g}: {'met' if value <= aim else 'MISSED'}"


def progress(text: str) -> None:
    """One line that is written over, where somebody looks."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """A line that stays."""
    progress("")
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Measure the start of containers, and a few things more.")
    parser.add_argument("--rounds", type=int, default=100, help="runs of each subject (default: 100)")
    parser.add_argument(
        "--only", action="append", choices=BENCHMARKS, help="only this benchmark (repeatable)"
    )
    parser.add_argument("--runner", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.runner is not None:
        serve(options.runner)
        return 0
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: give a number from 1 on")
    # As on a reader's machine, Python keeps what it has compiled. A launcher that compiles for itself has a seventh
    # more memory, and each container's processes begin as copies of it.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    rows: list[Row] = []
    for name, measure in BENCHMARKS.items():
        if not options.only or name in options.only:
            rows += measure(options.rounds)
    say(table(rows))
    RESULTS.parent.mkdir(exist_ok=True)
    shown: list[dict[str, Any]] = [row._asdict() | {"median_ms": round(row.median_ms, 3)} for row in rows]
    RESULTS.write_text(json.dumps(shown, indent=1) + "\n")
    print(f"\nwritten: {os.path.relpath(RESULTS)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as failure:
        sys.exit(f"bench: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
