"""The command line, run as people run it: a process of its own, real containers, exit statuses, streams, signals."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import click
import pytest

from labkernel import cli, state
from labkernel.container import cgroup_at
from tests.helpers import environment, needs_ids, needs_limits, own_home
from tests.ordinary_user import PYTHON, User, copy_package, ordinary_user

ROOT = Path(__file__).parent.parent
LABKERNEL = [sys.executable, "-m", "labkernel"]
PATIENCE = 30.0


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


def lab(*words: str, input: bytes | None = None, **settings: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the command and return how it ended."""
    stdin: Any = {"input": input} if input is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run(
        [*LABKERNEL, *words], cwd=ROOT, capture_output=True, timeout=PATIENCE, **stdin, **settings
    )


def printed(*words: str, **settings: Any) -> str:
    """What the command prints, which must not fail."""
    done = lab(*words, **settings)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def rows(verb: str = "ps", *words: str) -> dict[str, dict[str, Any]]:
    """What `ps --json` or `stats --json` lists, by the containers' names."""
    return {row["name"]: row for row in json.loads(printed(verb, *words, "--json"))}


@contextlib.contextmanager
def detached(name: str, *words: str) -> Iterator[str]:
    """A container that runs without us; removed at the end, whatever happened."""
    try:
        yield printed("run", "--detach", "--name", name, *words).strip()
    finally:
        lab("rm", "--force", name)


def waited_for(condition: Any, what: str) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"in vain: {what}"
        time.sleep(0.02)
    return found


# ---------------------------------------------------------------------- exit statuses and errors


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 3"], 3),
        (["/etc/passwd"], 126),
        (["no-such-program"], 127),
        (["sh", "-c", "kill -KILL $$"], 137),
        (["sh", "-c", "kill -TERM $$"], 143),
    ],
)
def test_the_exit_status_is_the_commands(command: list[str], status: int) -> None:
    done = lab("run", "--rm", *command)
    assert done.returncode == status
    if status in (126, 127):
        assert done.stderr.startswith(b"labkernel: cannot run ") and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(("program", "status"), [("no-such-program", 127), ("/etc/passwd", 126)])
@pytest.mark.parametrize("remove", [[], ["--rm"]], ids=["kept", "removed"])
def test_what_cannot_be_run_is_told_to_who_does_not_wait(
    program: str, status: int, remove: list[str]
) -> None:
    done = lab("run", "--detach", "--name", "failed", *remove, program)
    assert (done.returncode, done.stdout) == (status, b"")
    assert done.stderr.startswith(b"labkernel: ") and done.stderr.count(b"\n") == 1
    assert program.encode() in done.stderr
    if not remove:
        assert rows()["failed"]["exit_code"] == status
        printed("rm", "failed")


@pytest.mark.parametrize("command", [["true"], ["sh", "-c", "exit 127"], ["sleep", "1000"]], ids=" ".join)
def test_who_does_not_wait_gets_the_id_of_what_runs(command: list[str]) -> None:
    with detached("started", *command) as identity:
        assert rows()["started"]["id"] == identity


BAD = [
    (["--memory", "3M"], ["--memory '3M'", "from 6M to"]),
    (["--memory", "much"], ["--memory 'much'", "from 6M to"]),
    (["--memory", "900T"], ["--memory '900T'", "from 6M to"]),
    (["--memory-reservation", "1M"], ["--memory-reservation '1M'", "from 6M to"]),
    (["--memory-swap", "64M"], ["--memory-swap '64M'", "from 512M"]),
    (["--memory", "64M", "--memory-swap", "32M"], ["--memory-swap '32M'", "from 64M"]),
    (["--cpus", "0"], ["--cpus '0'", f"from 0.01 to {os.cpu_count()}"]),
    (["--cpus", "two"], ["--cpus 'two'", f"from 0.01 to {os.cpu_count()}"]),
    (["--cpu-weight", "0"], ["--cpu-weight '0'", "from 1 to 10000"]),
    (["--cpuset-cpus", "999"], ["--cpuset-cpus '999'", "cores from 0 to"]),
    (["--pids-limit", "none"], ["--pids-limit 'none'", "from 2 to"]),
    (["--device-read-bps", "1M"], ["--device-read-bps '1M'", "DEVICE:RATE"]),
    (["--device-write-bps", "/dev/nothing:1M"], ["--device-write-bps '/dev/nothing'", "block device"]),
    (["--hostname", "a_b"], ["--hostname 'a_b'", "letters, digits"]),
    (["--name", "../up"], ["--name '../up'", "letters, digits"]),
    (["--network", "mars"], ["--network 'mars'", "none, bridge, host"]),
    (["--publish", "99999:80"], ["--publish '99999:80'", "between 1 and 65535"]),
    (["--volume", "/no/such:/x"], ["--volume '/no/such:/x'", "there is no '/no/such'"]),
    (["--volume", "/tmp:x"], ["--volume '/tmp:x'", "absolute path"]),
    (["--env", "=x"], ["--env '=x'", "KEY=VALUE"]),
    (["--cap-drop", "CAP_FLY"], ["FLY"]),
    (["--security-opt", "apparmor=x"], ["--security-opt 'apparmor=x'", "seccomp=unconfined"]),
    (["--security-opt", "seccomp=/no/such"], ["/no/such", "No such file"]),
    (["--user", "nobody-here"], ["nobody-here", "/etc/passwd"]),
    (["--detach", "--tty"], ["--detach", "--tty"]),
    (["--interactive", "--tty"], ["--tty", "not a terminal"]),
    (["--flying"], ["--flying", "labkernel run --help"]),
]


