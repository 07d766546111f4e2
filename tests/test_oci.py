"""Image layouts: digests and sizes checked on every read; layers merged by the rules; hostile ones refused."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from labkernel.image.layer import OPAQUE
from labkernel.image.merge import Merged, merge
from labkernel.image.oci import (
    CONFIG,
    INDEX,
    LAYERS,
    MANIFEST,
    REF_NAME,
    BadImage,
    Descriptor,
    Image,
    Layout,
    architecture,
    check_digest,
    to_json,
)
from labkernel.image.tarball import LIMITS, Limits, Tarball, open_tarball
from labkernel.image.unpack import UnsafeArchive, unpack
from tests.test_unpack import file, header, pax

Entry = tuple[str, str | None]
"""A path and its content; a directory has none, and "-> x" is a symbolic link, "= x" a hard link."""


def tar(*entries: Entry) -> bytes:
    """A tarball of these entries, with fixed times and owners."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.mode = 0o755 if content is None else 0o644
            data = None
            if content is None:
                info.type = tarfile.DIRTYPE
            elif content.startswith("-> "):
                info.type, info.linkname = tarfile.SYMTYPE, content[3:]
            elif content.startswith("= "):
                info.type, info.linkname = tarfile.LNKTYPE, content[2:]
            else:
                info.size, data = len(content), io.BytesIO(content.encode())
            archive.addfile(info, data)
    return out.getvalue()


def layout_of(
    place: Path, *layers: bytes, compression: Any = "gzip", tag: str = "latest"
) -> tuple[Layout, Image]:
    layout = Layout.create(place)
    made = [layout.add_layer_from(io.BytesIO(layer), compression) for layer in layers]
    image = layout.add_image(
        made, {"Cmd": ["sh"]}, created="1980-01-01T00:00:00Z", history=["a test"], tag=tag
    )
    return layout, image


@contextmanager
def opened(path: Path, most: int) -> Iterator[Tarball]:
    with open_tarball(path) as archive:
        archive.limit = most
        yield archive


def merged(place: Path, *layers: bytes, limits: Limits = LIMITS) -> Merged:
    openers = []
    for number, layer in enumerate(layers):
        path = place / f"layer-{number}"
        path.write_bytes(layer)
        openers.append(functools.partial(opened, path))
    return merge(openers, place / "merged.tar", compression="none", limits=limits)


def seen(place: Path) -> dict[str, str | None]:
    """What is in the merged tarball: paths and contents, as in `Entry`."""
    found: dict[str, str | None] = {}
    with tarfile.open(place / "merged.tar") as archive:
        for one in archive:
            if one.isdir():
                found[one.name] = None
            elif one.issym() or one.islnk():
                found[one.name] = f"{'->' if one.issym() else '='} {one.linkname}"
            else:
                file = archive.extractfile(one)
                assert file
                found[one.name] = file.read().decode()
    return found


# ---------------------------------------------------------------------- writing


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_twice_the_same_bits(tmp_path: Path, compression: str) -> None:
    content = tar(("etc", None), ("etc/motd", "hello" * 1000))
    digests = [
        layout_of(tmp_path / n, content, compression=compression)[1].manifest.digest for n in ("a", "b")
    ]
    assert digests[0] == digests[1]
    files = [sorted((p.relative_to(tmp_path / n), p.read_bytes()) for p in (tmp_path / n).rglob("*") if p.is_file())
             for n in ("a", "b")]  # fmt: skip
    assert files[0] == files[1]


