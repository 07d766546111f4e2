"""A container from start to end, with the walls that can be told from inside: real programs, real limits."""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkernel import children, state
from labkernel.container import Container
from labkernel.linux import namespaces
from labkernel.spec import BadOption
from tests.helpers import needs_ids, needs_limits, own_home


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


def test_output_and_exit_status_come_back() -> None:
    ended = Container("python", ["sh", "-c", "echo out; echo err >&2; exit 7"]).run()
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, b"out\n", b"err\n")


def test_input_goes_in() -> None:
    data = os.urandom(1 << 20)
    assert Container("python", ["cat"]).run(input=data).stdout == data


@pytest.mark.parametrize(
    ("command", "status"), [(["/nosuch"], 127), (["/etc/passwd"], 126), (["sh", "-c", "kill -9 $$"], 137)]
)
def test_exit_status_as_the_field_has_it(command: list[str], status: int) -> None:
    assert Container("python", command).run().returncode == status


def test_all_eight_namespaces_are_new() -> None:
    with Container("python", ["sleep", "60"]) as container:
        assert container.pid
        assert not any(namespaces.shared("self", container.pid).values())


def test_only_what_is_needed_is_inside() -> None:
    program = (
        "import os; print(os.getuid(), os.getpid() > 1, sorted(os.listdir('/proc/self/fd')), len(os.environ))"
    )
    ended = Container("python", ["python3", "-c", program]).run()
    assert ended.stdout.decode().split()[:2] == ["0", "True"], ended
    assert b"'0', '1', '2', '3'" in ended.stdout  # 3 is listdir's own


@pytest.mark.parametrize(
    "forbidden",
    [
        "mount -t tmpfs none /tmp",
        "echo 1 > /proc/sys/kernel/sysrq",
        "echo h > /proc/sysrq-trigger",
        "cat /proc/1/environ",
        "ls /proc/1/root/",
        "python3 -c 'import os; os.mknod(\"/tmp/sda\", 0o60600, os.makedev(8, 0))'",
        "python3 -c 'import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x10000000))'",
    ],
)
def test_the_forbidden_is_refused(forbidden: str) -> None:
    assert Container("python", ["sh", "-c", forbidden]).run().returncode != 0


def test_init_tells_nothing_of_the_host() -> None:
    shown = Container("python", ["cat", "/proc/1/cmdline"]).run().stdout
    assert shown.rstrip(b"\0") == b"labkernel"


def test_memory_limit_kills() -> None:
    needs_limits()
    ended = Container("python", ["python3", "-c", "x = bytearray(200 << 20)"], memory="48M").run()
    assert ended.returncode == 137
    assert ended.oom_killed


def test_pids_limit_holds() -> None:
    needs_limits()
    forks = "while True:\n    os.fork() or time.sleep(9)"
    program = f"import os, time\ntry:\n  {forks}\nexcept OSError as error:\n  print(error.errno)"
    ended = Container("python", ["python3", "-c", program], pids_limit=10).run(timeout=60)
    assert ended.stdout.strip() == b"11"  # EAGAIN


def test_cpu_quota_holds() -> None:
    needs_limits()
    with Container("python", ["python3", "-c", "while True: pass"], cpus=0.25) as container:
        time.sleep(0.5)
        begin, used = time.monotonic(), container.stats().cpu_usec
        time.sleep(2)
        share = (container.stats().cpu_usec - used) / 1e6 / (time.monotonic() - begin)
    assert share == pytest.approx(0.25, rel=0.15)


def test_a_published_port_is_fetched_from_the_host() -> None:
    with Container("python", ["python3", "-m", "http.server", "8000"], publish=["18473:8000"]):
        for _ in range(200):
            try:
                with urllib.request.urlopen("http://127.0.0.1:18473/", timeout=5) as answer:
                    assert answer.status == 200
                    break
            except OSError:
                time.sleep(0.05)
        else:
            pytest.fail("no answer from the published port")


def test_exec_runs_inside() -> None:
    with Container("python", ["sleep", "60"], hostname="box") as container:
        ended = container.exec(["sh", "-c", "hostname; exit 5"])
    assert (ended.returncode, ended.stdout) == (5, b"box\n")


def test_volume_read_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    tmp_path.chmod(0o755)
    ended = Container(
        "python", ["sh", "-c", "cat /data/file; touch /data/x"], volumes=[f"{tmp_path}:/data:ro"]
    ).run()
    assert ended.stdout == b"hello"
    assert ended.returncode != 0


@pytest.mark.parametrize(
    "options", [{"memory": "1"}, {"cpus": 0}, {"cpus": 100000}, {"pids_limit": -1}, {"memory": "many"}]
)
def test_nonsense_is_refused_before_anything_is_made(options: dict[str, object]) -> None:
    with pytest.raises(BadOption, match=str(next(iter(options.values())))):
        Container("python", ["true"], **options)  # type: ignore[arg-type]
    assert state.records() == []


def test_nothing_is_left() -> None:
    Container("python", ["true"]).run()
    assert list(state.containers().iterdir()) == []


@pytest.mark.parametrize("user", ["0", "1000"])
def test_when_the_launcher_is_killed_its_containers_end_and_the_next_one_tidies_up(user: str) -> None:
    if user != "0":
        needs_ids()
    container = Container("python", ["sleep", "60"], user=user).start()
    assert container.pid
    key = state.ProcessKey.of(container.pid)
    process = children.launcher().process
    process.kill()
    process.wait()
    for _ in range(200):
        if not key.alive():
            break
        time.sleep(0.02)
    assert not key.alive()
    children.launcher()
    assert list(state.containers().iterdir()) == []
