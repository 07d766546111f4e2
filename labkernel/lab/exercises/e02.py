"""The checks of notebook 02: entries that lead out, the same bits twice, and the smallest rootfs for a program."""

from __future__ import annotations

import gzip
import io
import os
import random
import secrets
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from labkernel.children import in_child
from labkernel.image.elf import read_elf
from labkernel.lab import calm
from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.scratch import temporary

HONEST: tuple[tuple[str, bytes, str], ...] = (
    ("bin", tarfile.DIRTYPE, ""),
    ("bin/sh", tarfile.REGTYPE, ""),
    ("bin/..hidden", tarfile.REGTYPE, ""),
    ("..data", tarfile.REGTYPE, ""),
    ("bin/ash", tarfile.SYMTYPE, "sh"),
    ("bin/sh2", tarfile.LNKTYPE, "bin/sh"),
    ("etc/mtab", tarfile.SYMTYPE, "../proc/self/mounts"),
    ("usr/share/zone", tarfile.SYMTYPE, "../../etc/zone/../localtime"),
    ("var/run", tarfile.SYMTYPE, "/run"),
)
"""Name, type and target of a link. An absolute target is looked up in the new root, and stays inside."""

OUT: tuple[tuple[tuple[str, bytes, str], str], ...] = (
    (("/NAME", tarfile.REGTYPE, ""), "a file with an absolute name"),
    (("../NAME", tarfile.REGTYPE, ""), "a file whose name begins with .."),
    (("usr/../../NAME", tarfile.REGTYPE, ""), "a file whose name climbs out further on"),
    (
        ("usr/NAME", tarfile.SYMTYPE, "../../etc"),
        "a symbolic link that climbs further up than it lies deep",
    ),
    (("NAME", tarfile.SYMTYPE, ".."), "a symbolic link at the top of the archive, to .."),
    (("var/NAME", tarfile.LNKTYPE, "../etc/shadow"), "a hard link to a path that climbs out"),
    (("var/NAME", tarfile.LNKTYPE, "/etc/shadow"), "a hard link to an absolute path"),
)
"""An entry that leads out, and the verdict's words for it."""

PROGRAMS = {"sh": (["-c", "exit 42"], 42), "ls": (["/"], 0), "grep": (["-q", "x", "/nothing"], 2)}
"""Programs that every machine has, what to call them with, and the exit code that shows that they have run."""


@exercise("02.1", looks_at="what your function says of tarballs in which at most one entry leads out")
def leads_out(answer: Callable[[Path], Any]) -> str:
    """Each way out is tried in a tarball of its own, at a place and under a name that are drawn; one is honest."""
    with temporary() as place:
        for number, (hostile, words) in enumerate(((None, ""), *OUT)):
            name = secrets.token_hex(4)
            entries = list(HONEST)
            if hostile:
                hostile = (hostile[0].replace("NAME", name), *hostile[1:])
                entries.insert(random.randrange(1, len(entries)), hostile)
            tarball = place / f"{number}.tar"
            _write(tarball, entries)
            found = run_answer(answer, tarball)
            if not isinstance(found, list | tuple | set) or not all(isinstance(one, str) for one in found):
                raise NotYet(f"a list of names is asked for, and this is {found!r}"[:200])
            if innocent := sorted(set(found) - {hostile[0] if hostile else ""}):
                raise NotYet(f"an honest entry is accused: {innocent[0]}")
            if hostile and not found:
                raise NotYet(f"one that leads out is not found: {words}")
    return f"of {len(OUT)} ways out each is found, and no honest entry is accused."


def _write(tarball: Path, entries: list[tuple[str, bytes, str]]) -> None:
    with tarfile.open(tarball, "w") as tar:
        for name, kind, target in entries:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)


@exercise(
    "02.2", looks_at="the bits of tarballs that your function makes of the same files, and of other ones"
)
def same_bits(answer: Callable[[dict[str, Path], Path], Any]) -> str:
    """Twice the same content: in another order, with other times, another owner, under another name, a second later."""
    content = {
        f"{name}/{secrets.token_hex(3)}": secrets.token_bytes(700) for name in ("bin", "etc", "a", "z")
    }
    with temporary() as place:
        first = _pack(answer, _files(place / "one", content, 1_000_000_000), place / "one.tar.gz")
        _holds(first, content)
        time.sleep(1.1)  # gzip notes down the second
        again = _files(place / "two", dict(reversed(content.items())), 1_600_000_000)
        in_child(_give_away, list(again.values()))
        second = _pack(answer, again, place / "another-name.tar.gz")
        _holds(second, content)
        if first != second:
            raise NotYet(f"the two tarballs of the same files are not equal: {_difference(first, second)}")
        other = content | {"etc/more": b"more\n"}
        third = _pack(answer, _files(place / "three", other, 1_000_000_000), place / "three.tar.gz")
        _holds(third, other)
    return "the same files give the same bits, and other files give other ones."


def _files(place: Path, content: Mapping[str, bytes], when: int) -> dict[str, Path]:
    place.mkdir()
    files = {}
    for name, data in content.items():
        files[name] = place / name.replace("/", "-")
        files[name].write_bytes(data)
        files[name].chmod(0o755 if name.startswith("bin/") else 0o644)
        os.utime(files[name], (when, when))
    return files


def _give_away(files: list[Path]) -> None:
    """Another owner, where there is one to be had: an ordinary user may have a single id."""
    for file in files:
        try:
            os.chown(file, 1, 1)
        except OSError:
            return


