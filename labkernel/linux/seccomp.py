"""Seccomp: a filter on the system calls of a process and of all its descendants, for ever.

A filter is a program for the kernel's classic BPF machine, run at each system call. It sees the call's
number, the architecture and the six argument registers, and answers allow, fail with an errno, or kill. It is
made once, from a list that people can read, by libseccomp, which knows the numbers of all calls on all
architectures. Installing the finished program is a single system call.

libseccomp is used through the few functions declared below. The package pyseccomp wraps all of it, but had
its last release in 2021, and starts ldconfig or a compiler to find the library whenever it is imported.

Source: man 2 seccomp, man 3 seccomp_rule_add, https://docs.kernel.org/userspace-api/seccomp_filter.html
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import struct
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from labkernel.linux import capabilities, syscalls

DEFAULT_PROFILE = Path(__file__).with_name("seccomp_default.toml")
"""The default profile: read it, every group of calls has its reason beside it."""

# <linux/seccomp.h>; the number in an ERRNO's lower half is the errno.
KILL_THREAD = 0x00000000
TRAP = 0x00030000
ERRNO = 0x00050000
LOG = 0x7FFC0000
ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000
ACTION = 0xFFFF0000
"""The part of an answer that is the action."""

# <seccomp.h>
EQ, MASKED_EQ = 4, 7
OPERATORS = {"NE": 1, "LT": 2, "LE": 3, "EQ": EQ, "GE": 5, "GT": 6, "MASKED_EQ": MASKED_EQ}
SCMP_FLTATR_ACT_BADARCH = 2
SCMP_FLTATR_CTL_OPTIMIZE = 8
SECCOMP_SET_MODE_FILTER = 1

# <linux/audit.h>
ARCHITECTURES: Mapping[str, int] = {
    "x86_64": 0xC000003E,
    "i386": 0x40000003,
    "aarch64": 0xC00000B7,
    "arm": 0x40000028,
}
COMPANIONS = {"x86_64": "i386", "aarch64": "arm"}
"""A 64-bit kernel also takes the calls of its 32-bit sister, by other numbers: a filter has to know both."""

UNIFIED = 424
"""From this number on, a new system call has the same number on every architecture."""
PRIVATE = 0xF0000
"""Numbers from here on are special: ARM's own calls, and x32's."""


@dataclass(frozen=True)
class Comparison:
    """A condition on one argument: `argument & mask == value` for MASKED_EQ, or `argument OPERATOR value`."""

    argument: int
    operator: int
    value: int
    mask: int = 0


@dataclass(frozen=True)
class Rule:
    """What is answered to some calls, if all the conditions hold."""

    calls: tuple[str, ...]
    action: int = ALLOW
    conditions: tuple[Comparison, ...] = ()
    needs: frozenset[int] = frozenset()
    """The rule is for containers that have all these capabilities…"""
    unless: frozenset[int] = frozenset()
    """…and none of these."""
    purpose: str = ""
    why: str = ""


@dataclass(frozen=True)
class Profile:
    """Rules, and what is answered to every call that none of them speaks of."""

    rules: tuple[Rule, ...]
    default: int = ERRNO | errno.EPERM


# ---------------------------------------------------------------------- reading profiles


def load(path: str | os.PathLike[str]) -> Profile:
    """Read a profile: this package's TOML, or JSON as `docker run --security-opt seccomp=FILE` takes it.

    Raises FileNotFoundError, and ValueError for what is not a profile.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        return (
            _from_toml(tomllib.loads(text))
            if Path(path).suffix == ".toml"
            else _from_docker(json.loads(text))
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a seccomp profile: {type(error).__name__}: {error}") from None


@cache
def default_profile() -> Profile:
    """The default profile."""
    return load(DEFAULT_PROFILE)


def _from_toml(data: Mapping[str, Any]) -> Profile:
    return Profile(tuple(rule for group in data["group"] for rule in _rules_of_group(group)))


def _rules_of_group(group: Mapping[str, Any]) -> Iterator[Rule]:
    if platform.machine() not in group.get("machines", [platform.machine()]):
        return
    conditions: list[tuple[Comparison, ...]] = [()]
    if "equals" in group:  # the rules of one call are alternatives
        conditions = [(Comparison(group["argument"], EQ, value),) for value in group["equals"]]
    elif "clear" in group:
        conditions = [(Comparison(group["argument"], MASKED_EQ, 0, group["clear"]),)]
    for condition in conditions:
        yield Rule(
            calls=tuple(group["calls"].split()),
            action=ERRNO | group["errno"] if "errno" in group else ALLOW,
            conditions=condition,
            needs=capabilities.parse(group.get("needs", ())),
            unless=capabilities.parse([group["unless"]] if "unless" in group else ()),
            purpose=" ".join(group["purpose"].split()),
            why=" ".join(group["why"].split()),
        )


_ACTIONS = {"ALLOW": ALLOW, "ERRNO": ERRNO, "KILL": KILL_THREAD, "KILL_THREAD": KILL_THREAD, "LOG": LOG,
            "KILL_PROCESS": KILL_PROCESS, "TRAP": TRAP}  # fmt: skip
_GO_NAMES = {"x86_64": "amd64", "aarch64": "arm64"}


def _from_docker(data: Mapping[str, Any]) -> Profile:
    """Docker's format, https://docs.docker.com/engine/security/seccomp/. Of `archMap`, see COMPANIONS."""
    rules = []
    for entry in data.get("syscalls") or ():
        includes, excludes = entry.get("includes") or {}, entry.get("excludes") or {}
        goarch = _GO_NAMES.get(platform.machine(), platform.machine())
        if goarch not in includes.get("arches", [goarch]) or goarch in excludes.get("arches", ()):
            continue
        if _numbers(includes.get("minKernel", "0")) > _numbers(platform.release()):
            continue
        rules += [
            Rule(
                calls=tuple(entry.get("names") or [entry["name"]]),
                action=_action(entry["action"], entry.get("errnoRet")),
                conditions=conditions,
                needs=capabilities.parse(includes.get("caps", ())),
                unless=capabilities.parse(excludes.get("caps", ())),
                why=entry.get("comment", ""),
            )
            for conditions in _alternatives(entry.get("args") or ())
        ]
    return Profile(tuple(rules), _action(data["defaultAction"], data.get("defaultErrnoRet")))


def _alternatives(arguments: Any) -> list[tuple[Comparison, ...]]:
    """All conditions must hold, unless they name one argument twice: then, as in runc, any one is enough."""
    conditions = []
    for given in arguments:
        operator = OPERATORS[given["op"].removeprefix("SCMP_CMP_")]
        value, second = given["value"], given.get("valueTwo", 0)
        masked = operator == MASKED_EQ
        conditions.append(
            Comparison(given["index"], operator, second if masked else value, value if masked else 0)
        )
    if len({condition.argument for condition in conditions}) < len(conditions):
        return [(condition,) for condition in conditions]
    return [tuple(conditions)]


def _action(name: str, number: int | None) -> int:
    action = _ACTIONS[name.removeprefix("SCMP_ACT_")]
    return action | (errno.EPERM if number is None else number) if action == ERRNO else action


def _numbers(release: str) -> tuple[int, ...]:
    """(6, 1) for "6.1.0-13-amd64"."""
    return tuple(int(part) for part in release.split("-")[0].split(".")[:2])


# ---------------------------------------------------------------------- compiling


def compiled(profile: str, kept: frozenset[int]) -> bytes:
    """The program of the profile "default", or of one in a file, for a container that has `kept`."""
    return compile_profile(default_profile() if profile == "default" else load(profile), kept)


@lru_cache(maxsize=32)
def compile_profile(profile: Profile, kept: frozenset[int] = capabilities.DOCKER_DEFAULT) -> bytes:
    """Make the BPF program of a profile, ready for `install`.

    A list cannot speak of calls that were invented after it was written. Where the list refuses by an errno,
    those fail with ENOSYS: programs know that as "an older kernel", and do without. "After" means a higher
    number than that of any call in the profile that libseccomp knows.

    Raises FileNotFoundError if libseccomp is not installed, and OSError if it refuses a rule.
    """
    library = _library()
    machine = platform.machine()
    context = _checked(library.seccomp_init(profile.default), "seccomp_init", f"{profile.default:#x}")
    try:
        if machine in COMPANIONS:
            token = ARCHITECTURES[COMPANIONS[machine]]
            _checked(library.seccomp_arch_add(context, token), "seccomp_arch_add", COMPANIONS[machine])
        result = library.seccomp_attr_set(context, SCMP_FLTATR_ACT_BADARCH, ERRNO | errno.ENOSYS)
        _checked(result, "seccomp_attr_set", "SCMP_FLTATR_ACT_BADARCH")
        # A binary tree instead of a line. libseccomp before 2.5 has none, and decides the same.
        library.seccomp_attr_set(context, SCMP_FLTATR_CTL_OPTIMIZE, 2)
        newest = UNIFIED - 1
        for rule in profile.rules:
            applies = rule.needs <= kept and not rule.unless & kept and rule.action != profile.default
            for call in rule.calls:
                number = library.seccomp_syscall_resolve_name(call.encode())
                newest = max(newest, number)
                if applies and number != -1:  # -1: not known to this libseccomp
                    _add(context, rule, call, number)
        program = _exported(context)
    finally:
        library.seccomp_release(context)
    return (_newer_than(newest) if profile.default & ACTION == ERRNO else b"") + program


class _ArgCmp(ctypes.Structure):
    """struct scmp_arg_cmp of <seccomp.h>."""

    _fields_ = [
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    ]


def _add(context: int, rule: Rule, call: str, number: int) -> None:
    array = (_ArgCmp * len(rule.conditions))(
        *(
            _ArgCmp(c.argument, c.operator, c.mask, c.value)
            if c.operator == MASKED_EQ
            else _ArgCmp(c.argument, c.operator, c.value, 0)
            for c in rule.conditions
        )
    )
    result = _library().seccomp_rule_add_array(context, rule.action, number, len(array), array)
    _checked(result, "seccomp_rule_add", call)


def _exported(context: int) -> bytes:
    fd = os.memfd_create("labkernel-seccomp")
    try:
        _checked(_library().seccomp_export_bpf(context, fd), "seccomp_export_bpf", "")
        return os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)


