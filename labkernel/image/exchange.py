"""Images out of the store and into it, in the forms that others have: OCI layouts, `docker save`, plain tarballs.

Out: the tarball of the store becomes the one layer of an OCI image, in a directory, or in an archive that
`docker load` takes too. In: the layers are merged into one tarball, which is unpacked by the strict unpacker before it
is kept. So an image of the store is always one tarball, whatever it came from, and its record says what that was.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from labkernel import state
from labkernel.image import Progress, store
from labkernel.image.merge import merge
from labkernel.image.oci import (
    CONFIG,
    LAYERS,
    MANIFEST,
    MOST_LAYERS,
    BadImage,
    Image,
    Layer,
    Layout,
    compression_of,
    from_json,
    read_small,
    to_json,
)  # fmt: skip
from labkernel.image.pack import Compression, epoch, written_at_once
from labkernel.image.tarball import LIMITS, BadTarball, Limits, Tarball, open_tarball
from labkernel.image.unpack import UnsafeArchive, unpack
from labkernel.spec import PATH

DEFAULT_TAG = "latest"

RUN_SETTINGS = ("Entrypoint", "Cmd", "Env", "User", "WorkingDir")
"""What of an image's configuration says how it is run."""


def created() -> str:
    """The time that images made here carry: always the same, so that twice made is the same digest."""
    return datetime.datetime.fromtimestamp(epoch(), datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---------------------------------------------------------------------- out


def export_image(
    image: store.Image,
    destination: Path,
    *,
    tag: str = DEFAULT_TAG,
    command: Sequence[str] = (),
    compression: Compression = "gzip",
    progress: Progress | None = None,
) -> Image:
    """Write an image of the store as an OCI image of one layer; twice the same bits.

    To *destination*, a directory: a new OCI layout, or one that is there, which gets one more image. To a file that
    ends with .tar: an archive of a layout, with the file manifest.json that `docker load` looks for.
    *command* is what is run where nothing else is said; without it, what the image was imported with.
    Raises FileExistsError, BadImage, OSError.
    """
    if destination.suffix != ".tar":
        return _add(Layout.create(destination), image, tag, command, compression, progress)
    with tempfile.TemporaryDirectory(prefix=f".{state.PREFIX}", dir=destination.parent) as directory:
        layout = Layout.create(Path(directory, "layout"))
        made = _add(layout, image, tag, command, compression, progress)
        _pack_layout(layout, made, (f"{image.name}:{tag}", tag), destination)
    return made


def _add(
    layout: Layout, image: store.Image, tag: str, command: Sequence[str], compression: Compression,
    progress: Progress | None,
) -> Image:  # fmt: skip
    if progress:
        progress(f"export {image.name}", 0, 2)
    layer = layout.add_layer(image.tarball, compression)
    settings = dict((store.read_record(image.name) or {}).get("settings") or {"Env": [f"PATH={PATH}"]})
    if command:
        settings.pop("Entrypoint", None)
        settings["Cmd"] = list(command)
    history = [f"labkernel export {image.name}"]
    return layout.add_image([layer], settings, created=created(), history=history, tag=tag)


_PART = "[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_DOCKER_NAME = re.compile(
    rf"(?:[a-zA-Z0-9.-]+(?::[0-9]+)?/)?{_PART}(?:/{_PART})*:[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}}"
)
"""With any other in RepoTags, `docker load` refuses the archive."""


