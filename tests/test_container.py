"""A container from start to end, as its user sees it: options, streams, exit statuses, errors, many at once."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from labkernel import children, images, state
from labkernel.children import in_child
from labkernel.container import Container, ContainerError
from labkernel.linux import capabilities, mounts, syscalls
from labkernel.spec import BadOption
from tests.helpers import (
    Snapshot,
    assert_nothing_left,
    environment,
    facts,
    inside,
    link_images,
    logged,
    needs_ids,
    needs_limits,
    own_home,
    rootless,
)
from tests.helpers import snapshot as everything_of_ours


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


def snapshot() -> Snapshot:
    """What there is while a launcher runs, and nothing else."""
    children.launcher()
    return everything_of_ours()


def sleeping(**options: Any) -> Container:
    return Container("python", ["sleep", "60"], **options)


class Text(str):
    """Known to this module only."""


def wait_for_spare() -> None:
    """Until an empty container waits for the next one: its group's name is written down, and then its pid."""
    file = state.spare(children.launcher().process.pid) / "group"
    wait_until(lambda: file.exists() and len(file.read_text().split()) == 2)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "not within 20 s"
        time.sleep(0.01)


# ---------------------------------------------------------------------- exit statuses


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 3"], 3),
        (["sh", "-c", "exit 255"], 255),
        (["/etc/passwd"], 126),
        (["/tmp"], 126),
        (["nosuchprogram"], 127),
        (["/nosuch/program"], 127),
        (["sh", "-c", "kill -9 $$"], 137),
        (["sh", "-c", "kill -15 $$"], 143),
        (["python3", "-c", "import os; os.abort()"], 134),
        (["python3", "-c", "import ctypes; ctypes.string_at(0)"], 139),
    ],
)
def test_exit_statuses_are_the_fields(command: list[str], status: int) -> None:
    assert Container("python", command).run().returncode == status
    with sleeping() as container:
        assert container.exec(command).returncode == status


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("nosuchprogram", "not found in /usr/local/sbin:"),
        ("/nosuch/program", "no such file in the container"),
        ("/etc/passwd", "Permission denied"),
    ],
)
def test_a_program_that_cannot_be_run_is_told_in_words(program: str, words: str) -> None:
    ended = Container("python", [program]).run()
    assert repr(program) in ended.stderr.decode()
    assert words in ended.stderr.decode()


@pytest.mark.parametrize("tty_path", [False, True])
def test_a_program_that_cannot_be_run_where_nobody_can_be_told(tty_path: bool) -> None:
    """Its exit status is as ever. Another user's program goes the way of those that have a terminal."""
    if tty_path:
        needs_ids()
    user = "1000" if tty_path else "0:0"
    with open("/dev/full", "w") as full:
        assert Container("python", ["nosuchprogram"], user=user).start(stderr=full.fileno()).wait(20) == 127
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, bytes(4096))
    os.set_blocking(write, True)
    with open(read), open(write):
        container = Container("python", ["nosuchprogram"], user=user).start(stderr=write)
        time.sleep(0.2)
        assert container.running()  # it waits for a reader
        assert container.stop(20) == 143
    path = {"PATH": "/x\udcff"}
    assert Container("python", ["nosuchprogram"], env=path, user=user).run().returncode == 127


def test_the_program_may_unmount_what_it_has_left(tmp_path: Path) -> None:
    program = "import ctypes, os; os.chdir('/'); print(ctypes.CDLL(None).umount2(b'/v', 0))"
    options: dict[str, Any] = {"volumes": [f"{tmp_path}:/v"], "workdir": "/v", "cap_add": ["SYS_ADMIN"]}
    ended = Container("python", ["python3", "-c", program], **options).run()
    assert ended.stdout == b"0\n", ended.stderr


def test_a_script_whose_interpreter_is_missing(tmp_path: Path) -> None:
    (tmp_path / "script").write_text("#!/no/such/interpreter\n")
    (tmp_path / "script").chmod(0o755)
    tmp_path.chmod(0o755)
    ended = Container("python", ["/v/script"], volumes=[f"{tmp_path}:/v:ro"]).run()
    assert ended.returncode == 127
    assert b"it is there, but the interpreter it names" in ended.stderr


# ---------------------------------------------------------------------- streams


def test_out_and_err_are_apart_and_bytes() -> None:
    program = "import os; os.write(1, bytes(range(256))); os.write(2, b'\\xff\\x00err')"
    ended = Container("python", ["python3", "-c", program]).run()
    assert (ended.stdout, ended.stderr) == (bytes(range(256)), b"\xff\x00err")


def test_ten_megabytes_each_way() -> None:
    data = os.urandom(10 << 20)
    program = """
import sys, threading
data = sys.stdin.buffer.read()
for stream in (sys.stdout, sys.stderr):
    threading.Thread(target=stream.buffer.write, args=[data]).start()"""
    command = ["python3", "-c", program]
    ended = Container("python", command).run(input=data, timeout=60)
    assert (ended.stdout == data, ended.stderr == data) == (True, True)
    with sleeping() as container:
        ended = container.exec(command, input=data, timeout=60)
    assert (ended.returncode, ended.stdout == data, ended.stderr == data) == (0, True, True)


def test_without_input_there_is_none() -> None:
    assert Container("python", ["cat"]).run(timeout=30).stdout == b""
    with sleeping() as container:
        assert container.exec(["cat"], timeout=30).stdout == b""


def test_streams_of_the_callers_own(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"from a file")
    with open(tmp_path / "in", "rb") as source, open(tmp_path / "out", "wb") as target:
        container = Container("python", ["sh", "-c", "cat; echo err >&2"])
        container.start(source.fileno(), target.fileno())
        assert container.wait(30) == 0
    assert (tmp_path / "out").read_bytes() == b"from a file"


