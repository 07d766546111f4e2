"""What the recipes with a static CPython share: sources from the distribution, and a library in one archive."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import from_packages
import pytest
import static_cpython
import zipped_library

from labkernel.image import python as pythons
from labkernel.image import recipes
from labkernel.image.recipes import BuildError, Recipe

needs_dpkg_dev = pytest.mark.skipif(
    not (shutil.which("dpkg-source") and shutil.which("apt-get")), reason="dpkg-dev is not installed"
)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    for name in ("work", "cache"):
        (tmp_path / name).mkdir()
    return replace(recipes.find("python-http"), work=tmp_path / "work", cache=tmp_path / "cache")


def tell(what: str, done: int, total: int) -> None:
    """Progress, for nobody."""


# ---------------------------------------------------------------------- source packages


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mirror of the distribution in a directory, with two versions of a source package, and apt's list with it."""
    place = tmp_path / "mirror"
    pool = place / "pool"
    pool.mkdir(parents=True)
    for version in ("1.9", "1.10"):
        tree = tmp_path / "hello"
        (tree / "debian/source").mkdir(parents=True)
        (tree / "debian/source/format").write_text("3.0 (native)\n")
        (tree / "debian/control").write_text(
            "Source: hello\nMaintainer: A <a@b.c>\n\nPackage: hello\nArchitecture: all\n"
        )
        date = "Thu, 01 Jan 1970 00:00:00 +0000"
        (tree / "debian/changelog").write_text(
            f"hello ({version}) stable; urgency=low\n\n  * x\n\n -- A <a@b.c>  {date}\n"
        )
        (tree / "version").write_text(version)
        subprocess.run(["dpkg-source", "--build", tree], cwd=pool, check=True, capture_output=True)
        shutil.rmtree(tree)
    index = place / f"dists/{from_packages.codename()}/main/source"
    index.mkdir(parents=True)
    scanned = subprocess.run(["dpkg-scansources", "pool"], cwd=place, check=True, capture_output=True)
    (index / "Sources").write_bytes(scanned.stdout)
    (tmp_path / "apt/sources.list.d").mkdir(parents=True)
    line = f"deb [trusted=yes] file:{place} {from_packages.codename()} main\n"
    (tmp_path / "apt/sources.list").write_text(line + "deb [trusted=yes] file:/nowhere other main\n")
    monkeypatch.setattr(from_packages, "APT", tmp_path / "apt")
    return place


@needs_dpkg_dev
def test_the_newest_source_of_which_all_is_there(recipe: Recipe, mirror: Path) -> None:
    assert (static_cpython.Sources(recipe, tell).unpack("hello") / "version").read_text() == "1.10"
    assert [path.name for path in sorted((recipe.cache / "sources").iterdir())] == [
        "hello_1.10.dsc",
        "hello_1.10.tar.xz",
    ]


@needs_dpkg_dev
def test_a_mirror_that_has_forgotten_a_file(recipe: Recipe, mirror: Path) -> None:
    (mirror / "pool/hello_1.10.dsc").unlink()
    sources = static_cpython.Sources(recipe, tell)
    assert (sources.unpack("hello") / "version").read_text() == "1.9"
    (mirror / "pool/hello_1.9.tar.xz").write_bytes(b"something else")
    for path in (recipe.cache / "sources").iterdir():
        path.unlink()
    with pytest.raises(BuildError, match=r"none of the source packages hello \['1.10', '1.9'\]"):
        sources.unpack("hello")


def test_a_list_of_modules_is_read(tmp_path: Path) -> None:
    file = tmp_path / "modules.txt"
    file.write_text("# a comment\n[one]   # another\na   # why\n\nb|c\n[two words]\nd/*\n")
    assert static_cpython.chosen(file) == {"one": ["a", "b|c"], "two words": ["d/*"]}


@pytest.mark.parametrize("name", ["python-static", "python-http"])
def test_the_lists_of_the_recipes(name: str) -> None:
    lists = static_cpython.chosen(recipes.find(name).folder / "modules.txt")
    for names in lists.values():
        assert names and len(set(names)) == len(names)
    assert {"_socket", "unicodedata"} <= {*lists["compiled"]}


def test_the_log_of_a_failed_step_is_shown(recipe: Recipe, capfd: pytest.CaptureFixture[str]) -> None:
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    compiler = static_cpython.Compiler(recipe, tell, "")
    with pytest.raises(BuildError, match="cook failed"):
        compiler.run("cook", recipe.work, "sh", "-c", "echo no salt; exit 1")
    assert "no salt" in capfd.readouterr().out
    assert "== cook: sh -c" in compiler.log.read_text()
    with pytest.raises(BuildError, match="there is no program no-such-program"):
        compiler.run("cook", recipe.work, "no-such-program")


# ---------------------------------------------------------------------- the library in one archive


def test_a_library_in_an_archive_is_imported_from(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text(
        '"""Words."""\nassert not "asserted"\nnames = {"a", "b", "c"}\n'
    )
    (tmp_path / "other.py").write_text("from mine import names\n")
    files = [Path("mine/__init__.py"), Path("other.py")]
    content = zipped_library.byte_code(pythons.running(), tmp_path, files, "/inside")
    assert sorted(content) == ["mine/__init__.pyc", "other.pyc"]
    assert (
        b"Words." not in content["mine/__init__.pyc"] and str(tmp_path).encode() not in content["other.pyc"]
    )
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        for name in ("one.zip", "two.zip"):
            again = zipped_library.byte_code(pythons.running(), tmp_path, files, "/inside")
            zipped_library.write_zip(again, tmp_path / name, compression)
        assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
        code = f"import sys; sys.path.insert(0, {str(tmp_path / 'one.zip')!r}); import other; print(other.__file__)"
        done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == f"{tmp_path}/one.zip/other.pyc\n"
