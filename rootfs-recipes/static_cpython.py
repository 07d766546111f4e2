"""What the recipes with a static CPython share: the distribution's source packages, compiled against musl.

glibc can be linked statically, but looks up users and host names in libraries that it opens at run time; musl has all
that in it. Debian's musl-gcc is gcc with musl's headers and libraries in place of glibc's.
Source: Modules/Setup.stdlib.in and Modules/makesetup of CPython; man 1 apt-get ("source"); man 1 musl-gcc.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import from_packages
import zipped_library
from from_packages import codename, host_sources
from zipped_library import byte_code, write_zip

from labkernel.image import Progress
from labkernel.image.recipes import BuildError, Recipe

LAST_LINES = 12
"""Lines of a program's log that are shown when it fails."""

SMALL = "-Os -ffunction-sections -fdata-sections -fno-asynchronous-unwind-tables -fno-unwind-tables -fno-pie"
"""Compile for size; each function in a section of its own, so that the linker can leave out those nobody calls; no
tables for unwinding the stack, which C does not need."""

SMALL_LINK = "-Wl,--gc-sections -Wl,--build-id=none -Wl,-z,norelro -Wl,-z,noseparate-code"
"""Leave out what nobody calls, the digest of the build, and what fills up pages between code and data."""

NO_SECTIONS = (".comment", ".note.gnu.property", ".note.gnu.build-id")
"""Which compiler it was, and what else only a linker or a packager reads."""


# ---------------------------------------------------------------------- sources


class Sources:
    """The distribution's source packages, by an apt whose lists and files are in the recipe's cache.

    The machine's own apt is not changed: most machines do not have `deb-src` among their sources, and an ordinary
    user could not update the lists. Which packages there are is signed, and each is checked against that, as always.
    """

    def __init__(self, recipe: Recipe, tell: Progress) -> None:
        self.recipe = recipe
        self.tell = tell
        self.files = recipe.cache / "sources"
        for name in ("sources", "apt/lists/partial", "apt/cache/archives/partial"):
            (recipe.cache / name).mkdir(parents=True, exist_ok=True)
        for file in host_sources(codename(), recipe.work):
            text = file.read_text()
            text = re.sub(r"^deb ", "deb-src ", text, flags=re.M)
            file.write_text(re.sub(r"^Types:.*", "Types: deb-src", text, flags=re.M))
        (recipe.work / "sources.d").mkdir()
        for file in recipe.work.glob("host.*"):
            file.rename(recipe.work / "sources.d" / file.name)
        settings = {
            "Dir::Etc::SourceList": "/dev/null",
            "Dir::Etc::SourceParts": recipe.work / "sources.d",
            "Dir::State::Lists": recipe.cache / "apt/lists",
            "Dir::Cache": recipe.cache / "apt/cache",
            "APT::Sandbox::User": "root",  # in a user namespace there may be no other
            "Acquire::Languages": "none",
        }
        configuration = recipe.work / "apt.conf"
        configuration.write_text("".join(f'{key} "{value}";\n' for key, value in settings.items()))
        self.environment = {**os.environ, "APT_CONFIG": str(configuration)}
        tell("ask for the newest sources", 0, 1)
        recipe.run("apt-get", "--quiet", "update", env=self.environment)

    def unpack(self, package: str) -> Path:
        """Fetch a source package, unpack it with the distribution's patches, and return its directory.

        The newest version of which the mirror has every file: some forget the files of the last security update
        but one, some the last. What has been fetched before is not fetched again.
        """
        asked = ["apt-cache", "showsrc", "--only-source", package]
        shown = subprocess.run(asked, env=self.environment, capture_output=True, text=True).stdout
        versions = sorted(set(re.findall(r"^Version: (\S+)", shown, re.M)), key=_version, reverse=True)
        for version in versions:
            self.tell(f"fetch the sources of {package}", 0, 1)
            fetch = [
                "apt-get",
                "--quiet",
                "source",
                "--only-source",
                "--download-only",
                f"{package}={version}",
            ]
            if subprocess.run(fetch, cwd=self.files, env=self.environment).returncode == 0:
                described = self.files / f"{package}_{version.rpartition(':')[2]}.dsc"
                place = self.recipe.work / package
                self.recipe.run("dpkg-source", "--no-check", "--extract", described, place)
                return place
        raise BuildError(f"the distribution's mirror has none of the source packages {package} {versions}")


