"""Whoever is killed, at whatever moment: nothing of ours is left on the machine.

A *client* stands for a notebook's kernel. It starts containers and children one after the other until it is told to
end. While it does, somebody is killed with SIGKILL at a random moment:

- the client itself: its launcher has to notice and to tidy up, without help;
- the init of a container: the launcher tidies that container up, and the client goes on;
- the launcher: the kernel ends what it ran, and the next launcher removes what was left on disk and in the cgroup tree;
- client and launcher at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from labkernel import children, cleanup, state
from labkernel.children import in_child
from labkernel.container import Container
from labkernel.linux import cgroups, mounts, syscalls
from tests.helpers import (
    assert_nothing_left,
    descendants,
    facts,
    inits,
    launcher_of,
    own_home,
    seed,
    snapshot,
)

ROUNDS = int(os.environ.get("LABKERNEL_TEST_KILLS", "50"))
VICTIMS = ("client", "launcher", "init", "client and launcher")

CLIENT = """
import os, select, sys
from labkernel.children import LauncherDied, in_child, start_child
from labkernel.container import Container, ContainerError

def told_to_end():
    return bool(select.select([0], [], [], 0)[0])

number = 0
try:
    kept = Container("python", ["sh", "-c", "sleep 61 & sleep 62"], read_only=True).start()
    print("ready", flush=True)
    while not told_to_end():
        number += 1
        try:
            with Container("python", ["sh", "-c", "echo x > /tmp/x; (sleep 63 &); sleep 0.02"],
                           volumes=["/etc:/v:ro"], publish=["0:80"] if number % 3 == 0 else [],
                           network=NETWORK if number % 5 == 0 else "none") as container:
                container.exec(["true"])
                child = start_child(os.system, "sleep 64")
                container.wait(20)
            child.kill()
        except (ContainerError, LookupError, ProcessLookupError):
            pass                        # its init was the one that was killed
    kept.kill()
except (LauncherDied, ContainerError) as error:
    os._exit(3)
"""


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


@contextlib.contextmanager
def client() -> Iterator[subprocess.Popen[str]]:
    """A Python that keeps starting containers; it has started one when we get it."""
    network = "bridge" if os.geteuid() == 0 else "none"
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT.replace("NETWORK", repr(network))], text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout and process.stdin
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # type: ignore[union-attr]  # the sign to end
        try:
            process.wait(30)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]


def kill(pid: int | None) -> bool:
    """Kill it, and wait until it is dead: on a busy machine that takes a moment, and only then is it cleaned up."""
    if pid is None:
        return False
    try:
        dying = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    with contextlib.closing(os.fdopen(dying)):
        assert select.select([dying], [], [], 20)[0], f"{pid} does not die"
    return True


def killed(victim: str, process: subprocess.Popen[str], chance: random.Random) -> bool:
    """Kill the victim; False when there is none just now."""
    launcher = launcher_of(process.pid)
    if victim == "init":
        candidates = inits(process.pid)
        return bool(candidates) and kill(chance.choice(candidates))
    done = "client" not in victim or kill(process.pid)
    return done and ("launcher" not in victim or kill(launcher))


def test_nothing_is_left_whoever_is_killed() -> None:
    """All rounds in one test: half of the time two clients share the home, so that a clean-up meets what is alive."""
    number = seed()
    chance = random.Random(number)
    children.close_launcher()
    before = snapshot()
    for turn in range(ROUNDS):
        victim = VICTIMS[turn % len(VICTIMS)]
        after = chance.uniform(0, 0.25)
        what = f"LABKERNEL_TEST_SEED={number}, round {turn}: {victim} killed after {after:.3f} s"
        with client() as process:
            time.sleep(after)
            while not killed(victim, process, chance) and process.poll() is None:
                time.sleep(0.002)
            if "client" in victim:
                process.wait(20)
            if victim == "launcher":  # the client notices and ends by itself, or goes on with a new launcher
                assert process.stdin
                process.stdin.close()
                assert process.wait(40) in (0, 3), what
        if victim == "init":
            assert process.returncode in (0, 3), what
        if "launcher" in victim:
            children.launcher()  # cleans up before anything else
            children.close_launcher()
        try:
            assert_nothing_left(before)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from None


def test_a_clean_up_leaves_alone_what_is_alive() -> None:
    """Two clients in one home; one's launcher is killed and tidied up after, the other does not notice."""
    children.close_launcher()
    before = snapshot()
    with client() as one, client() as other:
        kill(launcher_of(one.pid))
        assert one.stdin
        one.stdin.close()  # it notices, or was between two requests, and goes on with a new launcher until told to end
        assert one.wait(40) in (0, 3)
        survivors = {record["id"] for record in state.records() if record["state"] == "running"}
        inits_before = set(inits(other.pid))
        removed = children.launcher().ask({"do": "clean"}).answer(30)["removed"]
        children.close_launcher()
        assert isinstance(removed, list)
        assert survivors
        assert inits_before & set(inits(other.pid)), "the other's container should go on"
        assert launcher_of(other.pid)
        assert other.poll() is None
    assert other.returncode == 0
    assert_nothing_left(before)