def _newer_than(newest: int) -> bytes:
    """Four instructions to put first: ENOSYS for the calls after `newest`. See UNIFIED and PRIVATE."""
    return b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (LD_ABS, 0, 0, 0),  # the number of the call
            (JGT, 0, 2, newest),
            (JGE, 1, 0, PRIVATE),
            (RET, 0, 0, ERRNO | errno.ENOSYS),
        )
    )


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        raise FileNotFoundError(
            errno.ENOENT,
            "libseccomp.so.2 is not on this machine, and the filter of system calls is made with it: "
            "install it (Debian and Ubuntu: apt install libseccomp2), or do without (seccomp=unconfined)",
        ) from None
    context, word = ctypes.c_void_p, ctypes.c_uint32
    library.seccomp_init.argtypes, library.seccomp_init.restype = (word,), context
    library.seccomp_release.argtypes, library.seccomp_release.restype = (context,), None
    library.seccomp_arch_add.argtypes = (context, word)
    library.seccomp_attr_set.argtypes = (context, ctypes.c_int, word)
    library.seccomp_syscall_resolve_name.argtypes = (ctypes.c_char_p,)
    library.seccomp_syscall_resolve_num_arch.argtypes = (word, ctypes.c_int)
    library.seccomp_syscall_resolve_num_arch.restype = ctypes.c_void_p  # ours to free
    library.seccomp_rule_add_array.argtypes = (
        context,
        word,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(_ArgCmp),
    )
    library.seccomp_export_bpf.argtypes = (context, ctypes.c_int)
    return library