def _version(version: str) -> tuple[list[int | str], ...]:
    """A key to sort versions of one package by: good for what a distribution offers at one time."""
    return tuple([int(word) if word.isdigit() else word] for word in re.findall(r"\d+|[^\d.]+", version))


# ---------------------------------------------------------------------- compiling


def chosen(file: Path) -> dict[str, list[str]]:
    """The names that a modules.txt lists, by its sections: `[section]`, then a name a line; `#` begins a comment."""
    found: dict[str, list[str]] = {}
    for line in file.read_text().splitlines():
        word = line.partition("#")[0].strip()
        if word.startswith("["):
            names = found.setdefault(word.strip("[]"), [])
        elif word:
            names.append(word)
    return found


class Compiler:
    """musl-gcc, for who builds with `configure` and `make`; through ccache where that is installed."""

    def __init__(self, recipe: Recipe, tell: Progress, flags: str, link: str = "") -> None:
        self.recipe = recipe
        self.tell = tell
        self.log = recipe.cache / "build.log"
        self.log.unlink(missing_ok=True)
        headers = recipe.work / "headers"  # the kernel's, but not glibc's beside them
        headers.mkdir()
        triplet = subprocess.run(["gcc", "-print-multiarch"], capture_output=True, text=True).stdout.strip()
        for name, place in {"linux": "", "asm-generic": "", "asm": triplet}.items():
            (headers / name).symlink_to(Path("/usr/include", place, name))
        # Debian's gcc answers for glibc, and CPython's configure takes that for a contradiction. What is said here and
        # not in CFLAGS is not written down in what comes out: OpenSSL tells its flags, and paths differ.
        script = f"""\
#!/bin/sh
[ "$*" = --print-multiarch ] && exit
exec musl-gcc -static -no-pie -isystem {headers} -ffile-prefix-map={recipe.work}=. "$@"
"""
        programs = recipe.work / "bin"
        programs.mkdir()
        (programs / "musl-cc").write_text(script)
        (programs / "musl-cc").chmod(0o755)
        self.environment = {
            **os.environ,
            "CC": "musl-cc",
            "CFLAGS": flags,
            "LDFLAGS": link,
            "PKG_CONFIG_LIBDIR": "/nowhere",  # what it finds is made for glibc
            "CCACHE_DIR": str(recipe.cache / "ccache"),
            "CCACHE_BASEDIR": str(recipe.work),
            "PATH": f"{programs}:/usr/lib/ccache:{os.environ['PATH']}",  # Debian's ccache has there a "gcc" of its own
        }

    def answers(self, options: Sequence[str]) -> Path:
        """Where configure finds its answers again when nothing has changed that they depend on: half of its time."""
        asked = ["dpkg-query", "--show", *self.recipe.needs]
        packages = subprocess.run(asked, capture_output=True, text=True).stdout
        sources = sorted(path.name for path in (self.recipe.cache / "sources").glob("*.dsc"))
        settings = [self.environment.get(name) for name in ("CFLAGS", "CPPFLAGS", "LDFLAGS")]
        key = hashlib.sha256(repr((packages, sources, settings, options)).encode()).hexdigest()[:16]
        for path in self.recipe.cache.glob("configure-*"):
            if path.name != f"configure-{key}":
                path.unlink()
        return self.recipe.cache / f"configure-{key}"

    def add(self, libraries: Path) -> None:
        """Compile and link from now on with what is in *libraries*, in include/ and in lib/."""
        self.environment["CPPFLAGS"] = f"-I{libraries}/include"
        self.environment["LDFLAGS"] += f" -L{libraries}/lib"

    def run(self, what: str, place: Path, *command: str | Path, total: int = 0, **variables: str) -> None:
        """Run a program in *place*, what it prints into the log; *total*: how many files it compiles, to tell how far
        it is. Raises BuildError, and shows the end of the log.
        """
        with self.log.open("ab") as log:
            log.write(f"\n== {what}: {' '.join(map(str, command))}\n".encode())
            log.flush()
            start = log.tell()
            try:
                process = subprocess.Popen(
                    list(map(str, command)), cwd=place, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    env=self.environment | variables,
                )  # fmt: skip
            except FileNotFoundError as error:
                raise BuildError(f"there is no program {command[0]}: {error.strerror}") from error
            done = 0
            with self.log.open("rb") as reader:
                reader.seek(start)
                while process.poll() is None:
                    done += reader.read().count(b" -c ")
                    self.tell(what, min(done, total), max(total, 1))
                    time.sleep(0.2)
        if process.returncode:
            print("\n".join(self.log.read_text(errors="replace").splitlines()[-LAST_LINES:]))
            raise BuildError(f"{what} failed: see {self.log}")

    def make(self, what: str, place: Path, *words: str, **variables: str) -> None:
        """Run make for *words*, on every processor that we may use."""
        environment = self.environment | variables
        asked = subprocess.run(["make", "-n", *words], cwd=place, env=environment, capture_output=True)
        jobs = f"-j{len(os.sched_getaffinity(0))}"
        self.run(what, place, "make", jobs, *words, total=asked.stdout.count(b" -c "), **variables)


