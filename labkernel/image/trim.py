"""Trimming: a root file system without what one program does not need.

Two ways to know what a program needs, and each is blind where the other sees. *Observation* (`labkernel.observe`) runs
it, and knows what it used today: nothing of what it does on Tuesdays only. *Analysis* reads the files that are left and
follows what is written in them: the ELF interpreter, which the kernel opens and no call names; shared libraries, also
those of modules that were not loaded today; the interpreter of a script; links. It knows nothing of names that a
program puts together while it runs.

So what was observed is kept, and what that needs; what nobody needs at run time goes (documentation, headers, the
packages' own files); and so do programs, libraries and whole directories that were not touched. What lies *beside*
files that were used, the modules of the same language perhaps, stays, unless somebody asks for less
(`only_observed`): a Tuesday may need it. Then the proof: the program runs in a container of what is left, or nothing
is made.

The original is never changed. What is made is a copy, with a report beside it that says what went.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import posixpath
import re
import shlex
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from labkernel import children, images, state
from labkernel.cleanup import remove_tree
from labkernel.image import Progress, elf, exchange, store
from labkernel.image.closure import OPENED_BY_LIBC
from labkernel.image.merge import header
from labkernel.image.pack import Compression, Digester, compressor, gzip_size, pack, written_at_once
from labkernel.image.tarball import BadTarball, Member, open_tarball
from labkernel.image.unpack import unpack
from labkernel.observe import Observation, observe


class TrimError(RuntimeError):
    """Nothing was made; the text says why, and what to do."""


@dataclass(frozen=True)
class Group:
    """Files that stay or go for one reason."""

    name: str
    why: str
    goes: bool
    paths: tuple[str, ...]
    bytes: int  # apparent


OPENED, NEEDED, ASKED_FOR = "used", "needed", "asked for"
BASE, BESIDE, LICENCES = "base", "beside", "licences"
PROGRAMS, LIBRARIES, ELSEWHERE = "programs", "libraries", "elsewhere"

WHY = {
    OPENED: "the program has named it",
    NEEDED: "what stays needs it: interpreters, libraries, targets of links",
    ASKED_FOR: "you asked to keep it",
    BASE: "settings: they are small, and read on odd days",
    BESIDE: "lies beside what was used: a Tuesday may need it (--only-observed)",
    LICENCES: "the licences ask for it",
    "documentation": "for people, who read it elsewhere",
    "building": "for who compiles against it: headers, static libraries",
    "packages": "what the package manager knows, and its caches",
    "languages": "what programs say in other languages, encodings before Unicode",
    "tests": "tests of the libraries themselves",
    PROGRAMS: "programs that were not started",
    LIBRARIES: "shared libraries that nothing asks for any more",
    ELSEWHERE: "in directories of which nothing was used",
}
"""The groups, in the order in which they are told."""

GONE_WITH_RISK = (BESIDE, LICENCES)
"""What goes only where less is asked for."""

_PATTERNS = (
    (LICENCES, r"/usr/share/doc/[^/]+/copyright|.*/(LICEN[CS]E|COPYING)[^/]*"),
    ("documentation", r"/usr/(local/)?share/(doc|doc-base|man|info|help|gtk-doc|groff|bug|lintian|linda)/.*"),
    ("documentation", r".*/node_modules/.*/(README|CHANGELOG|HISTORY|AUTHORS)[^/]*|.*\.(md|markdown)"),
    ("building", r"/usr/(local/)?include/.*|.*\.(a|la|o|h|hpp|pc|cmake|gir|vapi)|.*/config-3[^/]*/.*"),
    ("packages", r"/var/(lib/(dpkg|apt|rpm|pacman|apk)|cache|log)/.*|/etc/apt/.*|/usr/share/debconf/.*"),
    ("languages", r"/usr/share/(locale|i18n)/.*|/usr/lib/locale/.*|.*/gconv/.*"),
    ("tests", r".*/(python3[^/]*|node_modules|site-packages|dist-packages)/(.*/)?(tests?|idlelib|turtledemo)/.*"),
)  # fmt: skip

_BASE = re.compile(r"/etc/.*")
_PROGRAM = re.compile(r"(/usr|/usr/local)?/s?bin/[^/]+|/usr/libexec/.*")
_LIBRARY = re.compile(r"(/usr|/usr/local)?/lib(32|64|x32)?/([^/]*-linux-[^/]*/)?[^/]+\.so(\.[\d.]+)?")
_COMMON = re.compile(
    r"(/usr|/usr/local)?(/s?bin|/libexec|/share|/lib(32|64|x32)?(/[^/]*-linux-[^/]*)?)?|/opt|/var|/var/lib|/srv|/home"
)
"""Directories that hold things which have nothing to do with each other: nothing lies beside anything there."""

WITHIN = 60.0
"""Seconds that the program, and each proof, may take where nothing else is said."""


@dataclass(frozen=True)
class Plan:
    """What stays, and what goes."""

    groups: tuple[Group, ...]

    @property
    def keep(self) -> frozenset[str]:
        """The paths that stay."""
        return frozenset(path for group in self.groups if not group.goes for path in group.paths)

    @property
    def gone(self) -> dict[str, str]:
        """The paths that go, and the group of each."""
        return {path: group.name for group in self.groups if group.goes for path in group.paths}

    @property
    def bytes(self) -> tuple[int, int]:
        """Apparent size before and after."""
        sizes = [(group.bytes, 0 if group.goes else group.bytes) for group in self.groups]
        return sum(before for before, _ in sizes), sum(after for _, after in sizes)


# ---------------------------------------------------------------------- what may go


def plan(
    tarball: Path,
    tree: Path,
    observations: Iterable[Observation],
    *,
    keep: Sequence[str] = (),
    only_observed: bool = False,
) -> Plan:
    """Say what may go of an image: its *tarball*, which is unpacked in *tree*.

    *keep*: patterns of paths that stay in any case, as in "/usr/share/zoneinfo/*" (a "*" also stands for slashes).
    *only_observed*: what lies beside used files goes, too. To be called where all of *tree* can be read.
    """
    with open_tarball(tarball) as archive:
        members = {_inside(member.name): member for member in archive}
    planner = _Planner(tree, members)
    named = frozenset().union(*(observation.named for observation in observations))
    for path in named:
        planner.add(path, OPENED)
    places = _places(named & members.keys(), members)
    for path, member in members.items():
        if member.kind != "directory" and path not in planner.stays:
            if any(fnmatch.fnmatchcase(path, pattern) for pattern in keep):
                planner.add(path, ASKED_FOR)
            else:
                planner.others[path] = _group(path, places)
    for path, group in planner.others.items():
        if group == BASE or (group in GONE_WITH_RISK and not only_observed):
            planner.add(path, group)
    planner.follow(next((o.command[0] for o in observations), ""))
    return planner.plan()


def _inside(name: str) -> str:
    return posixpath.normpath(f"/{name}")


def _group(path: str, places: frozenset[str]) -> str:
    for name, pattern in _PATTERNS:
        if re.fullmatch(pattern, path):
            return name
    if _PROGRAM.fullmatch(path):
        return PROGRAMS
    if _LIBRARY.fullmatch(path):
        return LIBRARIES
    if _BASE.fullmatch(path):
        return BASE
    above = posixpath.dirname(path)
    while above != "/":
        if above in places:
            return BESIDE
        above = posixpath.dirname(above)
    return ELSEWHERE


def _places(used: frozenset[str], members: Mapping[str, Member]) -> frozenset[str]:
    """The directories in which something was used: the highest that hold one thing only, as /usr/lib/python3.11."""
    found = set()
    for path in used:
        if members[path].kind == "directory" or _PROGRAM.fullmatch(path) or _LIBRARY.fullmatch(path):
            continue
        parts = path.split("/")[1:-1]
        for count in range(1, len(parts) + 1):
            place = "/" + "/".join(parts[:count])
            if not _COMMON.fullmatch(place):
                found.add(place)
                break
    return frozenset(found)


@dataclass
class _Planner:
    tree: Path
    members: Mapping[str, Member]
    stays: dict[str, str] = field(default_factory=dict)  # path: its group
    others: dict[str, str] = field(default_factory=dict)
    queue: list[str] = field(default_factory=list)
    program: elf.Loaded | None = None
    names: dict[str, list[str]] = field(default_factory=dict)  # a file of several names: all of them

    def __post_init__(self) -> None:
        for path, member in self.members.items():
            if member.kind == "hardlink":
                first = _inside(member.linkname)
                self.names.setdefault(first, [first]).append(path)
        self.names |= {path: group for group in list(self.names.values()) for path in group}

    def add(self, path: str, group: str) -> None:
        """Let a path stay, with the links on the way to it, and where it leads."""
        for one in self.along(path):
            for name in self.names.get(one, [one]):
                if name in self.members and name not in self.stays:
                    self.stays[name] = group
                    self.queue.append(name)

    def along(self, path: str) -> list[str]:
        """Every link on the way to a path of the image, and where it leads in the end."""
        found: list[str] = []
        left, done = [part for part in path.split("/") if part][::-1], "/"
        while left and len(found) < 40:
            part = left.pop()
            done = posixpath.normpath(posixpath.join(done, part))
            member = self.members.get(done)
            if member and member.kind == "symlink":
                found.append(done)
                left += [part for part in member.linkname.split("/") if part][::-1]
                done = "/" if member.linkname.startswith("/") else posixpath.dirname(done)
        return [*found, done]

    def follow(self, command: str) -> None:
        """What stays asks for more: libraries and interpreters, until nothing is asked for any more."""
        for path in sorted(
            self.queue, key=lambda path: posixpath.basename(path) != posixpath.basename(command)
        ):
            self.examine(path, programs=True)
        while self.queue:
            self.examine(self.queue.pop())

    def examine(self, path: str, programs: bool = False) -> None:
        """Read one file, and add what it asks for."""
        member = self.members[path]
        if member.kind not in ("file", "hardlink"):
            return
        file = self.tree / path[1:]
        try:
            facts = elf.read_elf(file)
            words = [] if facts or not member.mode & 0o111 else elf.shebang(file)
        except (OSError, ValueError):
            return
        if programs:  # the first one is who opens libraries by name
            if facts and facts.interpreter and self.program is None and self.stays[path] == OPENED:
                self.program = elf.Loaded(path, path, facts)
            return
        if words:
            self.add(words[0], NEEDED)
        if facts is None:
            return
        if facts.interpreter:
            self.add(facts.interpreter, NEEDED)
        loader = elf.Loader(self.tree)
        for library in loader.load(path, None if facts.interpreter else self.program)[1:]:
            self.add(library.path, NEEDED)
            # The loader comes by the name it was asked for, which may be a link beside the file.
            directory = posixpath.dirname(library.path)
            self.add(f"{directory}/{posixpath.basename(library.name)}", NEEDED)
            if library.name.startswith("libc.so"):
                for name in OPENED_BY_LIBC:
                    self.add(f"{directory}/{name}", NEEDED)

    def plan(self) -> Plan:
        """The groups, with all files and links in them."""
        paths: dict[tuple[str, bool], list[str]] = {}
        for path, member in self.members.items():
            if member.kind != "directory":
                group = self.stays.get(path) or self.others.get(path, ELSEWHERE)
                paths.setdefault((group, path not in self.stays), []).append(path)
        return Plan(tuple(
            Group(name, WHY[name], goes, tuple(sorted(paths[name, goes])), sum(self.size(p) for p in paths[name, goes]))
            for goes in (True, False) for name in WHY if (name, goes) in paths
        ))  # fmt: skip

    def size(self, path: str) -> int:
        """Bytes of a file; a link, hard or symbolic, has none of its own."""
        return self.members[path].size if self.members[path].kind == "file" else 0


# ---------------------------------------------------------------------- making it


@dataclass(frozen=True)
class Made:
    """A tarball of what stays."""

    digest: str
    files: int
    bytes: int


def write(
    tarball: Path, stays: Plan, observations: Iterable[Observation], destination: Path, *,
    compression: Compression = "zstd", progress: Progress | None = None,
) -> Made:  # fmt: skip
    """Write what stays of an image as another tarball: owners, modes, times and order as they were.

    Directories stay where something in them does, where nothing ever was in them, or where the program named them.
    """
    keep, files, size = stays.keep, 0, 0
    named = frozenset().union(*(observation.named for observation in observations))
    with open_tarball(tarball) as archive:
        members = [_inside(member.name) for member in archive]
    full = {above for path in members for above in _above(path)}
    wanted = {above for path in keep for above in _above(path)}
    with written_at_once(destination) as file:
        digester = Digester(file)
        with (
            compressor(digester, compression) as compressed,
            tarfile.open(
                fileobj=compressed, mode="w|", format=tarfile.PAX_FORMAT, encoding="utf-8",
                errors="surrogateescape", bufsize=1 << 20,
            ) as out,
            open_tarball(tarball) as archive,
        ):  # fmt: skip
            for number, member in enumerate(archive):
                path = _inside(member.name)
                if progress and number % 100 == 0:
                    progress("write what stays", number, len(members))
                if member.kind == "directory":
                    stay = path == "/" or path in wanted or path not in full or path in named
                else:
                    stay = path in keep
                if stay:
                    out.addfile(
                        header(member, member.name, member.linkname),
                        cast(BinaryIO, archive) if member.kind == "file" else None,
                    )
                    files += member.kind == "file"
                    size += member.size if member.kind == "file" else 0
    return Made(f"sha256:{digester.hash.hexdigest()}", files, size)


def _above(path: str) -> Iterator[str]:
    while path != "/":
        path = posixpath.dirname(path)
        yield path


# ---------------------------------------------------------------------- from end to end


@dataclass(frozen=True)
class Source:
    """What is trimmed: an image of the store, a directory, or a tarball."""

    kind: str
    name: str
    tarball: Path

    @property
    def result(self) -> Path:
        """Where the trimmed copy goes: beside the original; for an image, its name in the store."""
        return trimmed_name(self.name)


SUFFIXES = (".tar.zst", ".tar.gz", ".tgz", ".tar")


def trimmed_name(name: str) -> Path:
    """What the trimmed copy of something is called: "x-trimmed", "x-trimmed.tar.zst"."""
    path = name.rstrip("/")
    if posixpath.basename(path) in ("", ".", ".."):  # else the copy would lie in the original
        path = os.path.abspath(name)
    suffix = next((suffix for suffix in SUFFIXES if path.endswith(suffix)), "")
    return Path(f"{path.removesuffix(suffix)}-trimmed{suffix}")


def report_of(result: Path) -> Path:
    """The report that lies beside a trimmed copy."""
    return result.with_name(f"{result.name}.json")  # x and x.tar.gz have one each


@dataclass(frozen=True)
class Study:
    """A root file system that was looked at, with what its programs have named."""

    source: Source
    tree: Path
    work: Path
    commands: tuple[tuple[str, ...], ...]
    observations: tuple[Observation, ...]
    plan: Plan
    options: Mapping[str, Any]
    enough: float | None


@contextlib.contextmanager
def studied(
    rootfs: str, commands: Sequence[Sequence[str]], *, keep: Sequence[str] = (), only_observed: bool = False,
    timeout: float = WITHIN, enough: float | None = None, progress: Progress | None = None, **options: Any,
) -> Iterator[Study]:  # fmt: skip
    """Run each of the *commands* in a container of *rootfs*, observed, and plan what can go.

    *rootfs*: the name of an image of the store, a directory, or a tarball. *enough*: for programs that do not end, the
    seconds after which they are asked to. *options*: of `Container`, as env, workdir, user, network.
    What the block does not make of it is gone when it ends; the original is not changed.

    Raises TrimError where a command fails in the untrimmed root, NoSuchImage, OSError.
    """
    with _working_directory() as work:
        source = open_source(rootfs, work, progress=progress)
        tree = work / "tree"
        if source.kind == "image":
            tree = images.rootfs(source.name, progress=progress)
        else:
            images.unpack_for_containers(source.tarball, tree)
        options = _as_it_is_run(source, options)
        observations = []
        for number, command in enumerate(commands):
            if progress:
                progress(f"observe {command[0]}", number, len(commands))
            observations.append(_observed(tree, command, timeout, enough, options))
        if progress:
            progress("plan", 0, 1)
        found = children.in_child(
            plan, source.tarball, tree, observations, keep=keep, only_observed=only_observed
        )
        words = tuple(tuple(command) for command in commands)
        yield Study(source, tree, work, words, tuple(observations), found, options, enough)


def _as_it_is_run(source: Source, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, and what nobody says as an imported image wants it: `labkernel run` does so, too."""
    record = store.read_record(source.name) if source.kind == "image" else None
    wanted = (record or {}).get("settings") or {}
    inside = dict(item.partition("=")[::2] for item in wanted.get("Env", ()))
    return {
        **options,
        "env": inside | dict(options.get("env") or {}),
        "user": options.get("user") or wanted.get("User") or "0:0",
        "workdir": options.get("workdir") or wanted.get("WorkingDir") or "/",
    }