def _pack(answer: Callable[[dict[str, Path], Path], Any], files: dict[str, Path], tarball: Path) -> bytes:
    run_answer(answer, files, tarball)
    if not tarball.is_file():
        raise NotYet("there is no tarball where it was asked for")
    return tarball.read_bytes()


def _holds(tarball: bytes, content: Mapping[str, bytes]) -> None:
    """Whether the tarball is what was asked for: all files, nothing else, and the programs among them are programs."""
    if tarball[:2] != b"\x1f\x8b":
        raise NotYet("the tarball is not compressed by gzip")
    try:
        with tarfile.open(fileobj=io.BytesIO(tarball), mode="r:gz") as tar:
            members = {m.name: m for m in tar if m.isfile()}
            found = {
                name: (file.read() if (file := tar.extractfile(m)) else b"") for name, m in members.items()
            }
    except (tarfile.TarError, OSError, EOFError) as error:
        raise NotYet(f"what it has written is no tarball: {calm.in_words(error)}") from None
    if found.keys() != content.keys():
        raise NotYet(f"the tarball holds {len(found)} files, of the names asked for "
                     f"{len(found.keys() & content.keys())}; {len(content)} were given")  # fmt: skip
    if found != content:
        raise NotYet("the files in the tarball have another content")
    for name, member in members.items():
        program = name.startswith("bin/")
        if bool(member.mode & 0o111) != program:
            words = ("a file that can be executed no longer can", "a file that could not be executed can be")
            raise NotYet(f"{words[not program]}, once unpacked")


def _difference(first: bytes, second: bytes) -> str:
    """In which respect two tarballs of the same files differ, in words."""
    one, two = gzip.decompress(first), gzip.decompress(second)
    if one == two:
        return "unpacked they are, so it is something that gzip notes down"
    with (
        tarfile.open(fileobj=io.BytesIO(one)) as left,
        tarfile.open(fileobj=io.BytesIO(two)) as right,
    ):
        pairs = list(zip(left.getmembers(), right.getmembers(), strict=False))
    for what, differ in (
        ("the order of the entries", any(a.name != b.name for a, b in pairs)),
        ("a time", any(a.mtime != b.mtime for a, b in pairs)),
        ("an owner", any((a.uid, a.gid, a.uname) != (b.uid, b.gid, b.uname) for a, b in pairs)),
    ):
        if differ:
            return f"{what} is another one"
    return "their headers are not"


@exercise(
    "02.3", looks_at="programs, run with nothing but your files as their root, and again without each of them"
)
def smallest(answer: Callable[[str], Any]) -> str:
    """Each program runs in exactly these files; without any one of them it does not."""
    counts = []
    for program, arguments, code in _programs():
        name = os.path.basename(program)
        files = run_answer(answer, program)
        if not isinstance(files, Mapping) or not files:
            raise NotYet(f"for {name}, a dictionary of files is asked for, and this is {str(files)[:40]!r}")
        counts.append(len(files))
        with temporary() as place:
            for inside, outside in files.items():
                _place(place, str(inside), str(outside), name)
            if program.lstrip("/") not in {str(inside).lstrip("/") for inside in files}:
                raise NotYet(f"{name} is not at its place in the root")
            if problem := in_child(_judge, str(place), [program, *arguments], code, [str(f) for f in files]):
                raise NotYet(f"{name} {problem}")
    return f"{len(counts)} programs run in your files and nothing else, and no file is too many."


def _programs() -> Iterator[tuple[str, list[str], int]]:
    """Those that are linked dynamically here: some distributions have scripts in their place."""
    for name, (arguments, code) in PROGRAMS.items():
        found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/bin:/bin")
        elf = read_elf(Path(found).resolve()) if found else None
        if found and elf and elf.interpreter:
            yield found, arguments, code


def _place(root: Path, inside: str, outside: str, program: str) -> None:
    parts = [part for part in inside.split("/") if part]
    if not parts or ".." in parts:
        raise NotYet(f"for {program}, {inside!r} is no place in a root file system")
    if not os.path.isfile(outside):
        raise NotYet(f"for {program}, one of the files is none of this machine's: {outside!r}")
    target = root.joinpath(*parts)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(outside, target)
    except OSError as error:
        raise NotYet(f"for {program}, the files do not go together: {error.strerror}") from None
    target.chmod(0o755)


def _judge(root: str, command: list[str], code: int, files: list[str]) -> str:
    """Run the command in that root, then again without each file; "" when all is well. In a child of the lab."""
    found = _ends(root, command)
    if found != str(code):
        return f"does not run in the files you gave: {found}"
    for file in files:
        path = os.path.join(root, file.lstrip("/"))
        os.rename(path, f"{path}.away")
        found = _ends(root, command)
        os.rename(f"{path}.away", path)
        if found == str(code):
            return f"runs, and there is a file that it does not need: {os.path.basename(file)}"
    return ""


def _ends(root: str, command: list[str]) -> str:
    """The exit code of a command in that root; or what the kernel or the dynamic loader says."""

    def go_in() -> None:
        os.chroot(root)
        os.chdir("/")

    try:
        done = subprocess.run(
            command,
            preexec_fn=go_in,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=10,
        )
    except subprocess.TimeoutExpired:
        return "it does not end"
    except OSError as error:
        return f"execve says {calm.in_words(OSError(error.errno, os.strerror(error.errno or 0)))}"
    said = done.stderr.decode(errors="replace").strip().partition(": ")[2]
    return f"it says: {said}" if done.returncode == 127 and said else str(done.returncode)
