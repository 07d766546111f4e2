"""Children of the launcher: what comes back from them, and that the calling process stays as it was."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from labkernel import children, cleanup, state
from labkernel.children import ChildFailed, LauncherDied, in_child, preload, start_child
from labkernel.container import Container
from labkernel.linux import mounts, namespaces, syscalls
from tests.helpers import assert_nothing_left, own_home, rootless
from tests.helpers import snapshot as everything_of_ours


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


@pytest.fixture(autouse=True)
def the_caller_stays_as_it_was() -> Iterator[None]:
    """Around every test: namespaces, root, directory, user, umask, signals and descriptors of this very process."""
    children.launcher()
    before = own_state()
    everything = everything_of_ours()
    yield
    children.launcher()
    assert own_state() == before
    assert len(everything_of_ours().descriptors) == len(everything.descriptors)


def own_state() -> dict[str, Any]:
    mask = os.umask(0)
    os.umask(mask)
    status = Path("/proc/self/status").read_text().splitlines()
    kept = ("Uid:", "Gid:", "Groups:", "CapEff:", "CapBnd:", "NoNewPrivs:", "Seccomp:", "SigBlk:", "SigIgn:")
    return {
        "namespaces": namespaces.inodes(),
        "for children": namespaces.inodes(children=True),
        "root": os.stat("/").st_ino,
        "cwd": os.getcwd(),
        "umask": mask,
        "status": [line for line in status if line.startswith(kept)],
        "cgroup": Path("/proc/self/cgroup").read_text(),
        "environment": {name: text for name, text in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
    }


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "value", [None, 0, "text ä", b"\0\xff", {"a": [1, (2, 3)]}, 1.5, {1, 2}, Path("/x"), os.stat("/")]
)
def test_the_value_comes_back(value: Any) -> None:
    assert in_child(lambda: value) == value


def test_arguments_and_keywords() -> None:
    def add(first: int, second: int, *, third: int) -> int:
        return first + second + third

    assert in_child(add, 1, second=2, third=3) == 6


def test_it_runs_elsewhere() -> None:
    assert in_child(os.getpid) not in (os.getpid(), children.launcher().process.pid)
    child = start_child(os.getpid)
    assert child.wait() == child.pid


def test_fifty_megabytes_both_ways() -> None:
    data = os.urandom(50 << 20)

    def reverse(text: bytes) -> bytes:
        return text[::-1]

    assert in_child(reverse, data, timeout=60) == data[::-1]


def test_functions_of_main_with_what_they_refer_to() -> None:
    """As in a notebook: functions, classes and variables of __main__, which no child could import."""
    program = """
from labkernel import in_child
factor = 6
class Answer:
    def __init__(self, number): self.number = number
    def __eq__(self, other): return type(self).__name__ == type(other).__name__ and self.number == other.number
def double(number): return 2 * number
def work(number):
    return Answer(double(number) * factor)
assert in_child(work, 7) == Answer(84)
assert in_child(lambda: factor) == 6
def outer():
    inner = 5
    return in_child(lambda: inner + factor)
assert outer() == 11
try:
    in_child(lambda: 1 / 0)
except ZeroDivisionError as error:
    assert 'in the child process' in error.__notes__[0] and 'Traceback' in error.__notes__[0]
class Trouble(Exception): pass
def fail(): raise Trouble('mine')
try:
    in_child(fail)
except Exception as error:
    assert 'mine' in str(error), repr(error)
    assert type(error).__name__ in ('Trouble', 'RuntimeError'), repr(error)
print('ok')
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (ended.stdout, ended.stderr) == ("ok\n", "")


# ---------------------------------------------------------------------- failures


def test_an_exception_with_the_childs_traceback() -> None:
    def fail() -> None:
        raise KeyError("what was looked for")

    with pytest.raises(KeyError, match="what was looked for") as caught:
        in_child(fail)
    assert "in the child process" in caught.value.__notes__[0]
    assert "in fail" in caught.value.__notes__[0]


