"""The checks of notebook 22: an image on top of another, the blobs that nobody needs, and what a layer has covered."""

from __future__ import annotations

import functools
import io
import random
import secrets
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labkernel.image.layer import WHITEOUT
from labkernel.image.merge import merge
from labkernel.image.oci import CONFIG, BadImage, Image, Layer, Layout
from labkernel.image.tarball import Limits
from labkernel.image.unpack import UnsafeArchive
from labkernel.lab.checks import NotYet, exercise, run_answer
from labkernel.lab.scratch import temporary

MOST = Limits().bytes
CREATED = "1980-01-01T00:00:00Z"


@exercise(
    "22.1",
    looks_at="the layout: its tags, its blobs and their digests, and what your image shows when merged",
)
def extend(answer: Callable[..., Any]) -> str:
    """A new image of the old one's layers and one more."""
    with temporary() as place:
        words: str = run_answer(_judge_extend, answer, place)
    return words


@exercise("22.2", looks_at="a layout in which tags have moved, and what can still be reached from its index")
def unused(answer: Callable[[Path], Any]) -> str:
    """The blobs that no tag leads to."""
    with temporary() as place:
        count: int = run_answer(_judge_unused, answer, place)
    return f"{count} blobs can go, and every image that has a tag stays whole."


@exercise("22.3", looks_at="what you say of files in three images, each of them covered by a layer above")
def dig(answer: Callable[[Path, str, str], Any]) -> str:
    """The content of a file that the image no longer shows."""
    with temporary() as place:
        run_answer(_judge_dig, answer, place)
    return "deleted, replaced, or gone with its directory: it was still there, each time."


# ---------------------------------------------------------------------- inner parts


def _word() -> str:
    return secrets.token_hex(4)


def _layer(layout: Layout, files: dict[str, str]) -> Layer:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, text in sorted(files.items()):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return layout.add_layer_from(io.BytesIO(out.getvalue()), random.choice(["gzip", "none"]))


def _image(layout: Layout, tag: str, *layers: Layer) -> Image:
    settings = {"Cmd": ["cat", _word()], "Env": [f"WORD={_word()}"]}
    return layout.add_image(layers, settings, created=CREATED, history=[tag] * len(layers), tag=tag)


def _blobs(layout: Layout) -> set[str]:
    found = {f"sha256:{path.name}" for path in (layout.path / "blobs" / "sha256").iterdir()}
    return {name for name in found if not name.startswith("sha256:.")}


def _of(image: Image) -> set[str]:
    """Every blob that an image needs."""
    return {image.manifest.digest, image.config.digest, *(layer.blob.digest for layer in image.layers)}


def _shown(layout: Layout, layers: tuple[Layer, ...]) -> dict[str, str]:
    """The files that layers show together, and their contents."""
    openers = [functools.partial(layout.tarball, layer) for layer in layers]
    merge(openers, layout.path.parent / "merged.tar", compression="none")
    with tarfile.open(layout.path.parent / "merged.tar") as tar:
        return {one.name: tar.extractfile(one).read().decode() for one in tar if one.isfile()}  # type: ignore[union-attr]


def _judge_extend(answer: Callable[..., Any], place: Path) -> str:
    layout = Layout.create(place / "layout")
    base = _layer(layout, {f"etc/{_word()}": _word(), "etc/motd": _word()})
    old = _image(layout, "old", base, _layer(layout, {f"srv/{_word()}": _word()}))
    other = _image(layout, "other", base)
    before, shown = _blobs(layout), _shown(layout, old.layers)
    contents = {digest: layout.place(digest).read_bytes() for digest in before}
    name = f"new-{_word()}"
    files = {"etc/motd": _word(), f"var/lib/{_word()}": _word()}
    answer(layout.path, "old", name, dict(files))
    if name not in layout.tags():
        raise NotYet("there is no image with the new tag")
    for tag, image in (("old", old), ("other", other)):
        if tag not in layout.tags() or layout.tags()[tag].digest != image.manifest.digest:
            raise NotYet("a tag that was there before is gone, or means another image now")
    if any(
        not layout.place(d).exists() or layout.place(d).read_bytes() != data for d, data in contents.items()
    ):
        raise NotYet("a blob that was there before is gone, or is not what it was")
    try:
        new = layout.image(name)
        if new.layers[: len(old.layers)] != old.layers:
            raise NotYet("it does not begin with the layers of the old image")
        if len(new.layers) != len(old.layers) + 1:
            raise NotYet(
                f"it has {len(new.layers)} layers; the old one has {len(old.layers)}, and one more is asked for"
            )
        if set(added := _shown(layout, new.layers[-1:])) != set(files):
            raise NotYet(f"its last layer has {len(added)} files, and {len(files)} are new")
        if _shown(layout, new.layers) != shown | files:
            raise NotYet("merged, it does not show what the old image shows with the new files over it")
    except (BadImage, UnsafeArchive) as error:
        raise NotYet(f"whoever reads it finds an error: {type(error).__name__}") from None
    if new.settings.get("config") != old.settings["config"]:
        raise NotYet("it is not run as the old one is: what is in `config` of the configuration differs")
    if len(_blobs(layout) - before) != 3:
        raise NotYet(f"{len(_blobs(layout) - before)} blobs are new, and it takes 3")
    for digest in _blobs(layout):
        if Layout.open(layout.path).add(layout.place(digest).read_bytes(), CONFIG).digest != digest:
            raise NotYet("a blob is not named by its digest")
    if (lines := len(new.settings.get("history", []))) != len(new.layers):
        raise NotYet(f"for its {len(new.layers)} layers its history has {lines} line{'s' * (lines != 1)}")
    return "3 new blobs, the old layers reused, and merged it shows the new files over the old ones."


