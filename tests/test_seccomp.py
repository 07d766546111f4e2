"""The seccomp filter, installed in children: what it forbids is tried, and what programs need is used."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import pickle
import platform
import random
import signal
import socket
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from labkernel.linux import capabilities, seccomp, syscalls
from labkernel.linux.capabilities import DOCKER_DEFAULT, parse
from labkernel.linux.seccomp import ALLOW, ARCHITECTURES, ERRNO, Comparison, Profile, Rule

X86_64 = platform.machine() == "x86_64"
only_x86_64 = pytest.mark.skipif(not X86_64, reason="these are numbers and instructions of x86_64")

PR_GET_SECCOMP = 21


def filtered(function: Callable[[], Any], program: bytes | None = None) -> Any:
    """Call a function in a child under a filter, the default one if none is given; return what it does."""
    program = seccomp.compiled("default", DOCKER_DEFAULT) if program is None else program
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
            seccomp.install(program)
            answer = ("value", function())
        except BaseException as error:
            answer = ("error", error)
        os.write(write, pickle.dumps(answer))
        os._exit(0)
    os.close(write)
    with open(read, "rb") as there:
        raw = there.read()
    _, status = os.waitpid(pid, 0)
    if not raw:
        return os.waitstatus_to_exitcode(status)
    kind, value = pickle.loads(raw)
    if kind == "error":
        raise value
    return value


def call(number: int, *arguments: object) -> int:
    """The errno of a system call, 0 if it succeeds."""
    ctypes.set_errno(0)
    return ctypes.get_errno() if syscalls.libc.syscall(number, *arguments) == -1 else 0


def number(name: str) -> int:
    found = seccomp.call_number(platform.machine(), name)
    assert found >= 0, f"{name} has no number here"
    return found


# ---------------------------------------------------------------------- forbidden

NOTHING = ctypes.c_void_p(0)

# With arguments that do no harm should the filter be broken: it is root of the real machine who tries.
FORBIDDEN: dict[str, Callable[[], int]] = {
    "mount": lambda: call(number("mount"), b"none", b"/nowhere", b"tmpfs", 0, NOTHING),
    "umount2": lambda: call(number("umount2"), b"/nowhere", 0),
    "pivot_root": lambda: call(number("pivot_root"), b"/nowhere", b"/nowhere"),
    "open_tree": lambda: call(number("open_tree"), -100, b"/nowhere", 0),
    "move_mount": lambda: call(number("move_mount"), -1, b"", -1, b"", 0),
    "fsopen": lambda: call(number("fsopen"), b"tmpfs", 0),
    "unshare": lambda: call(number("unshare"), syscalls.CLONE_NEWUSER),
    "setns": lambda: call(number("setns"), -1, 0),
    "clone with CLONE_NEWUSER": lambda: call(number("clone"), syscalls.CLONE_NEWUSER | 17, 0, 0, 0, 0),
    "clone with CLONE_NEWNET": lambda: call(number("clone"), syscalls.CLONE_NEWNET | 17, 0, 0, 0, 0),
    "keyctl": lambda: call(number("keyctl"), 0, -3, 0),
    "add_key": lambda: call(number("add_key"), b"user", b"name", b"x", ctypes.c_size_t(1), -2),
    "request_key": lambda: call(number("request_key"), b"user", b"name", NOTHING, -2),
    "bpf": lambda: call(number("bpf"), 0, NOTHING, 0),
    "perf_event_open": lambda: call(number("perf_event_open"), NOTHING, 0, -1, -1, 0),
    "kexec_load": lambda: call(number("kexec_load"), 0, 17, NOTHING, ctypes.c_ulong(2**64 - 1)),
    "init_module": lambda: call(number("init_module"), NOTHING, 0, b""),
    "clock_settime": lambda: call(number("clock_settime"), 0, NOTHING),
    "settimeofday": lambda: call(number("settimeofday"), ctypes.c_void_p(1), NOTHING),
    "reboot": lambda: call(number("reboot"), 0, 0, 0, 0),
    "swapon": lambda: call(number("swapon"), b"/nowhere", 0),
    "acct": lambda: call(number("acct"), b"/nowhere"),
    "syslog": lambda: call(number("syslog"), 10, NOTHING, 0),
    "sethostname": lambda: call(number("sethostname"), b"x", -1),
    "open_by_handle_at": lambda: call(number("open_by_handle_at"), -1, NOTHING, 0),
    "userfaultfd": lambda: call(number("userfaultfd"), 0),
    "io_uring_setup": lambda: call(number("io_uring_setup"), 1, NOTHING),
    "kcmp": lambda: call(number("kcmp"), os.getpid(), os.getpid(), 2, 0, 0),
    "quotactl": lambda: call(number("quotactl"), 0, NOTHING, 0, NOTHING),
    "personality of another system": lambda: call(number("personality"), 0x0004),
    "vsock": lambda: call(number("socket"), 40, socket.SOCK_STREAM, 0),
    "the kernel's cryptography": lambda: call(number("socket"), 38, socket.SOCK_SEQPACKET, 0),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_it_fails_with_eperm(name: str) -> None:
    assert filtered(FORBIDDEN[name]) == errno.EPERM


@pytest.mark.skipif(os.geteuid() != 0, reason="to others the kernel itself answers EPERM")
def test_without_the_filter_root_gets_other_answers() -> None:
    """The check of the checks: it is the filter that answers EPERM above, not the kernel."""
    nothing_forbidden = seccomp.compile_profile(Profile((Rule(("uselib",), ERRNO | 1),), ALLOW))
    assert [name for name in FORBIDDEN if filtered(FORBIDDEN[name], nothing_forbidden) == errno.EPERM] == []


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ("SYS_ADMIN", "mount"), ("SYS_ADMIN", "unshare"), ("SYS_ADMIN", "setns"), ("SYS_ADMIN", "clone3"),
        ("SYS_TIME", "clock_settime"), ("SYSLOG", "syslog"), ("SYS_PTRACE", "kcmp"), ("BPF", "bpf"),
        ("DAC_READ_SEARCH", "open_by_handle_at"), ("SYS_PACCT", "acct"), ("SYS_BOOT", "reboot"),
        ("SYS_MODULE", "init_module"), ("PERFMON", "perf_event_open"), ("SYS_NICE", "mbind"),
        ("SYS_RAWIO", "iopl"), ("SYS_TTY_CONFIG", "vhangup"),
    ],
)  # fmt: skip
def test_what_comes_with_a_capability(capability: str, name: str) -> None:
    if name == "iopl" and not X86_64:
        pytest.skip("iopl is a call of x86")
    native = ARCHITECTURES[platform.machine()]
    without = seccomp.compiled("default", DOCKER_DEFAULT)
    program = seccomp.compiled("default", frozenset(DOCKER_DEFAULT | parse([capability])))
    assert seccomp.verdict(without, native, number(name)) & seccomp.ACTION == ERRNO
    assert seccomp.verdict(program, native, number(name)) == ALLOW


def test_with_cap_sys_admin_clone_may_make_namespaces() -> None:
    program = seccomp.compiled("default", frozenset(DOCKER_DEFAULT | parse(["SYS_ADMIN"])))

    def work() -> int:
        pid = syscalls.libc.syscall(number("clone"), syscalls.CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0)
        if pid == 0:
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert filtered(work, program) == 0


def test_chroot_goes_with_its_capability() -> None:
    without = seccomp.compiled("default", DOCKER_DEFAULT - parse(["SYS_CHROOT"]))
    chroot = lambda: call(number("chroot"), b"/nowhere")  # noqa: E731
    assert filtered(chroot, without) == errno.EPERM
    assert filtered(chroot) == errno.ENOENT


def test_clone3_is_not_there_and_calls_of_the_future_neither() -> None:
    def work() -> list[int]:
        return [call(later, NOTHING, 0) for later in (number("clone3"), 900, 0x10000)]

    assert filtered(work) == [errno.ENOSYS] * 3


@only_x86_64
def test_x32_numbers_are_not_there() -> None:
    assert filtered(lambda: call(0x40000000 | number("getpid"))) == errno.ENOSYS
    assert filtered(lambda: call(0x40000000 | number("mount"), b"", b"/", b"", 0, NOTHING)) == errno.ENOSYS


def int80(number: int, first: int = 0) -> int:
    """A system call as 32-bit programs make it, from a 64-bit one: `int 0x80` with i386's numbers."""
    code = b"\x53" + b"\xb8" + struct.pack("<I", number) + b"\xbb" + struct.pack("<I", first)
    code += b"\x31\xc9\x31\xd2\x31\xf6\x31\xff" + b"\xcd\x80" + b"\x5b\xc3"  # no other arguments; return
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return int(ctypes.CFUNCTYPE(ctypes.c_int)(address)())