def test_an_oserror_keeps_its_errno() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        in_child(os.stat, "/no/such/file")
    assert (caught.value.errno, caught.value.filename) == (2, "/no/such/file")


def test_an_exception_that_cannot_be_pickled_is_told_by_its_text() -> None:
    def fail() -> None:
        class Odd(Exception):
            def __init__(self, one: int, two: int) -> None:
                super().__init__(f"{one} and {two}")
                self.lock = threading.Lock()

        raise Odd(1, 2)

    with pytest.raises(RuntimeError, match="Odd: 1 and 2"):
        in_child(fail)


@pytest.mark.parametrize("error", [KeyboardInterrupt("k"), GeneratorExit("g"), BaseException("b")])
def test_exceptions_of_the_other_kind(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        in_child(fail)
    assert in_child(lambda: 1) == 1


@pytest.mark.parametrize(("status", "code"), [(3, 3), (256 + 4, 4), ("words", 1), (True, 1)])
def test_exits_with_a_status(status: Any, code: int) -> None:
    with pytest.raises(ChildFailed) as caught:
        in_child(sys.exit, status)
    assert caught.value.status == code


@pytest.mark.parametrize("status", [0, None])
def test_an_exit_without_a_status_is_no_failure(status: Any) -> None:
    assert in_child(sys.exit, status) is None


def test_exits_at_once() -> None:
    with pytest.raises(ChildFailed, match="exit status 9 and no value") as caught:
        in_child(os._exit, 9)
    assert caught.value.status == 9


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_killed_by_a_signal(number: signal.Signals) -> None:
    with pytest.raises(ChildFailed, match=number.name) as caught:
        in_child(lambda: os.kill(os.getpid(), number))
    assert caught.value.status == 128 + number


def test_a_value_that_cannot_be_pickled(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ChildFailed, TypeError)):
        in_child(threading.Lock)
    assert in_child(lambda: 1) == 1


def test_a_function_that_cannot_be_pickled_is_refused_here() -> None:
    lock = threading.Lock()
    with pytest.raises(TypeError, match="pickle"):
        in_child(lambda: lock)


def test_an_argument_that_cannot_be_unpickled_there() -> None:
    class Odd:
        def __reduce__(self) -> Any:
            return (int, ("no number",))

    with pytest.raises(ValueError, match="no number"):
        in_child(str, Odd())


# ---------------------------------------------------------------------- output


def test_output_comes_in_order_while_the_child_runs(capsys: pytest.CaptureFixture[str]) -> None:
    def talk() -> None:
        for number in range(3):
            print(number)
            time.sleep(0.2)

    moments: list[float] = []

    class Listening:
        def write(self, text: str) -> None:
            moments.append(time.monotonic())
            texts.append(text)

        def flush(self) -> None:
            pass

    texts: list[str] = []
    before, sys.stdout = sys.stdout, Listening()
    try:
        in_child(talk)
    finally:
        sys.stdout = before
    assert "".join(texts) == "0\n1\n2\n"
    assert moments[-1] - moments[0] > 0.25


def test_both_streams_and_what_is_written_below_python(capsys: pytest.CaptureFixture[str]) -> None:
    def talk() -> None:
        print("one")
        os.write(1, b"two\n")
        subprocess.run(["echo", "three"])
        print("wrong", file=sys.stderr)
        sys.stdout.write("no newline")

    in_child(talk)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("one\ntwo\nthree\nno newline", "wrong\n")


def test_output_before_an_exception_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    def talk() -> None:
        print("last words", end="")
        raise ValueError

    with pytest.raises(ValueError):
        in_child(talk)
    assert capsys.readouterr().out == "last words"


def test_a_character_is_never_cut_in_two(capsys: pytest.CaptureFixture[str]) -> None:
    """Longer than a pipe takes at once, of characters of three bytes."""
    text = "€" * 100_000

    def talk() -> None:
        print(text)

    in_child(talk)
    assert capsys.readouterr().out == text + "\n"


