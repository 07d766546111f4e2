"""The checks of notebook 20: libraries that nobody needs, the days on which a program fails, and a diet with a test."""

from __future__ import annotations

import datetime
import os
import random
import secrets
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from labkernel.children import in_child
from labkernel.image import elf
from labkernel.image.closure import closure
from labkernel.image.pack import pack
from labkernel.image.unpack import unpack
from labkernel.image.weigh import weigh
from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.scratch import temporary

PROGRAMS = ("sh", "ls", "cat", "grep")
"""Every machine has them, and some of them need libraries of their own."""


@exercise("20.1", looks_at="the libraries that your function names, and whether the programs do without them")
def unneeded(answer: Callable[[Path], Any]) -> str:
    """A root with programs, and with libraries that belong to others: alone, and in a chain."""
    with temporary() as place:
        root = _root(place, PROGRAMS)
        _indirect(root)
        honest = {path for path in _libraries(root) if path in _needed(root)}
        strangers = _strangers(root)
        libraries = set(_libraries(root))
        found = run_answer(answer, root)
        if libraries != set(_libraries(root)):
            raise NotYet("your function has changed the root; it shall only look")
        if not isinstance(found, list | tuple | set) or not all(isinstance(one, str) for one in found):
            raise NotYet(f"a list of paths is asked for, and this is {found!r}"[:120])
        names = {f"/{one.lstrip('/')}" for one in found}
        if unknown := sorted(names - libraries):
            raise NotYet(f"this is no shared library of the root: {unknown[0]!r}"[:160])
        if wrong := names & honest:
            raise NotYet(
                f"a program needs {os.path.basename(min(wrong))}, directly or by way of another library"
            )
        if strangers - names:
            raise NotYet("there are libraries that no program needs, and you do not name them")
        for path in names:
            (root / path[1:]).unlink()
        for program in PROGRAMS:
            if lacking := elf.missing(_place_of(root, program), root):
                raise NotYet(f"without what you named, {program} lacks {lacking[0].name}")
    return f"{len(names)} libraries can go, and every program still finds all of its own."


def _root(place: Path, programs: Sequence[str]) -> Path:
    """The closure of programs as a tree."""
    pack(closure(programs), place / "closure.tar", compression="none")
    unpack(place / "closure.tar", place / "root")
    (place / "closure.tar").unlink()
    return place / "root"


def _place_of(root: Path, program: str) -> str:
    for directory in ("usr/bin", "usr/sbin"):
        if os.path.lexists(root / directory / program):
            return f"/{directory}/{program}"
    raise FileNotFoundError(f"{program} is not in the closure of itself")


def _libraries(root: Path) -> list[str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink())
    return [f"/{path.relative_to(root)}" for path in files if ".so" in path.name and elf.read_elf(path)]


def _needed(root: Path) -> set[str]:
    """What the programs of a root load, and their interpreters."""
    found: set[str] = set()
    for path in [*(root / "usr/bin").iterdir(), *(root / "usr/sbin").iterdir()]:
        facts = elf.read_elf(path) if path.is_file() and not path.is_symlink() else None
        if facts and facts.interpreter:
            found |= {one.path for one in elf.Loader(root).load(f"/{path.relative_to(root)}")}
            found.add(elf.resolve(facts.interpreter, root))
    return found


def _indirect(root: Path) -> None:
    """A program in /usr/sbin that needs a library that needs another one, which nobody else asks for."""
    libc = next(path for path in _libraries(root) if path.endswith("/libc.so.6"))
    beside, content = (root / libc[1:]).parent, (root / libc[1:]).read_bytes()
    first, second = f"lib{secrets.token_hex(1)}.so", f"lib{secrets.token_hex(4)}.so.1"
    asked = elf.Loader(root).load(libc)[0].elf.needed[0].encode()
    (beside / first).write_bytes(content.replace(asked + b"\0", second.encode().ljust(len(asked) + 1, b"\0")))
    (beside / second).write_bytes(content)
    program = (root / _place_of(root, "cat")[1:]).read_bytes()
    (root / "usr/sbin").mkdir(exist_ok=True)
    (root / "usr/sbin" / secrets.token_hex(4)).write_bytes(
        program.replace(b"libc.so.6\0", first.encode().ljust(10, b"\0"))
    )


def _strangers(root: Path) -> set[str]:
    """Libraries that no program needs: what came with the C library, and a chain of two that need one another."""
    strangers = set(_libraries(root)) - _needed(root)
    libc = next(path for path in _libraries(root) if path.endswith("/libc.so.6"))
    content = (root / libc[1:]).read_bytes()
    first, second = (f"lib{secrets.token_hex(4)}.so.1" for _ in range(2))
    # What a library asks for stands in it as a text, which a zero ends: the first one asks for the second.
    asked = elf.Loader(root).load(libc)[0].elf.needed[0].encode()
    changed = content.replace(asked + b"\0", second.encode().ljust(len(asked) + 1, b"\0"))
    for name, data in ((first, changed), (second, content)):
        path = f"{os.path.dirname(libc)}/{name}"
        (root / path[1:]).write_bytes(data)
        strangers.add(path)
    return strangers