def _pack_layout(layout: Layout, image: Image, names: Sequence[str], destination: Path) -> None:
    """An OCI layout as a tarball. Docker (before 25) and others find their way by manifest.json.

    The first of the *names* that is one for Docker is the image's; without any it has none there but its id.
    """

    def at(digest: str) -> str:
        return str(layout.place(digest).relative_to(layout.path))

    for_docker = {
        "Config": at(image.config.digest),
        "RepoTags": [one for one in names if _DOCKER_NAME.fullmatch(one)][:1],
        "Layers": [at(layer.blob.digest) for layer in image.layers],
    }
    (layout.path / "manifest.json").write_text(json.dumps([for_docker]))
    with (
        written_at_once(destination) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in sorted(layout.path.rglob("*")):
            info = tar.gettarinfo(path, str(path.relative_to(layout.path)))
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            info.mtime, info.mode = epoch(), 0o755 if path.is_dir() else 0o644
            with path.open("rb") if path.is_file() else contextlib.nullcontext() as content:
                tar.addfile(info, content)


# ---------------------------------------------------------------------- in


def import_image(
    source: Path,
    name: str,
    *,
    tag: str | None = None,
    limits: Limits = LIMITS,
    progress: Progress | None = None,
) -> store.Image:
    """Put an image into the store: an OCI layout (a directory, or an archive of one), an archive that `docker save`
    made, or the tarball of a root file system.

    *tag* chooses among several. Raises BadImage for what is none, or not what its digests say; UnsafeArchive for what
    an honest image does not hold; LookupError for a tag that is not there. Nothing is left behind then.
    """
    check_name(name)
    with working_directory() as work:
        if source.is_dir():
            return import_layout(Layout.open(source), name, tag=tag, limits=limits, progress=progress)
        kind = _kind(source, limits)
        if kind == "rootfs":
            return _keep(name, [functools.partial(_plain, source, limits)], {}, limits, work, progress)
        if progress:
            progress("unpack the archive", 0, 1)
        unpack(source, work / "archive", limits=limits)
        if kind == "oci":
            layout = Layout.open(work / "archive")
        else:
            layout = _from_docker(work / "archive", Layout.create(work / "layout"), tag)
            tag = None
        return import_layout(layout, name, tag=tag, limits=limits, progress=progress)


def import_layout(
    layout: Layout,
    name: str,
    *,
    tag: str | None = None,
    limits: Limits = LIMITS,
    facts: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> store.Image:
    """Put an image of an OCI layout into the store, with `facts` in its record. Raises as import_image does."""
    check_name(name)
    image = layout.image(tag)
    layers = [functools.partial(_layer, layout, layer, limits) for layer in image.layers]
    known = {"settings": _settings(image), "manifest": image.manifest.digest, **(facts or {})}
    with working_directory() as work:
        return _keep(name, layers, known, limits, work, progress)


def check_name(name: str) -> None:
    """Raise ValueError for a name that no image of the store may have."""
    from labkernel.images import STANDARD

    if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}", name):
        raise ValueError(f"name {name!r}: use letters, digits, and _ . - (at most 63 characters)")
    if name == STANDARD:
        raise ValueError(f"name {name!r}: that one is built from this machine's Python; choose another")


@contextlib.contextmanager
def working_directory() -> Iterator[Path]:
    """A directory that is gone afterwards; `labkernel clean --all` removes what a killed import has left."""
    builds = state.home() / "builds"
    builds.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="import-", dir=builds) as directory:
        yield Path(directory)


def _keep(
    name: str, layers: Sequence[Any], facts: Mapping[str, Any], limits: Limits, work: Path, progress: Progress | None
) -> store.Image:  # fmt: skip
    from labkernel import images

    tarball = work / "tarball"
    merged = merge(layers, tarball, limits=limits, progress=progress)
    # Only what the strict unpacker takes is kept, and it is needed unpacked anyway.
    # How much it may grow was asked of the layers as they came; zstd makes of them less than others did.
    grown = replace(limits, ratio=1 << 40)
    images.unpacked(name, tarball, merged.digest, limits=grown, progress=progress)
    place = state.home() / "images" / f"{name}.tar.zst"
    image = store.Image(name, place, merged.digest, merged.bytes, tarball.stat().st_size, merged.files)
    store.keep(image, tarball, {"imported": True, **facts})
    return image


def _layer(layout: Layout, layer: Layer, limits: Limits, most: int) -> AbstractContextManager[Tarball]:
    return layout.tarball(layer, replace(limits, bytes=most).allowed(layer.blob.size))


@contextlib.contextmanager
def _plain(path: Path, limits: Limits, most: int) -> Iterator[Tarball]:
    with open_tarball(path, replace(limits, bytes=most)) as archive:
        yield archive


