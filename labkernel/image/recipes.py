"""Recipes: root file systems that are described in one folder each, built, weighed, and kept in the store.

`rootfs-recipes/NAME/recipe.toml` says what the image is and what it needs; `build.py` beside it fills an empty
directory. What comes out is packed the same way each time, and found again as long as nothing has changed that it
was made from: the folder, the versions of the packages it needs, the images it starts from.

A build runs as root, of the machine or of a user namespace, as a child of the launcher, and in a pid and a mount
namespace of its own. So whatever it has started and mounted is gone when it ends or is interrupted; its ids are
those of the image, for root and for an ordinary user alike.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import labkernel
from labkernel import children, state
from labkernel.cleanup import remove_tree
from labkernel.image import Progress
from labkernel.image.pack import epoch, gzip_size, pack
from labkernel.image.store import Image, keep, read_record, whole
from labkernel.image.weigh import weigh
from labkernel.linux import mounts, syscalls
from labkernel.spec import parse_size

FOLDER = Path(labkernel.__file__).parent.parent / "rootfs-recipes"

LAST_LINES = 12
"""Lines of a failed build's log that its error shows."""

ENDS_WITHIN = 30.0
"""Seconds in which a build that was killed has to be gone."""


class BadRecipe(ValueError):
    """A recipe.toml that cannot be meant."""


class NoSuchRecipe(LookupError):
    """There is no recipe of that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class BuildError(RuntimeError):
    """An image could not be built: the text says what failed and what to do; `tail` is how the log ended."""

    def __init__(self, text: str, tail: str = "") -> None:
        super().__init__(text, tail)
        self.text = text
        self.tail = tail

    def __str__(self) -> str:
        return f"{self.text}\n{self.tail}".rstrip()


class NotHere(BuildError):
    """The distribution of this machine does not have what a recipe is made from: nothing that can be mended."""


@dataclass(frozen=True)
class Recipe:
    """What a recipe.toml says, and where the build finds its things."""

    folder: Path
    name: str
    what: str
    teaches: str  # the notebook
    size: int  # expected apparent size in bytes
    proof: tuple[str, ...]  # a command that ends with 0 in a container of the image
    needs: tuple[str, ...] = ()  # packages of Debian and Ubuntu
    same_bits: bool | str = True  # or why twice built is not the same digest
    slow: bool = False  # takes over three minutes
    user: str = "any"  # or "root"
    starts_from: tuple[str, ...] = ()  # "from" in the file: other recipes
    by_hand: str = ""  # why `build --all` leaves it out
    work: Path = Path()  # only while it is built, as is `cache`
    cache: Path = Path()  # kept between builds; who puts something there names it by its content

    def image(self, name: str) -> Path:
        """A copy of the root file system of an image that this one starts from: ours, to change or to take apart."""
        from labkernel.image.unpack import unpack
        from labkernel.images import ANY_SIZE

        place = self.work / f"from-{name}"
        if not place.is_dir():
            tarball = state.home() / "images" / f"{name}.tar.zst"
            unpack(tarball, place, same_owner=os.getuid() == 0, allow_setuid=True, limits=ANY_SIZE)
        return place

    def run(self, *command: str | Path, **settings: Any) -> None:
        """Run a program, its output into the log; settings as of subprocess.run. Raises BuildError if it fails."""
        try:
            done = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, **settings)
        except FileNotFoundError as error:
            raise BuildError(f"there is no program {command[0]}: {error.strerror}") from error
        if done.returncode:
            raise BuildError(_ended(list(command), done.returncode))


# ---------------------------------------------------------------------- which there are


def all_recipes(folder: Path | None = None) -> list[Recipe]:
    """The recipes of a folder, `rootfs-recipes` of this repository if none is named, by their names."""
    return [load(path.parent) for path in sorted((folder or FOLDER).glob("*/recipe.toml"))]


def find(name: str) -> Recipe:
    """The recipe of that name; or, where the name has a slash, the one in that folder. Raises NoSuchRecipe."""
    folder = Path(name).absolute() if "/" in name else FOLDER / name
    if name and (folder / "recipe.toml").is_file():
        return load(folder)
    if not FOLDER.is_dir():
        raise NoSuchRecipe(
            f"no image {name!r}, and no recipes here: {FOLDER} is part of the project's repository"
        )
    names = ", ".join(sorted(path.parent.name for path in FOLDER.glob("*/recipe.toml")))
    raise NoSuchRecipe(
        f"no image {name!r}; recipes: {names}; or give the folder of one of your own, as in ./mine"
    )


def load(folder: Path) -> Recipe:
    """Read folder/recipe.toml. Raises BadRecipe with the key at fault."""
    file = folder / "recipe.toml"
    try:
        given = tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise BadRecipe(f"{file}: {error}") from error
    kinds: dict[str, tuple[type, ...]] = {
        "name": (str,), "what": (str,), "teaches": (str,), "size": (str,), "proof": (list,), "needs": (list,),
        "same_bits": (bool, str), "slow": (bool,), "user": (str,), "from": (list,), "by_hand": (str,),
    }  # fmt: skip
    for key, value in given.items():
        if key not in kinds:
            raise BadRecipe(f"{file}: unknown key {key!r}; there are: {', '.join(kinds)}")
        words = value if isinstance(value, list) else [""]
        if not isinstance(value, kinds[key]) or not all(isinstance(word, str) for word in words):
            raise BadRecipe(
                f"{file}: {key} = {value!r}: give {' or '.join(_IN_WORDS[kind] for kind in kinds[key])}"
            )
    if lacking := [key for key in ("name", "what", "teaches", "size", "proof") if not given.get(key)]:
        raise BadRecipe(f"{file}: {lacking[0]} is missing")
    if given["name"] != folder.name:
        raise BadRecipe(f"{file}: name = {given['name']!r}: it has to be the folder's, {folder.name}")
    from labkernel.image.exchange import check_name

    try:
        check_name(given["name"])  # it becomes that of an image and of files; "python" is the lab's own
    except ValueError as error:
        raise BadRecipe(f"{file}: {error}") from None
    if given.get("user", "any") not in ("any", "root"):
        raise BadRecipe(f'{file}: user = {given["user"]!r}: give "any" or "root"')
    if given.get("same_bits") in (False, ""):
        raise BadRecipe(f"{file}: same_bits: give true, or a sentence that says why it is not")
    try:
        given["size"] = parse_size(given["size"], "size", minimum=1)
    except ValueError as error:
        raise BadRecipe(f"{file}: {error}") from error
    given["starts_from"] = given.pop("from", [])
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    return Recipe(folder, **values)


_IN_WORDS = {str: "a text", list: "a list of texts", bool: "true or false"}


def proof_command(recipe: Recipe) -> tuple[str, ...]:
    """The proof; a word "@FILE" is what that file holds, of the recipe's folder, the one above it, or FOLDER."""

    def content(word: str) -> str:
        if not word.startswith("@"):
            return word
        places = [folder / word[1:] for folder in (recipe.folder, recipe.folder.parent, FOLDER)]
        for place in places:
            if place.is_file():
                return place.read_text()
        raise BadRecipe(
            f"recipe {recipe.name}: proof: there is no {word[1:]} in {places[0].parent} or above it"
        )

    return tuple(map(content, recipe.proof))


