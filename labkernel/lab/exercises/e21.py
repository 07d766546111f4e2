"""The checks of notebook 21: a fragment of a defconfig, the price of one more program, the kernel that a tree wants."""

from __future__ import annotations

import os
import random
import re
import secrets
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labkernel.image import kconfig, recipes
from labkernel.image.closure import closure
from labkernel.image.pack import pack
from labkernel.image.unpack import unpack
from labkernel.image.weigh import weigh
from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.scratch import temporary

ABI_TAG = struct.pack("=III4sI", 4, 16, 1, b"GNU\0", 0)
"""How the note begins: sizes of the name and of what follows, type, name, and 0 for Linux. Source: elf(5), <elf.h>."""


@exercise("21.1", looks_at="the configuration that comes of our defconfig with your fragment over it")
def fragment(answer: Any) -> str:
    """A system that still has Python, and differs in four points."""
    if not isinstance(answer, str):
        raise NotYet(f"a text is asked for, and this is {type(answer).__name__}")
    folder = recipes.FOLDER / "buildroot-python"
    rules = kconfig.read_rules(folder / "symbols.toml")
    base = kconfig.read_config((folder / "external/configs/labkernel_python_defconfig").read_text())
    for line in answer.splitlines():
        if (off := re.search(r"(BR2_\w+) is not set", line)) and line != f"# {off[1]} is not set":
            raise NotYet(
                f'a line that switches off is "# NAME is not set" and nothing else; this is {line!r}'
            )
    try:
        asked = kconfig.read_config(answer)
    except ValueError as error:
        raise NotYet(str(error)) from None
    if unknown := [name for name in asked if name not in rules.symbols]:
        raise NotYet(f"{unknown[0]} is not among the symbols that are known")
    merged = base | asked
    config = kconfig.settle(rules, merged)
    for name, value, words in POINTS:
        if config.get(name, "n") != value:
            raise NotYet(words)
    if lost := kconfig.lost(merged, config):
        raise NotYet(
            f"a line of the two together is lost without a word: {lost[0]}. Of a choice only one can be on"
        )
    expected = kconfig.settle(rules, base | {name: value for name, value, _ in POINTS} | {GLIBC: "n"})
    if changed := [name for name in rules.symbols if config.get(name) != expected.get(name)]:
        raise NotYet(f"something else has changed, too: {changed[0]}")
    return "musl, no sqlite, xz, packed by zstd; nothing lost, and nothing else changed."


@exercise("21.2", looks_at="what you predict, and what a tree really weighs with one program more")
def predict(answer: Callable[[list[str], str], Any]) -> str:
    """The bytes by which a tree will grow."""
    with temporary() as place:
        run_answer(_judge_predict, answer, place)
    return "to the byte: what was there already has cost nothing, and what came along was counted."


@exercise(
    "21.3", looks_at="what you say of trees of real programs, in whose notes there are versions of our making"
)
def demands(answer: Callable[[Path], Any]) -> str:
    """The newest of the versions in all notes of a tree."""
    with temporary() as place:
        run_answer(_judge_demands, answer, place)
    return "the most demanding program was found each time, and nothing but programs was asked."


# ---------------------------------------------------------------------- inner parts

GLIBC = "BR2_TOOLCHAIN_BUILDROOT_GLIBC"

POINTS = (
    ("BR2_PACKAGE_PYTHON3", "y", "Python itself is lost: something that you ask for excludes it"),
    ("BR2_TOOLCHAIN_BUILDROOT_MUSL", "y", "the C library is another one than musl"),
    ("BR2_PACKAGE_PYTHON3_SQLITE", "n", "Python still has sqlite3"),
    ("BR2_PACKAGE_PYTHON3_XZ", "y", "Python cannot read .xz files"),
    ("BR2_TARGET_ROOTFS_TAR_ZSTD", "y", "the tarball is not packed by zstd"),
)