@dataclass(frozen=True)
class CPython:
    """A static CPython where it has been built: it runs here too."""

    build: Path
    library: Path  # the whole standard library, as source
    version: str  # "3.11"

    @property
    def executable(self) -> Path:
        """The program; as long as it lies there, it finds the library."""
        return self.build / "python"


FROZEN = ("importlib._bootstrap", "importlib._bootstrap_external", "zipimport")
"""Modules that are part of the interpreter: it cannot read any other without them."""


def freeze_only(names: Iterable[str], source: Path) -> None:
    """Take the modules other than *names* out of the interpreter: it looks for them in its library."""
    frozen = source / "Python/frozen.c"
    text = frozen.read_text()
    for array in ("stdlib_modules", "test_modules"):
        text = re.sub(rf"({array}\[\] = {{\n).*?(    {{0, 0, 0}})", r"\1\2", text, flags=re.S)
    frozen.write_text(text)
    makefile = source / "Makefile.pre.in"
    kept = "|".join(map(re.escape, names))
    pattern = rf"^\tPython/frozen_modules/(?!(?:{kept})\.h:)\S+\.h:\S+ \\\n"
    makefile.write_text(re.sub(pattern, "", makefile.read_text(), flags=re.M))


def python_version() -> str:
    """The series of the distribution's Python: "3.11"."""
    asked = ["/usr/bin/python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def compile_cpython(
    source: Path,
    compiler: Compiler,
    modules: Sequence[str],
    *options: str,
    extra: Mapping[str, str] | None = None,
) -> CPython:
    """Build the interpreter with *modules* in it, those in C.

    "one|other" is whichever this version of Python has. *extra*: lines for modules that CPython's own table may lack.
    Raises BuildError for a module of which configure says that it cannot be built here.
    """
    place = compiler.recipe.work / "build"
    place.mkdir()
    relative = os.path.relpath(source, place)
    compiler.run(
        "configure Python", place, f"{relative}/configure", f"--cache-file={compiler.answers(options)}",
        "--prefix=/usr", "--without-ensurepip", "--disable-test-modules", "--without-readline", *options,
    )  # fmt: skip
    table = dict(extra or {})
    for line in (place / "Modules/Setup.stdlib").read_text().splitlines():
        if re.match(r"\w+ ", line):  # those that it cannot be built with here begin with "#"
            table[line.split()[0]] = line
    lines = []
    for names in modules:
        found = [table[name] for name in names.split("|") if name in table]
        if not found:
            raise BuildError(f"configure says that {names} cannot be built here (see {compiler.log})")
        lines.append(found[0])
    setup = "\n".join(["*static*", *lines, ""])
    (place / "Modules/Setup.local").write_text(setup)
    (place / "Modules/Setup.stdlib").write_text("")  # from 3.12 on it is read too
    # Nothing is loaded at run time, so no name has to be there for what would be: else all of them are kept.
    compiler.make("compile Python", place, "python", "LINKFORSHARED=", "OPT=-DNDEBUG -fwrapv")
    version = re.search(r"^VERSION=\s*(\S+)", (place / "Makefile").read_text(), re.M)
    assert version
    return CPython(place, source / "Lib", version[1])