def i386_is_there() -> bool:
    """Whether this kernel takes 32-bit calls: without that, `int 0x80` kills the process."""
    return bool(
        filtered(lambda: int80(20) == os.getpid(), seccomp.compile_profile(Profile((), ALLOW))) is True
    )


@only_x86_64
def test_the_32_bit_entrance_is_filtered_by_its_own_numbers() -> None:
    if not i386_is_there():
        pytest.skip("this kernel has no 32-bit system calls")
    assert filtered(lambda: int80(20) == os.getpid())  # getpid, which is writev in 64 bits
    assert filtered(lambda: int80(21)) == -errno.EPERM  # mount, which is access in 64 bits
    assert filtered(lambda: int80(310, syscalls.CLONE_NEWUSER)) == -errno.EPERM  # unshare
    assert filtered(lambda: int80(120, syscalls.CLONE_NEWUSER)) == -errno.EPERM  # clone
    assert filtered(lambda: int80(435)) == -errno.ENOSYS  # clone3
    assert filtered(lambda: int80(359, 40)) == -errno.EPERM  # socket(AF_VSOCK)


# ---------------------------------------------------------------------- allowed


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import json, re, decimal; print(json.loads('[1]'), decimal.Decimal(1))", "[1] 1"),
        ("import ssl, hashlib; ssl.create_default_context(); print(len(hashlib.sha256(b'').digest()))", "32"),
        (
            """
            from concurrent.futures import ThreadPoolExecutor
            print(sum(ThreadPoolExecutor(4).map(int, range(100))))
            """,
            "4950",
        ),
        (
            """
            import subprocess, multiprocessing
            subprocess.run(['true'], check=True)
            print(multiprocessing.get_context('fork').Pool(2).map(abs, [-1, 2]))
            """,
            "[1, 2]",
        ),
        (
            """
            import asyncio
            async def main():
                async def answer(reader, writer):
                    writer.write(await reader.readline())
                    await writer.drain()
                    writer.close()
                server = await asyncio.start_server(answer, '127.0.0.1', 0)
                reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
                writer.write(b'hello\\n')
                print((await reader.readline()).decode().strip())
            asyncio.run(main())
            """,
            "hello",
        ),
        ("import socket; socket.socket(socket.AF_INET6); print(len(socket.socketpair()))", "2"),
        (
            """
            import os, tempfile, mmap, fcntl, shutil, time
            with tempfile.TemporaryDirectory() as d:
                p = os.path.join(d, 'f')
                with open(p, 'w+b') as f:
                    f.write(b'x' * 4096); f.flush()
                    fcntl.flock(f, fcntl.LOCK_EX); mmap.mmap(f.fileno(), 0)
                os.chmod(p, 0o600); os.utime(p); os.symlink('f', p + '2')
                shutil.copy(p, p + '3')
                os.statvfs(p)
                print(sorted(os.listdir(d)))
            os.eventfd(0); os.memfd_create('x'); os.sched_getaffinity(0)
            os.getrandom(1); time.clock_getres(1)
            """,
            "['f', 'f2', 'f3']",
        ),
        ("import sqlite3; print(sqlite3.connect(':memory:').execute('select 1').fetchone())", "(1,)"),
    ],
)  # fmt: skip
def test_programs_work(code: str, expected: str) -> None:
    assert filtered(lambda: run_python(code)) == expected