def test_a_program_that_reads_nothing_and_one_that_is_not_read() -> None:
    assert Container("python", ["true"]).run(input=bytes(1 << 20)).returncode == 0
    read, write = os.pipe()
    try:
        container = Container(
            "python", ["sh", "-c", "yes=$(cat /proc/self/status); while echo $yes; do :; done"]
        )
        container.start(stdout=write)
        os.close(write)
        os.read(read, 100)
    finally:
        os.close(read)
    assert container.wait(30) in (1, 2, 141)  # its pipe is broken, and so it ends


def test_output_of_a_process_that_outlives_the_program_does_not_hold_us_up() -> None:
    started = time.monotonic()
    ended = Container("python", ["sh", "-c", "sleep 50 & echo done"]).run(timeout=40)
    assert (ended.stdout, time.monotonic() - started < 20) == (b"done\n", True)


def test_logs_while_it_runs_and_after() -> None:
    with Container("python", ["sh", "-c", "echo one; echo two >&2; sleep 60"]) as container:
        assert logged(container, "two") == "one\ntwo\n"
    assert container.logs() == b"one\ntwo\n"


@pytest.mark.parametrize("unread", [False, True])
@pytest.mark.parametrize("user", ["0", "1000"])
def test_a_detached_container_goes_on_without_whoever_asked_for_it(
    user: str, unread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where he has gone before it could tell him that it runs, be it with a message that he has not read."""
    if user != "0":
        needs_ids()

    def go_away(container: Container) -> None:
        assert container._channel
        if unread:
            select.select([container._channel.socket], [], [], 30)
        raise KeyboardInterrupt

    monkeypatch.setattr(Container, "_until_ready", go_away)
    container = Container("python", ["sh", "-c", "echo said; sleep 60"], user=user, detach=True)
    with pytest.raises(KeyboardInterrupt):
        container.start()
    assert logged(container, "said") == "said\n"
    record = state.find(container.name)
    assert record["state"] == "running"
    os.kill(record["pid"], signal.SIGKILL)
    until = time.monotonic() + 30
    while container.spec.directory.exists():
        assert time.monotonic() < until, "it was not removed"
        time.sleep(0.01)


def test_its_streams_are_files_or_descriptors(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"from a file")
    ours, theirs = socket.socketpair()
    with open(tmp_path / "in", "rb") as stdin, open(tmp_path / "out", "wb") as stdout, ours:
        command = ["sh", "-c", "cat; echo to a socket >&2"]
        with theirs, Container("python", command).start(stdin, stdout, theirs) as container:
            assert container.wait(60) == 0
        assert ours.recv(100) == b"to a socket\n"
    assert (tmp_path / "out").read_bytes() == b"from a file"


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_a_pipe_that_nobody_has_made_is_refused_in_words(stream: str) -> None:
    container = Container("python", ["true"])
    with pytest.raises(ValueError, match=r"os\.pipe"):
        container.start(**{stream: subprocess.PIPE})
    assert container.start().wait(60) == 0


@pytest.mark.parametrize("user", ["0", "1000:1000"])
def test_its_streams_can_be_opened_by_name(user: str) -> None:
    """/dev/stdout is a link to what the descriptor is open on, and opening that asks who owns it."""
    if user != "0":
        needs_ids()
    command = ["sh", "-c", "echo one >> /dev/stdout; echo two >> /dev/stderr"]
    with sleeping() as container:
        for ended in (Container("python", command, user=user).run(), container.exec(command, user=user)):
            assert (ended.stdout, ended.stderr) == (b"one\n", b"two\n")
    with Container("python", [*command[:2], f"{command[2]}; sleep 60"], user=user) as container:
        assert logged(container, "two") == "one\ntwo\n"


def test_a_pipe_of_the_callers_own_stays_theirs() -> None:
    """What else they have in a pipeline may want to open it by name, too."""
    read, write = os.pipe()
    try:
        user = "1000" if facts()["container_map"]["count"] >= 65536 else "0"
        with Container("python", ["sleep", "60"], user=user).start(stdout=write) as container:
            container.exec(["true"], user=user)
            assert os.fstat(write).st_uid == os.geteuid()
    finally:
        os.close(read)
        os.close(write)


def from_terminal(terminal: int, wanted: bytes) -> bytes:
    """What a terminal shows, once that contains `wanted` and a whole line."""
    text, end = b"", time.monotonic() + 30
    while wanted not in text or not text.endswith(b"\n"):
        assert time.monotonic() < end, text
        if select.select([terminal], [], [], 0.1)[0]:
            text += os.read(terminal, 1000)
    return text


def test_a_terminal() -> None:
    with Container(
        "python", ["sh", "-c", "test -t 0 && test -t 2 && echo yes; read line; echo $line"], tty=True
    ) as c:
        assert c.terminal is not None
        assert from_terminal(c.terminal, b"yes") == b"yes\r\n"
        os.write(c.terminal, b"hello\n")
        assert from_terminal(c.terminal, b"hello\r\nhello\r\n")  # the terminal echoes
        assert c.wait(30) == 0
        os.close(c.terminal)


def test_control_c_on_the_terminal_reaches_the_program() -> None:
    # Not one long sleep: Python begins it although a signal has come a moment before.
    program = (
        "import time\ntry:\n print('here')\n while True: time.sleep(0.1)\n"
        "except KeyboardInterrupt: raise SystemExit(7)"
    )
    with Container("python", ["python3", "-c", program], tty=True) as container:
        assert container.terminal is not None
        try:
            from_terminal(container.terminal, b"here")
            os.write(container.terminal, b"\x03")
            assert container.wait(30) == 7
        finally:
            os.close(container.terminal)


# ---------------------------------------------------------------------- time


def test_a_timeout_kills_and_removes() -> None:
    before = snapshot()
    container = Container("python", ["sh", "-c", "sleep 61 & sleep 62"])
    with pytest.raises(TimeoutError):
        container.run(timeout=0.3)
    assert_nothing_left(before, within=5)
    assert not container.running()


def test_a_timeout_of_exec_kills_the_program_and_leaves_the_container() -> None:
    with sleeping() as container:
        with pytest.raises(TimeoutError):
            container.exec(["sleep", "61"], timeout=0.3)
        assert container.running()
        end = time.monotonic() + 10
        while b"sleep 61" in (table := container.exec(["ps", "-ef"]).stdout) and time.monotonic() < end:
            time.sleep(0.02)
        assert b"sleep 61" not in table
        assert b"sleep 60" in table
        assert container.running()


def test_waiting_in_vain_leaves_it_running() -> None:
    with sleeping() as container:
        with pytest.raises(TimeoutError):
            container.wait(0.1)
        assert container.running()
        with pytest.raises(TimeoutError):
            container.wait(0.01)
        assert container.exec(["true"]).returncode == 0


# ---------------------------------------------------------------------- life


def test_start_stop_kill() -> None:
    container = Container(
        "python", ["sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do sleep 0.05; done"]
    ).start()
    assert container.running()
    logged(container, "ready")
    assert container.stop(20) == 5
    assert not container.running()
    assert (container.stop(), container.kill(), container.wait()) == (5, 5, 5)

    stubborn = Container(
        "python", ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done"]
    ).start()
    logged(stubborn, "ready")
    assert stubborn.stop(0.3) == 137

    assert sleeping().start().kill() == 137


def test_sleep_ends_by_the_signal_that_stop_sends() -> None:
    assert sleeping().start().stop(20) == 143


def test_it_starts_once() -> None:
    with sleeping() as container, pytest.raises(RuntimeError, match="started already"):
        container.start()
    with pytest.raises(RuntimeError, match="has not been started"):
        sleeping().wait()


def test_the_context_manager_removes_also_when_there_is_an_error() -> None:
    before = snapshot()
    with pytest.raises(ZeroDivisionError), sleeping() as container:
        _ = 1 / 0
    assert not container.running()
    assert_nothing_left(before)


@pytest.mark.parametrize(("user", "becomes"), [("0", 0), ("0", 1000), ("1000", 1000)])
def test_signals_are_forwarded_to_the_program(user: str, becomes: int) -> None:
    if becomes:
        needs_ids()
    program = f"""
import os, signal, sys, time
if os.getuid() != {becomes}: os.setuid({becomes})
for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda n, f: os.write(1, signal.Signals(n).name.encode() + b'\\n'))  # print may not be nested
print('ready', flush=True)
while True: time.sleep(0.01)"""
    with Container("python", ["python3", "-c", program], user=user) as container:
        logged(container, "ready")
        for name in ("SIGUSR1", "SIGHUP", "SIGINT", "SIGTERM"):
            container.signal(getattr(signal, name))
            logged(container, name)


WHO_HAS_THE_PID_NOW = """
import contextlib, os, signal, subprocess, sys, time
from pathlib import Path
from labkernel import children, state
from labkernel.container import Container

