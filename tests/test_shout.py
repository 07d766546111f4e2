"""The recipes of shout: what they are pinned to, what they leave out, and what remains of it."""

from __future__ import annotations

import ctypes
import json
import re
import runpy
import subprocess
from pathlib import Path

import elf_names
import pytest

from labkernel.image import recipes, store
from labkernel.image.closure import closure

NAIVE = recipes.FOLDER / "shout-naive"


def test_every_module_is_pinned_by_its_digest_and_no_registry_is_named() -> None:
    lock = json.loads((NAIVE / "package-lock.json").read_text())
    root = lock["packages"].pop("")
    assert root["dependencies"] == json.loads((NAIVE / "package.json").read_text())["dependencies"]
    assert lock["packages"]["node_modules/shout"]["version"] == root["dependencies"]["shout"]
    for name, package in lock["packages"].items():
        assert re.fullmatch(r"sha512-[\w+/]{86}==", package["integrity"]), name
        assert "resolved" not in package, name
        wanted = package.get("dependencies", {}).values()
        assert not [version for version in wanted if ":" in version or "/" in version], name


LIBRARY = """
int base = 40;
int *where = &base;
int dropped(int n) { return n + base; }
int (*by_address)(int) = dropped;
int asked(int n) { return dropped(n) + by_address(0) - *where; }
__thread int mine = 7;
int also_asked(void) { return mine; }
"""
PROGRAM = """
#include <stdio.h>
int asked(int); int also_asked(void); extern int base;
int main(void) { base = 50; printf("%d %d\\n", asked(2), also_asked()); return 0; }
"""


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A library with many names, and a program that asks for three."""
    many = "".join(
        f"int a_function_of_a_long_name_that_nobody_asks_for_{n}(void) {{return {n};}}\n" for n in range(2000)
    )
    (tmp_path / "lib.c").write_text(LIBRARY + many)
    (tmp_path / "program.c").write_text(PROGRAM)
    library = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libmany.so.1", "-o", "libmany.so.1", "lib.c"]
    program = ["gcc", "-o", "program", "program.c", "libmany.so.1", "-Wl,-rpath,$ORIGIN"]
    for command in (library, program):
        subprocess.run(command, cwd=tmp_path, check=True)
    return tmp_path


def test_a_library_without_the_names_that_nobody_asks_for(built: Path) -> None:
    library = built / "libmany.so.1"
    before = library.read_bytes()
    after = elf_names.without_names(before, elf_names.names([built / "program"]))
    assert len(after) < len(before) / 2
    library.write_bytes(after)
    done = subprocess.run([built / "program"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "52 7\n"), done.stderr
    loaded = ctypes.CDLL(str(library))
    assert loaded.asked(1) == 41
    with pytest.raises(AttributeError):
        _ = loaded.dropped
    assert {"asked", "also_asked", "base", "mine"} <= elf_names.names([library])


def test_a_library_that_is_built_in_another_way_is_refused(built: Path) -> None:
    data = (built / "libmany.so.1").read_bytes()
    with pytest.raises(elf_names.NotThisOne, match="not for a 64-bit machine"):
        elf_names.without_names(data[:4] + b"\1" + data[5:], [])
    with pytest.raises(elf_names.NotThisOne, match="another machine"):
        elf_names.without_names(data[:18] + b"\x28\0" + data[20:], [])


def test_what_runs_and_the_licences_stay(tmp_path: Path) -> None:
    modules = tmp_path / "usr/local/lib/node_modules/it"
    stays = ("index.js", "package.json", "LICENSE.md", "lib/copying", "lib/tester.js")
    for name in (*stays, "README.md", "test/index.js", ".eslintrc", "types/it.d.ts", "dist/it.js.map"):
        (modules / name).parent.mkdir(parents=True, exist_ok=True)
        (modules / name).write_text(name)
    content = closure([])
    runpy.run_path(str(recipes.FOLDER / "shout/build.py"))["add_modules"](content, tmp_path)
    inside = {entry.path for entry in content if entry.why == "shout"}
    assert inside == {f"/usr/local/lib/node_modules/it/{name}" for name in stays}


def test_a_twentieth_of_the_naive_image() -> None:
    """Where somebody has built both: the store is theirs, and only read."""
    stored = {image.name: image for image in store.stored()}
    if not {"shout", "shout-naive"} <= set(stored):
        pytest.skip("shout and shout-naive are not built here: make recipes")
    assert 20 * stored["shout"].bytes <= stored["shout-naive"].bytes