@pytest.mark.parametrize(("options", "said"), BAD, ids=[" ".join(options) for options, _ in BAD])
def test_a_bad_value_is_named_with_what_is_allowed(
    options: list[str], said: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "isatty", lambda fd: False)
    # Only --user is found wrong by a container's child.
    monkeypatch.setattr(cli.containers, "_start_launcher", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "--rm", *options, "true"])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (125, "")
    assert err.startswith("labkernel: ") and err.count("\n") == 1 and "Errno" not in err
    for words in said:
        assert words in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["exec", "nobody", "true"], "no container called 'nobody'"),
        (["stop", "nobody"], "no container called 'nobody'"),
        (["rm", "nobody"], "no container called 'nobody'"),
        (["stats", "nobody"], "no container called 'nobody'"),
        (["build", "nothing"], "no image 'nothing'"),
        (["fly"], "No such command 'fly'"),
        (["stop", "--time", "-1", "x"], "x>=0"),
    ],
)
def test_every_verb_fails_in_one_line(words: list[str], said: str) -> None:
    done = lab(*words)
    assert (done.returncode, done.stdout) == (125, b"")
    assert done.stderr.decode().startswith("labkernel: ") and said in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1


def test_an_error_of_our_own_is_no_traceback_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise KeyError

    monkeypatch.setattr(state, "records", broken)
    with pytest.raises(SystemExit):
        cli.main(["ps"])
    assert "an error of labkernel itself, KeyError" in capsys.readouterr().err
    monkeypatch.setenv("LABKERNEL_DEBUG", "1")
    with pytest.raises(KeyError):
        cli.main(["ps"])


def words_of(notebook: str) -> str:
    cells = json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells)


def test_every_verb_and_option_names_a_notebook_that_has_it() -> None:
    for verb, command in cli.verbs.commands.items():
        named = re.findall(r"\[(\d\d-[a-z-]+)\]", command.help or "")
        assert named, verb
        assert all(re.search(rf"labkernel {verb}\b", words_of(notebook)) for notebook in named), verb
        for one in (param for param in command.params if isinstance(param, click.Option)):
            found = re.search(r"\[(\d\d-[a-z-]+)\]$", one.help or "")
            assert found, f"{verb} {one.name}: {one.help}"
            long = max(one.opts, key=len)
            ours = rf"(?:`(?:{verb} )?|labkernel [^`\n]*){long}(?![\w-])"  # not another program's option of that name
            assert re.search(ours, words_of(found[1])), f"{verb} {long}: not in {found[1]}"


# ---------------------------------------------------------------------- what run's options do


def test_the_image_may_be_named_or_left_out() -> None:
    assert printed("run", "--rm", "python", "echo", "a") == printed("run", "--rm", "echo", "a") == "a\n"


def test_without_a_command_it_is_python() -> None:
    assert lab("run", "--rm", "-i", input=b"print(6 * 7)").stdout == b"42\n"


def test_options_after_the_command_are_the_commands() -> None:
    assert printed("run", "--rm", "echo", "--rm", "-e", "--help") == "--rm -e --help\n"


def test_hostname() -> None:
    assert printed("run", "--rm", "--hostname", "box", "hostname") == "box\n"