def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)

def ready():
    with contextlib.suppress(FileNotFoundError, ValueError):
        group, init = (state.spare(children.launcher().process.pid) / 'group').read_text().split()
        return Path(f'/proc/{init}').exists()

read, write = os.pipe()
container = Container('python', ['cat']).start(stdin=read)
os.close(write), os.close(read)
until(lambda: not os.path.exists(f'/proc/{container.pid}'))    # the launcher has reaped it, and nobody has waited
until(ready)                                                   # so that it starts nobody who would take the pid
for _ in range(20):
    Path('/proc/sys/kernel/ns_last_pid').write_text(str(container.pid - 1))
    with subprocess.Popen(['sleep', '60']) as stranger:
        try:
            if stranger.pid == container.pid:
                container.signal(signal.SIGKILL)
                time.sleep(0.1)
                print(stranger.poll(), container.kill(), stranger.poll())
                break
        finally:
            stranger.kill()
"""


def test_no_signal_reaches_who_has_the_pid_after_the_container(tmp_path: Path, home: Path) -> None:
    """In a pid namespace, whose next pid can be chosen."""
    if not os.path.exists("/proc/sys/kernel/ns_last_pid"):
        pytest.skip("this kernel does not let the next pid be chosen (CONFIG_CHECKPOINT_RESTORE)")
    link_images(home.parent / "shared", tmp_path / "home")
    become_root = ["--user", "--map-root-user"] if rootless() else []
    command = ["unshare", *become_root, "--pid", "--fork", "--mount-proc", "--kill-child"]
    ended = subprocess.run(
        [*command, sys.executable, "-c", WHO_HAS_THE_PID_NOW], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "LABKERNEL_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert (ended.stdout, ended.stderr) == ("None 0 None\n", "")


def test_the_descriptor_of_its_init_is_closed_with_its_end_or_with_what_stands_for_it_here() -> None:
    before = snapshot()
    container = Container("python", ["true"]).start()
    assert container.wait(20) == 0
    assert_nothing_left(before, within=5)
    del container
    Container("python", ["true"]).start()
    assert_nothing_left(before, within=5)


def test_orphans_are_reaped() -> None:
    program = """
import os, time
for _ in range(20):
    if os.fork() == 0:
        if os.fork() == 0:
            time.sleep(0.01); os._exit(0)     # an orphan: pid 1 has to reap it
        os._exit(0)
    os.wait()
end = time.time() + 20
def others():
    return [pid for pid in os.listdir('/proc') if pid.isdigit() and int(pid) not in (1, os.getpid())]