def test_a_debugger_may_trace_its_own_child() -> None:
    def work() -> int:
        child = os.fork()
        if child == 0:
            os._exit(call(number("ptrace"), 0, 0, NOTHING, NOTHING))  # PTRACE_TRACEME
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert filtered(work) == 0


@pytest.mark.parametrize("value", [0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF])
def test_personalities_of_linux_are_allowed(value: int) -> None:
    assert filtered(lambda: call(number("personality"), ctypes.c_ulong(value))) == 0


# ---------------------------------------------------------------------- the program


class OfLibseccomp:
    """The same profile made into a program by libseccomp itself: somebody else's opinion of what it means."""

    class ArgCmp(ctypes.Structure):
        """struct scmp_arg_cmp of <seccomp.h>."""

        _fields_ = [
            ("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64),
        ]  # fmt: skip

    def __init__(self, profile: Profile, kept: frozenset[int]) -> None:
        library = ctypes.CDLL("libseccomp.so.2")
        library.seccomp_init.restype = ctypes.c_void_p
        context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(profile.default)))
        companion = ARCHITECTURES[seccomp.COMPANIONS[platform.machine()]]
        assert library.seccomp_arch_add(context, ctypes.c_uint32(companion)) == 0
        assert library.seccomp_attr_set(context, 2, ctypes.c_uint32(ERRNO | errno.ENOSYS)) == 0
        for rule in profile.rules:
            if not rule.needs <= kept or rule.unless & kept or rule.action == profile.default:
                continue
            array = (self.ArgCmp * len(rule.conditions))(*[self.comparison(one) for one in rule.conditions])
            for name in rule.calls:
                found = library.seccomp_syscall_resolve_name(name.encode())
                if found != -1:
                    action = ctypes.c_uint32(rule.action)
                    assert library.seccomp_rule_add_array(context, action, found, len(array), array) == 0
        fd = os.memfd_create("labkernel-test")
        assert library.seccomp_export_bpf(context, fd) == 0
        self.program = os.pread(fd, 1 << 20, 0)
        os.close(fd)
        library.seccomp_release(context)

    @classmethod
    def comparison(cls, one: Comparison) -> OfLibseccomp.ArgCmp:
        operator = seccomp.OPERATORS.index(one.operator) + 1
        if one.operator == "MASKED_EQ":
            return cls.ArgCmp(one.argument, operator, one.mask, one.value)
        return cls.ArgCmp(one.argument, operator, one.value, 0)