@exercise("20.2", looks_at="the days on which a program fails in its trimmed root, by running it")
def breaks(answer: Callable[[Path, list[str]], Any]) -> str:
    """A script that needs a file on one or two days of the week; the file is not there any more."""
    with temporary() as place:
        root = _root(place, ["sh"])
        for weekdays in (random.sample(range(7), 1), random.sample(range(7), 2), []):
            start = datetime.date(2000, 1, 1) + datetime.timedelta(random.randrange(20_000))
            days = [str(start + datetime.timedelta(number)) for number in range(14)]
            expected = [day for day in days if datetime.date.fromisoformat(day).weekday() in weekdays]
            _write_report(root, days, expected)
            found = run_answer(answer, root, days)
            if not isinstance(found, list | tuple | set):
                raise NotYet(f"a list of days is asked for, and this is {found!r}"[:120])
            if sorted(found) != expected:
                missed = set(expected) - set(found)
                what = "fails, and you do not name it" if missed else "runs, and you name it"
                raise NotYet(f"there is a day on which the program {what}")
    return "every day on which the program fails is found, and no other."


def _write_report(root: Path, days: list[str], bad: list[str]) -> None:
    """A program that reads another file each day: on bad days that is missing, or ends the program in its own way."""
    (root / "app").mkdir(exist_ok=True)
    cases = ""
    for day in days:
        name = secrets.token_hex(4)
        cases += f"  {day}) . /app/{name};;\n"
        if day not in bad:
            (root / "app" / name).touch()
        elif bad.index(day) == 1:  # it ends by a signal, and not by a status
            (root / "app" / name).write_text("kill -9 $$\n")
        elif bad.index(day) == 2:  # and says nothing
            (root / "app" / name).write_text("exit 3\n")
    (root / "app/report").write_text(f'case "$1" in\n{cases}  *) echo "report of $1";;\nesac\n')


@exercise("20.3", looks_at="a root after your function: its size, and its tests, run once more")
def diet(answer: Callable[[Path, list[list[str]], int], Any]) -> str:
    """Ballast and what is needed have names and sizes that tell nothing: only the tests know."""
    with temporary() as place:
        root = _root(place, PROGRAMS)
        needed = _load(root)
        tests = _tests(root, needed)
        sure = sum((root / path[1:]).stat().st_size for path in needed) + sum(
            (root / path.lstrip("/")).stat().st_size for path in _needed(root)
        )
        limit = int(1.05 * sure)
        if any(_status(root, test) for test in tests):
            raise NotYet("the check's own tests do not pass here")
        before = _contents(root)
        run_answer(answer, root, tests, limit)
        if not root.is_dir():
            raise NotYet("the root itself is gone")
        for test in tests:
            if status := _status(root, test):
                why = {
                    126: "cannot be started: is it executable (chmod)?",
                    127: "is not found, or its interpreter",
                }
                raise NotYet(
                    f"{' '.join(test)} ends with status {status} now: {why.get(status, 'it misses a file')}"
                )
        for path, content in _contents(root).items():
            if path not in before:
                raise NotYet(f"a file was not there before: {path}")
            if content != before[path]:
                raise NotYet(f"a file has another content than before: {path}")
        size = sum(weight.bytes for weight in weigh(root))
        if size > limit:
            raise NotYet("the tests pass, but the root weighs more than is allowed")
    return f"{len(tests)} tests pass, and the root is within its limit."


def _contents(root: Path) -> dict[str, bytes]:
    """What is in all files of the root, by their paths inside."""
    files = (path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    return {f"/{path.relative_to(root)}": path.read_bytes() for path in files}


def _load(root: Path) -> list[str]:
    """Fill the root with files, of which the tests need a few; returns these: the heaviest and the lightest, too."""
    names = [f"/data/{secrets.token_hex(4)}" for _ in range(12)]
    (root / "data").mkdir()
    for name in names:
        (root / name[1:]).write_text(secrets.token_hex(random.randrange(50_000, 90_000)))
    lightest, *others, heaviest = sorted(names, key=lambda name: (root / name[1:]).stat().st_size)
    return random.sample([lightest, random.choice(others), heaviest], 3)


def _tests(root: Path, needed: Sequence[str]) -> list[list[str]]:
    """Each kind of program once, and each needed file by one of them."""
    shell, cat, grep, ls = (_place_of(root, name) for name in ("sh", "cat", "grep", "ls"))
    word = (root / needed[1][1:]).read_text()[:20]
    (root / "app").mkdir(exist_ok=True)
    scripts = {
        "one": 'read -r line < "/data/$a$b" || test -n "$line"',
        "two": f'{grep} -q {word} "/data/$a$b"',
        "three": f'{cat} "/data/$a$b"',
    }
    for (name, text), file in zip(scripts.items(), needed, strict=True):
        start, end = file[6:10], file[10:]
        (root / "app" / name).write_text(f"a={start} b={end}\n{text}\n")
    return [*([shell, f"/app/{name}"] for name in scripts), [ls, "/data"]]


def _status(root: Path, command: Sequence[str]) -> int:
    return in_child(_run, str(root), list(command))


def _run(root: str, command: list[str]) -> int:
    def go_in() -> None:
        os.chroot(root)
        os.chdir("/")

    try:
        return subprocess.run(
            command, preexec_fn=go_in, env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, timeout=10,
        ).returncode  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return 127