while others() and time.time() < end: time.sleep(0.01)
result = others()"""
    assert inside(program) == []


def test_when_the_program_ends_all_ends() -> None:
    before = snapshot()
    container = Container(
        "python", ["sh", "-c", "(sleep 61 &) ; (setsid sleep 62 &); sleep 0.1; exit 4"]
    ).start()
    assert container.wait(30) == 4
    assert_nothing_left(before, within=5)


def test_when_init_dies_all_dies() -> None:
    before = snapshot()
    container = Container("python", ["sh", "-c", "sleep 61 & sleep 62"]).start()
    assert container.pid
    os.kill(container.pid, signal.SIGKILL)
    assert container.wait(30) == 137
    assert_nothing_left(before, within=5)


def test_exec_after_the_end_is_an_error_in_words() -> None:
    container = sleeping(name="short").start()
    container.kill()
    with pytest.raises((LookupError, OSError), match=r"short|no container"):
        container.exec(["true"])


def test_exec_before_the_start_is_an_error_in_words() -> None:
    with pytest.raises(LookupError, match="no container"):
        sleeping().exec(["true"])


def test_pause_and_go_on() -> None:
    needs_limits()
    program = "import time\nwhile True: print(time.time(), flush=True); time.sleep(0.005)"
    with Container("python", ["python3", "-c", program]) as container:
        logged(container, "")
        container.pause()
        first = container.logs()
        time.sleep(0.2)
        assert container.logs() == first
        container.unpause()
        end = time.monotonic() + 10
        while container.logs() == first and time.monotonic() < end:
            time.sleep(0.01)
        assert container.logs() != first


def test_a_paused_container_can_be_killed() -> None:
    needs_limits()
    before = snapshot()
    container = sleeping().start()
    container.pause()
    assert container.kill() == 137
    assert_nothing_left(before, within=5)


def test_a_paused_container_is_removed_by_the_context_manager() -> None:
    needs_limits()
    before = snapshot()
    with sleeping() as container:
        container.pause()
    assert_nothing_left(before, within=5)


def test_stats_while_it_runs_and_after() -> None:
    needs_limits()
    with Container(
        "python", ["python3", "-c", "x = bytearray(30 << 20); print(1, flush=True); input()"]
    ) as container:
        logged(container, "1") if False else None
        container.wait(30)
    assert container.final_stats is not None
    assert container.final_stats.memory_peak_bytes > 30 << 20
    assert container.final_stats.cpu_usec > 1000
    with sleeping() as container:
        assert container.stats().pids == 2
        assert container.final_stats is None


# ---------------------------------------------------------------------- options


def test_hostname_workdir_and_environment() -> None:
    program = "result = [socket.gethostname(), os.getcwd(), os.environ['A'], open('/etc/hostname').read()]"
    assert inside(program, hostname="box", workdir="/usr/lib", env={"A": "b=c"}) == [
        "box",
        "/usr/lib",
        "b=c",
        "box\n",
    ]


def test_a_workdir_that_is_not_there_is_made() -> None:
    assert Container("python", ["sh", "-c", "pwd"], workdir="/made/for/it").run().stdout == b"/made/for/it\n"


def test_a_workdir_that_is_a_file_is_an_error_in_words() -> None:
    with pytest.raises(OSError, match="/etc/passwd"):
        Container("python", ["true"], workdir="/etc/passwd").run()


def test_its_own_name_is_known_inside() -> None:
    assert inside("result = socket.gethostbyname('box')", hostname="box").startswith("127.")


@pytest.mark.parametrize(
    ("user", "uid", "gid"),
    [("0", 0, 0), ("root", 0, 0), ("0:0", 0, 0), ("65534:65534", 65534, 65534), ("1234", 1234, 0), ("1234:5", 1234, 5),
     ("root:1", 0, 1), ("nobody", 65534, 65534)],
)  # fmt: skip
def test_users_by_name_and_number(user: str, uid: int, gid: int) -> None:
    if uid or gid:
        needs_ids()
    assert inside("result = [os.getuid(), os.getgid(), os.geteuid(), os.getegid()]", user=user) == [
        uid,
        gid,
        uid,
        gid,
    ]


@pytest.mark.parametrize(
    "user", ["nosuchuser", "root:nosuchgroup", "-1", "99999999", "4294967295", "", "1:2:3"]
)
def test_users_that_are_not_there(user: str) -> None:
    before = snapshot()
    with pytest.raises((OSError, BadOption), match=r"--user|user|uid|map"):
        Container("python", ["true"], user=user).run()
    assert_nothing_left(before, within=5)


def test_the_writable_layer_is_the_containers_own() -> None:
    with sleeping() as one, sleeping() as other:
        assert one.exec(["sh", "-c", "echo x > /tmp/file; rm /etc/passwd"]).returncode == 0
        assert other.exec(["sh", "-c", "test ! -e /tmp/file && test -s /etc/passwd"]).returncode == 0
    assert Container("python", ["test", "-s", "/etc/passwd"]).run().returncode in (0, 127)


def test_read_only() -> None:
    program = """
result = [attempt(open, '/tmp/x', 'w'), attempt(os.unlink, '/etc/passwd'), attempt(open, '/dev/shm/x', 'w')]"""
    assert inside(program, read_only=True) == ["EROFS", "EROFS", "done"]
    assert inside(program) == ["done"] * 3


# ---------------------------------------------------------------------- volumes


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    place = tmp_path / "a b"
    place.mkdir()
    (place / "file").write_text("hello")
    return place


def test_a_volume_is_seen_and_written_from_both_sides(shared: Path) -> None:
    program = """