def _judge_unused(answer: Callable[[Path], Any], place: Path) -> int:
    count = 0
    for number in range(2):
        layout = Layout.create(place / f"layout-{number}")
        shared, top = (_layer(layout, {_word(): _word()}) for _ in range(2))
        dead = [
            _image(layout, "moved", shared, _layer(layout, {_word(): _word()}))
            for _ in range(random.randint(1, 3))
        ]
        alive = [
            _image(layout, "moved", shared, top),
            _image(layout, "other", shared),
            _image(layout, "third", top),
        ]
        layout.tag("second-name", alive[0].manifest)
        layout.add(_word().encode(), CONFIG)
        needed: set[str] = set().union(*map(_of, alive))
        right = _blobs(layout) - needed
        files = {path: path.read_bytes() for path in layout.path.rglob("*") if path.is_file()}
        said = answer(layout.path)
        if files != {path: path.read_bytes() for path in layout.path.rglob("*") if path.is_file()}:
            raise NotYet("something in the layout has changed; only look")
        if not isinstance(said, set | frozenset | list | tuple):
            raise NotYet(f"a set of digests is asked for, and this is {type(said).__name__}")
        if not all(isinstance(one, str) and one.startswith("sha256:") for one in said):
            raise NotYet("a digest is a text that begins with sha256: and not all of yours do")
        if too_many := set(said) & needed:
            raise NotYet(f"{_kind(too_many, alive)} that an image with a tag needs is among them")
        if missing := right - set(said):
            raise NotYet(f"{_kind(missing, dead)} that no tag leads to is missing")
        if set(said) - right:
            raise NotYet("there is something among them that is no blob of this layout")
        count += len(right)
    return count


def _kind(digests: set[str], images: list[Image]) -> str:
    """What some blobs are, the first kind of them: notebooks keep the words, so chance must not choose."""
    kinds = {
        "a manifest": {image.manifest.digest for image in images},
        "a configuration": {image.config.digest for image in images},
        "a layer": {layer.blob.digest for image in images for layer in image.layers},
    }
    return next((kind for kind, some in kinds.items() if some & digests), "a blob")


def _judge_dig(answer: Callable[[Path, str, str], Any], place: Path) -> None:
    for number in random.sample(range(3), 3):
        layout = Layout.create(place / f"layout-{number}")
        directory, name, text = _word(), _word(), _word()
        path = f"{directory}/{name}"
        cover = [{f"{directory}/{WHITEOUT}{name}": ""}, {path: _word()}, {f"{WHITEOUT}{directory}": ""}][
            number
        ]
        later = _word()
        layers = [{_word(): _word()}, {path: text}, {path: later}, cover, {_word(): _word()}]
        _image(layout, "it", *(_layer(layout, layer) for layer in layers))
        _image(layout, "not-it", _layer(layout, {path: _word()}))
        said = answer(layout.path, "it", path)
        if not isinstance(said, str):
            raise NotYet(f"a text is asked for, and this is {type(said).__name__}")
        if said != text:
            if said == later:
                raise NotYet("that is what the file had later: there is a lower layer in which it is")
            shown = _shown(layout, layout.image("it").layers).get(path)
            raise NotYet(
                "that is what the image shows" if said == shown else "that is not what was in the file"
            )
        shutil.rmtree(layout.path)