def _checked(result: int | None, call: str, arguments: str) -> int:
    """libseccomp answers with a negative errno, or with no context at all."""
    if result is None or result < 0:
        raise syscalls.explained(-result if result else errno.EINVAL, call, arguments)
    return result


# ---------------------------------------------------------------------- installing


class _SockFprog(ctypes.Structure):
    """struct sock_fprog of <linux/filter.h>: how many instructions, and where."""

    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def install(program: bytes) -> None:
    """Put the calling process under the filter; there is no way back, and execve does not end it.

    Needs no_new_privs or CAP_SYS_ADMIN: else a filter could make a setuid program misbehave. Raises OSError
    EACCES without, EINVAL for a program that the kernel does not take. man 2 seccomp.
    """
    given = ctypes.byref(_SockFprog(len(program) // 8, program))
    result = syscalls.libc.syscall(syscalls.SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, given)
    syscalls.check(result, "seccomp", "SECCOMP_SET_MODE_FILTER")


# ---------------------------------------------------------------------- reading programs

# <linux/bpf_common.h>: the instructions that occur in filters.
LD_ABS, JA, JEQ, JGT, JGE, JSET, AND, RET = 0x20, 0x05, 0x15, 0x25, 0x35, 0x45, 0x54, 0x06

_TESTS = {JEQ: "==", JGT: ">", JGE: ">=", JSET: "&"}
_ANSWERS = {
    KILL_THREAD: "kill the thread",
    KILL_PROCESS: "kill the process",
    TRAP: "SIGSYS",
    LOG: "allow, and log",
    ALLOW: "allow",
}


def listing(program: bytes) -> list[str]:
    """The program, one instruction a line, with names for numbers where they are clear.

    A is the machine's one register. Jumps only go forward, so one pass sees where each line is reached from,
    and with that what A holds there and which architecture it is about.
    """
    instructions = list(struct.iter_unpack("=HBBI", program))
    reached: dict[int, set[tuple[str, int]]] = {0: {("", 0)}}  # line: what A may hold, and the architecture
    lines = []
    for place, (code, if_true, if_false, k) in enumerate(instructions):
        states = reached.get(place, {("", 0)})
        field, architecture = states.pop() if len(states) == 1 else ("", 0)
        true, false = place + 1 + if_true, place + 1 + if_false
        after = (field, architecture)
        if code == LD_ABS:
            after = (_field(k), architecture)
            text = f"A = {after[0]}"
        elif code == AND:
            after = ("", architecture)
            text = f"A &= {k:#x}"
        elif code == JA:
            true = false = place + 1 + k
            text = f"goto {true}"
        elif code == RET:
            text = f"return {_answer(k)}"
        elif code in _TESTS:
            text = f"if A {_TESTS[code]} {_constant(field, architecture, k)} then {true} else {false}"
        else:
            text = f"code {code:#x} {if_true} {if_false} {k:#x}"
        if code != RET:
            matched = (field, k) if code == JEQ and field == "arch" else after
            reached.setdefault(true if code in _TESTS or code == JA else place + 1, set()).add(matched)
            if code in _TESTS:
                reached.setdefault(false, set()).add(after)
        lines.append(f"{place:4}  {text}")
    return lines


def _field(offset: int) -> str:
    """What lies at an offset of struct seccomp_data."""
    if offset < 16:
        return {0: "number", 4: "arch", 8: "low half of instruction pointer", 12: "high half of it"}[offset]
    return f"{'high' if offset % 8 else 'low'} half of argument {(offset - 16) // 8}"


def _constant(field: str, architecture: int, k: int) -> str:
    if field == "arch":
        return next((name for name, token in ARCHITECTURES.items() if token == k), f"{k:#x}")
    if field == "number" and architecture and (name := call_name(architecture, k)):
        return f"{k} ({name})"
    return f"{k:#x}" if k > 0xFFFF else str(k)


def _answer(k: int) -> str:
    if k & ACTION == ERRNO:
        return errno.errorcode.get(k & 0xFFFF, str(k & 0xFFFF))
    return _ANSWERS.get(k & ACTION, f"{k:#x}")


def call_name(architecture: int, number: int) -> str | None:
    """The name of a system call's number on one of ARCHITECTURES, or None if libseccomp knows none."""
    address = _library().seccomp_syscall_resolve_num_arch(architecture, number)
    if not address:
        return None
    try:
        return ctypes.string_at(address).decode()
    finally:
        syscalls.libc.free(ctypes.c_void_p(address))