before = [open('/v/file').read(), os.stat('/v/file').st_uid]
open('/v/new', 'w').write('from inside')
result = before + [os.stat('/v/new').st_uid]"""
    assert inside(program, volumes=[f"{shared}:/v"]) == ["hello", 0, 0]
    assert (shared / "new").read_text() == "from inside"
    assert (shared / "new").stat().st_uid == os.geteuid()


def test_a_read_only_volume(shared: Path) -> None:
    program = "result = [open('/v/file').read(), attempt(open, '/v/x', 'w'), attempt(os.chmod, '/v/file', 0)]"
    assert inside(program, volumes=[f"{shared}:/v:ro"]) == ["hello", "EROFS", "EROFS"]


def test_a_single_file_and_a_deep_target(shared: Path) -> None:
    volumes = [f"{shared}/file:/srv/deep/inside/file", f"{shared}:/etc/new/place:ro"]
    program = "result = [open('/srv/deep/inside/file').read(), os.listdir('/etc/new/place')]"
    assert inside(program, volumes=volumes) == ["hello", ["file"]]


def test_volumes_of_two_containers_at_once(shared: Path) -> None:
    with sleeping(volumes=[f"{shared}:/v"]) as one, sleeping(volumes=[f"{shared}:/w:ro"]) as other:
        one.exec(["sh", "-c", "echo news > /v/news"])
        assert other.exec(["cat", "/w/news"]).stdout == b"news\n"


def test_a_read_only_volume_with_mounts_below_it(tmp_path: Path) -> None:
    """A mount below a read-only volume is either not seen, or read-only too; never writable."""
    (tmp_path / "below").mkdir()
    try:
        syscalls.mount("tmpfs", tmp_path / "below", "tmpfs")
    except PermissionError:
        pytest.skip("an ordinary user can mount nothing outside of a user namespace")
    try:
        assert inside("result = attempt(open, '/v/below/x', 'w')", volumes=[f"{tmp_path}:/v:ro"]) == "EROFS"
    finally:
        syscalls.umount2(tmp_path / "below")


@pytest.mark.parametrize(
    "text",
    ["/nosuch:/v", "/etc", "/etc:relative", "/etc:/v:rx", "/etc:/../v", ":/v", "/etc:", "/etc:/v:ro:x", "/e\0tc:/v",
     "/etc:/"],
)  # fmt: skip
def test_volumes_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(BadOption, match="--volume"):
        Container("python", ["true"], volumes=[text])


def test_a_target_through_a_link_of_the_image_is_refused(shared: Path, tmp_path: Path) -> None:
    """An image with a link that leads out would otherwise have us mount, or make directories, elsewhere."""
    base = images.rootfs()
    outside = tmp_path / "outside"
    outside.mkdir()

    def evil_image(target: str) -> None:
        shutil.copytree(base, target, symlinks=True)
        os.symlink("/proc/self/root/../../../..", f"{target}/srv-link")
        os.symlink(outside, f"{target}/out")
        os.chmod(target, 0o755)

    image = str(tmp_path / "evil")
    in_child(evil_image, image)
    try:
        for where in ("/out/v", "/srv-link/v", "/lib/v", "/out"):
            before = snapshot()
            with pytest.raises(OSError, match="symbolic link in the image"):
                Container(image, ["true"], volumes=[f"{shared}:{where}"]).run()
            assert_nothing_left(before, within=5)
        assert list(outside.iterdir()) == []
    finally:
        in_child(shutil.rmtree, image)


# ---------------------------------------------------------------------- names


def test_names(home: Path) -> None:
    with sleeping(name="one") as container:
        assert state.find("one")["id"] == container.spec.id == state.find(container.spec.id[:6])["id"]
        assert state.find("one")["state"] == "running"
        with pytest.raises(BadOption, match=r"'one'.*already"):
            sleeping(name="one")
    with pytest.raises(state.NoSuchContainer, match="one"):
        state.find("one")
    with sleeping(name="one"):
        pass


def test_two_containers_that_want_the_same_name_at_the_same_moment() -> None:
    """Both are described before one is started; only one may have the name."""
    one, other = sleeping(name="twin"), sleeping(name="twin")
    with one, pytest.raises((BadOption, OSError), match="twin"), other:
        pass
    assert state.records() == []


def test_the_program_does_not_run_before_its_container_is_written_down(shared: Path) -> None:
    """It is ready, and waits, while the launcher has to wait for others, and then finds that the name is taken."""
    options: dict[str, Any] = {"volumes": [f"{shared}:/v"], "workdir": "/v/made", "tty": True}
    other = Container("python", ["sh", "-c", "echo > /v/ran"], name="twin", **options)
    with sleeping(name="twin"), ThreadPoolExecutor() as pool:
        Container("python", ["true"]).run()
        wait_for_spare()
        with state.locked(state.containers()):
            start = pool.submit(other.start)
            wait_until((shared / "made").exists)
            time.sleep(0.3)
        with pytest.raises(OSError, match="twin"):
            start.result()
    assert not (shared / "ran").exists()


def test_a_port_that_is_taken_is_found_before_anything_is_done(shared: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options: dict[str, Any] = {
            "volumes": [f"{shared}:/v"],
            "workdir": "/v/made",
            "publish": [f"{port}:80"],
        }
        Container("python", ["true"]).run()
        wait_for_spare()
        with pytest.raises(OSError, match=str(port)):
            Container("python", ["true"], **options).start()
        assert not (shared / "made").exists()
        wait_for_spare()  # the empty one still waits


def test_texts_of_another_class_are_taken_as_texts() -> None:
    Container("python", ["true"]).run()
    wait_for_spare()  # whose processes have no module that was imported later, and the image may have one of its name
    ended = Container("python", [Text("sh"), Text("-c"), Text("echo $A")], env={Text("A"): Text("b")}).run()
    assert ended.stdout == b"b\n"
    wait_for_spare()
    with pytest.raises(ContainerError, match=f"{Text.__module__} is not known"):
        Container("python", ["true"], workdir=Text("/")).run()


def test_a_container_in_readiness_is_not_taken_for_one_with_other_capabilities() -> None:
    """What it has given up nobody can get back; and what it has kept may be more than the next one is to have."""
    show = ["grep", "CapBnd", "/proc/self/status"]
    for first, second in ((("CHOWN",), ()), ((), ("CHOWN",)), (("CHOWN", "KILL"), ("CHOWN", "FOWNER"))):
        children.close_launcher()
        Container("python", ["true"], cap_drop=["ALL"], cap_add=first).run()
        wait_for_spare()
        wanted = b"CapBnd:\t%016x\n" % sum(1 << number for number in capabilities.parse(second))
        with Container("python", ["sleep", "60"], cap_drop=["ALL"], cap_add=second) as container:
            assert container.exec(show).stdout == wanted
            one = Path(f"/proc/{container.pid}/status").read_text()
            assert wanted.decode() in one


def test_no_module_is_taken_from_the_image() -> None:
    """An order may name a class of a module that whoever carries it out has not imported, and the image has one."""
    children.close_launcher()  # whose empty container may be of another kind
    Container("python", ["true"]).run()
    wait_for_spare()
    strange = Container("python", ["true"])
    strange.spec = strange.spec._replace(limits_required=frozenset({Fraction(1)}))  # type: ignore[arg-type]
    with pytest.raises(ContainerError, match="fractions is not known"):
        strange.run()


@pytest.mark.parametrize("name", ["-x", "a b", "a/b", "../x", "x" * 64, "ä", "a\n", "."])
def test_names_that_cannot_be_meant(name: str) -> None:
    with pytest.raises(BadOption, match="--name"):
        sleeping(name=name)


@pytest.mark.parametrize("name", ["-x", "a b", "a_b", "x" * 64, "x-", "ä", "a\n"])
def test_host_names_that_cannot_be_meant(name: str) -> None:
    with pytest.raises(BadOption, match="--hostname"):
        sleeping(hostname=name)


@pytest.mark.parametrize("command", [[], ["a\0b"], ["true", 1], [b"true"], "true", [""]])
def test_commands_that_cannot_be_meant(command: Any) -> None:
    with pytest.raises((BadOption, ContainerError)):
        assert Container("python", command).run().returncode not in (126, 127), "told by the exit status only"


@pytest.mark.parametrize("env", [{"A\0B": "c"}, {"A": "b\0c"}, {"A=B": "c"}, {"": "x"}, {"A": 1}])
def test_environments_that_cannot_be_meant(env: Any) -> None:
    with pytest.raises(BadOption, match="env"):
        Container("python", ["true"], env=env)


@pytest.mark.parametrize(
    "options",
    [{"network": "moon"}, {"namespaces": ["net"]}, {"namespaces": ["mnt", "pid", "moon"]}, {"cap_add": ["MOON"]},
     {"cap_drop": ["CAP_MOON"]}, {"seccomp": "/no/such/profile"}, {"publish": ["1:2:3:4"]}, {"publish": ["99999:1"]},
     {"publish": ["a:b"]}, {"publish": ["8000:80"], "network": "host"},
     {"publish": ["8000:80"], "namespaces": ["mnt", "pid"]}, {"network": "bridge", "namespaces": ["mnt", "pid"]},
     {"workdir": "relative"}, {"workdir": "/a\0b"}],
)  # fmt: skip
def test_options_that_cannot_be_meant(options: dict[str, Any]) -> None:
    word = next(iter(options)).replace("_", "-")
    with pytest.raises(BadOption, match=word):
        Container("python", ["true"], **options)
    assert state.records() == []


# ---------------------------------------------------------------------- a machine that is not as it should be


def test_an_image_that_is_not_there() -> None:
    with pytest.raises(LookupError, match="nosuchimage"):
        Container("nosuchimage", ["true"]).run()
    with pytest.raises(LookupError, match="/no/such/rootfs"):
        Container("/no/such/rootfs", ["true"]).run()


def test_a_root_file_system_without_anything(tmp_path: Path) -> None:
    """Not even the directories on which /proc and /dev are mounted: an error that says which is missing."""
    (tmp_path / "empty").mkdir(mode=0o755)
    before = snapshot()
    with pytest.raises(OSError, match=r"/proc|proc"):
        Container(str(tmp_path / "empty"), ["true"]).run()
    assert_nothing_left(before, within=5)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, home: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    try:
        syscalls.mount("tmpfs", place, "tmpfs", 0, "size=64k")
    except PermissionError:
        pytest.skip("an ordinary user can mount nothing outside of a user namespace")
    try:
        link_images(home.parent / "shared", place)
        with environment(LABKERNEL_HOME=str(place)):
            children.close_launcher()
            assert (
                Container("python", ["true"]).run().returncode == 0
            )  # the launcher has begun; then the disk fills
            before = snapshot()
            launcher = children.launcher().process.pid
            end = time.monotonic() + 20
            while state.ended(launcher).exists() or not (state.spare(launcher) / "group").exists():
                assert time.monotonic() < end
                time.sleep(0.01)  # what the first one has left would make room
            time.sleep(0.1)
            with contextlib.suppress(OSError), open(place / "fill", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            for _ in range(2):  # the one that was made in advance, and one that is made now
                with pytest.raises(OSError) as caught:
                    Container("python", ["true"]).run()
                assert caught.value.errno == errno.ENOSPC
                assert str(place) in str(caught.value)
            os.unlink(place / "fill")
            assert_nothing_left(before, within=5)
            assert Container("python", ["true"]).run().returncode == 0
            children.close_launcher()
    finally:
        children.close_launcher()
        syscalls.umount2(place, syscalls.MNT_DETACH)


def test_where_mounts_are_shared_the_host_sees_none_of_the_containers(tmp_path: Path, home: Path) -> None:
    """With systemd every mount is shared (man 7 mount_namespaces), and so is a copy of it that nobody makes private."""
    place = tmp_path / "shared"
    place.mkdir()
    try:
        syscalls.mount("tmpfs", place, "tmpfs")
    except PermissionError:
        pytest.skip("an ordinary user can mount nothing outside of a user namespace")
    try:
        mounts.set_propagation(place, "shared")
        link_images(home.parent / "shared", place)
        (place / "volume").mkdir()
        with environment(LABKERNEL_HOME=str(place)):
            children.close_launcher()
            before = Path("/proc/self/mountinfo").read_text()
            with sleeping(volumes=[f"{place}/volume:/v"]) as container:
                assert Path("/proc/self/mountinfo").read_text() == before
                assert not any(entry.propagation for entry in mounts.mountinfo(container.pid or 0))
    finally:
        children.close_launcher()
        syscalls.umount2(place, syscalls.MNT_DETACH)


def test_a_home_that_cannot_be_written_is_told(tmp_path: Path, home: Path) -> None:
    (tmp_path / "file").write_text("")
    with environment(LABKERNEL_HOME=str(tmp_path / "file")):
        children.close_launcher()
        with pytest.raises(OSError, match=str(tmp_path / "file")):
            Container("python", ["true"]).run()
        children.close_launcher()


@pytest.mark.skipif(not rootless(), reason="root reads and writes every directory")
def test_a_home_of_somebody_else_is_told() -> None:
    with environment(LABKERNEL_HOME="/root/labkernel"):
        children.close_launcher()
        with pytest.raises(OSError, match="/root/labkernel"):
            Container("python", ["true"]).run()
        children.close_launcher()


WITHOUT_NAMESPACES = """
import os, sys
from pathlib import Path
from labkernel.linux import syscalls
uid, gid = os.geteuid(), os.getegid()
syscalls.unshare(syscalls.CLONE_NEWUSER)
Path('/proc/self/setgroups').write_text('deny')
Path('/proc/self/uid_map').write_text(f'1000 {uid} 1')
Path('/proc/self/gid_map').write_text(f'1000 {gid} 1')
Path('/proc/sys/user/max_user_namespaces').write_text('0')
# execve by somebody who is not root of the namespace: an ordinary user, on a machine that forbids user namespaces
os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])
"""


def test_without_user_namespaces_the_reason_is_told(home: Path) -> None:
    program = """
