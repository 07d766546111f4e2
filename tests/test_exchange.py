"""Images in and out of the store: the same image again, and what other programs make and run."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labkernel import Container, children, images
from labkernel.image import exchange, recipes, store
from labkernel.image.oci import BadImage, Layout
from labkernel.image.tarball import Limits
from labkernel.image.unpack import UnsafeArchive
from tests.helpers import own_home
from tests.ordinary_user import PYTHON, copy_package, ordinary_user
from tests.others import cli, program, run, runtime
from tests.test_oci import damage, layout_of, tar

SAYS = ["sh", "-c", "echo the same everywhere; id -u"]


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory, images_too=False) as place:
        yield place


@pytest.fixture(scope="module")
def busybox(home: Path) -> store.Image:
    if not shutil.which("busybox"):
        pytest.skip("busybox-static is not installed")
    return recipes.build("busybox")


def left(home: Path) -> list[str]:
    return [path.name for path in (home / "builds").glob("import-*")]


# ---------------------------------------------------------------------- our own


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_there_and_back_is_the_same_image(
    busybox: store.Image, tmp_path: Path, compression: Any, home: Path
) -> None:
    exported = exchange.export_image(busybox, tmp_path / "layout", compression=compression, command=SAYS)
    image = exchange.import_image(tmp_path / "layout", "back")
    assert (image.digest, image.bytes, image.files) == (busybox.digest, busybox.bytes, busybox.files)
    again = exchange.export_image(image, tmp_path / "again", compression=compression)
    assert again.config.digest != exported.config.digest, "its history has another name"
    assert again.layers == exported.layers and again.settings["config"] == exported.settings["config"]
    assert left(home) == []


def test_an_archive_is_the_same_twice_and_for_docker_too(busybox: store.Image, tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        exchange.export_image(busybox, tmp_path / name, command=SAYS)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert exchange.import_image(tmp_path / "a.tar", "back").digest == busybox.digest
    with tarfile.open(tmp_path / "a.tar") as archive:
        manifest = archive.extractfile("manifest.json")
        assert manifest
        (entry,) = json.load(manifest)
        assert entry["RepoTags"] == ["busybox:latest"]
        assert {entry["Config"], *entry["Layers"]} <= set(archive.getnames())


@pytest.mark.parametrize(
    ("name", "tag", "said"),
    [
        ("box", "1", ["box:1"]),
        ("box", "host.example:5000/a/b:1", ["host.example:5000/a/b:1"]),
        ("box", "a/b", []),
        ("MyImage", "1", []),
    ],
)
def test_an_archive_has_no_name_that_docker_refuses(
    tmp_path: Path, name: str, tag: str, said: list[str]
) -> None:
    (tmp_path / "x.tar").write_bytes(tar(("x", "x")))
    exchange.export_image(exchange.import_image(tmp_path / "x.tar", name), tmp_path / "out.tar", tag=tag)
    with tarfile.open(tmp_path / "out.tar") as archive:
        manifest = archive.extractfile("manifest.json")
        assert manifest and json.load(manifest)[0]["RepoTags"] == said


def test_what_docker_save_made_is_read(busybox: store.Image, tmp_path: Path) -> None:
    """The older form: no layout, layers by other names, and one that is a link to another."""
    layout, image = layout_of(
        tmp_path / "layout", tar(("a", "1"), ("b", "2")), tar((".wh.a", "")), compression="none"
    )
    save = tmp_path / "save"
    save.mkdir()
    digits = image.config.digest.partition(":")[2]
    shutil.copy(layout.place(image.config.digest), save / f"{digits}.json")
    for number, layer in enumerate(image.layers):
        (save / str(number)).mkdir()
        shutil.copy(layout.place(layer.blob.digest), save / f"{number}/real.tar")
        (save / f"{number}/layer.tar").symlink_to("real.tar")
    entry = {"Config": f"{digits}.json", "RepoTags": ["x:1"], "Layers": ["0/layer.tar", "1/layer.tar"]}
    (save / "manifest.json").write_text(json.dumps([entry]))
    run("tar", "-C", save, "-cf", tmp_path / "save.tar", ".")
    image_ = exchange.import_image(tmp_path / "save.tar", "saved", tag="x:1")
    assert (image_.files, image_.bytes) == (1, 1)
    (save / "0/real.tar").write_bytes(tar(("evil", "x")))
    run("tar", "-C", save, "-cf", tmp_path / "save.tar", ".")
    with pytest.raises(BadImage, match=r"unpacked layer sha256:.* is not what its name says"):
        exchange.import_image(tmp_path / "save.tar", "saved")
    for bad in ("/etc/passwd", "../layout/oci-layout"):
        (save / "manifest.json").write_text(json.dumps([entry | {"Layers": [bad, "1/layer.tar"]}]))
        run("tar", "-C", save, "-cf", tmp_path / "save.tar", ".")
        with pytest.raises(BadImage, match="the archive has no file"):
            exchange.import_image(tmp_path / "save.tar", "saved")
    (save / f"{digits}.json").write_text("{}")
    run("tar", "-C", save, "-cf", tmp_path / "save.tar", ".")
    with pytest.raises(BadImage, match="is not what its name says"):
        exchange.import_image(tmp_path / "save.tar", "saved")


@pytest.mark.parametrize("option", ["--gzip", "--zstd", "--no-auto-compress"])
def test_the_tarball_of_a_root_file_system_is_read(tmp_path: Path, option: str) -> None:
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "root/etc/motd").write_text("hello")
    run("tar", "-C", tmp_path / "root", option, "-cf", tmp_path / "some.tar", ".")
    image = exchange.import_image(tmp_path / "some.tar", "plain")
    assert (image.files, image.bytes) == (1, 5)


def test_how_much_an_image_may_grow_is_asked_of_what_comes(tmp_path: Path) -> None:
    """Zeros that are not compressed are no bomb, though zstd makes almost nothing of them; and limits can be raised."""
    zeros = tar(("zeros", "\0" * (8 << 20)))
    (tmp_path / "plain.tar").write_bytes(zeros)
    (tmp_path / "bomb.tar.gz").write_bytes(gzip.compress(zeros))
    image = exchange.import_image(tmp_path / "plain.tar", "zeros")
    assert image.bytes == 8 << 20 and image.zstd_bytes * 200 + (1 << 20) < image.bytes
    with pytest.raises(UnsafeArchive, match="a bomb"):
        exchange.import_image(tmp_path / "bomb.tar.gz", "bomb")
    again = exchange.import_image(tmp_path / "bomb.tar.gz", "bomb", limits=Limits(ratio=2000))
    children.in_child(shutil.rmtree, images.rootfs("bomb"))
    assert (images.rootfs("bomb") / "zeros").stat().st_size == again.bytes == image.bytes


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (tar(("out", "-> /etc"), ("out/passwd", "x")), "out"),
        (tar(("../passwd", "x")), r"has a component \.\."),
        (tar(("x", "-> ../../etc")), "leads out"),
        (tar(("proc", "-> etc"), ("etc", None)), "no directory, and a container has one mounted there"),
    ],
)
def test_a_hostile_image_is_refused_and_nothing_is_left(
    tmp_path: Path, home: Path, layer: bytes, said: str
) -> None:
    layout_of(tmp_path / "layout", layer)
    before = sorted(path for path in home.rglob("*") if "launchers" not in path.parts)
    with pytest.raises(UnsafeArchive, match=said):
        exchange.import_image(tmp_path / "layout", "evil")
    assert sorted(path for path in home.rglob("*") if "launchers" not in path.parts) == before


def test_a_refused_image_does_not_replace_the_one_that_is_there(tmp_path: Path) -> None:
    layout, image = layout_of(tmp_path / "layout", tar(("a", "1")))
    kept = exchange.import_image(tmp_path / "layout", "kept")
    damage(layout, image.layers[0].blob, "other")
    with pytest.raises((BadImage, UnsafeArchive)):
        exchange.import_image(tmp_path / "layout", "kept")
    assert store.whole("kept") == kept


def test_names_that_no_image_may_have(tmp_path: Path) -> None:
    for name, said in (
        ("python", "built from this machine's Python"),
        ("../x", "use letters"),
        ("", "use letters"),
    ):
        with pytest.raises(ValueError, match=said):
            exchange.import_image(tmp_path, name)


# ---------------------------------------------------------------------- the command line


def test_the_verbs(busybox: store.Image, tmp_path: Path) -> None:
    made = json.loads(
        cli("export", "busybox", str(tmp_path / "l"), "--tag", "1", "--json", "--", *SAYS).stdout
    )
    assert made["digest"] == Layout.open(tmp_path / "l").image("1").manifest.digest
    assert cli("import", str(tmp_path / "l"), "mine").stdout.startswith("mine: ")
    assert cli("run", "--rm", "mine").stdout == "the same everywhere\n0\n", "as the image says"
    assert cli("run", "--rm", "mine", "echo", "other").stdout == "other\n"
    failed = cli("import", str(tmp_path / "l"), "mine", "--tag", "2", status=125)
    assert failed.stderr == "labkernel: no image '2' in this layout; tags: 1\n"
    failed = cli("export", "nothing", str(tmp_path / "m"), status=125)
    assert "no image 'nothing'" in failed.stderr and not (tmp_path / "m").exists()


def test_an_image_says_how_it_is_run(busybox: store.Image, tmp_path: Path) -> None:
    layout = Layout.create(tmp_path / "l")
    layer = layout.add_layer(busybox.tarball)
    settings = {"Entrypoint": ["/bin/sh", "-c"], "Cmd": ["echo $COLOUR; pwd; id -u"], "Env": ["COLOUR=blue"],
                "WorkingDir": "/tmp", "User": "7"}  # fmt: skip
    layout.add_image([layer], settings, created="1980-01-01T00:00:00Z", history=[""], tag="x")
    exchange.import_image(tmp_path / "l", "entry")
    assert cli("run", "--rm", "entry").stdout == "blue\n/tmp\n7\n"
    assert cli("run", "--rm", "-e", "COLOUR=red", "-u", "0", "-w", "/", "entry").stdout == "red\n/\n0\n"
    assert cli("run", "--rm", "entry", "echo $0 other").stdout == "/bin/sh other\n"


# ---------------------------------------------------------------------- with the programs of others


def podman(place: Path, *words: str) -> str:
    limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000"] if words[0] == "run" else []
    where = ["--root", f"{place}/root", "--runroot", f"{place}/run", "--storage-driver", "vfs"]
    how = ["--cgroup-manager=cgroupfs", "--runtime", "runc"]
    # What it mounts is for no other test to see, whichever runs beside this one.
    apart = [] if os.geteuid() else [program("unshare"), "--mount"]
    return run(*apart, program("podman"), *where, *how, words[0], *limits, *words[1:])


@pytest.fixture
def podman_place() -> Iterator[Path]:
    program("podman")
    with tempfile.TemporaryDirectory(prefix="lk-", dir="/tmp") as place:  # podman takes no long paths
        yield Path(place)
        podman(Path(place), "rmi", "--all", "--force")


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_podman_runs_ours(busybox: store.Image, tmp_path: Path, podman_place: Path, compression: Any) -> None:
    exchange.export_image(busybox, tmp_path / "l", command=SAYS, compression=compression)
    name = f"oci:{tmp_path}/l:latest"
    assert podman(podman_place, "run", "--rm", "--network", "none", name) == "the same everywhere\n0\n"


def test_podman_loads_our_archive(busybox: store.Image, tmp_path: Path, podman_place: Path) -> None:
    exchange.export_image(busybox, tmp_path / "l.tar", command=SAYS)
    assert "Loaded image" in podman(podman_place, "load", "-i", f"{tmp_path}/l.tar")


@pytest.mark.parametrize("name", ["runc", "crun"])
def test_runtimes_run_ours_unpacked_by_umoci(busybox: store.Image, tmp_path: Path, name: str) -> None:
    exchange.export_image(busybox, tmp_path / "l", command=SAYS)
    run(program("umoci"), "unpack", "--image", f"{tmp_path}/l:latest", tmp_path / "bundle")
    config = json.loads((tmp_path / "bundle/config.json").read_text())
    config["process"]["terminal"] = False
    config["process"].pop("rlimits", None)  # raising one takes CAP_SYS_RESOURCE
    (tmp_path / "bundle/config.json").write_text(json.dumps(config))
    assert run(*runtime(name), "run", "-b", f"{tmp_path}/bundle", f"lk-{name}") == "the same everywhere\n0\n"


def test_skopeo_takes_ours_for_a_valid_image(busybox: store.Image, tmp_path: Path) -> None:
    image = exchange.export_image(busybox, tmp_path / "l", command=SAYS)
    exchange.export_image(busybox, tmp_path / "l.tar", command=SAYS)
    policy = ["--insecure-policy"]
    skopeo = program("skopeo")
    for source in (
        f"oci:{tmp_path}/l:latest",
        f"oci-archive:{tmp_path}/l.tar",
        f"docker-archive:{tmp_path}/l.tar",
    ):
        run(skopeo, *policy, "copy", source, f"dir:{tmp_path}/copy-{source.partition(':')[0]}")
    said = json.loads(run(skopeo, "inspect", f"oci:{tmp_path}/l:latest"))
    assert said["Digest"] == image.manifest.digest


@pytest.mark.parametrize("form", ["oci", "oci-archive", "docker-archive"])
def test_what_skopeo_made_is_read(busybox: store.Image, tmp_path: Path, form: str) -> None:
    exchange.export_image(busybox, tmp_path / "l", command=SAYS)
    made = tmp_path / ("copy" if form == "oci" else "copy.tar")
    run(program("skopeo"), "--insecure-policy", "copy", f"oci:{tmp_path}/l:latest", f"{form}:{made}:x:1"
        if form == "docker-archive" else f"{form}:{made}:x")  # fmt: skip
    assert exchange.import_image(made, "skopeo").digest == busybox.digest


def test_what_umoci_made_is_read(busybox: store.Image, tmp_path: Path) -> None:
    """A second layer: a file changed, one deleted, a directory replaced."""
    exchange.export_image(busybox, tmp_path / "l", command=SAYS)
    umoci = program("umoci")
    run(umoci, "unpack", "--image", f"{tmp_path}/l:latest", tmp_path / "b")
    (tmp_path / "b/rootfs/new").write_text("new")
    (tmp_path / "b/rootfs/bin/[").unlink()
    run(umoci, "repack", "--image", f"{tmp_path}/l:two", tmp_path / "b")
    assert len(Layout.open(tmp_path / "l").image("two").layers) == 2
    exchange.import_image(tmp_path / "l", "umoci", tag="two")
    script = "cat new; test -e /bin/[ || echo gone; ls /bin/busybox"
    assert Container("umoci", ["sh", "-c", script]).run().stdout == b"newgone\n/bin/busybox\n"


def test_what_buildah_made_is_read(busybox: store.Image, tmp_path: Path) -> None:
    exchange.export_image(busybox, tmp_path / "l", command=SAYS)
    where = ["--root", f"{tmp_path}/b/root", "--runroot", f"{tmp_path}/b/run", "--storage-driver", "vfs"]
    buildah = [program("buildah"), *where]
    (tmp_path / "hello").write_text("hello")
    name = run(*buildah, "from", f"oci:{tmp_path}/l:latest").strip()
    try:
        run(*buildah, "copy", name, tmp_path / "hello", "/etc/hello")
        run(*buildah, "config", "--cmd", "cat /etc/hello", name)
        run(*buildah, "commit", name, f"oci:{tmp_path}/made:x")
        run(*buildah, "commit", name, f"docker-archive:{tmp_path}/made.tar:x:1")
    finally:
        run(*buildah, "rm", "--all")
        run(*buildah, "rmi", "--all", "--force")
    for source in ("made", "made.tar"):
        exchange.import_image(tmp_path / source, "buildah")
        assert cli("run", "--rm", "buildah").stdout == "hello"


# ---------------------------------------------------------------------- an ordinary user


def test_an_ordinary_user_exports_imports_bundles_and_runs(tmp_path: Path) -> None:
    """Ownership inside is right: root's files are root's, and those of user 7 are user 7's."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a user; all tests are this user's already")
    busybox = shutil.which("busybox") or pytest.skip("busybox-static is not installed")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.add(busybox, "bin/busybox", filter=lambda info: info.replace(uid=0, gid=0, mode=0o755))
        for name, owner in (("mine", 0), ("theirs", 7)):
            info = tarfile.TarInfo(name)
            info.uid = info.gid = owner
            archive.addfile(info)
    with ordinary_user() as user:
        variables = copy_package(user)
        layout_of(user.home / "layout", out.getvalue(), tar(("more", "more")))
        user.gets(user.home / "layout")

        def lab(*words: str) -> str:
            done = user.run(PYTHON, "-m", "labkernel", *words, variables=variables, timeout=180)
            assert done.returncode == 0, done.stderr.decode()
            return str(done.stdout.decode())

        assert lab("import", "layout", "box").startswith("box: ")
        seen = lab(
            "run", "--rm", "box", "/bin/busybox", "stat", "-c", "%u %n", "/mine", "/theirs", "/bin/busybox"
        )
        assert seen == "0 /mine\n7 /theirs\n0 /bin/busybox\n"
        lab("export", "box", "out")
        exported = Layout.open(user.home / "out").image("latest")
        # The same bits as when root does it.
        exchange.import_image(user.home / "layout", "box")
        store_image = store.whole("box")
        assert store_image
        ours = exchange.export_image(store_image, tmp_path / "out")
        assert ours.manifest.digest == exported.manifest.digest
        lab("bundle", "box", "bundle", "--", "/bin/busybox", "true")
        maps = json.loads((user.home / "bundle/config.json").read_text())["linux"]["uidMappings"]
        assert maps[0]["hostID"] == user.uid == (user.home / "bundle/rootfs/mine").stat().st_uid
        assert (user.home / "bundle/rootfs/theirs").stat().st_uid == maps[1]["hostID"] + 7 - maps[1][
            "containerID"
        ]
        lab("clean", "--all")
