"""The table of what Docker's default profile and ours do not have in common: complete, and not a word too much."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkernel.linux import capabilities, seccomp, seccomp_docker
from labkernel.linux.seccomp_docker import Difference, entries, facts, fingerprint


@pytest.fixture(params=["x86_64", "aarch64"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both machines, whichever this is: what a profile says there."""
    monkeypatch.setattr(seccomp, "MACHINE", request.param)
    seccomp.default_profile.cache_clear()
    yield request.param
    seccomp.default_profile.cache_clear()


def with_differences(*differences: Difference) -> frozenset[str]:
    return entries(seccomp.default_profile()).union(*(one.entries for one in differences))


def test_ours_and_the_differences_are_dockers_list(machine: str) -> None:
    assert fingerprint(with_differences(*facts().differences)) == facts().fingerprints[machine]


def test_each_difference_is_needed(machine: str) -> None:
    """Nothing that is in ours already, and nothing left out."""
    ours = entries(seccomp.default_profile())
    for one in facts().differences:
        assert not one.entries & ours
        for line in one.entries:
            changed = dataclasses.replace(one, entries=one.entries - {line})
            rest = [other for other in facts().differences if other is not one]
            assert fingerprint(with_differences(changed, *rest)) != facts().fingerprints[machine]


def test_every_difference_has_its_reason_and_the_facts_their_source() -> None:
    for one in facts().differences:
        assert one.what and one.theirs and one.ours and one.why
    assert facts().source.startswith("https://github.com/moby/profiles/blob/")
    assert facts().source.split("/")[6][:7] in facts().version


def test_what_our_own_file_says_of_differences_is_in_the_table() -> None:
    text = " ".join(f"{one.what} {one.why}" for one in facts().differences)
    for word in ("families", "x32", "RISC-V"):
        assert word in text


def test_what_the_table_says_of_ours_is_so() -> None:
    """The differences in what is answered, which are no lines of a profile."""
    program = seccomp.compiled("default", capabilities.DOCKER_DEFAULT)
    native = seccomp.ARCHITECTURES[platform.machine()]
    (families,) = (one for one in facts().differences if one.values)
    for value in (line.rpartition(" ")[2] for line in families.entries):
        socket = seccomp.call_number(platform.machine(), "socket")
        assert seccomp.answer(program, native, socket, (int(value),)) == "EPERM"
    assert seccomp.answer(program, native, 0x40000000 | 1) == "ENOSYS"
    assert seccomp.answer(program, native, 1000) == "ENOSYS"
    assert seccomp.answer(program, 0xC00000F3, 1) == "ENOSYS"
    assert seccomp.call_number(platform.machine(), "riscv_hwprobe") == -1


def test_entries_of_dockers_format(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    errno_ret = {"action": "SCMP_ACT_ERRNO", "errnoRet": 38}
    below = {"index": 0, "value": 3, "op": "SCMP_CMP_LT"}
    masked = {"index": 1, "value": 6, "op": "SCMP_CMP_MASKED_EQ"}
    file.write_text(
        json.dumps(
            {
                "defaultAction": "SCMP_ACT_ERRNO",
                "syscalls": [
                    {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"},
                    {"names": ["read"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_KILL"]}},
                    {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
                    {"names": ["clone3"], **errno_ret, "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
                    {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [below]},
                    {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [masked]},
                ],
            }
        )
    )
    assert entries(seccomp.load(file)) == {
        "read",
        "write",
        "mount with CAP_SYS_ADMIN",
        "clone3 without CAP_SYS_ADMIN fails with 38",
        *(f"socket if argument 0 == {value}" for value in range(3)),
        "clone if argument 1 & 0x6 == 0",
    }


def test_a_fingerprint_is_of_the_lines_in_order() -> None:
    assert fingerprint(frozenset(("b", "a"))) == fingerprint(frozenset(("a", "b")))
    assert fingerprint(frozenset(("a",))) != fingerprint(frozenset(("a", "b")))
    assert seccomp_docker.FACTS.is_file()