from labkernel.container import Container
try:
    print(Container('python', ['true']).run().returncode)
except OSError as error:
    print(type(error).__name__, error)
"""
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_NAMESPACES, program], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert "Traceback" not in ended.stderr
    assert "max_user_namespaces" in ended.stdout or "max_*_namespaces" in ended.stdout, ended


def test_a_namespace_that_is_one_too_many_is_not_told_as_a_full_disk() -> None:
    """ENOSPC is the kernel's word for both (man 2 clone)."""
    program = """
from labkernel.container import Container
try:
    print(Container('python', ['true']).run().returncode)
except OSError as error:
    print(error)
"""
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_NAMESPACES.replace("max_user_", "max_uts_"), program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "clone3" in ended.stdout and "LABKERNEL_HOME" not in ended.stdout, ended


def test_a_filter_that_the_kernel_refuses_is_told_in_words(tmp_path: Path) -> None:
    """More than 4096 instructions (BPF_MAXINSNS): the last thing that can fail, after the container is said to run."""
    argument = {"index": 1, "op": "SCMP_CMP_EQ"}
    rules = [
        {"names": ["ioctl"], "action": "SCMP_ACT_ERRNO", "args": [argument | {"value": 1 << 40 | number}]}
        for number in range(1100)
    ]
    profile = tmp_path / "long.json"
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}))
    before = snapshot()
    for _ in range(12):  # its word of that may come before or after the launcher's, that it has been started
        with pytest.raises(ContainerError, match=r"the container could not be made: .*seccomp") as caught:
            Container("python", ["true"], seccomp=str(profile)).run(timeout=30)
        assert caught.value.errno == errno.EINVAL
    assert_nothing_left(before, within=5)