def test_env() -> None:
    words = ["-e", "A=1", "--env", "B=x=y", "-e", "COPIED", "-e", "NOT_THERE", "env"]
    lines = printed("run", "--rm", *words, env={**os.environ, "COPIED": "ours"}).splitlines()
    assert {"A=1", "B=x=y", "COPIED=ours"} <= set(lines)
    assert not any(line.startswith("NOT_THERE") for line in lines)


def test_workdir_and_user() -> None:
    assert printed("run", "--rm", "-w", "/var/tmp", "sh", "-c", "pwd") == "/var/tmp\n"
    needs_ids()
    assert printed("run", "--rm", "-u", "nobody", "id", "-u") == "65534\n"
    assert printed("run", "--rm", "--user", "1000:1001", "sh", "-c", "id -u; id -g") == "1000\n1001\n"


def test_a_users_name_is_read_where_the_host_has_another_encoding() -> None:
    """In a container nothing can be imported any more, not even what it takes to read UTF-8."""
    needs_ids()
    other = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert printed("run", "--rm", "-u", "nobody", "id", "-u", env=other) == "65534\n"


def test_read_only() -> None:
    done = lab("run", "--rm", "--read-only", "touch", "/new")
    assert done.returncode == 1 and b"Read-only file system" in done.stderr
    assert lab("run", "--rm", "touch", "/new").returncode == 0


