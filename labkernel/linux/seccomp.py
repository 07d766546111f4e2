"""Seccomp: a filter on the system calls of a process and of all its descendants, for ever.

A filter is a program for the kernel's classic BPF machine, run at each system call. It sees the call's
number, the architecture and the six argument registers, and answers allow, fail with an errno, or kill. It is
made once, from a list that people can read; installing it is a single system call.

libseccomp knows the numbers of all calls on all architectures. The program is put together here: a tree over
ranges of numbers, half as long as libseccomp's own over single ones, so that the kernel needs a third of the
time to check and translate it, at each container's start. The tests compare the answers of the two programs.

Source: man 2 seccomp, https://docs.kernel.org/userspace-api/seccomp_filter.html
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from operator import and_, eq, ge, gt
from pathlib import Path
from typing import Any, NamedTuple

from labkernel.linux import capabilities, syscalls
from labkernel.linux.syscalls import MACHINE

DEFAULT_PROFILE = Path(__file__).with_name("seccomp_default.toml")
"""The default profile: read it, every group of calls has its reason beside it."""

# <linux/seccomp.h>; the number in an ERRNO's lower half is the errno.
KILL_THREAD = 0x00000000
TRAP = 0x00030000
ERRNO = 0x00050000
USER_NOTIF = 0x7FC00000
LOG = 0x7FFC0000
ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000
ACTION = 0xFFFF0000
"""The part of an answer that is the action."""

OPERATORS = ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ")
SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_NEW_LISTENER = 1 << 3

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
CALL_NUMBERS = (range(1024), range(0xF0000, 0xF0010))
"""Where there are numbers; the second range is ARM's own."""


class Comparison(NamedTuple):
    """A condition on one argument: `argument & mask == value` for MASKED_EQ, or `argument OPERATOR value`."""

    argument: int
    operator: str
    value: int
    mask: int = 0


class Rule(NamedTuple):
    """What is answered to some calls, if all the conditions hold. A call's first rule that fits counts."""

    calls: tuple[str, ...]
    action: int = ALLOW
    conditions: tuple[Comparison, ...] = ()
    needs: frozenset[int] = frozenset()
    """The rule is for containers that have all these capabilities…"""
    unless: frozenset[int] = frozenset()
    """…and none of these."""
    purpose: str = ""
    why: str = ""


class Profile(NamedTuple):
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
        return _from_toml(text) if Path(path).suffix == ".toml" else _from_docker(json.loads(text))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a seccomp profile: {type(error).__name__}: {error}") from None


@cache
def default_profile() -> Profile:
    """The default profile."""
    return load(DEFAULT_PROFILE)


def named(profile: str) -> Profile | None:
    """The profile that `--security-opt seccomp=…` names: "default", a file, or "unconfined", which is none."""
    if profile == "unconfined":
        return None
    return default_profile() if profile == "default" else load(profile)


def _from_toml(text: str) -> Profile:
    import tomllib  # the launcher, whose memory every container copies, only installs programs

    data = tomllib.loads(text)
    return Profile(tuple(rule for group in data["group"] for rule in _rules_of_group(group)))


def _rules_of_group(group: Mapping[str, Any]) -> Iterator[Rule]:
    if MACHINE not in group.get("machines", [MACHINE]):
        return
    conditions: list[tuple[Comparison, ...]] = [()]
    if "equals" in group:  # the rules of one call are alternatives
        conditions = [(Comparison(group["argument"], "EQ", value),) for value in group["equals"]]
    elif "clear" in group:
        conditions = [(Comparison(group["argument"], "MASKED_EQ", 0, group["clear"]),)]
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
        goarch = _GO_NAMES.get(MACHINE, MACHINE)
        if goarch not in includes.get("arches", [goarch]) or goarch in excludes.get("arches", ()):
            continue
        if _numbers(includes.get("minKernel", "0")) > _numbers(os.uname().release):
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
        operator = given["op"].removeprefix("SCMP_CMP_")
        if operator not in OPERATORS:
            raise ValueError(f"{given['op']} is no comparison")
        value, second = given["value"], given.get("valueTwo", 0)
        masked = operator == "MASKED_EQ"
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


# ---------------------------------------------------------------------- making programs


def compiled(profile: str, kept: frozenset[int]) -> bytes:
    """The program of the profile "default", or of one in a file, for a container that has `kept`."""
    return _compiled_default(kept) if profile == "default" else compile_profile(load(profile), kept)