@pytest.mark.parametrize("action", ["SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS"])
def test_a_filter_that_forbids_to_read_forbids_it_to_the_program_only(tmp_path: Path, action: str) -> None:
    """Without no_new_privs it is there before the capabilities are given up, long before the program."""
    profile = tmp_path / "no-read.json"
    rules = [{"names": ["read"], "action": action}]
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}))
    for no_new_privs in (True, False):
        ended = Container(
            "python", ["cat", "/etc/hostname"], seccomp=str(profile), no_new_privs=no_new_privs
        ).run()
        assert ended.returncode == (127 if action == "SCMP_ACT_ERRNO" else 128 + signal.SIGSYS)


@pytest.mark.skipif(rootless(), reason="only root may look at the launcher's descriptors")
def test_a_start_that_fails_late_gives_back_the_relay_and_the_address() -> None:
    launcher = children.launcher().process.pid
    own_address = """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('192.0.2.1', 9))
result = s.getsockname()[0]"""

    def fails() -> None:
        """By its own first process, which ends while the launcher lays the cable to it."""
        container = Container("python", ["true"], network="bridge", publish=["80"], workdir="/etc/hostname")
        with pytest.raises(ContainerError, match="--workdir"):
            container.start()
        Container("python", ["true"]).run()
        wait_for_spare()  # which has descriptors, too

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{launcher}/fd"))

    address = inside(own_address, network="bridge")
    wait_for_spare()
    fails()
    before = descriptors()
    fails()
    end = time.monotonic() + 5
    while descriptors() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert descriptors() <= before
    assert inside(own_address, network="bridge") == address


def test_an_empty_container_holds_nothing_open_but_where_its_order_comes_from() -> None:
    """What it had of its launcher's would stay open for whoever waits for its end."""

    def held(pid: int) -> list[str]:
        return [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]

    with sleeping():  # whose channel the launcher has open when it makes the next one
        Container("python", ["true"]).run()
        wait_for_spare()
        pid = int((state.spare(children.launcher().process.pid) / "group").read_text().split()[1])
        wait_until(lambda: len(in_child(held, pid)) == 4)
        kinds = sorted(name.partition(":")[0] for name in in_child(held, pid))
        assert kinds == ["/dev/null", "/dev/null", "/dev/null", "socket"]


# ---------------------------------------------------------------------- many


def test_twenty_threads() -> None:
    before = snapshot()

    def work(number: int) -> tuple[bytes, int]:
        ended = Container("python", ["sh", "-c", f"echo {number}; exit {number}"]).run(timeout=60)
        return ended.stdout, ended.returncode

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(work, range(60))) == [(f"{n}\n".encode(), n) for n in range(60)]
    assert_nothing_left(before, within=5)