INTERESTING = (0, 1, 2, 3, 8, 10, 16, 17, 18, 38, 40, 0x20000, 0x20008, 0x10000000, 0x7E020000, 0x40000011,
               0x01200011, 0x3D0F00, 0xFFFFFFFF, 1 << 32, (1 << 32) + 2, (1 << 64) - 1)  # fmt: skip


@pytest.mark.parametrize("added", ["", "SYS_ADMIN", "ALL"])
def test_the_program_answers_as_libseccomps_does(added: str) -> None:
    """Every number on both architectures, with arguments that the conditions ask for and others."""
    kept = frozenset(DOCKER_DEFAULT | parse([added] if added else []))
    profile = seccomp.default_profile()
    ours, theirs = seccomp.compiled("default", kept), OfLibseccomp(profile, kept).program
    machine = platform.machine()
    newest = max(seccomp.call_number(machine, name) for rule in profile.rules for name in rule.calls)
    conditional = {name for rule in profile.rules if rule.conditions for name in rule.calls}
    differ = []
    for architecture in (machine, seccomp.COMPANIONS[machine]):
        token = ARCHITECTURES[architecture]
        asked = {seccomp.call_number(architecture, name) for name in conditional}
        for nr in range(newest + 1):
            values = [value for value in INTERESTING if architecture == machine or value < 1 << 32]
            for value in values if nr in asked else (0,):
                answers = [seccomp.verdict(program, token, nr, (value,)) for program in (ours, theirs)]
                if answers[0] != answers[1]:
                    differ.append((architecture, nr, value, answers))
        for nr in (newest + 1, 1000, 0x3FFFFFFF, 0x40000000, 0x40000027, 0xFFFFFFFF):
            assert seccomp.verdict(ours, token, nr) == ERRNO | errno.ENOSYS
    assert not differ
    assert seccomp.verdict(ours, 0xC00000F3, 0) == ERRNO | errno.ENOSYS  # riscv64
    assert len(ours) < len(theirs)