def test_clean_from_the_command_line() -> None:
    """One `labkernel clean` is enough, and it says what it removed; a second one finds nothing."""
    children.close_launcher()
    before = snapshot()
    process = children.launcher().process
    container = Container("python", ["sleep", "60"]).start()
    process.kill()
    process.wait()
    assert (state.containers() / container.spec.id).is_dir()
    command = [sys.executable, "-m", "labkernel", "clean"]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    first, second = (
        subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60) for _ in range(2)
    )
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert container.spec.id in first.stdout + first.stderr
    assert container.spec.id not in second.stdout + second.stderr
    container.kill()  # nothing to do; it hangs up
    children.close_launcher()
    assert_nothing_left(before)


def test_what_has_ended_is_left_to_its_launcher_as_long_as_that_lives() -> None:
    """It has only not come to it yet: the log, the layer and the exit status are still wanted."""
    read, write = os.pipe()
    program = ["sh", "-c", "read line; echo $line; exit 3"]
    container = Container("python", program, remove=False).start(stdin=read)
    assert container.pid
    busy = children.launcher().process.pid
    with contextlib.closing(os.fdopen(os.pidfd_open(container.pid))) as init:
        os.kill(busy, signal.SIGSTOP)
        try:
            os.write(write, b"precious\n")
            assert select.select([init], [], [], 20)[0]
            assert state.find(container.spec.id)["state"] == "dead"
            children.Launcher().close()  # cleans up before anything else
        finally:
            os.kill(busy, signal.SIGCONT)
    assert (container.wait(20), container.logs()) == (3, b"precious\n")
    children.launcher().ask({"do": "remove", "record": state.find(container.spec.id)}).answer(30)
    os.close(read)
    os.close(write)