# ---------------------------------------------------------------------- building


def build(name: str, *, again: bool = False, progress: Progress | None = None) -> Image:
    """The image that a recipe describes: from the store, or built if need be (or in any case: *again*).

    Raises NoSuchRecipe, BadRecipe, and BuildError with the end of the build's log. What was interrupted or failed
    leaves nothing but its log, and the image that was there before.
    """
    return _build(find(name), again, progress, ())


def _build(recipe: Recipe, again: bool, progress: Progress | None, above: tuple[str, ...]) -> Image:
    if recipe.name in above:
        raise BadRecipe(f"the recipes {' and '.join(above)} start from one another")
    bases = {}
    for name in recipe.starts_from:
        beside = recipe.folder.parent / name
        base = find(str(beside) if beside.is_dir() else name)
        bases[name] = _build(base, False, progress, (*above, recipe.name)).digest
    built_from = _built_from(recipe, bases)
    directory = state.home() / "builds" / recipe.name
    (state.home() / "images").mkdir(parents=True, exist_ok=True)
    (directory / "cache").mkdir(parents=True, exist_ok=True)
    with state.locked(directory):  # one process builds it, who comes later waits and takes it from the store
        if not again and (image := _stored(recipe.name, built_from)):
            return image
        return _build_now(
            replace(recipe, work=directory / "work", cache=directory / "cache"), built_from, progress
        )


def _built_from(recipe: Recipe, bases: Mapping[str, str]) -> dict[str, Any]:
    """All that decides what comes out, but the files of the host that a build says it has used."""
    rules = Path(__file__).with_name("pack.py").read_bytes()
    return {
        "recipe": _digest_of_folder(recipe.folder),
        "needs": _installed(recipe),
        "from": dict(bases),
        "packed": hashlib.sha256(rules).hexdigest()[:16] + f" {epoch()}",
    }


