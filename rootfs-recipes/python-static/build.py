"""Python with nothing beside it: no loader, no library, no module in a file of its own.

The libraries that the standard test program wants are compiled first, as archives for the linker, from the source
packages of the distribution too. What a static program cannot do is in static_dl.c.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import static_cpython as static

from labkernel.image import Progress
from labkernel.image.recipes import Recipe


def build(root: Path, recipe: Recipe, tell: Progress) -> list[Path]:
    """Fetch, compile, and put together."""
    modules = static.chosen(recipe.folder / "modules.txt")
    sources = static.Sources(recipe, tell)
    compiler = static.Compiler(recipe, tell, static.SMALL, static.SMALL_LINK)
    libraries = recipe.work / "libraries"
    (libraries / "lib").mkdir(parents=True)
    (libraries / "include").mkdir()
    for package, compile_library in LIBRARIES.items():
        compile_library(compiler, sources.unpack(package), libraries)
    compiler.add(libraries)
    static_dl(compiler, recipe.folder, libraries)
    source = sources.unpack(f"python{static.python_version()}")
    python = static.compile_cpython(
        source, compiler, modules["compiled"], f"--with-openssl={libraries}", "--without-doc-strings",
        extra={"_ctypes": CTYPES},
    )  # fmt: skip
    files = static.library(python, modules["left out"])
    static.fill(root, python, files, zipfile.ZIP_DEFLATED)
    return static.inputs()


CTYPES = (
    "_ctypes _ctypes/_ctypes.c _ctypes/callbacks.c _ctypes/callproc.c _ctypes/stgdict.c _ctypes/cfield.c "
    "-DHAVE_FFI_PREP_CIF_VAR -DHAVE_FFI_PREP_CLOSURE_LOC -DHAVE_FFI_CLOSURE_ALLOC -lffi -ldl"
)
"""As Modules/Setup has it in a comment, up to Python 3.11."""


def static_dl(compiler: static.Compiler, source: Path, libraries: Path) -> None:
    """In place of musl's libdl.a, which is empty."""
    flags = compiler.environment["CFLAGS"].split()
    compiled = compiler.recipe.work / "static_dl.o"
    compiler.run("compile static_dl.c", source, "musl-cc", *flags, "-c", "static_dl.c", "-o", compiled)
    compiler.run("compile static_dl.c", source, "ar", "rcD", libraries / "lib/libdl.a", compiled)


def zlib(compiler: static.Compiler, source: Path, libraries: Path) -> None:
    """Compress, as gzip does: the library's archive is deflated."""
    compiler.run("configure zlib", source, "./configure", "--static")
    compiler.make("compile zlib", source, "libz.a")
    take(source, libraries, "libz.a", "zlib.h", "zconf.h")


def libffi(compiler: static.Compiler, source: Path, libraries: Path) -> None:
    """Call functions of which only the running program knows the arguments: for ctypes."""
    compiler.run(
        "configure libffi", source, "./configure", "--disable-shared", "--disable-docs",
        "--disable-exec-static-tramp", "--disable-multi-os-directory", f"--prefix={libraries}",
    )  # fmt: skip
    compiler.make("compile libffi", source, "install")


def sqlite3(compiler: static.Compiler, source: Path, libraries: Path) -> None:
    """A database in one file of C, which is first put together out of a hundred, by a program in Tcl."""
    compiler.run("configure SQLite", source, "./configure", "--disable-shared", "--disable-readline")
    compiler.make("put SQLite together", source, "sqlite3.c")
    settings = ("-DSQLITE_THREADSAFE=1", "-DSQLITE_OMIT_LOAD_EXTENSION", "-DSQLITE_ENABLE_FTS5")
    flags = compiler.environment["CFLAGS"].split()
    compiler.run("compile SQLite", source, "musl-cc", *flags, *settings, "-c", "sqlite3.c", "-o", "sqlite3.o")
    compiler.run("compile SQLite", source, "ar", "rcD", "libsqlite3.a", "sqlite3.o")
    take(source, libraries, "libsqlite3.a", "sqlite3.h")


def openssl(compiler: static.Compiler, source: Path, libraries: Path) -> None:
    """TLS and what it needs: nothing that is loaded at run time, no algorithm and no protocol that it does without."""
    left_out = (
        "shared", "dso", "module", "engine", "afalgeng", "legacy", "async", "tests", "ui-console", "comp",
        "aria", "bf", "camellia", "cast", "gost", "idea", "md4", "mdc2", "rc2", "rc4", "rmd160", "seed", "siphash",
        "sm2", "sm3", "sm4", "whirlpool", "cmp", "cms", "ct", "dtls", "srp", "ts",
    )  # fmt: skip
    compiler.run(
        "configure OpenSSL", source, "./config", *(f"no-{word}" for word in left_out),
        "--prefix=/usr", "--openssldir=/etc/ssl", "--libdir=lib",
    )  # fmt: skip
    compiler.make("compile OpenSSL", source, "build_libs")
    take(source, libraries, "libssl.a", "libcrypto.a")
    shutil.copytree(source / "include", libraries / "include", dirs_exist_ok=True)


LIBRARIES: dict[str, Callable[[static.Compiler, Path, Path], None]] = {
    "zlib": zlib, "libffi": libffi, "sqlite3": sqlite3, "openssl": openssl,
}  # fmt: skip
"""Source packages, and how each is compiled."""


def take(source: Path, libraries: Path, *names: str) -> None:
    """Put what was compiled where compiler and linker will look."""
    for name in names:
        shutil.copy(source / name, libraries / ("lib" if name.endswith(".a") else "include") / name)
