"""The Vagrantfile, the box that it wants, and the files with which other programs make such a VM."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
IMAGE = "ubuntu-24.04-server-cloudimg-amd64.img"


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip where a program is missing (`make test` installs them)."""
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def vagrant(
    directory: Path, tmp_path: Path, *arguments: str, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Call vagrant, which asks nobody for a newer version and writes to `tmp_path` only."""
    own = {
        "VAGRANT_CHECKPOINT_DISABLE": "1",
        "VAGRANT_HOME": str(tmp_path / "home"),
        "VAGRANT_DOTFILE_PATH": str(tmp_path / "state"),
        **settings,
    }
    return subprocess.run(
        ["vagrant", *arguments],
        cwd=directory,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=120,
    )


@needs("vagrant")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"LAB_BOX": "some/box"},
        {"LAB_CPUS": "4", "LAB_MEMORY": "8192", "LAB_PORT": "9000", "LAB_UBUNTU": "26.04"},
    ],
    ids=["as it is", "another box", "all settings"],
)
def test_vagrant_accepts_the_vagrantfile(tmp_path: Path, settings: dict[str, str]) -> None:
    done = vagrant(ROOT, tmp_path, "validate", "--ignore-provider", **settings)
    assert (done.returncode, done.stderr) == (0, "")


@needs("vagrant")
def test_vagrant_would_refuse_a_wrong_vagrantfile(tmp_path: Path) -> None:
    text = (ROOT / "Vagrantfile").read_text()
    (tmp_path / "Vagrantfile").write_text(text.replace("config.vm.hostname", "config.vm.hostnames"))
    assert vagrant(tmp_path, tmp_path, "validate", "--ignore-provider").returncode != 0


@needs("vagrant")
def test_a_vm_would_have_what_the_settings_say(tmp_path: Path) -> None:
    """A Vagrantfile around ours prints what Vagrant has made of it; the providers are not here, so they are noted."""
    (tmp_path / "Vagrantfile").write_text(
        """
configure = Vagrant.method(:configure)
Vagrant.define_singleton_method(:configure) do |version, &block|
  configure.call(version) do |config|
    config.vm.define_singleton_method(:provider) do |name, &set|
      set.call(provider = Struct.new(:cpus, :memory).new, config)
      puts "#{name}=#{provider.to_a} from #{config.vm.box_url}"
    end
    block.call(config)
    puts "box=#{config.vm.box}", config.vm.post_up_message
    config.vm.networks.each { |kind, options| puts "#{kind}=#{options.slice(:guest, :host, :host_ip).values}" }
  end
end
"""
        + f"load {str(ROOT / 'Vagrantfile')!r}\n"
    )
    settings = {"LAB_CPUS": "3", "LAB_MEMORY": "3000", "LAB_PORT": "9000"}
    said = vagrant(tmp_path, tmp_path, "validate", "--ignore-provider", **settings).stdout
    assert "box=containers-from-scratch/ubuntu-24.04\n" in said
    assert 'forwarded_port=[8888, 9000, "127.0.0.1"]\n' in said
    assert "http://127.0.0.1:9000/lab " in said and '"labkernel-token 9000"\n' in said
    packed = f"{ROOT}/vm/box/ubuntu-24.04-{'arm64' if os.uname().machine == 'aarch64' else 'amd64'}"
    assert f"virtualbox=[3, 3000] from {packed}-virtualbox.box\n" in said
    assert f"libvirt=[3, 3000] from {packed}-libvirt.box\n" in said
    other = {"LAB_BOX": "some/box", "LAB_BOX_URL": "https://some.where/it.box"}
    said = vagrant(tmp_path, tmp_path, "validate", "--ignore-provider", **other).stdout
    assert "box=some/box\n" in said and "libvirt=[2, 4096] from https://some.where/it.box\n" in said


class Mirror(NamedTuple):
    """Files as Ubuntu has them, served on this machine, and the key by which they are signed."""

    files: Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mirror]:
    """A small disk image, the list with its digest, and the list's signature by a key made for it."""
    files = tmp_path_factory.mktemp("mirror")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", files / IMAGE, "8M"], check=True)
    digest = hashlib.sha256((files / IMAGE).read_bytes()).hexdigest()
    (files / "SHA256SUMS").write_text(f"{'0' * 64} *ubuntu-24.04-other.img\n{digest} *{IMAGE}\n")
    # A short path: the agent's socket is in it.
    with tempfile.TemporaryDirectory(prefix="gpg-") as home:
        gpg: list[str | Path] = ["gpg", "--homedir", home, "--batch", "--quiet", "--passphrase", ""]
        for name in ("ubuntu", "somebody else"):
            subprocess.run(
                [*gpg, "--quick-generate-key", name, "ed25519", "sign"], check=True, capture_output=True
            )
        (files / "keyring.gpg").write_bytes(subprocess.check_output([*gpg, "--export"]))
        listed = subprocess.check_output([*gpg, "--with-colons", "--list-keys", "ubuntu"], text=True)
        fingerprint = next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr:"))
        for name in ("ubuntu", "somebody else"):
            signature = files / ("SHA256SUMS.gpg" if name == "ubuntu" else "by-somebody-else.gpg")
            sign: list[str | Path] = [
                "--local-user",
                name,
                "--output",
                signature,
                "--detach-sign",
                files / "SHA256SUMS",
            ]
            subprocess.run([*gpg, *sign], check=True)
        subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=True)
    environment = {"LAB_KEYRING": str(files / "keyring.gpg"), "LAB_FINGERPRINT": fingerprint}
    yield Mirror(files, environment)