def test_every_blob_is_named_by_its_content_and_nothing_else_is_there(tmp_path: Path) -> None:
    layout, image = layout_of(tmp_path / "a", tar(("a", "1")), tar(("b", "2")))
    blobs = [path for path in (layout.path / "blobs").rglob("*") if path.is_file()]
    assert {path.name for path in blobs} == {hashlib.sha256(path.read_bytes()).hexdigest() for path in blobs}
    assert len(blobs) == 4  # two layers, configuration, manifest
    assert json.loads((layout.path / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    found = layout.image("latest")
    assert (found.manifest.digest, found.layers) == (image.manifest.digest, image.layers)


def test_two_tags_are_one_blob(tmp_path: Path) -> None:
    layout, first = layout_of(tmp_path / "a", tar(("a", "1")), tag="one")
    before = sorted(os.listdir(layout.path / "blobs/sha256"))
    _, second = layout_of(tmp_path / "a", tar(("a", "1")), tag="two")
    assert sorted(os.listdir(layout.path / "blobs/sha256")) == before
    assert first.manifest == second.manifest and set(layout.tags()) == {"one", "two"}
    with pytest.raises(LookupError, match="no image 'three' in this layout; tags: one, two"):
        layout.image("three")
    assert layout.image().manifest.digest == first.manifest.digest, "two names of one image leave no choice"


def test_a_tag_moves(tmp_path: Path) -> None:
    layout, first = layout_of(tmp_path / "a", tar(("a", "1")))
    _, second = layout_of(tmp_path / "a", tar(("a", "2")))
    assert layout.image("latest").manifest.digest == second.manifest.digest != first.manifest.digest
    assert layout.read_image(first.manifest).manifest.digest == first.manifest.digest, "it is still there"


def test_what_others_have_written_into_the_index_stays(tmp_path: Path) -> None:
    layout, image = layout_of(tmp_path / "a", tar(("a", "1")), tag="one")
    index = json.loads((layout.path / "index.json").read_text())
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    theirs = {"mediaType": kind, "digest": f"sha256:{'1' * 64}", "size": 9, "artifactType": "application/x",
              "urls": ["https://host.example/x"], "annotations": {"of": "them"}}  # fmt: skip
    index |= {"manifests": [*index["manifests"], theirs], "annotations": {"also": "of them"}}
    (layout.path / "index.json").write_bytes(to_json(index))
    layout.tag("two", image.manifest)
    found = json.loads((layout.path / "index.json").read_text())
    assert theirs in found["manifests"] and found["annotations"] == {"also": "of them"}
    assert set(layout.tags()) == {"one", "two"}


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("x")
    with pytest.raises(FileExistsError, match="neither empty nor an OCI image layout"):
        Layout.create(tmp_path / "mine")
    with pytest.raises(BadImage, match="there is no file oci-layout"):
        Layout.open(tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["file"]


# ---------------------------------------------------------------------- reading


def damage(layout: Layout, blob: Descriptor, how: str) -> None:
    path = layout.place(blob.digest)
    data = path.read_bytes()
    path.unlink()
    if how == "short":
        path.write_bytes(data[:-1])
    elif how == "long":
        path.write_bytes(data + b"x")
    elif how == "other":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif how == "link":
        (layout.path / "elsewhere").write_bytes(data)
        path.symlink_to(layout.path / "elsewhere")
    elif how == "fifo":
        os.mkfifo(path)


@pytest.mark.parametrize("which", ["manifest", "config", "layer"])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("short", "has .* bytes, and not the"),
        ("long", "has .* bytes, and not the"),
        ("other", "is not what its name says|damaged"),
        ("gone", "is missing"),
        ("link", "cannot be read"),
        ("fifo", "is no file"),
    ],
)
def test_damaged_blobs_are_refused(tmp_path: Path, which: str, how: str, said: str) -> None:
    layout, image = layout_of(tmp_path / "a", tar(("a", "1")))
    blob = {"manifest": image.manifest, "config": image.config, "layer": image.layers[0].blob}[which]
    damage(layout, blob, how)
    with pytest.raises((BadImage, UnsafeArchive), match=said):
        found = layout.image("latest")
        merge([functools.partial(layout.tarball, found.layers[0])], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["index.json", "oci-layout", "blobs", "blobs/sha256"])
def test_a_layout_does_not_lead_elsewhere(tmp_path: Path, name: str) -> None:
    layout, _ = layout_of(tmp_path / "a", tar(("a", "1")))
    (layout.path / name).rename(tmp_path / "elsewhere")
    (layout.path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadImage, match=r"cannot be read|is a symbolic link"):
        Layout.open(layout.path).image()
    (layout.path / name).unlink()
    if "." in name or name == "oci-layout":
        os.mkfifo(layout.path / name)
        with pytest.raises(BadImage, match=r"is no file|there is no file"):
            Layout.open(layout.path).image()


@pytest.mark.parametrize("annotations", [{"org.opencontainers.image.ref.name": ["x"]}, {"a": 1}, "x", [1]])
def test_annotations_that_are_no_texts(tmp_path: Path, annotations: Any) -> None:
    layout, image = layout_of(tmp_path / "a", tar(("a", "1")))
    index = {"manifests": [image.manifest.as_json() | {"annotations": annotations}]}
    (layout.path / "index.json").write_bytes(to_json(index))
    with pytest.raises(BadImage, match="its annotations are"):
        layout.image("latest")


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_a_layer_has_to_be_what_the_configuration_says(tmp_path: Path, compression: Any) -> None:
    """The blob may be right and another one than the configuration means: the diff_id tells."""
    layout, image = layout_of(tmp_path / "a", tar(("a", "1")), compression=compression)
    other = layout.add_layer_from(io.BytesIO(tar(("a", "2"))), compression)
    manifest = json.loads(layout.bytes(image.manifest))
    manifest["layers"] = [other.blob.as_json()]
    found = layout.read_image(layout.add(to_json(manifest), MANIFEST))
    with pytest.raises(BadImage, match=r"unpacked layer sha256:.* is not what its name says"):
        merge([functools.partial(layout.tarball, found.layers[0])], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "digest",
    ["", "sha256:", "sha256:" + "g" * 64, "sha256:" + "a" * 63, "md5:" + "a" * 32, "sha256:../../../etc/passwd",
     "sha256:" + "A" * 64, "sha256:" + "a" * 64 + "\n", None, 3],
)  # fmt: skip
def test_what_is_no_digest_never_becomes_a_path(tmp_path: Path, digest: Any) -> None:
    with pytest.raises(BadImage, match="is no digest"):
        check_digest(digest)
    with pytest.raises(BadImage, match="is no digest"):
        Descriptor.read({"mediaType": MANIFEST, "digest": digest, "size": 1})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": "x"}, "a list of at most"),
        ({"layers": []}, "the manifest has 0 layers, and its configuration 1"),
        ({"config": None}, "a descriptor is expected"),
        ({"config": {"mediaType": CONFIG, "digest": "sha256:" + "0" * 64, "size": -1}}, "no number of bytes"),
        (
            {"config": {"mediaType": CONFIG, "digest": "sha256:" + "0" * 64, "size": True}},
            "no number of bytes",
        ),
        (
            {"config": {"mediaType": "application/x", "digest": "sha256:" + "0" * 64, "size": 1}},
            "an artifact",
        ),
    ],
)
def test_manifests_that_cannot_be_meant(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    layout, image = layout_of(tmp_path / "a", tar(("a", "1")))
    manifest = json.loads(layout.bytes(image.manifest)) | change
    with pytest.raises(BadImage, match=said):
        layout.read_image(layout.add(to_json(manifest), MANIFEST))


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    layout, _ = layout_of(tmp_path / "a", tar(("a", "1")))
    for data, said in ((b"[" * 100_000, "is no JSON"), (b"[]", "no JSON object"), (b"\xff", "is no JSON")):
        with pytest.raises(BadImage, match=said):
            layout.read_image(layout.add(data, MANIFEST))
    with pytest.raises(BadImage, match="over the limit"):
        layout.read_image(Descriptor(MANIFEST, "sha256:" + "0" * 64, 5 << 20))


def test_of_several_platforms_ours_is_taken(tmp_path: Path) -> None:
    layout, image = layout_of(tmp_path / "a", tar(("a", "1")))
    other = {"mediaType": MANIFEST, "digest": "sha256:" + "1" * 64, "size": 9,
             "platform": {"os": "linux", "architecture": "s390x"}}  # fmt: skip
    ours = image.manifest.as_json()
    index = layout.add(to_json({"schemaVersion": 2, "manifests": [other, ours]}), INDEX)
    assert layout.read_image(index).manifest.digest == image.manifest.digest
    foreign = layout.add(to_json({"schemaVersion": 2, "manifests": [other]}), INDEX)
    with pytest.raises(BadImage, match=f"no image for linux/{architecture()} in it; there is: s390x"):
        layout.read_image(foreign)


def test_docker_names_its_images_in_full_and_a_layout_may_hold_several_platforms(tmp_path: Path) -> None:
    layout, one = layout_of(tmp_path / "a", tar(("a", "1")))
    _, two = layout_of(tmp_path / "a", tar(("a", "2")))
    names = ["docker.io/library/one:1", "host.example/two:1"]

    def write(*blobs: dict[str, Any]) -> None:
        (layout.path / "index.json").write_bytes(to_json({"schemaVersion": 2, "manifests": blobs}))

    write(*(
        image.manifest.as_json() | {"annotations": {"io.containerd.image.name": name, REF_NAME: "1"}}
        for image, name in zip((one, two), names, strict=True)
    ))  # fmt: skip
    for tag, image in (("one:1", one), (names[0], one), (names[1], two)):
        assert layout.image(tag).manifest.digest == image.manifest.digest
    for several in (None, "1"):
        with pytest.raises(LookupError, match=f"choose a tag: {', '.join(names)}"):
            layout.image(several)
    with pytest.raises(LookupError, match=f"no image 'three' in this layout; tags: 1, {', '.join(names)}"):
        layout.image("three")
    machines = ("s390x", one), (architecture(), two)
    write(*(
        image.manifest.as_json() | {"annotations": {}, "platform": {"os": "linux", "architecture": machine}}
        for machine, image in machines
    ))  # fmt: skip
    assert layout.image().manifest.digest == two.manifest.digest
    write(*(image.manifest.as_json() | {"annotations": {}} for image in (one, two)))
    with pytest.raises(LookupError, match=r"choose a tag: sha256:\w{64}, sha256:\w{64}$"):
        layout.image()


def test_an_image_for_another_machine_is_refused(tmp_path: Path) -> None:
    layout, image = layout_of(tmp_path / "a", tar(("a", "1")))
    config = layout.add(to_json(dict(image.settings) | {"architecture": "s390x"}), CONFIG)
    manifest = json.loads(layout.bytes(image.manifest)) | {"config": config.as_json()}
    with pytest.raises(BadImage, match="the image is for linux/s390x"):
        layout.read_image(layout.add(to_json(manifest), MANIFEST))


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_bomb_is_stopped(tmp_path: Path, compress: Any) -> None:
    layout = Layout.create(tmp_path / "a")
    content = compress(tar(("zeros", "0" * (64 << 20))))
    kind = LAYERS["gzip" if compress is gzip.compress else "zstd"]
    layer = layout.add_layer_from(io.BytesIO(b""), "none")  # any: only its blob is replaced
    layer = type(layer)(layout.add(content, kind), "sha256:" + "0" * 64)
    with (
        pytest.raises(BadImage, match=r"has more than 1048576 bytes \(a bomb"),
        layout.tarball(layer, 1 << 20) as all_,
    ):
        list(all_)


# ---------------------------------------------------------------------- merging

BASE = (("etc", None), ("etc/passwd", "root"), ("etc/motd", "hello"), ("cache", None), ("cache/one", "1"))


@pytest.mark.parametrize(
    ("above", "expected"),
    [
        ([("etc/motd", "bye")], {"etc/motd": "bye"}),
        ([("etc/.wh.motd", "")], {"etc/motd": ...}),
        ([("./etc/.wh.motd", "")], {"etc/motd": ...}),
        ([(".wh.cache", "")], {"cache": ..., "cache/one": ...}),
        ([(f"cache/{OPAQUE}", ""), ("cache/two", "2")], {"cache/one": ..., "cache/two": "2"}),
        ([("cache/two", "2"), (f"cache/{OPAQUE}", "")], {"cache/one": ..., "cache/two": "2"}),
        ([(".wh.cache", ""), ("cache", None), ("cache/two", "2")], {"cache/one": ..., "cache/two": "2"}),
        ([("cache", "a file now")], {"cache": "a file now", "cache/one": ...}),
        ([("cache", "-> etc")], {"cache": "-> etc", "cache/one": ...}),
        ([("etc/.wh.nothing", "")], {}),
        ([("etc/.wh.motd", ""), ("etc/motd", "again")], {"etc/motd": "again"}),
        ([(".wh.etc", ""), (".wh.cache", "")], dict.fromkeys([name for name, _ in BASE], ...)),
        ([("cache", "a file"), (".wh.nothing", "")], {"cache": "a file", "cache/one": ...}),
        ([(OPAQUE, "")], dict.fromkeys([name for name, _ in BASE], ...)),
    ],
)  # fmt: skip
def test_what_a_layer_hides(tmp_path: Path, above: Sequence[Entry], expected: dict[str, Any]) -> None:
    merged(tmp_path, tar(*BASE), tar(*above))
    wanted: dict[str, Any] = dict(BASE) | expected
    assert seen(tmp_path) == {name: content for name, content in wanted.items() if content is not ...}


def test_what_a_hidden_file_has_replaced_does_not_come_back(tmp_path: Path) -> None:
    merged(tmp_path, tar(*BASE), tar(("cache", "a file")), tar(("cache", None)))
    assert seen(tmp_path) == dict(BASE[:3]) | {"cache": None}


def test_the_same_layers_give_the_same_bits_and_one_layer_its_own(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    layers = tar(*BASE), tar(("etc/.wh.motd", ""))
    assert merged(tmp_path, *layers).digest == merged(tmp_path / "b", *layers).digest
    alone = merged(tmp_path, layers[0])
    assert alone.files == 3 and alone.hidden == 0 and alone.bytes == len("roothello1")


def test_a_hard_link_lives_on_with_the_content(tmp_path: Path) -> None:
    lower = tar(("a", "content"), ("b", "= a"), ("c", "= b"))
    merged(tmp_path, lower, tar((".wh.a", "")))
    assert seen(tmp_path) == {"b": "content", "c": "= b"}
    merged(tmp_path, lower, tar(("a", "other")))
    assert seen(tmp_path) == {"b": "content", "c": "= b", "a": "other"}
    merged(tmp_path, lower, tar((".wh.b", "")))
    assert seen(tmp_path) == {"a": "content", "c": "= a"}
    with pytest.raises(
        UnsafeArchive, match="a hard link to a of a layer below, which another layer has replaced"
    ):
        merged(tmp_path, tar(("a", "1")), tar(("b", "= a")), tar(("a", "2")))
    merged(tmp_path, tar(("a", "1")), tar(("b", "= a")))
    assert seen(tmp_path) == {"a": "1", "b": "= a"}


def device_as_whiteout() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo(".wh.etc")
        info.type = tarfile.CHRTYPE
        archive.addfile(info)
    return out.getvalue()


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (tar(("../out", "x")), r"has a component \.\."),
        (tar(("etc/../../.wh.out", "")), r"has a component \.\."),
        (tar(("/out", "x")), "is absolute"),
        (tar(("/.wh.out", "")), "is absolute"),
        (tar(("a", "= ../out")), r"has a component \.\."),
        (tar((".wh.", "")), "a whiteout of nothing"),
        (tar(("etc/.wh...", "")), "a whiteout of nothing, or of a directory it is in"),
        (tar(("etc/.wh..", "")), "a whiteout of nothing, or of a directory it is in"),
        (tar((".wh..wh.plnk", "")), "a mark that no layer has"),
        (tar((".wh.etc", "with content")), "a whiteout that is no empty file"),
        (tar((".wh.etc", None)), "a whiteout that is no empty file"),
        (device_as_whiteout(), "a whiteout that is no empty file"),
        (tar(("a", "x"))[:700], "cut short"),
        (tar(("a", "1"), ("a", "2")), "such an entry already"),
        (tar(("a", "= b"), ("b", "= a"), ("c", "= a")), "which comes after it"),  # a circle
        (tar(("a", "= a")), "which comes after it"),
        (tar(("etc/.wh.x/file", "x")), "a directory with the name of a whiteout"),
        (tar(("a\x1b[2J", "x")), "control characters"),
        (tar(("d/" * 2100 + "f", "x")), "longer than the kernel"),
        (tar(("d/" * 150 + "f", "x")), "deeper than"),
        (pax(mtime="nan") + file("a"), "no time of a file"),
        (pax(mtime="inf") + file("a"), "no time of a file"),
        (header("a", b"3", device=1 << 40), "none that Linux has"),
        (b"no tarball" * 100, "is not an octal number"),
    ],
)
def test_hostile_layers_are_refused(tmp_path: Path, layer: bytes, said: str) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "out").write_text("untouched")
    with pytest.raises(UnsafeArchive, match=said):
        merged(tmp_path / "work", tar(*BASE), layer)
    assert (tmp_path / "out").read_text() == "untouched"
    assert not (tmp_path / "work/merged.tar").exists()


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([[("lib", "-> usr/lib"), ("usr/lib", None)], [("lib/x", "y")]], "lib"),  # which of the two is meant?
        ([[("out", "-> /etc")], [("out/passwd", "y")]], "out"),
        ([[("a", "file")], [("a/b", "y")]], "a"),
        ([[("a", "-> ../../etc/passwd")]], "leads out"),
        ([[("b", "= nowhere")]], "no file that came before"),
    ],
)
def test_what_a_merged_tarball_cannot_hide_from_the_unpacker(
    tmp_path: Path, layers: list[list[Entry]], said: str
) -> None:
    merged(tmp_path, *(tar(*layer) for layer in layers))
    with pytest.raises(UnsafeArchive, match=said):
        unpack(tmp_path / "merged.tar", tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_a_chain_of_hard_links_costs_no_more_than_its_links(tmp_path: Path) -> None:
    """Each a name of the one before: to follow all of them from each of them would take minutes."""
    names = [("0", "x"), *((str(number), f"= {number - 1}") for number in range(1, 8_000))]
    layer = tar(*names)
    begin = time.process_time()
    found = merged(tmp_path, layer, tar((".wh.0", "")))
    assert found.files == 1
    assert time.process_time() - begin < 20


def test_a_layer_that_stands_in_an_image_many_times_counts_each_time(tmp_path: Path) -> None:
    layer = tar(("zeros", "0" * (1 << 20)))
    with pytest.raises(UnsafeArchive, match="a bomb"):
        merged(tmp_path, *[layer] * 50, limits=Limits(bytes=10 << 20))
    with pytest.raises(UnsafeArchive, match="more than 40 entries"):
        merged(tmp_path, *[tar(("x", "x"))] * 50, limits=Limits(entries=40))


def test_limits(tmp_path: Path) -> None:
    with pytest.raises(UnsafeArchive, match="more than 3 entries"):
        merged(tmp_path, tar(*BASE), limits=Limits(entries=3))
    with pytest.raises(UnsafeArchive, match="more than 4 entries"):
        merged(
            tmp_path,
            tar(("a", "1"), ("b", "2"), ("c", "3")),
            tar(("d", "4"), ("e", "5")),
            limits=Limits(entries=4),
        )
    with pytest.raises(UnsafeArchive, match="bomb"):
        merged(tmp_path, tar(("a", "x" * 100_000)), limits=Limits(bytes=50_000))
    with pytest.raises(UnsafeArchive, match="bomb"):
        merged(tmp_path, tar(("a", "x" * 100_000)), tar(("b", "x" * 100_000)), limits=Limits(bytes=150_000))


NAMES = st.sampled_from(["a", "b", "a/a", "a/b", "b/a", "a/a/a"])


@given(
    st.lists(
        st.dictionaries(NAMES, st.sampled_from(["file", "directory", "whiteout", "opaque"]), max_size=5),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=150, deadline=None)
def test_merging_is_applying_one_after_the_other(layers: list[dict[str, str]]) -> None:
    """The specification's own words, done with a dictionary: remove what is hidden, then add."""
    tarballs: list[bytes] = []
    model: dict[str, str | None] = {}
    for number, layer in enumerate(layers):
        entries: list[Entry] = []
        for path, kind in sorted(layer.items()):
            parent, _, name = path.rpartition("/")
            if any(layer.get(above) == "file" for above in (path[:1], path[:3]) if above != path):
                continue  # such a layer does not exist: a file with something in it
            if kind == "whiteout":
                entries.append((f"{parent}/.wh.{name}".lstrip("/"), ""))
            elif kind == "opaque":
                entries += [(path, None), (f"{path}/{OPAQUE}", "")]
            else:
                entries.append((path, f"layer {number}" if kind == "file" else None))
        # A directory that is taken for granted stands in honest layers.
        parents = {path.rpartition("/")[0] for path, _ in entries} | {
            p[:1] for p, _ in entries if "/" in p[1:]
        }
        known = {path for path, _ in entries}
        entries = sorted([*((parent, None) for parent in parents - known - {""}), *entries])
        tarballs.append(tar(*entries))
        for path, _ in entries:
            parent, _, name = path.rpartition("/")
            if name == OPAQUE:
                model = {p: c for p, c in model.items() if not p.startswith(f"{parent}/")}
            elif name.startswith(".wh."):
                gone = f"{parent}/{name[4:]}".lstrip("/")
                model = {p: c for p, c in model.items() if p != gone and not p.startswith(f"{gone}/")}
        for path, content in entries:
            if not path.rpartition("/")[2].startswith(".wh."):
                if content is not None or model.get(path) is not None:
                    model = {p: c for p, c in model.items() if not p.startswith(f"{path}/")}
                model[path] = content
    with tempfile.TemporaryDirectory() as place:
        merged(Path(place), *tarballs)
        assert seen(Path(place)) == model