@contextlib.contextmanager
def _working_directory() -> Iterator[Path]:
    with exchange.working_directory() as work:
        try:
            yield work
        finally:  # the ids of containers have files there
            for path in sorted(work.iterdir()):
                if path.is_dir():
                    children.in_child(remove_tree, str(path))


def _is_path(rootfs: str) -> bool:
    """Whether that is meant which is there of this name, and not the image."""
    return "/" in rootfs or (Path(rootfs).exists() and store.whole(rootfs) is None)


def open_source(rootfs: str, work: Path, *, progress: Progress | None = None) -> Source:
    """Find what is to be trimmed. Raises NoSuchImage, FileNotFoundError, ValueError."""
    path = Path(rootfs)
    if path.is_dir() and _is_path(rootfs):
        if os.path.realpath(path) == "/":
            raise ValueError("this is the root of the machine itself: copy what you need of it first")
        tarball = work / "directory.tar"
        if progress:
            progress(f"read {path.name}", 0, 1)
        children.in_child(pack, path.absolute(), tarball, compression="none", same_owner=True)
        return Source("directory", str(path), tarball)
    if path.is_file() and _is_path(rootfs):
        try:
            with open_tarball(path) as archive:
                next(iter(archive), None)
        except BadTarball as error:
            raise ValueError(f"{rootfs} is neither a directory nor a tarball: {error}") from error
        return Source("tarball", rootfs, path.absolute())
    if "/" in rootfs or rootfs.endswith(SUFFIXES):
        raise images.NoSuchImage(f"{rootfs} is neither a directory nor a tarball")
    return Source("image", rootfs, images.stored(rootfs, progress=progress).tarball)