# ---------------------------------------------------------------------- the tree

IMPORTED = """
import sys
for name in sys.argv[1:]:
    __import__(name)
print("\\n".join(sorted(sys.modules)))
"""


def imported(python: CPython, names: Sequence[str]) -> list[Path]:
    """The files of the library that are needed when *names* are imported, relative to it."""
    command = [python.executable, "-E", "-S", "-B", "-c", IMPORTED, *names]
    modules = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    found: list[Path] = []
    for name in {*modules} - {*FROZEN}:
        path = Path(*name.split("."))
        found += [
            file
            for file in (path.with_suffix(".py"), path / "__init__.py")
            if (python.library / file).is_file()
        ]
    return sorted(found)


DIRECTORIES = ("dev", "etc", "proc", "root", "run", "sys", "tmp", "usr/bin")
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/usr/bin/python3\nnobody:x:65534:65534:nobody:/:/usr/bin/python3\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    # Without it, musl asks a name server for the machine's own name, and waits where there is none.
    "etc/hosts": "127.0.0.1\tlocalhost\n::1\tlocalhost\n",
}


def library(python: CPython, left_out: Sequence[str]) -> list[Path]:
    """The files of the library, relative to it, but those that a pattern of *left_out* names."""
    # The file from which the module sysconfig has what is known since the build. Made by a build, it is full of the
    # paths and flags of that; this says what programs ask of it at run time.
    asked = [python.executable, "-E", "-c", "import sysconfig; print(sysconfig._get_sysconfigdata_name())"]
    name = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    known = {
        "prefix": "/usr",
        "exec_prefix": "/usr",
        "VERSION": python.version,
        "TZPATH": "/usr/share/zoneinfo",
    }
    (python.library / f"{name}.py").write_text(f"build_time_vars = {known}\n")
    files = (path.relative_to(python.library) for path in python.library.rglob("*.py"))
    return sorted(path for path in files if not any(fnmatch(str(path), pattern) for pattern in left_out))


def fill(root: Path, python: CPython, files: Iterable[Path], compression: int) -> None:
    """Make the tree: the interpreter, *files* of its library in one archive, and what a program expects of a system.

    *compression*: zipfile.ZIP_STORED or ZIP_DEFLATED, which takes the module zlib.
    """
    for name in DIRECTORIES:
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    (root / "root").chmod(0o700)
    for name, text in FILES.items():
        (root / name).write_text(text)
    program = root / "usr/bin/python3"
    removed = [f"--remove-section={name}" for name in NO_SECTIONS]
    subprocess.run(["strip", "--strip-all", *removed, "-o", program, python.executable], check=True)
    # Python looks for this directory of loadable modules, and warns where it finds none.
    (root / f"usr/lib/python{python.version}/lib-dynload").mkdir(parents=True)
    library = f"usr/lib/python{python.version.replace('.', '')}.zip"
    content = byte_code(python.executable, python.library, files, f"/{library}")
    write_zip(content, root / library, compression)


def inputs() -> list[Path]:
    """The files beside the recipe that decide what comes out."""
    return [Path(__file__), Path(from_packages.__file__), Path(zipped_library.__file__)]
