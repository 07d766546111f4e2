"""Docker's default seccomp profile beside ours: what one allows and the other does not, and why.

Docker's list itself is not kept here, only the differences (seccomp_docker.toml), and a fingerprint of the list. Ours
and the differences together must have the same one: so nothing is missing in the table, and nothing is made up.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from labkernel.linux import capabilities
from labkernel.linux.seccomp import ACTION, ALLOW, ERRNO, Comparison, Profile, Rule

FACTS = Path(__file__).with_name("seccomp_docker.toml")


@dataclass(frozen=True)
class Difference:
    """One thing on which the two profiles do not agree."""

    what: str
    theirs: str
    ours: str
    why: str
    entries: frozenset[str]
    """The lines (see `entries`) that are in Docker's profile only; none is in ours only."""
    values: tuple[str, ...] = ()
    """Names of the argument's values that it is about."""


@dataclass(frozen=True)
class Facts:
    """What is known of Docker's profile, and where from."""

    source: str
    version: str
    fingerprints: dict[str, str]
    """By machine: what a profile says depends on it."""
    differences: tuple[Difference, ...]


@cache
def facts() -> Facts:
    """The differences between Docker's default profile and ours."""
    data = tomllib.loads(FACTS.read_text(encoding="utf-8"))
    differences = tuple(_difference(entry) for entry in data["difference"])
    return Facts(data["source"], data["version"], data["fingerprints"], differences)


def _difference(data: dict[str, Any]) -> Difference:
    values: dict[str, int] = data.get("values", {})
    conditions: list[tuple[Comparison, ...]] = [
        (Comparison(data["argument"], "EQ", value),) for value in values.values()
    ]
    calls = tuple(data.get("calls", "").split())
    rules = tuple(Rule(calls, conditions=condition) for condition in conditions or [()])
    why = " ".join(data["why"].split())
    return Difference(data["what"], data["theirs"], data["ours"], why, entries(Profile(rules)), tuple(values))


def entries(profile: Profile) -> frozenset[str]:
    """What a profile says, as a set of lines: "read", "socket if argument 0 == 2", "mount with CAP_SYS_ADMIN"."""
    always = {call for rule in profile.rules for call in rule.calls if _unconditional(rule)}
    return frozenset(
        f"{call}{words}"
        for rule in profile.rules
        for words in _words(rule)
        for call in rule.calls
        if call not in always or _unconditional(rule)
    )


def fingerprint(lines: frozenset[str]) -> str:
    """The SHA-256 digest of a set of lines, in order."""
    return hashlib.sha256("".join(f"{line}\n" for line in sorted(lines)).encode()).hexdigest()


def _unconditional(rule: Rule) -> bool:
    return rule.action == ALLOW and not (rule.conditions or rule.needs or rule.unless)


def _words(rule: Rule) -> Iterator[str]:
    """What a rule says of each of its calls; "less than" in as many lines as there are values."""
    answer = "" if rule.action == ALLOW else f" fails with {rule.action & ~ACTION}"
    assert rule.action & ACTION in (ALLOW & ACTION, ERRNO), "a profile that allows, or refuses by an errno"
    needs = "".join(f" with {name}" for name in sorted(capabilities.names(rule.needs)))
    unless = "".join(f" without {name}" for name in sorted(capabilities.names(rule.unless)))
    if len(rule.conditions) == 1 and rule.conditions[0].operator == "LT":
        (one,) = rule.conditions
        conditions = [f" if argument {one.argument} == {value}" for value in range(one.value)]
    else:
        conditions = ["".join(map(_condition, rule.conditions))]
    for condition in conditions:
        yield condition + needs + unless + answer


def _condition(one: Comparison) -> str:
    if one.operator == "MASKED_EQ":
        return f" if argument {one.argument} & {one.mask:#x} == {one.value}"
    operator = {"EQ": "==", "NE": "!=", "LT": "<", "LE": "<=", "GE": ">=", "GT": ">"}[one.operator]
    return f" if argument {one.argument} {operator} {one.value}"