HOLDS: dict[str, Callable[[int, int, int], bool]] = {
    "NE": lambda argument, value, mask: argument != value,
    "LT": lambda argument, value, mask: argument < value,
    "LE": lambda argument, value, mask: argument <= value,
    "EQ": lambda argument, value, mask: argument == value,
    "GE": lambda argument, value, mask: argument >= value,
    "GT": lambda argument, value, mask: argument > value,
    "MASKED_EQ": lambda argument, value, mask: argument & mask == value,
}
EDGES = [high << 32 | low for high in (0, 1, 2, 0xFFFFFFFF) for low in (0, 1, 2, 0xFFFFFFFF)]


@pytest.mark.parametrize("operator", seccomp.OPERATORS)
def test_conditions_compare_all_64_bits(operator: str) -> None:
    native = ARCHITECTURES[platform.machine()]
    nr = number("lseek")
    for value in EDGES:
        for mask in (3, 1 << 32, (1 << 64) - 1) if operator == "MASKED_EQ" else (0,):
            first = Comparison(1, operator, value, mask)
            rules = (
                Rule(("lseek",), ERRNO | 5, (first, Comparison(5, "EQ", 7))),
                Rule(("lseek",), ALLOW, (first,)),
            )
            program = seccomp.compile_profile(Profile(rules), frozenset())
            for argument in EDGES:
                expected = HOLDS[operator](argument, value, mask)
                arguments = (0, argument, 0, 0, 0, 7)
                assert seccomp.verdict(program, native, nr, arguments) == (
                    ERRNO | 5 if expected else ERRNO | 1
                )
                assert seccomp.verdict(program, native, nr, (0, argument)) == (
                    ALLOW if expected else ERRNO | 1
                )


def test_the_same_profile_makes_the_same_program_and_only_once() -> None:
    first = seccomp.compiled("default", DOCKER_DEFAULT)
    assert seccomp.compiled("default", frozenset(DOCKER_DEFAULT)) is first
    seccomp.compile_profile.cache_clear()
    assert seccomp.compile_profile(seccomp.default_profile(), DOCKER_DEFAULT) == first
    assert len(first) % 8 == 0 and len(first) // 8 <= 4096


def test_a_profile_of_ones_own_with_conditions() -> None:
    profile = Profile(
        (
            Rule(("write", "exit_group", "getppid")),
            Rule(("getpid",), ERRNO | errno.ENETDOWN),
            Rule(("lseek",), conditions=(Comparison(0, "EQ", 5), Comparison(2, "EQ", 1))),
        ),
        ERRNO | errno.EACCES,
    )  # fmt: skip
    program = seccomp.compile_profile(profile, frozenset())
    native = ARCHITECTURES[platform.machine()]
    assert seccomp.verdict(program, native, number("getppid")) == ALLOW
    assert seccomp.verdict(program, native, number("getpid")) == ERRNO | errno.ENETDOWN
    assert seccomp.verdict(program, native, number("read")) == ERRNO | errno.EACCES
    assert seccomp.verdict(program, native, number("lseek"), (5, 9, 1)) == ALLOW
    assert seccomp.verdict(program, native, number("lseek"), (5, 9, 2)) == ERRNO | errno.EACCES
    assert seccomp.verdict(program, native, number("lseek"), (5 + (1 << 32), 9, 1)) == ERRNO | errno.EACCES
    assert seccomp.verdict(program, 0xDEAD, number("getppid")) == ERRNO | errno.ENOSYS