def test_a_record_whose_pid_belongs_to_somebody_else_now_kills_nobody() -> None:
    """The record of a dead launcher may name a pid that the kernel has given out again."""
    victim = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        container = Container("python", ["sleep", "60"]).start()
        record = state.read_record(container.spec.directory)
        assert record
        launcher = children.launcher().process
        launcher.kill()
        launcher.wait()
        stolen = {"pid": victim.pid, "started": 1, "boot": state.boot_id()}
        state.write_record(
            container.spec.directory, record | {"init": stolen, "launcher": stolen, "pid": victim.pid}
        )
        children.launcher()
        assert state.records() == []
        time.sleep(0.1)
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_a_session_of_somebody_who_has_a_dead_launchers_pid_now_is_left_alone() -> None:
    children.launcher()
    victim = subprocess.Popen(
        ["sh", "-c", "sleep 60 & echo $!; wait"], start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    assert victim.stdout
    member = int(victim.stdout.readline())
    record = state.launchers() / f"{victim.pid}.json"
    try:
        record.write_text(json.dumps({"pid": victim.pid, "started": 1, "boot": state.boot_id()}))
        children.Launcher().close()
        assert not record.exists()
        assert member in descendants(victim.pid)
    finally:
        os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
        victim.stdout.close()


def test_one_leftover_that_cannot_be_removed_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a control group with another group in it; here two directories stand for the two groups."""
    in_vain = cgroups.remove_directory
    monkeypatch.setattr(cgroups, "remove_directory", lambda path, timeout: in_vain(path, 0.01))
    (tmp_path / "group/inner/process").mkdir(parents=True)
    (tmp_path / "group/inner/process/file").touch()
    nobody = {"pid": os.getpid(), "started": 1, "boot": state.boot_id()}
    for identity, group in (("0123456789ab", "group"), ("0123456789ac", "nothing")):
        (state.containers() / identity).mkdir(parents=True)
        record = {"id": identity, "name": identity, "created": 1.0, "command": ["true"], "launcher": nobody}
        record |= {"state": "running", "init": nobody, "cgroup": {"": str(tmp_path / group)}}
        state.write_record(state.containers() / identity, record)
    assert cleanup.clean(None) == ["container 0123456789ac"]
    (tmp_path / "group/inner/process/file").unlink()
    assert cleanup.clean(None) == ["container 0123456789ab"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"id": 1}', '{"id": "x", "name": "y", "created": "z"}']
)
def test_a_record_that_cannot_be_read_stops_nobody(content: str) -> None:
    children.close_launcher()
    directory = state.containers() / "0123456789ab"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "record.json").write_text(content)
    state.launchers().mkdir(exist_ok=True)
    (state.launchers() / "1.json").write_text(content)
    old = time.time() - 3600
    os.utime(directory, (old, old))
    assert Container("python", ["true"]).run().returncode == 0
    assert not directory.exists()
    assert not (state.launchers() / "1.json").exists()


def test_what_a_container_leaves_in_its_layer_is_removed_whatever_its_modes() -> None:
    script = """
mkdir -p /tmp/a/b /tmp/c && touch /tmp/a/b/file && rm -r /etc/passwd /usr/lib/python3*/json
chmod 0 /tmp/a/b /tmp/a /tmp/c"""
    for remove in (True, False):
        container = Container("python", ["sh", "-c", script], remove=remove)
        assert container.run().returncode == 0
        if not remove:
            assert state.find(container.spec.id)["state"] == "exited"
            children.launcher().ask({"do": "remove", "record": state.find(container.spec.id)}).answer(30)
        assert not container.spec.directory.exists()


def test_a_tree_that_is_deeper_than_a_path_can_say_is_removed_and_ends_nobody(tmp_path: Path) -> None:
    """Whoever removes a tree by calling himself for each directory in it ends amid."""
    (tmp_path / "kept").write_text("kept")
    script = f"""
import os
os.symlink({str(tmp_path)!r}, "/root/out")
os.chdir("/root")
for _ in range(5000):
    os.mkdir("below")
    os.symlink("/", "link")
    os.chdir("below")"""
    before = children.launcher().process.pid
    neighbour = Container("python", ["sleep", "60"]).start()
    assert Container("python", ["python3", "-c", script]).run().returncode == 0
    ended = state.ended(before)
    end = time.monotonic() + 60
    while ended.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert neighbour.running()
    assert neighbour.kill() == 137
    assert children.launcher().process.pid == before
    assert (tmp_path / "kept").read_text() == "kept"


def interrupted(
    monkeypatch: pytest.MonkeyPatch, path: Path, acts: Mapping[Path, Callable[[], object]]
) -> None:
    """Remove a tree in which somebody acts each time when we have come to some directories."""
    by_number = {place.stat().st_ino: act for place, act in acts.items()}
    remove_files = cleanup._remove_files

    def files(directory: int, end: float) -> list[str]:
        remove_files(directory, end)
        if act := by_number.get(os.fstat(directory).st_ino):
            act()
        return sorted(os.listdir(directory), key=str.isdigit)  # the last is the first to be entered

    with monkeypatch.context() as patch:
        patch.setattr(cleanup, "_remove_files", files)
        cleanup.remove_tree(str(path))


def test_a_directory_that_moves_up_while_it_is_emptied_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another container may have a descriptor of it; and from a place less deep, ".." leads out of the tree."""
    layers = tmp_path / "home/layers"
    layer = layers / "7"
    deepest = layer / "1/2/3"
    deepest.mkdir(parents=True)
    (layers / "6/of/another").mkdir(parents=True)
    for place in (layer, layer / "1", layer / "1/2", layers, tmp_path / "home", tmp_path):
        (place / "precious/kept").mkdir(parents=True)
    before = len(os.listdir("/proc/self/fd"))
    interrupted(monkeypatch, layers, {deepest: lambda: deepest.rename(layer / "3")})
    for place in (tmp_path / "home", tmp_path):
        assert (place / "precious/kept").exists()
    assert (layer / "3").exists()
    assert os.listdir(layers) == ["7"]  # all others were removed
    assert len(os.listdir("/proc/self/fd")) == before
    cleanup.remove_tree(str(layers))
    assert not layers.exists()


def test_directories_that_are_moved_into_each_other_do_not_lead_in_circles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = tmp_path / "layer"
    turns = []

    def turn(here: str, other: str) -> None:
        """What we came by goes below where we are: so for ever, if we follow."""
        turns.append(here)
        assert len(turns) < 10
        for source, target in ((f"{other}/{other}/{here}", here), (other, f"{here}/{here}/{other}")):
            if (layer / source).exists():
                (layer / source).rename(layer / target)

    for name in ("1", "2"):
        (layer / name / name).mkdir(parents=True)
    acts = {layer / "1/1": lambda: turn("1", "2"), layer / "2/2": lambda: turn("2", "1")}
    interrupted(monkeypatch, layer, acts)
    assert len(turns) > 1
    cleanup.remove_tree(str(layer))
    assert not layer.exists()


@pytest.mark.parametrize("kind", ["tmpfs", "of the same file system"])
def test_what_is_mounted_in_a_tree_is_not_removed(tmp_path: Path, kind: str) -> None:
    def work() -> tuple[bool, int]:
        place, source = tmp_path / "tree/mounted", tmp_path / "source"
        place.mkdir(parents=True)
        source.mkdir(mode=0o755)
        syscalls.unshare(syscalls.CLONE_NEWNS)
        mounts.set_propagation("/", "private")
        if kind == "tmpfs":
            syscalls.mount("tmpfs", place, "tmpfs", 0, "mode=755")
        else:
            mounts.bind(source, place)
        (place / "kept").touch()
        cleanup.remove_tree(str(tmp_path / "tree"))
        return (place / "kept").exists(), place.stat().st_mode & 0o777

    assert in_child(work) == (True, 0o755)


def test_the_record_of_a_launcher_that_has_the_pid_now_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have begun while we were ending what the earlier one had left."""
    children.close_launcher()
    state.launchers().mkdir(parents=True, exist_ok=True)
    mine = state.ProcessKey.of(os.getpid())
    record, spare = state.launchers() / f"{mine.pid}.json", state.spare(mine.pid)
    before = state.ProcessKey(mine.pid, mine.started - 1, mine.boot)

    def begin(_: int) -> int:
        cleanup.remember_launcher(record, mine)
        spare.mkdir()
        return 0

    cleanup.remember_launcher(record, before)
    with monkeypatch.context() as patch:
        patch.setattr(cleanup, "_session_may_be_left", lambda _: True)
        patch.setattr(cleanup, "end_session", begin)
        assert cleanup.clean(None) == []
    assert (record.exists(), spare.exists()) == (True, True)
    record.unlink()
    assert cleanup.clean(None) == []
    assert spare.exists()  # we live
    spare.rmdir()


SESSION_FROM_OUTSIDE = """
import os
from labkernel import cleanup, state
state.launchers().mkdir(parents=True)
state.spare(os.getpid()).mkdir()
print(os.getsid(0), cleanup.clean(None), state.spare(os.getpid()).exists())
"""


def test_who_has_its_session_from_outside_of_its_pid_namespace_lives(tmp_path: Path) -> None:
    """As what `docker exec` starts: the kernel says 0 there for its session."""
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    separate = ["unshare", *as_root, "--pid", "--fork", "--mount-proc"]
    command = [*separate, sys.executable, "-c", SESSION_FROM_OUTSIDE]
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "LABKERNEL_HOME": str(tmp_path / "home"),
    }
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == "0 [] True\n"


@pytest.mark.parametrize("deaf", [False, True])
def test_a_launcher_that_a_child_has_started_may_tidy_up_when_ours_ends(deaf: bool, tmp_path: Path) -> None:
    """But not for ever; and an orphan that has the pid of a launcher that died may not at all."""

    def tidy_up_slowly() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if deaf else lambda *_: (tmp_path / "told").touch())
        os.setsid()
        record = state.launchers() / f"{os.getpid()}.json"
        cleanup.remember_launcher(record, state.ProcessKey.of(os.getpid()))
        (tmp_path / "begun").touch()
        time.sleep(60 if deaf else 0.5)
        (tmp_path / "done").touch()
        record.unlink()

    def sleep() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        record = state.launchers() / f"{os.getpid()}.json"
        cleanup.remember_launcher(record, state.ProcessKey.of(os.getpid())._replace(started=1))
        (tmp_path / "other").touch()
        time.sleep(60)

    def work() -> tuple[int, set[str], float]:
        syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
        for act in (tidy_up_slowly, sleep):
            if os.fork() == 0:  # ends at once, and its own child is ours then
                if os.fork() == 0:
                    act()
                os._exit(0)
            os.wait()
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        cleanup.PATIENCE = 2.0
        begun = time.monotonic()
        ended = cleanup.end_session(os.getpid())
        return ended, {path.name for path in tmp_path.iterdir()}, time.monotonic() - begun

    state.launchers().mkdir(parents=True, exist_ok=True)
    ended, files, seconds = in_child(work)
    assert ended == 2
    assert files == {"begun", "other"} | (set() if deaf else {"told", "done"})
    assert (seconds >= 2) == deaf
    cleanup.clean(None)


def test_a_launcher_whose_home_is_gone_has_nothing_to_forget(tmp_path: Path) -> None:
    key = state.ProcessKey.of(os.getpid())
    assert not cleanup.forget_launcher(tmp_path / "launchers" / f"{key.pid}.json", key)


def test_what_takes_long_to_remove_keeps_nobody_waiting(tmp_path: Path) -> None:
    deep = tmp_path / "tree"
    deep.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    for name in range(500):
        (deep / f"{name}/{name}").mkdir(parents=True)
    assert not cleanup.remove_tree(str(deep), 0)
    assert not cleanup.remove_tree(str(deep), 0.001)
    assert deep.exists()
    assert cleanup.remove_tree(str(deep), 60)
    assert not deep.exists()
    assert cleanup.remove_tree(str(deep), 60)  # there is nothing
    assert len(os.listdir("/proc/self/fd")) == before


def test_somebody_elses_group_with_a_name_like_ours_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleanup, "_groups_in_other_places", lambda: [Path("/x/labkernel-child-x")])
    assert cleanup.remove_groups_of_ended_children(None) == []


def test_what_a_launcher_without_a_record_has_left_is_removed() -> None:
    children.close_launcher()
    state.launchers().mkdir(parents=True, exist_ok=True)
    for place in (state.ended(4_194_304), state.spare(4_194_304)):
        (place / "upper/etc").mkdir(parents=True)
    assert Container("python", ["true"]).run().returncode == 0
    assert not state.ended(4_194_304).exists()
    assert not state.spare(4_194_304).exists()


def test_a_container_with_groups_of_its_own_below_and_many_processes() -> None:
    if facts()["cgroup_version"] is None:
        pytest.skip(f"no limits here: {facts()['no_cgroup']}")
    before = snapshot()
    script = "for i in 1 2 3 4 5 6 7 8 9; do (sleep 6$i &) ; done; sleep 60"
    container = Container("python", ["sh", "-c", script]).start()
    end = time.monotonic() + 60

    def running() -> int:
        members = container.cgroup.pids()
        return len([pid for pid in descendants() if pid in members])

    while running() != 12:  # init, sh, ten of sleep; a shell that starts one of them is there for a moment
        assert time.monotonic() < end
        time.sleep(0.01)
    container.kill()
    assert_nothing_left(before, 5)


def test_the_container_that_is_made_in_advance_is_cleaned_up_too() -> None:
    """It is kept while the launcher has nothing to do; killed with the launcher, its group is found by the next one."""
    children.close_launcher()
    before = snapshot()
    Container("python", ["true"]).run()
    file = state.spare(children.launcher().process.pid) / "group"
    end = time.monotonic() + 20
    while not file.exists() or len(file.read_text().split()) < 2:
        assert time.monotonic() < end
        time.sleep(0.005)
    _, pid = file.read_text().split()
    assert Path(f"/proc/{pid}/ns/net").exists()
    launcher = children.launcher().process
    launcher.kill()
    launcher.wait()
    children.launcher()
    children.close_launcher()
    assert_nothing_left(before)


def test_the_container_that_is_made_in_advance_may_be_killed() -> None:
    with Container("python", ["true"]) as first:
        first.wait(20)
    file = state.spare(children.launcher().process.pid) / "group"
    end = time.monotonic() + 20
    pid = 0
    while not pid:
        assert time.monotonic() < end
        with contextlib.suppress(FileNotFoundError, ValueError):
            _, word = file.read_text().split()
            pid = int(word)
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}").exists():  # the launcher reaps it
        assert time.monotonic() < end
        time.sleep(0.005)
    assert Container("python", ["true"]).run().returncode == 0


def test_what_was_thrown_away_goes_at_once_or_with_the_next_launcher() -> None:
    """Nobody waits for the disk; but whoever is killed in between leaves it to the next."""
    children.close_launcher()
    before = snapshot()
    container = Container("python", ["sh", "-c", "mkdir -p /a/b; echo x > /a/b/c"])
    assert container.run().returncode == 0
    assert not container.spec.directory.exists()
    launcher = children.launcher().process
    ended = state.ended(launcher.pid)
    end = time.monotonic() + 20
    while ended.exists():
        assert time.monotonic() < end
        time.sleep(0.005)
    launcher.kill()
    launcher.wait()
    (ended / "0123456789ab/upper/closed").mkdir(parents=True)
    (ended / "0123456789ab/upper/closed").chmod(0)
    children.launcher()
    assert not ended.exists()
    children.close_launcher()
    assert_nothing_left(before)