def _judge_predict(answer: Callable[[list[str], str], Any], place: Path) -> None:
    shell, lister, mover, *others = (
        shutil.which(name) or name for name in ("sh", "ls", "mv", "env", "sort", "cat")
    )
    if answer([shell, lister], lister) != 0:
        raise NotYet("a program that is in the tree already costs nothing")
    # One that needs a library which a shell does not need; one that shares such a library; and any other.
    for have, more in (
        ([shell], shutil.which("findmnt") or lister),
        ([shell, lister], mover),
        ([shell, lister], random.choice(others)),
    ):
        before, after = (_built(some, place) for some in (have, [*have, more]))
        said = answer(list(have), more)
        if not isinstance(said, int) or isinstance(said, bool):
            raise NotYet(f"a number of bytes is asked for, and this is {type(said).__name__}")
        if said != after - before:
            which = "less" if said < after - before else "more"
            case = f"{Path(more).name} beside {' and '.join(Path(one).name for one in have)}"
            raise NotYet(f"for {case}, that is {which} than what the tree has grown by, once it was built")


def _built(programs: list[str], place: Path) -> int:
    """Build a tree of these programs, and weigh it."""
    root = place / secrets.token_hex(4)
    pack(closure(programs), place / "tree.tar", compression="none")
    unpack(place / "tree.tar", root)
    return sum(one.bytes for one in weigh(root))


def _judge_demands(answer: Callable[[Path], Any], place: Path) -> None:
    shell = Path(os.path.realpath(shutil.which("sh") or "/bin/sh")).read_bytes()
    # A version that reads higher as a text than the newest, one with a higher last number, one as in most programs.
    rounds = (
        ((4, random.randint(10, 19), 0), [(4, 9, 9), (3, 2, 0)]),
        ((6, random.randint(2, 9), random.randint(1, 9)), [(6, 1, 99), (5, 19, 17)]),
        *(((6, 5, random.randint(5, 9)), [(6, 5, 3), (6, 5, 4)]) for _ in range(3)),
        ((random.randint(10, 99), 0, 0), [(9, 99, 99), (3, 2, 0)]),
    )
    for number, (newest, others) in enumerate(rounds):
        root = place / secrets.token_hex(4)
        (root / "usr/bin").mkdir(parents=True)
        # A program, one further down than one would look, and one that the loader does not want to be executable.
        places = [("usr/bin", 0o755), (f"opt/{secrets.token_hex(4)}/tools/bin", 0o755), ("usr/lib", 0o644)]
        places = places[number % 3 :] + places[: number % 3]  # so the newest is at each of them once
        for version, (where, mode) in zip([newest, *others], places, strict=True):
            path = root / where / secrets.token_hex(4)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_with_tag(shell, version))
            path.chmod(0o755)
            # The notes are real ones: the program runs.
            subprocess.run([path, "-c", "exit 0"], check=True)
            path.chmod(mode)
        (root / "usr/bin/without").write_bytes(shell.replace(ABI_TAG, bytes(len(ABI_TAG)), 1))
        (root / "usr/bin/script").write_bytes(b"#!/bin/sh\n" + _note((99, 9, 9)))
        (root / "usr/bin/empty").touch()
        (root / "usr/bin/dangling").symlink_to("nowhere")
        (root / "bin").symlink_to("usr/bin")
        said = answer(root)
        if not isinstance(said, tuple | list) or [type(one) for one in said] != [int] * 3:
            raise NotYet("three numbers are asked for, as in (5, 10, 0)")
        if tuple(said) != newest:
            words = (
                "newer than any program wants" if tuple(said) > newest else "not new enough for one of them"
            )
            raise NotYet(f"the kernel that you name is {words}")


def _note(version: tuple[int, int, int]) -> bytes:
    return ABI_TAG + struct.pack("=III", *version)


def _with_tag(program: bytes, version: tuple[int, int, int]) -> bytes:
    at = program.index(ABI_TAG)
    note = _note(version)
    return program[:at] + note + program[at + len(note) :]