def _digest_of_file(path: str | Path) -> str:
    """By content and not by time, which a checkout changes: some of these images take ten minutes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _digest_of_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder)} {len(content)} {os.access(path, os.X_OK)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


def _installed(recipe: Recipe) -> dict[str, str]:
    """The versions of the packages that a recipe needs. Raises BuildError where one is not installed."""
    if not recipe.needs:
        return {}
    query = [
        "dpkg-query",
        "--show",
        "--showformat=${Package}\t${Version}\t${db:Status-Status}\n",
        *recipe.needs,
    ]
    try:
        lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:
        raise NotHere(
            f"recipe {recipe.name} is made from packages of Debian or Ubuntu, and there is no dpkg here; "
            "use the lab's virtual machine (vm/README.md)"
        ) from None
    rows = (line.split("\t") for line in lines)
    versions = {name: version for name, version, status in rows if status == "installed"}
    if missing := [name for name in recipe.needs if name not in versions]:
        if unknown := [name for name in missing if not _offered(name)]:
            raise NotHere(
                f"recipe {recipe.name} is made from {' and '.join(unknown)}, which this distribution does not have"
            )
        raise BuildError(
            f"recipe {recipe.name} needs packages that are not installed: sudo apt-get install "
            f"--no-install-recommends {' '.join(missing)} (or, for all recipes: make recipes)"
        )
    return versions


def _offered(name: str) -> bool:
    """Whether apt knows the package; where apt has no lists yet, it may be there."""
    if not any(Path("/var/lib/apt/lists").glob("*_Packages*")):
        return True
    return subprocess.run(["apt-cache", "show", name], capture_output=True).returncode == 0


def _stored(name: str, built_from: Mapping[str, Any]) -> Image | None:
    """The image in the store, if it is whole and what it was built from is as it was."""
    known = read_record(name) or {}
    image = whole(name)
    if image and known.get("built_from") == built_from:
        with contextlib.suppress(OSError):
            if all(_digest_of_file(path) == then for path, then in known.get("inputs", {}).items()):
                return image
    return None


def _build_now(recipe: Recipe, built_from: Mapping[str, Any], progress: Progress | None) -> Image:
    if recipe.user == "root" and os.geteuid() != 0:
        raise BuildError(f"recipe {recipe.name} can be built by root only; its recipe.toml says why")
    children.in_child(remove_tree, str(recipe.work))  # what a killed build has left
    try:
        made = _Listener(recipe, progress).listen()
        image = Image(
            **{key: made[key] for key in ("name", "digest", "bytes", "zstd_bytes", "files", "gzip_bytes")},
            tarball=state.home() / "images" / f"{recipe.name}.tar.zst",
        )
        keep(
            image,
            recipe.work / "tarball",
            {key: made[key] for key in ("inputs", "runs")} | {"built_from": built_from},
        )
        return image
    finally:
        children.in_child(remove_tree, str(recipe.work))


class _Listener:
    """Our end of a build: it starts the child, and hears from it how far it is and how it ended."""

    def __init__(self, recipe: Recipe, progress: Progress | None) -> None:
        self.recipe = recipe
        self.progress = progress
        self.half = ""
        self.pidfd: int | None = None
        self.answer: dict[str, Any] = {}

    def listen(self) -> dict[str, Any]:
        """Build, and return the facts of the image. Raises BuildError."""
        child = children.start_child(_build_in_child, self.recipe, epoch())
        child.send_output(self)
        try:
            child.wait()
        finally:
            child.close()
            self.wait_for_the_end()
        if "error" in self.answer or not self.answer:
            log = _log(self.recipe.name)
            said = self.answer.get("error", "the build was killed")
            raise BuildError(f"recipe {self.recipe.name}: {said} (the whole log: {log})", _tail(log))
        return self.answer

    def write(self, text: str) -> None:
        """Take what the child says, a JSON object a line."""
        *lines, self.half = (self.half + text).split("\n")
        for message in map(json.loads, lines):
            if "done" in message and self.progress:
                self.progress(message["what"], message["done"], message["total"])
            elif "pid" in message:
                with contextlib.suppress(ProcessLookupError):
                    self.pidfd = os.pidfd_open(message["pid"])
            elif "digest" in message or "error" in message:
                self.answer = message

    def flush(self) -> None:
        """Nothing is held back."""

    def wait_for_the_end(self) -> None:
        """Wait until the first process of the build's pid namespace, and with it all of them, has ended."""
        if self.pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            select.select([self.pidfd], [], [], ENDS_WITHIN)
            os.close(self.pidfd)


def _log(name: str) -> Path:
    return state.home() / "builds" / name / "log"


def _tail(log: Path) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
    except OSError:
        return ""


def _ended(command: Iterable[object], status: int) -> str:
    words = " ".join(map(str, command))
    words = words if len(words) <= 80 else words[:79] + "…"
    how = (
        f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
    )
    return f"{words!r} {how}"