def test_a_hundred_at_once() -> None:
    before = snapshot()
    with contextlib.ExitStack() as running:
        options = {"memory": "16M"} if facts()["cgroup_version"] else {}
        all_of_them = [running.enter_context(sleeping(**options)) for _ in range(100)]
        assert len({container.pid for container in all_of_them}) == 100
        assert all(container.running() for container in all_of_them)
        assert len(state.records()) == 100
    assert_nothing_left(before)


def test_one_after_the_other_costs_no_descriptors_and_no_memory() -> None:
    launcher = children.launcher().process.pid

    def ready() -> bool:
        try:
            pid = (state.spare(launcher) / "group").read_text().split()[1:]
        except FileNotFoundError:
            return False
        return bool(pid) and os.path.exists(f"/proc/{pid[0]}")

    def costs() -> tuple[int, int]:
        """With the container that is kept ready, which is made when the launcher has been idle for a moment."""
        end = time.monotonic() + 5
        while not ready() and time.monotonic() < end:
            time.sleep(0.01)
        pages = int(Path(f"/proc/{launcher}/statm").read_text().split()[1])
        return len(os.listdir(f"/proc/{launcher}/fd")), pages

    def open_here() -> int:
        return len(os.listdir("/proc/self/fd"))

    for _ in range(5):
        Container("python", ["true"]).run()
    ours = open_here()
    theirs = costs() if not rootless() else None
    for number in range(40):
        Container("python", ["true"], volumes=["/etc:/v:ro"]).run()
        if number % 4 == 0:
            with pytest.raises(OSError):
                Container("python", ["true"], user="nosuch").run()
            with sleeping() as container:
                container.exec(["true"])
    assert open_here() == ours
    if theirs:
        end = time.monotonic() + 60
        while costs()[0] > theirs[0] and time.monotonic() < end:
            time.sleep(0.01)  # it may still remove what the last ones have left
        assert costs()[0] <= theirs[0], sorted(
            os.readlink(entry.path) for entry in os.scandir(f"/proc/{launcher}/fd")
        )
        assert costs()[1] < theirs[1] + 1000  # pages


def test_two_pythons_at_once(home: Path) -> None:
    program = """
from labkernel.container import Container
for number in range(10):
    assert Container('python', ['sh', '-c', f'exit {number}']).run(timeout=60).returncode == number
with Container('python', ['sleep', '60']) as container:
    print('ok', flush=True)
    input()
"""
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    both = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables, text=True)
        for _ in range(2)
    ]
    for one in both:
        assert one.stdout and one.stdout.readline() == "ok\n"
    assert len(state.records()) == 2
    both[0].communicate("\n", timeout=60)
    assert len(state.records()) == 1  # the other's is left alone, also by a new one's clean-up
    Container("python", ["true"]).run()
    assert [record["state"] for record in state.records()] == ["running"]
    both[1].communicate("\n", timeout=60)
    assert [one.returncode for one in both] == [0, 0]
    assert state.records() == []


def test_a_caller_that_forks_gets_a_launcher_of_its_own() -> None:
    """A child of ours must not talk over our connection to the launcher."""
    program = """
import os
from labkernel.container import Container
assert Container('python', ['true']).run().returncode == 0
pid = os.fork()
if pid == 0:
    code = Container('python', ['sh', '-c', 'exit 5']).run(timeout=60).returncode
    from labkernel import children
    children.close_launcher()
    os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
assert Container('python', ['sh', '-c', 'exit 6']).run(timeout=60).returncode == 6
"""
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, timeout=60)
    assert ended.returncode == 0, ended.stderr.decode()


def test_a_root_file_system_of_the_readers_own_may_be_changed_between_two_containers(tmp_path: Path) -> None:
    """Overlay forbids it beneath a mount; so none is made in advance on what is not of the store."""
    program = shutil.which("busybox")
    if not program:
        pytest.skip("busybox is not installed")
    tmp_path.chmod(0o755)
    place = tmp_path / "rootfs"
    for number in range(3):
        (place / "bin").mkdir(parents=True)
        for name in ("proc", "sys", "dev"):
            (place / name).mkdir()
        shutil.copy(program, place / "bin/sh")
        (place / "number").write_text(f"{number}\n")
        place.chmod(0o755)
        for _ in range(2):
            container = Container(str(place), ["/bin/sh", "-c", "read n < /number; echo $n"])
            assert container.run().stdout.split() == [b"%d" % number]
            time.sleep(0.05)
            (place / "number").write_text(f"{number}\n\n")
        shutil.rmtree(place)


def test_a_program_may_run_on_every_processor_that_the_launcher_may() -> None:
    """The first process of a container that was made in advance is kept off the launcher's own for a moment."""
    children.close_launcher()
    mine = os.sched_getaffinity(0)
    program = "import os; print(*sorted(os.sched_getaffinity(0)))"
    try:
        for allowed in (mine, {min(mine)}):
            os.sched_setaffinity(children.launcher().process.pid, allowed)
            for _ in range(3):
                ended = Container("python", ["python3", "-c", program]).run()
                assert ended.stdout.split() == [b"%d" % number for number in sorted(allowed)]
                time.sleep(0.1)
            children.close_launcher()
    finally:
        children.close_launcher()


def test_a_container_like_none_before_is_made_as_well() -> None:
    """The one that is made in advance is like the last; each of these is unlike it."""
    for options in (
        {},
        {"masked_paths": False},
        {},
        {"namespaces": ("mnt", "pid", "user")},
        {"network": "host"},
    ):
        for _ in range(2):
            ended = Container("python", ["sh", "-c", "grep -c /proc/keys /proc/mounts"], **options).run()
            assert ended.stdout.strip() == (b"0" if "masked_paths" in options else b"1")
            time.sleep(0.05)