def test_volumes(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("from outside")
    assert printed("run", "--rm", "-v", f"{tmp_path}:/mnt/here:ro", "cat", "/mnt/here/in") == "from outside"
    refused = lab("run", "--rm", "-v", f"{tmp_path}:/mnt/here:ro", "touch", "/mnt/here/out")
    assert b"Read-only file system" in refused.stderr
    printed("run", "--rm", "--volume", f"{tmp_path}:/mnt/here", "sh", "-c", "echo inside > /mnt/here/out")
    assert (tmp_path / "out").read_text() == "inside\n"


def status_inside(*options: str) -> dict[str, str]:
    """/proc/self/status of a program in a container."""
    text = printed("run", "--rm", *options, "cat", "/proc/self/status")
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def test_capabilities() -> None:
    assert int(status_inside("--cap-drop", "ALL")["CapBnd"], 16) == 0
    usual = int(status_inside()["CapBnd"], 16)
    fewer = int(status_inside("--cap-drop", "NET_RAW")["CapBnd"], 16)
    more = int(status_inside("--cap-add", "CAP_SYS_PTRACE", "--cap-add", "syslog")["CapBnd"], 16)
    assert (usual & ~fewer, fewer & ~usual) == (1 << 13, 0)
    assert (more & ~usual, usual & ~more) == (1 << 19 | 1 << 34, 0)


def test_security_opt(tmp_path: Path) -> None:
    usual = status_inside()
    assert (usual["Seccomp"], usual["NoNewPrivs"]) == ("2", "1")
    lifted = status_inside(
        "--security-opt", "seccomp=unconfined", "--security-opt", "no-new-privileges=false"
    )
    assert (lifted["Seccomp"], lifted["NoNewPrivs"]) == ("0", "0")
    profile = tmp_path / "no-directories.json"
    rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    refused = lab("run", "--rm", "--security-opt", f"seccomp={profile}", "mkdir", "/tmp/new")
    assert refused.returncode == 1 and b"No space left" in refused.stderr


def test_network() -> None:
    names = ["python3", "-c", "import socket; print(*sorted(name for _, name in socket.if_nameindex()))"]
    assert printed("run", "--rm", *names) == printed("run", "--rm", "--network", "none", *names) == "lo\n"
    assert printed("run", "--rm", "--network", "bridge", *names).split() == ["eth0", "lo"]
    ours = os.readlink("/proc/self/ns/net")
    shown = ["python3", "-c", "import os; print(os.readlink('/proc/self/ns/net'))"]
    assert printed("run", "--rm", "--network", "host", *shown).strip() == ours


def test_publish() -> None:
    server = ["python3", "-m", "http.server", "8000"]
    with detached("web", "-p", "8000", "-p", "127.0.0.1:0:8000", *server):  # the kernel chooses, and ps tells
        for published in rows()["web"]["publish"]:
            address, chosen, inside = published.split(":")
            assert (address, inside) == ("127.0.0.1", "8000") and int(chosen) > 0
            page = f"http://{address}:{chosen}/etc/hostname"
            assert waited_for(lambda page=page: fetch(page), "an answer on the port that was chosen")
        assert published in printed("ps")
    with detached("web", "--publish", f"{(port := free_port())}:8000", *server):
        assert rows()["web"]["publish"] == [f"127.0.0.1:{port}:8000"]
        page = f"http://127.0.0.1:{port}/etc/hostname"
        assert waited_for(lambda: fetch(page), "an answer on the published port")


def fetch(page: str) -> bytes | None:
    with contextlib.suppress(OSError), urllib.request.urlopen(page, timeout=5) as answer:
        return bytes(answer.read())
    return None


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_limits_reach_the_kernel() -> None:
    needs_limits("memory", "cpu", "cpuset", "pids")
    options = ["--memory", "64M", "--memory-reservation", "32M", "--cpus", "0.5", "--cpu-weight", "50",
               "--cpuset-cpus", "0", "--pids-limit", "32"]  # fmt: skip
    with detached("limited", *options, "sleep", "1000"):
        group = cgroup_at(state.find("limited")["cgroup"])
        assert group
        written = {os.path.basename(path): text for path, text in group.limits_written().items()}
    wanted = {
        "memory.max": str(64 << 20), "memory.limit_in_bytes": str(64 << 20),
        "memory.high": str(32 << 20), "memory.soft_limit_in_bytes": str(32 << 20),
        "cpu.max": "50000 100000", "cpu.cfs_quota_us": "50000", "cpu.weight": "50", "cpu.shares": "512",
        "cpuset.cpus": "0", "pids.max": "32",
    }  # fmt: skip
    seen = {name: text for name, text in written.items() if name in wanted}
    assert len(seen) == 6 and seen == {name: wanted[name] for name in seen}


def test_the_memory_limit_kills() -> None:
    needs_limits("memory")
    assert lab("run", "--rm", "--memory", "32M", "python3", "-c", "b'x' * 10**9").returncode == 137


def test_memory_swap_reaches_the_kernel() -> None:
    needs_limits("memory")
    done = lab("run", "--rm", "--memory", "64M", "--memory-swap", "96M", "true")
    if b"memory.memsw.limit_in_bytes" in done.stderr and b"No such file" in done.stderr:
        pytest.skip("this kernel does not count swap (the boot option swapaccount=1 is missing)")
    assert done.returncode == 0, done.stderr


def test_disk_rates_reach_the_kernel() -> None:
    needs_limits("io")
    disks = [name for name in sorted(os.listdir("/sys/block")) if os.path.exists(f"/dev/{name}")]
    if not disks:
        pytest.skip("there is no block device here")
    rates = ["--device-read-bps", f"/dev/{disks[-1]}:1M", "--device-write-bps", f"/dev/{disks[-1]}:2M"]
    with detached("slow", *rates, "sleep", "1000"):
        limits = state.find("slow")["limits"]
    assert list(limits["read_bps"].values()) == [1 << 20] and list(limits["write_bps"].values()) == [2 << 20]


# ---------------------------------------------------------------------- streams and terminals


def test_standard_streams_are_passed_through() -> None:
    done = lab("run", "--rm", "-i", "sh", "-c", "cat; echo error >&2", input=b"hi\n")
    assert (done.stdout, done.stderr) == (b"hi\n", b"error\n")


def test_without_interactive_there_is_nothing_to_read() -> None:
    assert lab("run", "--rm", "cat", input=b"hi\n").stdout == b""


def test_binary_data() -> None:
    data = os.urandom(10 << 20)
    assert lab("run", "--rm", "-i", "cat", input=data).stdout == data


def test_a_reader_that_has_seen_enough() -> None:
    loop = "while echo y; do :; done"
    pipeline = f"{' '.join(LABKERNEL)} run --rm sh -c '{loop}' | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", pipeline], cwd=ROOT, capture_output=True, timeout=PATIENCE)
    assert (done.stdout, done.returncode) == (b"y\n", 128 + signal.SIGPIPE)
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [*LABKERNEL, "--help"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, timeout=PATIENCE
        )
    finally:
        os.close(write)
    assert (done.stderr, done.returncode) == (b"", 1)