@cache
def _compiled_default(kept: frozenset[int]) -> bytes:
    """Without a look at each of its rules, which is what comparing two profiles takes, at each container's start."""
    return compile_profile(default_profile(), kept)


# An instruction: the operation, how many instructions to skip if its test holds, and if not, and a constant.
Instruction = tuple[int, int, int, int]
Code = tuple[Instruction, ...]

# <linux/bpf_common.h>: the operations that occur in filters. A is the machine's one register.
LD_ABS, AND, JA, JEQ, JGT, JGE, JSET, RET = 0x20, 0x54, 0x05, 0x15, 0x25, 0x35, 0x45, 0x06

# Offsets in struct seccomp_data of <linux/seccomp.h>; an argument is 64 bits wide, the low half first.
NUMBER, ARCH, ARGUMENTS = 0, 4, 16


@lru_cache(maxsize=32)
def compile_profile(
    profile: Profile, kept: frozenset[int] = capabilities.DOCKER_DEFAULT, machine: str = MACHINE
) -> bytes:
    """Make the BPF program of a profile, ready for `install` on machines of that kind.

    A list cannot speak of calls that were invented after it was written. Where the list refuses by an errno,
    those fail with ENOSYS: programs know that as "an older kernel", and do without. "After" means a higher
    number than that of any call in the profile that libseccomp knows. So do calls of other architectures.

    Raises FileNotFoundError if libseccomp is not installed, and OSError on a machine that is not supported.
    """
    if machine not in COMPANIONS:
        raise OSError(errno.ENOTSUP, f"the filter knows {' and '.join(COMPANIONS)}, not {machine}")
    rules = [rule for rule in profile.rules if rule.needs <= kept and not rule.unless & kept]
    names = {call for rule in profile.rules for call in rule.calls}
    newest = max([UNIFIED - 1, *(call_number(machine, name) for name in names)])
    unknown: Code = (
        (RET, 0, 0, ERRNO | errno.ENOSYS if profile.default & ACTION == ERRNO else profile.default),
    )
    program: Code = ((LD_ABS, 0, 0, ARCH),)
    for name in (machine, COMPANIONS[machine]):
        answers = _tree(_ranges(_answers(rules, name, profile.default), profile.default, newest, unknown))
        block = ((LD_ABS, 0, 0, NUMBER), *answers)
        program += ((JEQ, 1, 0, ARCHITECTURES[name]), (JA, 0, 0, len(block)), *block)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program + unknown)


def _answers(rules: Iterable[Rule], machine: str, default: int) -> dict[int, Code]:
    """For each call's number on a machine, the code that answers it. An unconditional rule comes first."""
    by_number: dict[int, list[Rule]] = {}
    for rule in rules:
        for call in rule.calls:
            if (number := call_number(machine, call)) >= 0:
                by_number.setdefault(number, []).append(rule)
    codes = {}
    for number, its in by_number.items():
        its.sort(key=lambda rule: bool(rule.conditions))  # a stable sort
        code: Code = ()
        for rule in its:
            code += _rule(rule)
            if not rule.conditions:
                break
        else:
            code += ((RET, 0, 0, default),)
        codes[number] = code
    return codes


def _ranges(codes: Mapping[int, Code], default: int, newest: int, unknown: Code) -> list[tuple[int, Code]]:
    """The first number of each range that is answered alike, in order."""
    ranges: list[tuple[int, Code]] = []
    for start in sorted({0, newest + 1} | codes.keys() | {number + 1 for number in codes}):
        code = codes.get(start, ((RET, 0, 0, default),) if start <= newest else unknown)
        if not ranges or ranges[-1][1] != code:
            ranges.append((start, code))
    return ranges


def _tree(ranges: Sequence[tuple[int, Code]]) -> Code:
    """Find the range of the number in A by halving, then answer."""
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    below, above = _tree(ranges[:middle]), _tree(ranges[middle:])
    if len(below) < 256:  # as far as a test can jump
        return ((JGE, len(below), 0, ranges[middle][0]), *below, *above)
    return ((JGE, 0, 1, ranges[middle][0]), (JA, 0, 0, len(below)), *below, *above)


def _rule(rule: Rule) -> Code:
    """Answer if all conditions hold; else go on after this code."""
    code: Code = ((RET, 0, 0, rule.action),)
    for condition in reversed(rule.conditions):
        code = _condition(condition, len(code)) + code
    return code