def _kind(source: Path, limits: Limits) -> str:
    """ "oci", "docker" or "rootfs": what is in a tarball, by the names at its top."""
    names: set[str] = set()
    try:
        with open_tarball(source, limits) as archive:
            for number, member in enumerate(archive):
                if number >= limits.entries:
                    raise UnsafeArchive(member.name, f"more than {limits.entries} entries")
                top, _, below = member.name.removeprefix("./").partition("/")
                names.add(f"{top}/" if below else top)
    except BadTarball as error:
        raise UnsafeArchive("", str(error)) from error
    if {"oci-layout", "index.json"} <= names:
        return "oci"
    system = names & {"bin", "etc", "usr", "bin/", "etc/", "usr/"}
    return "docker" if "manifest.json" in names and not system else "rootfs"


def _from_docker(archive: Path, layout: Layout, tag: str | None) -> Layout:
    """What `docker save` made, as an OCI layout: the file manifest.json names the configuration and the layers.

    It has no digests of the layers, but the configuration has, and its own digest is its name.
    """
    try:
        entries = json.loads(read_small(_within(archive, "manifest.json")))
        found = [
            (e["Config"], list(e["Layers"]), [str(name) for name in e.get("RepoTags") or []]) for e in entries
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadImage(f"manifest.json is none of `docker save`: {error!r:.200}") from None
    there = ", ".join(sorted(name for _, _, names in found for name in names)) or "none"
    if tag is not None:
        found = [one for one in found if any(tag in (name, name.rpartition(":")[2]) for name in one[2])]
    if len(found) != 1:
        raise LookupError(f"{len(found)} images are in the archive; choose a tag: {there}")
    config, layers, _ = found[0]
    path = _within(archive, config)
    content = read_small(path)
    settings = from_json(content, f"configuration {config!r:.100}")
    digits = path.name.removesuffix(".json")
    blob = layout.add(content, CONFIG)
    if re.fullmatch("[0-9a-f]{64}", digits) and blob.digest != f"sha256:{digits}":
        raise BadImage(f"configuration {path.name} is not what its name says: its digest is {blob.digest}")
    if len(layers) > MOST_LAYERS:
        raise BadImage(f"manifest.json names {len(layers)} layers, over the limit of {MOST_LAYERS}")
    copied: dict[Path, Any] = {}  # the same layer may be in an image more than once
    for path in (places := [_within(archive, name) for name in layers]):
        if path in copied:
            continue
        with path.open("rb") as file:
            with layout.adding(LAYERS[compression_of(file)]) as sink:
                while data := file.read(1 << 20):
                    sink.write(data)
            copied[path] = sink.blob.as_json()
    described = [copied[path] for path in places]
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": blob.as_json(), "layers": described}
    if not isinstance(settings.get("rootfs"), dict):
        raise BadImage(f"configuration {config!r:.100} names no layers")
    layout.tag(DEFAULT_TAG, layout.add(to_json(manifest), MANIFEST))
    return layout


def _within(directory: Path, name: object) -> Path:
    """A file of an unpacked archive. It may be a link to another one (as old archives have it), but not out of it."""
    try:
        path = (directory / str(name)).resolve()
        if path.is_relative_to(directory.resolve()) and path.is_file():
            return path
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte in it, links in a circle
        pass
    raise BadImage(f"the archive has no file {str(name)!r:.100}")


def _settings(image: Image) -> dict[str, Any]:
    """How the image wants to be run, of the types that the specification says. Raises BadImage."""
    given = image.settings.get("config") or {}
    if not isinstance(given, dict):
        raise BadImage(f"{image.config.digest}: its config is {given!r:.60}")
    found = {key: given[key] for key in RUN_SETTINGS if given.get(key)}
    for key, value in found.items():
        texts = [value] if key in ("User", "WorkingDir") else value
        if not isinstance(texts, list) or not all(isinstance(one, str) and "\0" not in one for one in texts):
            raise BadImage(f"{image.config.digest}: config.{key} is {value!r:.60}")
    return found
