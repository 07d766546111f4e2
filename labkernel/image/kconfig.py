"""Kconfig, as far as one has to know it to read a defconfig: what a symbol needs, and what it brings with it.

The Linux kernel, busybox and Buildroot are configured in the same language. A *symbol* is an option. A *defconfig*
names the symbols that are not as they are by default; from it and the rules comes the full `.config`. This is enough
of the rules for notebook 21: yes or no and texts, dependencies, selections, defaults, choices. What Buildroot says of
the symbols stands in a TOML file (rootfs-recipes/buildroot-python/symbols.toml), and not in Kconfig's language.
Source: https://www.kernel.org/doc/html/latest/kbuild/kconfig-language.html
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Config = dict[str, str]
"""Values by symbol, as they stand in a .config: y, n, or a text in quotes."""


@dataclass(frozen=True)
class Symbol:
    """What is known of one symbol."""

    name: str
    file: str
    prompt: str = ""  # "": hidden; nobody can set it but other symbols
    kind: str = "bool"  # or "string"
    depends: str = ""
    selects: tuple[str, ...] = ()
    default: tuple[
        str, ...
    ] = ()  # each may have a condition, as in "y if BR2_A"; the first that holds counts
    choice: str = ""  # the name of the choice of which it is one


@dataclass(frozen=True)
class Rules:
    """What is known of all symbols, in the order of the files."""

    symbols: dict[str, Symbol]
    choices: dict[str, tuple[str, ...]]  # which one is taken when nobody asks, as in Symbol.default
    needs: dict[str, str]  # what a choice depends on


def read_rules(path: Path) -> Rules:
    """Read a symbols.toml."""
    given: dict[str, Any] = tomllib.loads(path.read_text())
    lists = ("selects", "default")
    symbols: dict[str, Symbol] = {}
    for name, facts in given["symbols"].items():
        read: dict[str, Any] = {key: tuple(v) if key in lists else v for key, v in facts.items()}
        symbols[name] = Symbol(name, **read)
    choices = {name: tuple(facts["defaults"]) for name, facts in given["choices"].items()}
    return Rules(symbols, choices, {name: one.get("depends", "") for name, one in given["choices"].items()})


def read_config(text: str) -> Config:
    """The values in a defconfig or a .config. Raises ValueError for a line that is neither that nor a comment."""
    found: Config = {}
    for line in text.splitlines():
        if unset := re.fullmatch(r"# (\w+) is not set", line):
            found[unset[1]] = "n"
        elif line.strip() and not line.startswith("#"):
            name, equals, value = line.partition("=")
            if not equals or not re.fullmatch(r"\w+", name):
                raise ValueError(f"no line of a defconfig: {line!r}")
            if not re.fullmatch(r'[yn]|"[^"]*"|-?\d+|0x[\da-fA-F]+', value):
                raise ValueError(
                    f"the value of {name} is neither y nor n, a number, or a text in quotes: {value!r}"
                )
            found[name] = value
    return found


def write_config(config: Mapping[str, str]) -> str:
    """A defconfig or .config of these values."""
    lines = (f"# {name} is not set" if value == "n" else f"{name}={value}" for name, value in config.items())
    return "".join(f"{line}\n" for line in lines)


def lost(wanted: Mapping[str, str], config: Mapping[str, str]) -> list[str]:
    """The lines of a defconfig that did not get into the .config made from it."""
    different = {name: v for name, v in wanted.items() if config.get(name, "n") != v}
    return write_config(different).splitlines()


def holds(expression: str, config: Mapping[str, str]) -> bool:
    """Whether an expression such as "BR2_A && !(BR2_B || BR2_C)" is true; an empty one is."""
    words = re.sub(r"[A-Z]\w+", lambda name: str(config.get(name[0]) == "y"), expression)
    for sign, word in (("&&", " and "), ("||", " or "), ("!", " not ")):
        words = words.replace(sign, word)
    if not re.fullmatch(r"(?:True|False|and|or|not|[() ])*", words):
        raise ValueError(f"no expression of Kconfig: {expression!r}")
    return not words.strip() or bool(eval(words.strip()))


def settle(rules: Rules, wanted: Mapping[str, str]) -> Config:
    """The .config that comes of a defconfig: of every symbol that is visible or has a value.

    A wish counts where the symbol has a prompt and its dependencies hold; a selection counts in any case. Wishes for
    symbols that are not known are dropped without a word, as Kconfig does: see `lost`.
    """
    config: Config = {}
    while True:
        before = config
        on = [symbol for name, symbol in rules.symbols.items() if before.get(name) == "y"]
        selected = {name for symbol in on for name in symbol.selects}
        values = {name: _value(symbol, rules, wanted, before) for name, symbol in rules.symbols.items()}
        values |= dict.fromkeys(selected, "y")
        config = {name: value for name, value in values.items() if value}
        if config == before:
            return config


def _value(symbol: Symbol, rules: Rules, wanted: Mapping[str, str], now: Config) -> str:
    """The value of a symbol that nothing selects, by the values of the others now; "" where it is not visible."""
    possible = holds(symbol.depends, now)
    visible = bool(symbol.prompt) and possible
    if symbol.choice:
        visible = visible and holds(rules.needs[symbol.choice], now)
        value = "y" if visible and _chosen(symbol.choice, rules, wanted, now) == symbol.name else "n"
    elif visible and symbol.name in wanted:
        value = wanted[symbol.name]
    else:
        value = (_first(symbol.default, now) if possible else "") or ("n" if symbol.kind == "bool" else "")
    return value if visible or value != "n" else ""


def _chosen(choice: str, rules: Rules, wanted: Mapping[str, str], now: Config) -> str:
    """Which symbol of a choice it is: the last that is asked for, or the default, or the first there is."""
    members = [one.name for one in rules.symbols.values() if one.choice == choice and holds(one.depends, now)]
    asked = [name for name, value in wanted.items() if value == "y" and name in members]
    default = _first(rules.choices[choice], now)
    return asked[-1] if asked else default if default in members else members[0] if members else ""


def _first(values: Iterable[str], now: Config) -> str:
    """Of values with conditions, the first whose condition holds."""
    for value, _, condition in (one.partition(" if ") for one in values):
        if holds(condition, now):
            return value
    return ""


def minimal(rules: Rules, wanted: Mapping[str, str]) -> Config:
    """The shortest defconfig from which the same .config comes: as `make savedefconfig` writes it."""
    whole = settle(rules, wanted)
    kept = dict(wanted)
    for name in list(kept):
        without = {other: value for other, value in kept.items() if other != name}
        if settle(rules, without) == whole:
            kept = without
    return kept