def test_ten_megabytes_of_output(capsys: pytest.CaptureFixture[str]) -> None:
    def talk() -> None:
        for _ in range(10):
            sys.stdout.write("x" * (1 << 20))

    in_child(talk, timeout=60)
    assert len(capsys.readouterr().out) == 10 << 20


def test_the_child_has_no_input_and_no_descriptor_of_ours() -> None:
    with open("/etc/passwd") as file:
        os.set_inheritable(file.fileno(), True)

        def look() -> tuple[str, list[str]]:
            links = []
            for fd in os.listdir("/proc/self/fd"):
                if os.path.lexists(f"/proc/self/fd/{fd}"):  # not listdir's own, which is closed by now
                    links.append(os.readlink(f"/proc/self/fd/{fd}"))
            return sys.stdin.read(), links

        text, links = in_child(look)
    assert text == ""
    assert [link for link in links if not link.startswith(("pipe:", "/dev/null", "/memfd:"))] == []


# ---------------------------------------------------------------------- time


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(pid: int, within: float = 10.0) -> bool:
    end = time.monotonic() + within
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not alive(pid)


def test_a_timeout_kills_the_child_and_its_children() -> None:
    told = Path(os.environ["LABKERNEL_HOME"]) / "grandchild"

    def work() -> None:
        other = subprocess.Popen(["sleep", "61"])
        told.write_text(str(other.pid))
        time.sleep(60)

    child = start_child(work)
    with pytest.raises(TimeoutError):
        child.wait(0.5)
    end = time.monotonic() + 10
    while not told.exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert gone(child.pid)
    assert gone(int(told.read_text()))
    told.unlink()


def test_a_short_timeout_is_kept() -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        in_child(time.sleep, 30, timeout=0.2)
    assert time.monotonic() - started < 10


def test_a_process_left_behind_does_not_hold_us_up_and_ends_with_the_launcher() -> None:
    def leave() -> int:
        return subprocess.Popen(["sleep", "62"], start_new_session=False).pid

    started = time.monotonic()
    pid = in_child(leave)
    assert time.monotonic() - started < 10
    children.close_launcher()
    assert gone(pid, 1)


def test_what_is_preloaded_is_there_in_every_child_that_follows() -> None:
    def loaded() -> bool:
        return "colorsys" in sys.modules

    before = in_child(loaded)
    preload("colorsys")
    assert (before, in_child(loaded), in_child(loaded)) == (False, True, True)


def test_a_module_that_is_not_there_cannot_be_preloaded() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module_of_ours"):
        preload("no_such_module_of_ours")
    assert in_child(lambda: 1) == 1


def test_kill() -> None:
    child = start_child(time.sleep, 60)
    child.kill()
    assert gone(child.pid)


def test_control_c_while_waiting_kills_the_child() -> None:
    """In a process of its own, which gets SIGINT as a notebook's kernel does when a cell is interrupted."""
    program = """
import os, signal, threading, time
from labkernel import children
child = children.start_child(time.sleep, 60)
threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
try:
    child.wait()
except KeyboardInterrupt:
    end = time.monotonic() + 10
    while os.path.exists(f'/proc/{child.pid}') and time.monotonic() < end: time.sleep(0.01)
    print('gone' if not os.path.exists(f'/proc/{child.pid}') else 'still there')
print(children.in_child(lambda: 'the next one works'))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (ended.stdout, ended.stderr) == ("gone\nthe next one works\n", "")


def test_control_c_at_the_terminal_does_not_reach_the_launcher() -> None:
    assert os.getsid(children.launcher().process.pid) != os.getsid(0)


# ---------------------------------------------------------------------- what a child may do


def test_a_child_may_change_itself() -> None:
    def change() -> dict[str, bool]:
        syscalls.unshare(syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET)
        os.chroot("/tmp")
        os.chdir("/")
        import socket

        socket.sethostname("elsewhere")
        return {"host": socket.gethostname() == "elsewhere", "root": os.path.exists("/etc")}

    import socket

    before = socket.gethostname()
    assert in_child(change) == {"host": True, "root": False}
    assert socket.gethostname() == before


def test_mounts_of_a_child_are_not_the_machines() -> None:
    """Also where it is the machine's root, and has forgotten `unshare`."""
    before = Path("/proc/self/mountinfo").read_text()
    in_child(mounts.tmpfs, "/mnt")
    assert Path("/proc/self/mountinfo").read_text() == before
    own, childs = os.stat("/proc/self/ns/mnt").st_ino, in_child(lambda: os.stat("/proc/self/ns/mnt").st_ino)
    assert own != childs
    in_child(syscalls.umount2, "/mnt", 0)