def _observed(
    tree: Path, command: Sequence[str], timeout: float, enough: float | None, options: Mapping[str, Any]
) -> Observation:
    from labkernel.container import Container

    words = _words(command)
    try:
        found = observe(Container(tree, command, **options), timeout=timeout, enough=enough)
    except TimeoutError:
        raise TrimError(
            f"{words}: still running after {timeout:g} s; for a program that does not end, say --seconds"
        ) from None
    if not found.succeeded:
        raise TrimError(
            f"{words}: ends with exit status {found.returncode} in the untrimmed root already: {_said(found)}"
        )
    return found


def _words(command: Sequence[str]) -> str:
    words = " ".join(shlex.join(command).split())
    return words if len(words) <= 80 else words[:79] + "…"


def _said(found: Any) -> str:
    text = (found.stderr or found.stdout).decode(errors="replace").strip()
    return " / ".join(text.splitlines()[-3:]) or "it said nothing"


def apply(
    study: Study,
    proofs: Sequence[Sequence[str]] = (),
    *,
    timeout: float = WITHIN,
    progress: Progress | None = None,
) -> Path:
    """Make the trimmed copy, once the proofs have run in it: the observed commands, or others. Returns where it is.

    Raises TrimError where a proof fails: nothing is made then. FileExistsError where something is in the way that is
    no trimmed copy.
    """
    result = study.source.result
    _check_place(study.source.kind, result)
    tarball = study.work / "trimmed.tar.zst"
    made = write(study.source.tarball, study.plan, study.observations, tarball, progress=progress)
    tree = study.work / "trimmed"
    images.unpack_for_containers(tarball, tree, images.ANY_SIZE)  # of what was within the limits
    commands = proofs or study.commands
    for number, command in enumerate(commands):
        if progress:
            progress(f"prove {command[0]}", number, len(commands))
        _prove(study, tree, command, timeout)
    report = {
        "trimmed": study.source.name,
        "commands": [list(command) for command in study.commands],
        "proofs": [list(command) for command in commands],
        "before_and_after": study.plan.bytes,
        "groups": [asdict(group) | {"paths": len(group.paths)} for group in study.plan.groups],
        "gone": sorted(study.plan.gone),
    }
    _put(study.source, tarball, made, report, progress)
    return result