def _condition(condition: Comparison, rest: int) -> Code:
    """Go on if the condition holds, else skip `rest` more: 64 bits compared in halves, the high one first."""
    high, low = (
        ((LD_ABS, 0, 0, ARGUMENTS + 8 * condition.argument + offset), condition.value >> shift & 0xFFFFFFFF)
        for offset, shift in ((4, 32), (0, 0))
    )
    yes, no = 0, rest
    if condition.operator in ("NE", "LT", "LE"):  # the opposite of EQ, GE, GT
        yes, no = no, yes
    if condition.operator == "MASKED_EQ":
        mask_high, mask_low = condition.mask >> 32, condition.mask & 0xFFFFFFFF
        masked = (low[0], (AND, 0, 0, mask_low), (JEQ, yes, no, low[1]))
        if not mask_high and not high[1]:
            return masked
        return (high[0], (AND, 0, 0, mask_high), (JEQ, 0, no + 3, high[1]), *masked)
    if condition.operator in ("EQ", "NE"):
        return (high[0], (JEQ, 0, no + 2, high[1]), low[0], (JEQ, yes, no, low[1]))
    last = JGE if condition.operator in ("GE", "LT") else JGT
    return (
        high[0], (JGT, yes + 3, 0, high[1]), (JEQ, 0, no + 2, high[1]), low[0], (last, yes, no, low[1])
    )  # fmt: skip


# ---------------------------------------------------------------------- names and numbers


def call_number(machine: str, name: str) -> int:
    """The number of a system call on one of ARCHITECTURES; -1 if it has none there, or is not known."""
    return _numbers_of(machine).get(name, -1)


def call_name(machine: str, number: int) -> str | None:
    """The name of a system call's number on one of ARCHITECTURES, or None if libseccomp knows none."""
    address = _library().seccomp_syscall_resolve_num_arch(ARCHITECTURES[machine], number)
    if not address:
        return None
    try:
        return ctypes.string_at(address).decode()
    finally:
        syscalls.libc.free(ctypes.c_void_p(address))


@cache
def _numbers_of(machine: str) -> Mapping[str, int]:
    """All numbers by name. (By name, libseccomp hides i386's numbers of what socketcall does too.)"""
    numbers = (number for some in CALL_NUMBERS for number in some)
    return {name: number for number in numbers if (name := call_name(machine, number))}


@cache
def _library() -> ctypes.CDLL:
    """libseccomp, for one question. The package pyseccomp wraps all of it, but runs a compiler to find it."""
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        raise FileNotFoundError(
            errno.ENOENT,
            "libseccomp.so.2 is not on this machine, and the filter of system calls is made with it: "
            "install it (Debian and Ubuntu: apt install libseccomp2), or do without (seccomp=unconfined)",
        ) from None
    library.seccomp_syscall_resolve_num_arch.argtypes = (ctypes.c_uint32, ctypes.c_int)
    library.seccomp_syscall_resolve_num_arch.restype = ctypes.c_void_p  # ours to free
    return library


# ---------------------------------------------------------------------- installing


