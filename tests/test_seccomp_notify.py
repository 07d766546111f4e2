"""Watching system calls: what a trace sees is what strace sees, and what a trap tells is what was done."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkernel import in_child
from labkernel.lab.checks import run_answer
from labkernel.lab.exercises import e19
from labkernel.linux import seccomp, seccomp_notify, syscalls
from labkernel.linux.seccomp import ALLOW, Profile, Rule
from labkernel.linux.seccomp_notify import Trap, trace
from tests.helpers import own_home

MACHINE = platform.machine()
PYTHON = [sys.executable, "-I", "-S", "-B", "-c"]

COMMANDS = {
    "python": [*PYTHON, "pass"],
    "threads": [*PYTHON, "import threading; t = threading.Thread(target=int); t.start(); t.join()"],
    "children": ["/bin/sh", "-c", "ls / | wc -l; exit 3"],
    "another program": ["/bin/sh", "-c", "exec sleep 0"],
    "a signal": ["/bin/sh", "-c", "kill -9 $$"],
}


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


def quietly(command: list[str]) -> seccomp_notify.Trace:
    """Trace in a child of the lab, with nothing printed."""

    def run() -> seccomp_notify.Trace:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return trace(command)

    traced = in_child(run, timeout=60)
    assert isinstance(traced, seccomp_notify.Trace)
    return traced


def by_strace(command: list[str], place: Path) -> tuple[set[str], int]:
    output = place / "strace"
    whole = ["strace", "-f", "-qq", "-e", "signal=none", "-o", str(output), *command]
    status = subprocess.run(whole, stdout=subprocess.DEVNULL, timeout=60).returncode
    lines = output.read_text().splitlines()
    found = {match[1] for line in lines if (match := re.match(r"\d+ +(?:<\.\.\. )?(\w+)[ (]", line))}
    return found - {"exited", "killed"}, status


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize("name", COMMANDS)
def test_it_sees_what_strace_sees(name: str, tmp_path: Path) -> None:
    seen = quietly(COMMANDS[name])
    expected, status = by_strace(COMMANDS[name], tmp_path)
    # How a wait ends is a matter of who is faster, and whether a thread's own end comes before that of all.
    differ = (seen.calls ^ expected) - {"restart_syscall", "futex", "madvise", "exit"}
    assert not differ
    assert seen.exit_code == status


def test_only_what_comes_from_execve_on_counts() -> None:
    """Our own Python makes a call that /bin/true does not make, under the filter, before it becomes /bin/true."""

    def run() -> frozenset[str]:
        execve = os.execve

        def ask_first(path: str, arguments: list[str], env: dict[str, str]) -> None:
            os.getpriority(os.PRIO_PROCESS, 0)
            execve(path, arguments, env)

        os.execve = ask_first  # type: ignore[assignment]
        return trace(["/bin/true"]).calls

    calls = in_child(run, timeout=60)
    assert "execve" in calls
    assert "getpriority" not in calls
    assert "getpriority" in quietly([*PYTHON, "import os; os.getpriority(os.PRIO_PROCESS, 0)"]).calls


def test_a_program_that_is_not_there() -> None:
    assert quietly(["/nothing/of/this/name"]).exit_code == seccomp_notify.CANNOT_RUN


def test_what_outlives_the_command_does_not_hold_it_up() -> None:
    start = time.monotonic()
    assert quietly(["/bin/sh", "-c", "sleep 1000 & exit 4"]).exit_code == 4
    assert time.monotonic() - start < 30


def test_many_calls_at_once_are_all_answered() -> None:
    code = (
        "import os, threading\n"
        "threads = [threading.Thread(target=lambda: [os.getppid() for _ in range(200)]) for _ in range(8)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]"
    )
    traced = quietly([*PYTHON, code])
    assert traced.exit_code == 0
    assert "getppid" in traced.calls


def test_who_is_watched_already_says_so() -> None:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from labkernel.linux.seccomp_notify import trace\n"
        "import errno\n"
        "try:\n    trace(['/bin/true'])\n"
        "except OSError as error:\n    raise SystemExit(error.errno)"
    )
    assert quietly([sys.executable, "-c", code]).exit_code == errno.EBUSY


def test_why_it_failed_is_told_also_when_it_has_ended_already() -> None:
    def late() -> int:
        ready, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(tell, struct.pack("=iiii", 100, 0, -1, errno.EBUSY))
            os._exit(1)
        os.close(tell)
        pidfd = os.pidfd_open(pid)
        select.select([pidfd], [], [])
        try:
            seccomp_notify._listener_of(pid, pidfd, ready)
        except OSError as error:
            return error.errno or 0
        return 0

    assert in_child(late, timeout=60) == errno.EBUSY


def test_nothing_is_left_open() -> None:
    def count() -> tuple[int, int]:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            trace(["/bin/true"])
        return before, len(os.listdir("/proc/self/fd"))

    before, after = in_child(count, timeout=60)
    assert before == after


# ---------------------------------------------------------------------- traps


def trapped(name: str, data: int) -> list[Trap]:
    """What a handler is told when a call by that name is trapped, in a child."""

    def run() -> list[Trap]:
        found: list[Trap] = []
        seccomp_notify.on_trap(found.append)
        number = seccomp.call_number(MACHINE, name)
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        program = seccomp.compile_profile(Profile((Rule((name,), seccomp.TRAP | data),), ALLOW))
        seccomp.install(program)
        syscalls.libc.syscall(number, -1, -1, -1)
        return found

    traps: list[Trap] = in_child(run, timeout=60)
    return traps


@pytest.mark.parametrize(("name", "data"), [("socket", 0), ("getpriority", 77), ("openat2", 0xFFFF)])
def test_a_trap_tells_which_call_it_was(name: str, data: int) -> None:
    (trap,) = trapped(name, data)
    assert trap.code == seccomp_notify.SYS_SECCOMP
    assert trap.errno == data
    assert trap.arch == seccomp.ARCHITECTURES[MACHINE]
    assert trap.syscall == seccomp.call_number(MACHINE, name)
    assert seccomp_notify.name_of(trap.arch, trap.syscall) == name
    assert trap.call_addr > 0


def test_a_trap_reaches_the_thread_that_made_the_call() -> None:
    def run() -> bool:
        found: list[int] = []
        seccomp_notify.on_trap(lambda trap: found.append(threading.get_native_id()))
        mine: list[int] = []

        def work() -> None:
            mine.append(threading.get_native_id())
            syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
            seccomp.install(seccomp.compile_profile(Profile((Rule(("socket",), seccomp.TRAP),), ALLOW)))
            syscalls.libc.syscall(seccomp.call_number(MACHINE, "socket"), 2, 1, 0)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return mine == found and mine != [threading.get_native_id()] and bool(socket.socket())

    assert in_child(run, timeout=60)


def test_names_of_calls_of_other_architectures() -> None:
    assert seccomp_notify.name_of(seccomp.ARCHITECTURES["i386"], 359) == "socket"
    assert seccomp_notify.name_of(seccomp.ARCHITECTURES["x86_64"], 41) == "socket"
    assert seccomp_notify.name_of(0xDEAD, 41) == "41"
    assert seccomp_notify.name_of(seccomp.ARCHITECTURES["x86_64"], 100_000) == "100000"


def test_the_filter_of_one_instruction() -> None:
    assert seccomp.listing(seccomp_notify.ASK) == ["   0  return ask"]
    assert seccomp.answer(seccomp_notify.ASK, 0, 0) == "ask"


def test_without_a_listener_there_is_no_such_call() -> None:
    """Nobody holds it: then the kernel says ENOSYS by itself."""

    def run() -> int:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        rule = Rule(("getpriority",), seccomp.USER_NOTIF)
        seccomp.install(seccomp.compile_profile(Profile((rule,), ALLOW)))
        syscalls.libc.syscall(seccomp.call_number(MACHINE, "getpriority"), 0, 0)
        return ctypes.get_errno()

    assert in_child(run, timeout=60) == errno.ENOSYS


def test_signals_are_named_in_a_trace() -> None:
    assert quietly(COMMANDS["a signal"]).exit_code == -signal.SIGKILL


@pytest.mark.parametrize("occasion", sorted(e19.OCCASIONS))
def test_a_call_that_marks_a_day_of_exercise_19_3_is_missed_where_it_is_refused(occasion: str) -> None:
    other = next(name for name in sorted(e19.OCCASIONS) if name != occasion)
    calls = trace(e19._command(other)).calls | e19.ANY_DAY
    program = seccomp.compile_profile(Profile((Rule(tuple(sorted(calls))),), seccomp.ERRNO | errno.EPERM))
    assert run_answer(e19._behind, program, e19._command(other)).returncode == e19.DONE
    assert run_answer(e19._behind, program, e19._command(occasion)).returncode != e19.DONE