def test_how_a_child_failed_can_be_pickled() -> None:
    copy = pickle.loads(pickle.dumps(ChildFailed("killed by SIGKILL", 137)))
    assert (str(copy), copy.status) == ("killed by SIGKILL", 137)


def test_a_child_is_root_at_least_of_a_user_namespace() -> None:
    assert in_child(os.geteuid) == 0
    shared = in_child(lambda: namespaces.inodes()["user"]) == namespaces.inodes()["user"]
    assert shared != rootless()


def test_a_hundred_children_at_once() -> None:
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(lambda n: in_child(lambda: n * n), range(100))) == [n * n for n in range(100)]


def test_a_child_keeps_nothing_of_the_request() -> None:
    def files_in_memory() -> int:
        with os.scandir("/proc/self/fd") as entries:
            return sum("memfd" in os.readlink(entry.path) for entry in entries)

    assert in_child(files_in_memory) == 1  # the function


def test_children_cost_no_descriptors() -> None:
    launcher = children.launcher().process.pid

    def costs() -> list[int]:
        where = ["self"] if rootless() else ["self", str(launcher)]
        return [len(os.listdir(f"/proc/{who}/fd")) for who in where]

    in_child(int)
    before = costs()
    for _ in range(50):
        in_child(int)
    for _ in range(5):
        with pytest.raises(ChildFailed):
            in_child(os._exit, 1)
        start_child(time.sleep, 60).kill()
    end = time.monotonic() + 5
    while any(now > then for now, then in zip(costs(), before, strict=True)) and time.monotonic() < end:
        time.sleep(0.01)
    assert all(now <= then for now, then in zip(costs(), before, strict=True)), (before, costs())


def test_orphans_of_a_child_do_not_pile_up_in_the_launcher() -> None:
    launcher = children.launcher().process.pid

    def leave() -> None:
        for _ in range(10):
            if os.fork() == 0:
                os.setpgid(0, 0)
                time.sleep(0.05)
                os._exit(0)

    def zombies() -> int:
        found = 0
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                found += fields[:2] == ["Z", str(launcher)]
        return found

    in_child(leave)
    time.sleep(0.3)
    end = time.monotonic() + 5
    while (number := zombies()) and time.monotonic() < end:
        in_child(int)
        time.sleep(0.05)
    assert number == 0


# ---------------------------------------------------------------------- the launcher dies


def test_when_the_launcher_is_killed_the_next_call_works() -> None:
    child = start_child(time.sleep, 60)
    container = Container("python", ["sleep", "60"]).start()
    process = children.launcher().process
    threading.Timer(0.2, process.kill).start()
    with pytest.raises(LauncherDied, match="has ended"):
        child.wait()
    assert gone(child.pid)
    assert container.pid
    assert gone(container.pid)
    assert not container.running()
    assert in_child(lambda: 1) == 1
    assert children.launcher().process.pid != process.pid


def test_when_the_launcher_dies_between_two_calls() -> None:
    process = children.launcher().process
    process.kill()
    process.wait()
    assert in_child(lambda: 1) == 1