class _SockFprog(ctypes.Structure):
    """struct sock_fprog of <linux/filter.h>: how many instructions, and where."""

    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def install(program: bytes, *, listener: bool = False) -> int:
    """Put the calling process under the filter; there is no way back, and execve does not end it.

    With `listener`, returns a descriptor at which somebody else is asked about the calls that the filter answers by
    USER_NOTIF (see seccomp_notify.py); else 0. Needs no_new_privs or CAP_SYS_ADMIN: else a filter could make a setuid
    program misbehave. Raises OSError EACCES without, EINVAL for a program that the kernel does not take.
    man 2 seccomp.
    """
    given = ctypes.byref(_SockFprog(len(program) // 8, program))
    flags = SECCOMP_FILTER_FLAG_NEW_LISTENER if listener else 0
    result = syscalls.libc.syscall(syscalls.SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, given)
    return syscalls.check(result, "seccomp", "SECCOMP_SET_MODE_FILTER")


# ---------------------------------------------------------------------- reading programs

_TESTS = {JEQ: "==", JGT: ">", JGE: ">=", JSET: "&"}
_HOLDS: Mapping[int, Callable[[int, int], object]] = {
    JEQ: eq,
    JGT: gt,
    JGE: ge,
    JSET: and_,
}
_ANSWERS = {
    KILL_THREAD: "kill the thread",
    KILL_PROCESS: "kill the process",
    TRAP: "SIGSYS",
    USER_NOTIF: "ask",
    LOG: "allow, and log",
    ALLOW: "allow",
}


def listing(program: bytes) -> list[str]:
    """The program, one instruction a line, with names for numbers where they are clear.

    Jumps only go forward, so one pass sees where each line is reached from,
    and with that what A holds there and which architecture it is about.
    """
    reached: dict[int, set[tuple[str, str]]] = {0: {("", "")}}  # line: what A may hold, and on which machine
    lines = []
    for place, (code, if_true, if_false, k) in enumerate(struct.iter_unpack("=HBBI", program)):
        states = reached.get(place, set())
        field, machine = states.pop() if len(states) == 1 else ("", "")
        true, false = place + 1 + if_true, place + 1 + if_false
        then = (field, machine)
        if code == LD_ABS:
            then = (_field(k), machine)
            text = f"A = {then[0]}"
        elif code == AND:
            text = f"A &= {k:#x}"
        elif code == JA:
            true = false = place + 1 + k
            text = f"goto {true}"
        elif code == RET:
            text = f"return {_answer(k)}"
        elif code in _TESTS:
            text = f"if A {_TESTS[code]} {_constant(field, machine, k)} then {true} else {false}"
        else:
            text = f"operation {code:#x} {if_true} {if_false} {k:#x}"
        if code != RET:
            matched = (field, _MACHINES.get(k, "")) if field == "architecture" and code == JEQ else then
            reached.setdefault(true, set()).add(matched)
            reached.setdefault(false, set()).add(then)
        lines.append(f"{place:4}  {text}")
    return lines


def path(program: bytes, architecture: int, number: int, arguments: Sequence[int] = ()) -> list[int]:
    """The lines of a program that are run for a call, the last of which answers: the kernel's machine, made by hand.

    The architecture is one of the values of ARCHITECTURES, or any other number. Raises ValueError for an operation
    that is in none of our programs.
    """
    data = struct.pack("=IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    code = list(struct.iter_unpack("=HBBI", program))
    lines, accumulator = [0], 0
    while True:
        kind, if_true, if_false, k = code[lines[-1]]
        skip = 0
        if kind == LD_ABS:
            (accumulator,) = struct.unpack_from("=I", data, k)
        elif kind == AND:
            accumulator &= k
        elif kind == JA:
            skip = k
        elif kind in _HOLDS:
            skip = if_true if _HOLDS[kind](accumulator, k) else if_false
        elif kind == RET:
            return lines
        else:
            raise ValueError(f"line {lines[-1]} has the operation {kind:#x}, which is unknown here")
        lines.append(lines[-1] + 1 + skip)


def verdict(program: bytes, architecture: int, number: int, arguments: Sequence[int] = ()) -> int:
    """What a program answers to a call: one of the actions, with its number in the lower half."""
    last = path(program, architecture, number, arguments)[-1]
    answer: int = struct.unpack_from("=I", program, 8 * last + 4)[0]
    return answer


def answer(program: bytes, architecture: int, number: int, arguments: Sequence[int] = ()) -> str:
    """What a program answers to a call, in words: "allow", "EPERM", "kill the process"."""
    return _answer(verdict(program, architecture, number, arguments))


_MACHINES = {token: name for name, token in ARCHITECTURES.items()}


def _field(offset: int) -> str:
    """What lies at an offset of struct seccomp_data."""
    if offset < ARGUMENTS:
        return {NUMBER: "number", ARCH: "architecture"}.get(offset, "half of the instruction pointer")
    return f"{'high' if offset % 8 else 'low'} half of argument {(offset - ARGUMENTS) // 8}"


def _constant(field: str, machine: str, k: int) -> str:
    if field == "architecture":
        return _MACHINES.get(k, f"{k:#x}")
    if field == "number" and machine and (name := call_name(machine, k)):
        return f"{k} ({name})"
    return f"{k:#x}" if k > 0xFFFF else str(k)


def _answer(k: int) -> str:
    if k & ACTION == ERRNO:
        return errno.errorcode.get(k & 0xFFFF, str(k & 0xFFFF))
    return _ANSWERS.get(k & ACTION, f"{k:#x}")