def _check_place(kind: str, result: Path) -> None:
    if kind == "image":
        exchange.check_name(str(result))
        known = store.read_record(str(result))
        there = known is not None and "trimmed" not in known
    else:
        report = report_of(result)
        there = any(map(os.path.lexists, (result, report))) and not _is_report(report)
    if there:
        raise FileExistsError(f"{result} is there already, and is no trimmed copy: move it away first")


def _is_report(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        return isinstance(found, dict) and "trimmed" in found
    return False


def _put(
    source: Source, tarball: Path, made: Made, report: dict[str, Any], progress: Progress | None
) -> None:
    result = source.result
    if source.kind == "image":
        before = store.read_record(source.name) or {}
        image = store.Image(
            str(result), state.home() / "images" / f"{result}.tar.zst", made.digest, made.bytes,
            tarball.stat().st_size, made.files, gzip_size(tarball, progress=progress),
        )  # fmt: skip
        kept = {key: before[key] for key in ("settings",) if key in before}
        store.keep(image, tarball, kept | report)
        return
    _undo_path(result, missing_ok=True)  # not by name: that could mean an image
    if source.kind == "directory":
        children.in_child(_unpack_as_it_was, tarball, result.absolute())
    elif str(result).endswith(".tar.zst"):
        with written_at_once(result) as file:
            file.write(tarball.read_bytes())
    else:
        _recompress(tarball, result)
    report_of(result).write_text(json.dumps(report, indent=1))


def _unpack_as_it_was(tarball: Path, place: Path) -> None:
    unpack(tarball, place, same_owner=os.getuid() == 0, allow_setuid=True, limits=images.ANY_SIZE)


def _recompress(tarball: Path, result: Path) -> None:
    import zstandard

    compression: Compression = "none" if result.name.endswith(".tar") else "gzip"
    with (
        written_at_once(result) as file,
        tarball.open("rb") as packed,
        zstandard.ZstdDecompressor().stream_reader(packed) as plain,
        compressor(Digester(file), compression) as out,
    ):
        while data := plain.read(1 << 20):
            out.write(data)


def undo(name: str) -> bool:
    """Remove the trimmed copy of something, and its report; the original was never changed.

    Raises FileNotFoundError where there is none that was made here.
    """
    result = trimmed_name(name)
    if _is_path(name):
        return _undo_path(result)
    known = store.read_record(str(result))
    if known is None or "trimmed" not in known:
        raise FileNotFoundError(f"nothing to undo: there is no image {result} that was made by trimming")
    images.remove(str(result))
    return True


def _undo_path(result: Path, *, missing_ok: bool = False) -> bool:
    report = report_of(result)
    if not _is_report(report):
        if missing_ok and not os.path.lexists(result):
            return False
        raise FileNotFoundError(f"nothing to undo: no {report}, so {result} was not made by trimming")
    children.in_child(_remove, result.absolute())
    report.unlink()
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        remove_tree(str(path))
    else:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------- the proof, and why it fails


def _prove(study: Study, tree: Path, command: Sequence[str], timeout: float) -> None:
    from labkernel.container import Container

    container = Container(tree, command, **study.options)
    if study.enough is not None and tuple(command) in study.commands:
        try:
            done: Any = container.run(timeout=study.enough)
        except TimeoutError:
            return  # it is as alive as it was in the untrimmed root
    else:
        try:
            done = container.run(timeout=timeout)
        except TimeoutError:
            raise TrimError(f"the proof {_words(command)} was still running after {timeout:g} s") from None
    if done.returncode:
        what = f"ends with exit status {done.returncode} in the trimmed root: {_said(done)}"
        raise TrimError(f"{_words(command)}: {what}{_hint(study, tree, command, done, timeout)}")


def _hint(study: Study, tree: Path, command: Sequence[str], done: Any, timeout: float) -> str:
    """Which of the files that went it has asked for, or speaks of."""
    from labkernel.container import Container

    gone = study.plan.gone
    asked: list[str] = []
    with contextlib.suppress(OSError, TimeoutError):
        again = observe(Container(tree, command, **study.options), timeout=timeout, enough=study.enough)
        asked = sorted(again.missing & gone.keys())
    if not asked:
        # A directory was listed, and the name was not in it: the program's own words are all there is.
        last = " ".join(done.stderr.decode(errors="replace").strip().splitlines()[-1:])
        words = {
            part for quoted in re.findall(r"['\"`‘]([\w.+-]+)['\"`’]", last) for part in quoted.split(".")
        }
        words |= set(last.split()[-1:])
        asked = sorted(path for path in gone if posixpath.basename(path).split(".")[0] in words)
    if not asked:
        return "; try without --only-observed, or observe more (--also)"
    some = ", ".join(f"{path} (group {gone[path]})" for path in asked[:3])
    more = f" and {len(asked) - 3} more" if len(asked) > 3 else ""
    keep = " ".join(f"--keep {shlex.quote(path)}" for path in asked[:3])
    return f"; it asked for what went: {some}{more}. Keep it ({keep}), or observe more (--also)"