# ---------------------------------------------------------------------- in the child


def _build_in_child(recipe: Recipe, time_of_files: int) -> None:
    """Start the build as the first process of new namespaces, and stay until it has ended."""
    messages = os.dup(1)
    _prepare(recipe, time_of_files)
    syscalls.unshare(syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNS)
    go_read, go_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(go_read, 1)  # until our pid is known to who has to wait for our end
        _first_process(recipe, messages)
    _say(messages, {"pid": pid})
    os.write(go_write, b"g")
    os.waitpid(pid, 0)


def _prepare(recipe: Recipe, time_of_files: int) -> None:
    """What programs print goes to the log; what they would take from the reader's settings is set."""
    log = os.open(_log(recipe.name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    for target in (1, 2):
        os.dup2(log, target)
    os.close(log)
    os.umask(0o022)
    (recipe.work / "tmp").mkdir(parents=True)
    os.environ |= {
        "TMPDIR": str(recipe.work / "tmp"), "LC_ALL": "C.UTF-8", "TZ": "UTC",
        "SOURCE_DATE_EPOCH": str(time_of_files),
    }  # fmt: skip
    os.environ["PATH"] += ":/usr/local/sbin:/usr/sbin:/sbin"  # Debian leaves these out for ordinary users


def _first_process(recipe: Recipe, messages: int) -> NoReturn:
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        mounts.set_propagation("/", "private")
        with contextlib.suppress(
            OSError
        ):  # where parts of /proc are covered, as in Docker, the old one has to do
            mounts.proc("/proc")
        _say(messages, _make(recipe, messages))
    except BaseException as error:
        _say(messages, {"error": _in_words(error, recipe)})
    os._exit(0)


def _make(recipe: Recipe, messages: int) -> dict[str, Any]:
    """Fill the tree, weigh it and pack it."""
    tell = _teller(messages)
    root = recipe.work / "root"
    root.mkdir()
    os.chmod(root, 0o755)
    tell(f"build {recipe.name}", 0, 1)
    used = _builder(recipe)(root, recipe, tell)
    sys.stdout.flush()
    weights = weigh(root)
    if not weights:
        raise BuildError("build.py has left the tree empty")
    tarball = recipe.work / "tarball"
    digest = pack(root, tarball, same_owner=True, progress=tell)
    return {
        "name": recipe.name,
        "digest": digest,
        "bytes": sum(weight.bytes for weight in weights),
        "files": len(weights),
        "zstd_bytes": tarball.stat().st_size,
        "gzip_bytes": gzip_size(tarball, progress=tell),
        "inputs": {str(path): _digest_of_file(path) for path in sorted(used or ())},
        "runs": [name for name in _RUNS if any(os.path.lexists(root / d / name) for d in ("bin", "usr/bin"))],
    }


_RUNS = ("sh", "python3", "micropython", "node", "npm", "gcc", "apt-get")
"""Programs of which `labkernel images` says that an image has them."""


def _builder(recipe: Recipe) -> Any:
    """The function `build` of the recipe's build.py."""
    file = recipe.folder / "build.py"
    sys.dont_write_bytecode = True  # the folder is the reader's
    sys.path[:0] = [str(recipe.folder), str(recipe.folder.parent)]  # what recipes share lies beside them
    specification = importlib.util.spec_from_file_location("build", file)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.build


def _teller(messages: int) -> Progress:
    """Tells how far we are, ten times a second at most."""
    last = ("", 0.0)

    def tell(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if what != last[0] or now - last[1] > 0.1 or done == total:
            last = (what, now)
            _say(messages, {"what": what, "done": done, "total": total})

    return tell


def _say(messages: int, message: Mapping[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(messages, data) :]


def _in_words(error: BaseException, recipe: Recipe) -> str:
    """What failed, in words; the traceback goes to the log where it is no failure that we know."""
    free = shutil.disk_usage(recipe.work.parent).free
    full = (
        f"no space left on the disk of {state.home()} ({free >> 20} MB free): make room there, or set "
        "LABKERNEL_HOME to a directory on another disk"
    )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return full
    if isinstance(error, subprocess.CalledProcessError):
        error = BuildError(_ended([error.cmd] if isinstance(error.cmd, str) else error.cmd, error.returncode))
    if isinstance(error, BuildError):
        # A program that has no room says so in the log, for which there is no room either.
        return f"{error.text}; {full}" if free < NO_ROOM else error.text
    traceback.print_exception(error)
    sys.stderr.flush()
    return f"{type(error).__name__}: {error}"


NO_ROOM = 1 << 20
"""Bytes free on a disk that is full for all purposes."""