def test_dockers_format(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(
        json.dumps(
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [
                    {"names": ["getppid", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5},
                    {"names": ["getpgrp"], "action": "SCMP_ACT_ERRNO", "includes": {"caps": ["CAP_KILL"]}},
                    {"names": ["getuid"], "action": "SCMP_ACT_ERRNO", "excludes": {"caps": ["CAP_KILL"]}},
                    {"names": ["getgid"], "action": "SCMP_ACT_ERRNO", "includes": {"minKernel": "99.1"}},
                    {"names": ["getegid"], "action": "SCMP_ACT_ERRNO", "includes": {"arches": ["s390"]}},
                    {
                        "names": ["personality"],
                        "action": "SCMP_ACT_ERRNO",
                        "args": [
                            {"index": 0, "value": 0x10, "valueTwo": 0x10, "op": "SCMP_CMP_MASKED_EQ"},
                            {"index": 0, "value": 7, "op": "SCMP_CMP_EQ"},
                        ],
                    },
                ],
            }
        )
    )
    program = seccomp.compiled(str(file), parse(["KILL"]))
    native = ARCHITECTURES[platform.machine()]
    refused = ERRNO | errno.EPERM
    assert seccomp.verdict(program, native, number("getppid")) == ERRNO | 5
    if X86_64:
        assert seccomp.verdict(program, native, number("getpgrp")) == refused
    for name in ("getuid", "getgid", "getegid", "read"):
        assert seccomp.verdict(program, native, number(name)) == ALLOW
    for value, answer in ((0x10, refused), (0x30, refused), (7, refused), (6, ALLOW)):
        assert seccomp.verdict(program, native, number("personality"), (value,)) == answer
    assert filtered(lambda: call(number("getppid")), program) == 5


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"defaultAction": "SCMP_ACT_WHATEVER"}', "not json"])
def test_what_is_no_profile_says_so(tmp_path: Path, text: str) -> None:
    file = tmp_path / "profile.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"profile\.json is not a seccomp profile"):
        seccomp.compiled(str(file), frozenset())
    with pytest.raises(FileNotFoundError):
        seccomp.compiled(str(tmp_path / "none.json"), frozenset())


def test_killing_and_its_signal() -> None:
    program = seccomp.compile_profile(Profile((Rule(("getppid",), seccomp.KILL_PROCESS),), ALLOW))
    assert filtered(os.getppid, program) == -signal.SIGSYS


def test_it_lasts_over_execve_and_is_inherited() -> None:
    assert (
        filtered(lambda: run_python("import os; print(os.system('grep -c Seccomp:.2 /proc/self/status'))"))
        == "1\n0"
    )