@dataclass
class Terminal:
    """The command in a terminal of its own, and we at the keyboard."""

    process: subprocess.Popen[bytes]
    keyboard: int
    inner: int
    seen: bytes = b""

    def type(self, text: str) -> None:
        data = text.encode()
        while data:
            data = data[os.write(self.keyboard, data) :]

    def read_until(self, text: str) -> str:
        """What appears up to and including `text`."""
        end = time.monotonic() + PATIENCE
        while text.encode() not in self.seen:
            ready, _, _ = select.select([self.keyboard], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{text!r} does not appear in {self.seen!r}"
            self.seen += os.read(self.keyboard, 1 << 16)
        shown, self.seen = self.seen.split(text.encode(), 1)
        return (shown + text.encode()).decode()


@contextlib.contextmanager
def terminal(*words: str) -> Iterator[Terminal]:
    keyboard, inner = pty.openpty()
    termios.tcsetwinsize(inner, (33, 99))
    process = subprocess.Popen(
        [*LABKERNEL, *words], cwd=ROOT, stdin=inner, stdout=inner, stderr=inner, start_new_session=True
    )
    try:
        yield Terminal(process, keyboard, inner)
    finally:
        for fd in (keyboard, inner):
            with contextlib.suppress(OSError):
                os.close(fd)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()


SIZE = "python3 -c 'import os; print(*os.get_terminal_size())'\n"


def test_a_session_in_a_terminal() -> None:
    with terminal("run", "--rm", "-it", "-e", "PS1=> ", "sh") as session:
        before = termios.tcgetattr(session.inner)
        session.read_until("> ")
        session.type(SIZE)
        session.read_until("99 33\r\n> ")
        termios.tcsetwinsize(session.inner, (40, 120))
        session.process.send_signal(signal.SIGWINCH)  # the kernel sends it to the terminal's foreground
        session.type(SIZE)
        session.read_until("120 40\r\n> ")
        session.type("cat\n")
        session.read_until("cat\r\n")
        session.type("key by key\n")
        session.read_until("key by key\r\nkey by key\r\n")
        session.type("\x03")  # Ctrl-C: the terminal inside makes the signal, for cat alone
        session.read_until("> ")
        session.type("echo status $?\n")
        session.read_until("status 130\r\n> ")
        session.type("exit 5\n")
        assert session.process.wait(PATIENCE) == 5
        assert termios.tcgetattr(session.inner) == before


def test_more_than_a_terminal_takes_at_once() -> None:
    """The program writes while it does not read, and we type meanwhile: nobody may wait for the other for ever."""
    program = "import time; print('ready'); time.sleep(.5); print('y' * 1000000); [*iter(input, 'end')]; print('read')"
    with terminal("run", "--rm", "-it", "python3", "-c", program) as session:
        session.read_until("ready")
        typist = threading.Thread(
            target=session.type, args=(("x" * 60 + "\n") * 5000 + "end\n",), daemon=True
        )
        typist.start()
        session.read_until("read\r\n")
        assert session.process.wait(PATIENCE) == 0


def test_a_terminal_that_is_gone_ends_the_session() -> None:
    with terminal("run", "--rm", "-it", "-e", "PS1=> ", "sh") as session:
        session.read_until("> ")
        os.close(session.keyboard)
        assert session.process.wait(PATIENCE) == 128 + signal.SIGHUP


def test_a_terminal_without_keyboard() -> None:
    done = lab("run", "--rm", "-t", "python3", "-c", "import os; print(os.isatty(0), os.isatty(1))")
    assert done.stdout == b"True True\r\n"


# ---------------------------------------------------------------------- signals

ON_SIGNAL = """
import os, signal, sys, time
def tell(number, frame):
    os.write(1, signal.Signals(number).name.encode() + b"\\n")
    sys.exit(7)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, tell)
os.write(1, b"ready\\n")
while True: time.sleep(0.1)  # one long sleep begins although a signal has come a moment before
"""
IGNORES = "trap 'echo caught' INT; trap '' TERM HUP; echo ready; while :; do sleep 0.1; done"


@contextlib.contextmanager
def started(*words: str) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """The command as it runs, and what it prints; killed at the end, if the test fails."""
    with subprocess.Popen([*LABKERNEL, *words], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            yield process, process.stdout
        finally:
            process.kill()


@contextlib.contextmanager
def running(*words: str) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """`labkernel run` of a program that has said that it is ready."""
    with started("run", *words) as (process, output):
        assert output.readline() == b"ready\n"
        yield process, output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_the_program(number: signal.Signals) -> None:
    with running("--rm", "python3", "-c", ON_SIGNAL) as (process, output):
        process.send_signal(number)
        assert output.read() == f"{number.name}\n".encode()
        assert process.wait(PATIENCE) == 7


def test_the_second_interrupt_kills() -> None:
    with running("--rm", "sh", "-c", IGNORES) as (process, output):
        process.send_signal(signal.SIGINT)
        assert output.readline() == b"caught\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 137


def test_killing_the_command_ends_the_container() -> None:
    with running("--name", "orphan", "--rm", "sh", "-c", IGNORES) as (process, _):
        pid = rows()["orphan"]["pid"]
        init = state.ProcessKey.of(pid)
        process.kill()
        waited_for(lambda: not init.alive() and "orphan" not in rows(), "the end of the container")


# ---------------------------------------------------------------------- from one process to the next


def test_a_container_that_runs_without_us() -> None:
    with detached("box", "--hostname", "box", "sleep", "1000") as identity:
        row = rows()["box"]
        assert row["id"] == identity and row["state"] == "running" and row["image"] == "python"
        assert row["command"] == ["sleep", "1000"] and row["exit_code"] is None
        assert state.ProcessKey.of(row["pid"]).alive()
        table = printed("ps").splitlines()
        assert table[0].split() == ["ID", "NAME", "IMAGE", "COMMAND", "CREATED", "STATE", "PID", "PORTS"]
        assert any(
            identity in line and "sleep 1000" in line and str(row["pid"]) in line for line in table[1:]
        )

        assert printed("exec", "box", "hostname") == printed("exec", identity[:8], "hostname") == "box\n"
        assert "sleep 1000" in printed("exec", "box", "ps", "-A", "-o", "args")
        assert lab("exec", "box", "sh", "-c", "exit 6").returncode == 6
        assert lab("exec", "box", "no-such-program").returncode == 127
        data = os.urandom(1 << 20)
        assert lab("exec", "-i", "box", "cat", input=data).stdout == data
        assert printed("exec", "-e", "A=b", "-w", "/tmp", "box", "sh", "-c", "echo $A; pwd") == "b\n/tmp\n"
        assert (
            printed("exec", "--tty", "box", "python3", "-c", "import os; print(os.isatty(1))") == "True\r\n"
        )

        refused = lab("rm", "box")
        assert refused.returncode == 125 and b"box runs" in refused.stderr
        again = lab("run", "--rm", "--name", "box", "true")
        assert again.returncode == 125 and b"a container of that name already" in again.stderr
        assert printed("stop", "box") == "box\n"
        row = rows()["box"]
        assert (row["state"], row["pid"], row["exit_code"]) == ("exited", None, 143)
        assert "exited (143)" in printed("ps")
        ended = lab("exec", "box", "true")
        assert ended.returncode == 125 and b"does not run: it is exited" in ended.stderr
        assert printed("rm", "box") == "box\n"
        assert "box" not in rows()


def test_exec_is_behind_the_same_walls() -> None:
    show = ["grep", "-E", "CapBnd|CapEff|Seccomp:|NoNewPrivs", "/proc/self/status"]
    options = ["--cap-drop", "NET_RAW", "--security-opt", "seccomp=unconfined"]
    for walls in ([], options):
        first = printed("run", "--rm", *walls, *show)
        with detached("walled", *walls, "sleep", "1000"):
            assert printed("exec", "walled", *show) == first


def test_exec_starts_from_what_the_container_was_given(tmp_path: Path) -> None:
    needs_ids()
    profile = tmp_path / "no-directories.json"
    rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    security = ["--security-opt", f"seccomp={profile}", "--security-opt", "no-new-privileges=false"]
    given = ["-e", "A=1", "-e", "B=2", "-u", "1000:1001", "-w", "/var/tmp", *security]
    show = "env; id; pwd; ulimit -n; grep -E '^(Cap|NoNew|Seccomp:)' /proc/self/status; mkdir /tmp/x"
    with detached(
        "box", *given, "sh", "-c", f"({show}) > /tmp/first 2>&1; mv /tmp/first /tmp/done; sleep 1000"
    ):
        profile.unlink()  # the one that was read is what counts
        first = waited_for(lambda: lab("exec", "box", "cat", "/tmp/done").stdout.decode(), "its file")
        for line in ("A=1\n", "uid=1000", "/var/tmp\n", "NoNewPrivs:\t0\n", "No space left"):
            assert line in first
        again = lab("exec", "box", "sh", "-c", show)
        assert (again.stdout + again.stderr).decode() == first
        words = ["-e", "B=3", "-u", "0:0", "-w", "/"]
        assert printed("exec", *words, "box", "sh", "-c", "echo $A $B; id -u; pwd") == "1 3\n0\n/\n"


def test_a_session_by_exec() -> None:
    with detached("box", "sleep", "1000"), terminal("exec", "-it", "-e", "PS1=> ", "box", "sh") as session:
        session.read_until("> ")
        session.type(SIZE)
        session.read_until("99 33\r\n> ")
        session.type("exit 4\n")
        assert session.process.wait(PATIENCE) == 4


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_an_exec_that_is_interrupted_ends(number: int, status: int) -> None:
    with detached("box", "sleep", "1000"):
        with started("exec", "box", "sh", "-c", "echo ready; sleep 777; :") as (process, output):
            assert output.readline() == b"ready\n"
            waited_for(lambda: "sleep 777\n" in printed("exec", "box", "ps", "-A", "-o", "args"), "its start")
            process.send_signal(number)
            assert process.wait(PATIENCE) == status
        waited_for(lambda: "sleep 777" not in printed("exec", "box", "ps", "-A", "-o", "args"), "its end")


def test_stop_kills_what_does_not_listen() -> None:
    with detached("deaf", "sh", "-c", IGNORES):
        began = time.monotonic()
        printed("stop", "--time", "0.5", "deaf")
        assert time.monotonic() - began > 0.5
        assert rows()["deaf"]["exit_code"] == 137


def test_rm_force_kills() -> None:
    with detached("busy", "sleep", "1000"):
        pid = rows()["busy"]["pid"]
        assert printed("rm", "--force", "busy") == "busy\n"
        assert "busy" not in rows() and not os.path.exists(f"/proc/{pid}")


def test_what_has_ended_is_kept_unless_rm_is_said() -> None:
    assert lab("run", "--name", "kept", "sh", "-c", "exit 3").returncode == 3
    assert lab("run", "--name", "gone", "--rm", "sh", "-c", "exit 3").returncode == 3
    listed = rows()
    assert listed["kept"]["exit_code"] == 3 and "gone" not in listed
    printed("rm", "kept")


def test_stats() -> None:
    burn = ["python3", "-c", "while True: pass"]
    with detached("burner", *burn), detached("idle", "sleep", "1000"):
        both = rows("stats")
        assert set(both) == {"burner", "idle"}
        assert both["burner"]["cpu_percent"] > 5 > both["idle"]["cpu_percent"]
        keys = {
            "id", "name", "cpu_percent", "memory_bytes", "memory_limit_bytes", "memory_percent",
            "net_received_bytes", "net_sent_bytes", "io_read_bytes", "io_write_bytes", "pids",
        }  # fmt: skip
        assert set(both["idle"]) == keys
        assert both["idle"]["pids"] == 2 and both["idle"]["memory_bytes"] > 0
        assert set(rows("stats", "idle")) == {"idle"}
        table = printed("stats", "--no-stream", "burner").splitlines()
        assert len(table) == 2 and table[0].split()[:3] == ["ID", "NAME", "CPU"] and "burner" in table[1]


def test_live_stats_end_with_the_container() -> None:
    with detached("short", "sleep", "1000"), started("stats", "short") as (process, output):
        lines = [output.readline() for _ in range(4)]  # two tables
        printed("stop", "--time", "0", "short")
        assert process.wait(PATIENCE) == 0
        assert [b"short" in line for line in lines] == [False, True, False, True]
    with detached("long", "sleep", "1000"), started("stats") as (process, output):
        assert output.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130


# ---------------------------------------------------------------------- build, doctor, clean


def test_build_says_what_it_made(home: Path) -> None:
    built = json.loads(printed("build", "--json"))
    assert built["name"] == "python" and built["digest"].startswith("sha256:")
    assert built["files"] > 100 and built["bytes"] > built["tarball_bytes"] > 0
    assert os.path.isfile(built["tarball"]) and os.path.isdir(f"{built['rootfs']}/usr/bin")
    assert built["digest"] in printed("build")


def test_build_again_builds_again() -> None:
    built = json.loads(printed("build", "--json"))
    before = os.stat(built["tarball"]).st_mtime_ns
    done = subprocess.run(
        [*LABKERNEL, "build", "--again", "--json"], cwd=ROOT, capture_output=True, timeout=10 * PATIENCE
    )
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout) == built, "the same bits"
    assert os.stat(built["tarball"]).st_mtime_ns != before


def test_the_doctor_answers() -> None:
    answers = lab("doctor", "--json")
    findings = json.loads(answers.stdout)
    assert {"name", "ok", "detail", "remedy", "optional"} == set(findings[0])
    healthy = all(finding["ok"] or finding["optional"] for finding in findings)
    assert answers.returncode == (0 if healthy else 1)
    table = lab("doctor").stdout.decode()
    assert all(finding["name"] in table for finding in findings)


def test_clean_removes_what_is_left_behind_and_says_so() -> None:
    assert printed("clean") == "nothing was left behind\n"
    lab("run", "--name", "ended", "true")
    with detached("survivor", "sleep", "1000"), detached("dead", "sleep", "1000"):
        os.kill(state.find("dead")["launcher"]["pid"], signal.SIGKILL)
        waited_for(lambda: rows()["dead"]["state"] == "dead", "the launcher's death to be seen")
        said = printed("clean")
        assert "removed container ended" in said and "removed container dead" in said
        assert "still running: survivor" in said
        assert set(rows()) == {"survivor"}


def test_clean_all_leaves_nothing(tmp_path: Path) -> None:
    with environment(LABKERNEL_HOME=str(tmp_path / "home")):
        printed("run", "--detach", "--name", "runs", "sleep", "1000")
        pid = rows()["runs"]["pid"]
        said = printed("clean", "--all")
        assert "removed container runs" in said and "removed images/python.tar.zst" in said
        assert not os.path.exists(f"/proc/{pid}")
        assert not (tmp_path / "home").exists()


# ---------------------------------------------------------------------- as an ordinary user


@dataclass
class Student:
    """Somebody without rights, who has a copy of this package and of what it needs."""

    user: User
    variables: dict[str, str]

    def lab(self, *words: str, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        command = [PYTHON, "-m", "labkernel", *words]
        done: subprocess.CompletedProcess[bytes] = self.user.run(
            *command, variables=self.variables, input=input, timeout=PATIENCE
        )
        return done

    def printed(self, *words: str) -> str:
        done = self.lab(*words)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()


@pytest.fixture(scope="module")
def student(home: Path) -> Iterator[Student]:
    if os.geteuid() != 0:
        pytest.skip("these tests are run by an ordinary user already; only root can make another one")
    with ordinary_user() as user:
        yield Student(user, copy_package(user))


def test_an_ordinary_user_builds_and_runs(student: Student) -> None:
    assert "sha256:" in student.printed("build")
    assert student.printed("run", "--rm", "id", "-u") == "0\n"
    assert student.lab("run", "--rm", "sh", "-c", "exit 3").returncode == 3
    assert student.lab("run", "--rm", "-i", "cat", input=b"hi\n").stdout == b"hi\n"


def test_an_ordinary_users_container_that_runs_without_them(student: Student) -> None:
    port = free_port()
    web = ["--publish", f"{port}:8000", "python3", "-m", "http.server", "8000"]
    student.printed("run", "--detach", "--name", "web", *web)
    try:
        (row,) = json.loads(student.printed("ps", "--json"))
        assert row["name"] == "web" and row["state"] == "running"
        assert student.printed("exec", "web", "id", "-u") == "0\n"
        (used,) = json.loads(student.printed("stats", "--json"))
        assert used["name"] == "web" and used["pids"] == 2
        waited_for(lambda: fetch(f"http://127.0.0.1:{port}/"), "an answer on the published port")
        assert student.printed("stop", "web") == "web\n"
        assert student.printed("rm", "web") == "web\n"
    finally:
        student.lab("rm", "--force", "web")


def test_an_ordinary_user_asks_for_a_limit(student: Student) -> None:
    """It holds, or it is said why it cannot be had; it is never silently left out."""
    done = student.lab("run", "--rm", "--memory", "64M", "true")
    assert done.returncode == 0 or (done.returncode == 125 and b"limits are asked for (memory" in done.stderr)


def test_an_ordinary_user_leaves_nothing(student: Student) -> None:
    student.printed("run", "--detach", "--name", "last", "sleep", "1000")
    assert "removed container last" in student.printed("clean", "--all")
    assert not (student.user.home / ".local" / "share" / "labkernel").exists()
    waited_for(lambda: student.user.processes() == [], "the end of the user's last process")