class Quiet(SimpleHTTPRequestHandler):
    """Serves a directory without a word."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def mirror(signed: Mirror, tmp_path: Path) -> Iterator[Mirror]:
    """A copy of the signed files, for one test to spoil, behind an address."""
    files = tmp_path / "mirror"
    shutil.copytree(signed.files, files)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(files))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield Mirror(files, {**signed.environment, "LAB_MIRROR": f"http://127.0.0.1:{server.server_port}"})
        server.shutdown()
        thread.join()


class Packed(NamedTuple):
    """What came of a call of pack-box."""

    status: int
    said: str
    boxes: list[Path]


def pack(mirror: Mirror, tmp_path: Path, *arguments: str, **settings: str) -> Packed:
    """Call a copy of pack-box, so that its boxes are not left in the project."""
    here = tmp_path / "vm"
    shutil.copytree(ROOT / "vm" / "box-parts", here / "box-parts", dirs_exist_ok=True)
    shutil.copy(ROOT / "vm" / "pack-box", here)
    (tmp_path / "tmp").mkdir()
    own = {**mirror.environment, "TMPDIR": str(tmp_path / "tmp"), **settings}
    done = subprocess.run(
        [here / "pack-box", *arguments],
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert not list((tmp_path / "tmp").iterdir()), "nothing is left behind"
    return Packed(done.returncode, done.stdout, sorted(here.glob("box/*")))


def unpacked(packed: Packed, tmp_path: Path) -> dict[str, Path]:
    """The files of the one box that was packed."""
    assert packed.status == 0, packed.said
    (box,) = packed.boxes
    with tarfile.open(box) as archive:
        archive.extractall(tmp_path / "box", filter="data")
    return {path.name: path for path in (tmp_path / "box").iterdir()}


def disk(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(
        subprocess.check_output(["qemu-img", "info", "--output", "json", path])
    )
    return found


packs = needs("qemu-img", "gpg", "xorriso", "curl")


@packs
def test_box_for_libvirt(mirror: Mirror, tmp_path: Path) -> None:
    packed = pack(mirror, tmp_path, "libvirt", "amd64")
    files = unpacked(packed, tmp_path)
    assert packed.boxes[0].name == "ubuntu-24.04-amd64-libvirt.box"
    assert sorted(files) == ["Vagrantfile", "box.img", "metadata.json", "seed.img"]
    metadata = json.loads(files["metadata.json"].read_text())
    assert metadata["provider"] == "libvirt" and metadata["architecture"] == "amd64"
    assert [entry["path"] for entry in metadata["disks"]] == ["box.img", "seed.img"]
    assert disk(files["box.img"])["format"] == disk(files["seed.img"])["format"] == "qcow2"
    assert disk(files["box.img"])["virtual-size"] == 20 << 30


@packs
def test_box_for_virtualbox(mirror: Mirror, tmp_path: Path) -> None:
    files = unpacked(pack(mirror, tmp_path, "virtualbox", "amd64"), tmp_path)
    assert sorted(files) == ["Vagrantfile", "box-disk1.vmdk", "box.ovf", "metadata.json", "seed.vmdk"]
    assert json.loads(files["metadata.json"].read_text()) == {
        "provider": "virtualbox",
        "architecture": "amd64",
    }
    ovf = ElementTree.parse(files["box.ovf"])
    assert "@" not in files["box.ovf"].read_text()
    name = "{http://schemas.dmtf.org/ovf/envelope/1}"
    hrefs = {file.get(f"{name}id"): file.get(f"{name}href") for file in ovf.iter(f"{name}File")}
    disks = {entry.get(f"{name}diskId"): entry for entry in ovf.iter(f"{name}Disk")}
    for entry in disks.values():
        path = files[hrefs[entry.get(f"{name}fileRef")] or ""]
        assert disk(path)["format"] == "vmdk"
        assert str(disk(path)["virtual-size"]) == entry.get(f"{name}capacity")
        assert b'createType="streamOptimized"' in path.read_bytes()[:2048]
    used = [element.text for element in ovf.iter() if element.tag.endswith("}HostResource")]
    assert used == [f"/disk/{entry}" for entry in disks]


@packs
def test_seed_lets_vagrant_in(mirror: Mirror, tmp_path: Path) -> None:
    files = unpacked(pack(mirror, tmp_path, "libvirt", "amd64"), tmp_path)
    seed = tmp_path / "seed.iso"
    subprocess.run(["qemu-img", "convert", "-O", "raw", files["seed.img"], seed], check=True)
    assert (
        seed.read_bytes()[16 * 2048 + 40 : 16 * 2048 + 72].rstrip() == b"cidata"
    )  # the volume's name, ISO 9660
    reading: list[str | Path] = [
        "xorriso",
        "-indev",
        seed,
        "-osirrox",
        "on",
        "-extract",
        "/",
        tmp_path / "seed",
    ]
    subprocess.run(reading, check=True, capture_output=True)
    assert "instance-id" in yaml.safe_load((tmp_path / "seed" / "meta-data").read_text())
    text = (tmp_path / "seed" / "user-data").read_text()
    assert text.startswith("#cloud-config\n")
    (user,) = yaml.safe_load(text)["users"]
    assert user["name"] == "vagrant" and "NOPASSWD" in user["sudo"]
    for key in Path("/usr/share").glob("rubygems-integration/all/gems/vagrant-*/keys/vagrant.pub"):
        assert key.read_text().split()[1] in {line.split()[1] for line in user["ssh_authorized_keys"]}


@packs
@needs("vagrant")
def test_vagrant_takes_the_box(mirror: Mirror, tmp_path: Path) -> None:
    packed = pack(mirror, tmp_path, "virtualbox", "amd64")
    added = vagrant(tmp_path, tmp_path, "box", "add", "--name", "the/box", str(packed.boxes[0]))
    assert added.returncode == 0, added.stderr
    assert "the/box (virtualbox, 0)" in vagrant(tmp_path, tmp_path, "box", "list").stdout


@packs
def test_image_with_a_wrong_digest_is_refused(mirror: Mirror, tmp_path: Path) -> None:
    with (mirror.files / IMAGE).open("ab") as image:
        image.write(b"one byte more")
    packed = pack(mirror, tmp_path, "libvirt", "amd64")
    assert packed.status == 1 and packed.boxes == []
    assert "and not" in packed.said and "as signed" in packed.said


@packs
@pytest.mark.parametrize("spoilt", ["list", "signature", "signer", "no signature", "fingerprint"])
def test_list_that_ubuntus_key_has_not_signed_is_refused(mirror: Mirror, tmp_path: Path, spoilt: str) -> None:
    signature = mirror.files / "SHA256SUMS.gpg"
    settings = {}
    if spoilt == "list":
        (mirror.files / "SHA256SUMS").write_text(f"{'0' * 64} *{IMAGE}\n")
    elif spoilt == "signature":
        content = bytearray(signature.read_bytes())
        content[-1] ^= 1
        signature.write_bytes(content)
    elif spoilt == "signer":  # valid, and by a key in the keyring: but not by the one that counts
        shutil.copy(mirror.files / "by-somebody-else.gpg", signature)
    elif spoilt == "no signature":
        signature.write_bytes(b"")
    else:
        settings["LAB_FINGERPRINT"] = "D2EB44626FDDC30B513D5BB71A5D6C4C7DB87C81"
    packed = pack(mirror, tmp_path, "libvirt", "amd64", **settings)
    assert packed.status == 1 and packed.boxes == []
    assert "not signed by Ubuntu's key" in packed.said


@packs
def test_architecture_that_ubuntu_has_not_is_refused(mirror: Mirror, tmp_path: Path) -> None:
    packed = pack(mirror, tmp_path, "libvirt", "arm64")
    assert packed.status == 1 and "could not download" in packed.said


def test_cloud_init_and_lima_call_provision() -> None:
    cloud = (ROOT / "vm" / "cloud-init.yaml").read_text()
    assert cloud.startswith("#cloud-config\n")
    commands = yaml.safe_load(cloud)["runcmd"]
    assert any("vm/provision.sh" in str(command) for command in commands)
    lima = yaml.safe_load((ROOT / "vm" / "lima.yaml").read_text())
    assert {image["arch"] for image in lima["images"]} == {"x86_64", "aarch64"}
    assert any("vm/provision.sh" in step["script"] for step in lima["provision"])
    assert lima["portForwards"][0]["hostPort"] == 8888


def test_settings_are_those_that_provision_knows() -> None:
    """What the callers of provision.sh set is among what its head describes."""
    head = (ROOT / "vm" / "provision.sh").read_text().split("set -euo")[0]
    known = set(re.findall(r"^# {3}([A-Z_]+) ", head, re.MULTILINE))
    for name in ("Vagrantfile", "vm/cloud-init.yaml", "vm/lima.yaml"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if "provision.sh" in line]
        assert set(re.findall(r"\b(LAB_[A-Z]+)=", "\n".join(lines))) <= known
