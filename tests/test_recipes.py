"""Recipes: what they may say, what a build does when it fails, is interrupted or has no room, and what comes out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkernel import images
from labkernel.image import recipes, store
from labkernel.image.recipes import BadRecipe, BuildError, NoSuchRecipe
from tests.helpers import own_home

LINES = {
    "name": '"mine"', "what": '"a test"', "teaches": '"02-tarball"', "size": '"1K"', "proof": '["sh", "-c", "true"]',
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        (
            place / "images"
        ).unlink()  # that of this run of the tests is shared with others, who count what is in it
        (place / "rootfs").unlink()
        yield place


def write(folder: Path, build: str = "(root / 'file').write_text('content')", **lines: str) -> str:
    """Make a recipe, and return the name under which it can be built."""
    folder.mkdir(exist_ok=True)
    text = "".join(
        f"{key} = {value}\n" for key, value in (LINES | {"name": f'"{folder.name}"'} | lines).items()
    )
    (folder / "recipe.toml").write_text(text)
    body = "".join(f"    {line}\n" for line in build.splitlines())
    (folder / "build.py").write_text(f"def build(root, recipe, tell):\n{body}")
    return str(folder)


# ---------------------------------------------------------------------- what a recipe may say


def test_every_recipe_can_be_read() -> None:
    found = recipes.all_recipes()
    assert "busybox" in [recipe.name for recipe in found]
    assert images.STANDARD not in [recipe.name for recipe in found]
    for recipe in found:
        assert recipes.proof_command(recipe)
        assert recipe.teaches[:2].isdigit()
        assert set(recipe.starts_from) <= {other.name for other in found}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ({"colour": '"blue"'}, "unknown key 'colour'; there are: name, what"),
        ({"size": '"big"'}, "size 'big': give bytes"),
        ({"size": "2"}, "size = 2: give a text"),
        ({"proof": '"sh"'}, "proof = 'sh': give a list of texts"),
        ({"proof": "[1]"}, r"proof = \[1\]: give a list of texts"),
        ({"proof": "[]"}, "proof is missing"),
        ({"what": '""'}, "what is missing"),
        ({"name": '"other"'}, "has to be the folder's, mine"),
        ({"user": '"me"'}, 'give "any" or "root"'),
        ({"same_bits": "false"}, "a sentence that says why"),
        ({"slow": '"yes"'}, "slow = 'yes': give true or false"),
        ({"needs": "["}, "recipe.toml: "),
    ],
)
def test_a_bad_recipe_is_refused_with_the_key(tmp_path: Path, lines: dict[str, str], said: str) -> None:
    write(tmp_path / "mine", **lines)
    with pytest.raises(BadRecipe, match=said):
        recipes.load(tmp_path / "mine")


def test_a_recipe_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoSuchRecipe, match=r"no image 'nothing'; recipes: .*busybox"):
        recipes.build("nothing")
    with pytest.raises(NoSuchRecipe):
        recipes.build(str(tmp_path))
    monkeypatch.setattr(recipes, "FOLDER", tmp_path / "nowhere")
    with pytest.raises(NoSuchRecipe, match="no recipes here"):
        recipes.build("busybox")


# ---------------------------------------------------------------------- building


def test_a_build_is_kept_until_something_changes(tmp_path: Path, home: Path) -> None:
    name = write(tmp_path / "mine")
    image = recipes.build(name)
    assert (image.bytes, image.files) == (7, 1)
    tarball = image.tarball.stat().st_mtime_ns
    assert recipes.build(name) == image == store.whole("mine")
    assert image.tarball.stat().st_mtime_ns == tarball
    assert recipes.build(name, again=True) == image
    assert image.tarball.stat().st_mtime_ns != tarball
    write(tmp_path / "mine", "(root / 'file').write_text('other')")
    assert recipes.build(name).bytes == 5
    image.tarball.write_bytes(b"cut short")
    assert recipes.build(name).tarball.stat().st_size > 20
    assert json.loads((home / "images/mine.json").read_text())["name"] == "mine"


def test_a_build_that_fails_shows_the_end_of_its_log(tmp_path: Path, home: Path) -> None:
    before = store.whole("mine")
    name = write(tmp_path / "mine", "recipe.run('sh', '-c', 'seq 30; echo no such thing >&2; exit 3')")
    with pytest.raises(BuildError) as caught:
        recipes.build(name)
    assert "recipe mine: 'sh -c seq 30" in caught.value.text and "exit status 3" in caught.value.text
    assert caught.value.tail.splitlines()[-2:] == ["30", "no such thing"]
    assert len(caught.value.tail.splitlines()) == recipes.LAST_LINES
    assert store.whole("mine") == before
    assert not (home / "builds/mine/work").exists()


def test_the_ids_are_those_of_the_image(tmp_path: Path) -> None:
    build = "(root / 'etc').mkdir()\n(root / 'etc/x').write_text('x')\nimport os\nos.chown(root / 'etc/x', 33, 42)"
    write(tmp_path / "owned", build)
    recipes.build(str(tmp_path / "owned"))
    file = images.rootfs("owned") / "etc/x"
    base = file.parent.stat().st_uid
    assert (file.stat().st_uid, file.stat().st_gid) == (base + 33, base + 42)