def test_when_the_launcher_is_killed_by_sigterm_it_tidies_up() -> None:
    for _ in range(5):  # it may be amid what follows the word that the container has started
        container = Container("python", ["sleep", "60"]).start()
        before = children.launcher().process
        before.terminate()
        before.wait(20)
        assert container.pid
        assert gone(container.pid)
        assert list((Path(os.environ["LABKERNEL_HOME"]) / "containers").iterdir()) == []
        assert container.wait() == 128 + signal.SIGKILL
    assert in_child(lambda: 1) == 1


def test_what_was_started_to_go_on_without_us_neither_holds_us_up_nor_ends_with_us() -> None:
    program = """
from labkernel.container import Container
print(Container('python', ['sleep', '60'], detach=True).start().spec.id, flush=True)
"""
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert time.monotonic() - started < 20
    record = state.find(ended.stdout.strip())
    assert record["state"] == "running"
    os.kill(record["pid"], signal.SIGKILL)
    assert gone(record["pid"]) and gone(record["launcher"]["pid"])


def test_what_a_child_started_to_go_on_without_it_ends_with_our_launcher_and_is_tidied_up() -> None:
    program = [sys.executable, "-m", "labkernel", "run", "--detach", "--rm", "sleep", "60"]

    def start() -> str:
        done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.strip()

    children.close_launcher()
    before = everything_of_ours()
    record = state.find(in_child(start))
    assert record["state"] == "running"
    started = time.monotonic()
    children.close_launcher()
    assert time.monotonic() - started < cleanup.PATIENCE
    assert gone(record["pid"], 1) and gone(record["launcher"]["pid"], 1)
    assert_nothing_left(before, 5)


HOLDS_A_CONTAINER = """
import resource, signal, sys, time
from labkernel.container import Container
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
signal.signal(int(sys.argv[1]), signal.SIG_DFL)
container = Container('python', ['sleep', '60']).start()
print(container.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    "name", ["HUP", "INT", "QUIT", "ILL", "ABRT", "BUS", "USR1", "SEGV", "PIPE", "TERM", "RTMIN"]
)
def test_whoever_dies_by_a_signal_leaves_nothing(name: str) -> None:
    number = signal.Signals[f"SIG{name}"]
    children.close_launcher()
    before = everything_of_ours()
    command = [sys.executable, "-c", HOLDS_A_CONTAINER, str(int(number))]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=variables) as process:
        assert process.stdout
        init = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(20) == -number
    assert gone(init)
    assert_nothing_left(before, 5)


TOLD_TO_END_AT_ONCE = """
import os, signal, socket
from labkernel import cleanup, launcher
def remember(*record):
    write(*record)
    os.kill(os.getpid(), signal.SIGTERM)
write, cleanup.remember_launcher = cleanup.remember_launcher, remember
ours, theirs = socket.socketpair()
launcher.main(theirs.detach())
"""


def test_a_launcher_that_is_told_to_end_while_it_starts_leaves_no_record(tmp_path: Path) -> None:
    variables = {"PYTHONPATH": os.pathsep.join(sys.path), "LABKERNEL_HOME": str(tmp_path)}
    command = [sys.executable, "-c", TOLD_TO_END_AT_ONCE]
    subprocess.run(command, env=os.environ | variables, timeout=60, check=True)
    assert list((tmp_path / "launchers").iterdir()) == []


def test_an_orphan_that_has_left_the_session_ends_with_the_launcher() -> None:
    def leave() -> int:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            time.sleep(60)
            os._exit(0)
        return pid

    orphan = in_child(leave)
    assert alive(orphan)
    children.close_launcher()
    assert gone(orphan, 1)


def test_close_ends_everything() -> None:
    children.close_launcher()
    before = everything_of_ours()
    child = start_child(time.sleep, 60)
    container = Container("python", ["sleep", "60"]).start()
    children.close_launcher()
    assert gone(child.pid, 1)
    assert container.pid
    assert gone(container.pid, 1)
    child.close()
    assert container.wait(5) == 137
    assert_nothing_left(before, 5)