def test_without_no_new_privs_it_takes_a_privilege() -> None:
    program = seccomp.compiled("default", DOCKER_DEFAULT)
    pid = os.fork()
    if pid == 0:
        if os.geteuid() == 0:
            capabilities.capset((), ())
        try:
            seccomp.install(program)
        except PermissionError as error:
            os._exit(0 if "no_new_privs" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_program_that_is_none_is_refused() -> None:
    with pytest.raises(OSError, match=r"EINVAL.*refuses this filter program"):
        filtered(lambda: None, b"\xff" * 16)


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    seccomp._library.cache_clear()
    seccomp._numbers_of.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(FileNotFoundError, match="apt install libseccomp2"):
        seccomp.compile_profile(Profile((Rule(("read",)),)), frozenset({1}))


def test_the_listing_names_what_it_shows() -> None:
    profile = Profile((Rule(("getppid",)), Rule(("socket",), conditions=(Comparison(0, "EQ", 2),))))
    program = seccomp.compile_profile(profile, frozenset())
    lines = seccomp.listing(program)
    text = "\n".join(lines)
    assert len(lines) == len(program) // 8
    assert [int(line.split()[0]) for line in lines] == list(range(len(lines)))
    for part in (f"A == {platform.machine()} ", f"{number('getppid')} (getppid)", "(socket)",
                 "A = low half of argument 0", "return allow", "return EPERM", "return ENOSYS"):  # fmt: skip
        assert part in text


def test_the_listing_of_another_machine() -> None:
    """What it shows does not depend on where it is made."""
    profile = Profile((Rule(("socket",), ERRNO | errno.EPERM),), ALLOW)
    program = seccomp.compile_profile(profile, frozenset(), "aarch64")
    text = "\n".join(seccomp.listing(program))
    for part in ("A == aarch64", "A == arm", "A >= 198 (socket)", "A >= 281 (socket)"):
        assert part in text
    assert seccomp.answer(program, ARCHITECTURES["aarch64"], 198) == "EPERM"
    assert seccomp.answer(program, ARCHITECTURES["x86_64"], 41) == "allow"


NO_CALL = 1000
"""A number that is no system call's: whatever becomes of it does no harm."""


def random_program(chance: random.Random) -> bytes:
    """A program that lets everything be but NO_CALL, and answers that by an errno that says which way it took."""
    length = chance.randrange(8, 40)
    code = [(seccomp.LD_ABS, 0, 0, 0), (seccomp.JEQ, 1, 0, NO_CALL), (seccomp.RET, 0, 0, ALLOW)]
    while len(code) < length - 4:
        left = length - len(code) - 2
        number = chance.choice((0, 1, 3, NO_CALL, 0x80, 0xFFFFFFFF, chance.getrandbits(32)))
        jump = chance.choice((seccomp.JEQ, seccomp.JGT, seccomp.JGE, seccomp.JSET))
        code.append(
            chance.choice(
                (
                    (seccomp.LD_ABS, 0, 0, chance.choice((0, 4, *range(16, 64, 4)))),
                    (seccomp.AND, 0, 0, number),
                    (seccomp.JA, 0, 0, chance.randrange(0, min(left, 3))),
                    (jump, chance.randrange(0, left), chance.randrange(0, left), number),
                    (seccomp.RET, 0, 0, ERRNO | 100 + len(code)),
                )
            )
        )
    code += [(seccomp.RET, 0, 0, ERRNO | 100 + place) for place in range(len(code), length)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def test_the_machine_made_by_hand_does_what_the_kernels_does() -> None:
    """Random programs and arguments; the last line that is run tells, by its errno, which way was taken."""
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    native = ARCHITECTURES[platform.machine()]
    for count in range(60):
        program = random_program(chance)
        arguments = [chance.choice((0, 1, 0x80, (1 << 64) - 1, chance.getrandbits(64))) for _ in range(6)]
        got = filtered(lambda: call(NO_CALL, *map(ctypes.c_uint64, arguments)), program)  # noqa: B023
        assert got == 100 + seccomp.path(program, native, NO_CALL, arguments)[-1], (seed, count)


def test_a_program_with_an_unknown_operation_is_not_guessed_at() -> None:
    with pytest.raises(ValueError, match=r"line 0 has the operation 0x4, which is unknown here"):
        seccomp.path(struct.pack("=HBBI", 4, 0, 0, 1), 0, 0)


def test_every_group_of_the_default_profile_has_its_reason() -> None:
    rules = seccomp.default_profile().rules
    assert all(rule.purpose and rule.why for rule in rules)
    listed = [
        name for rule in rules if not (rule.conditions or rule.needs or rule.unless) for name in rule.calls
    ]
    assert len(listed) == len(set(listed)), "a call is listed twice"
