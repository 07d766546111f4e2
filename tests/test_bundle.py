"""Bundles: config.json says what our own container is, field by field, and runc and crun run it to the same effect."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labkernel import Container, bundle, children, images
from labkernel.image import exchange, recipes, store
from labkernel.image.unpack import UnsafeArchive
from labkernel.lab import runtimes
from labkernel.linux import capabilities, cgroups, mounts, seccomp
from labkernel.linux.users import IdMap
from labkernel.spec import BadOption, Spec
from tests.helpers import assert_nothing_left, descendants, launcher_of, own_home, snapshot
from tests.ordinary_user import needs_root
from tests.others import cli, run, runtime
from tests.test_oci import tar
from tests.test_unpack import END, header

LOOK = r"""
hostname; id -u; id -g; pwd; echo $COLOUR
cat /proc/self/uid_map /proc/self/gid_map
grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status
grep -E '^Max (open files|core file size)' /proc/self/limits
ls /proc/self/ns | tr '\n' ' '; echo
cat /proc/net/dev | grep -c :
touch /proc/sys/kernel/hostname 2>/dev/null || echo no
unshare -U true 2>/dev/null || echo no namespaces
for path in /proc/kcore /proc/keys /proc/timer_list /sys/firmware; do
    ls -A $path 2>/dev/null; cat $path 2>/dev/null | wc -c
done
"""


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory, images_too=False) as place:
        yield place


@pytest.fixture(scope="module")
def busybox(home: Path) -> store.Image:
    if not shutil.which("busybox"):
        pytest.skip("busybox-static is not installed")
    return recipes.build("busybox")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory to which everybody finds: runc goes there with the ids of the container's root."""
    with tempfile.TemporaryDirectory(prefix="lk-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def described(version: str = "1.1", cgroup_version: int = 2, **options: Any) -> tuple[Spec, dict[str, Any]]:
    """A container's spec, and its config.json."""
    spec = Container("/", ["true"], **options).spec
    profile = seccomp.named(options.get("seccomp", "default"))
    maps = [IdMap(0, 100_000, 65_536)]
    found = bundle.config(
        spec, ids=(0, 0, ()), maps=maps, profile=profile, cgroup_version=cgroup_version, version=version
    )
    json.dumps(found)  # and nothing in it that JSON cannot say
    return spec, found


# ---------------------------------------------------------------------- field by field


def test_the_program() -> None:
    spec, config = described(env={"COLOUR": "blue"}, workdir="/tmp", cap_drop=["CHOWN"], cap_add=["SYS_TIME"])
    found = config["process"]
    assert found["args"] == list(spec.process.command) and found["cwd"] == spec.process.workdir
    assert dict(item.split("=", 1) for item in found["env"]) == dict(spec.process.environment)
    for name in ("bounding", "effective", "permitted"):
        assert capabilities.parse(found["capabilities"][name]) == spec.process.capabilities
    assert found["capabilities"]["inheritable"] == found["capabilities"]["ambient"] == []
    assert {(one["type"], one["soft"], one["hard"]) for one in found["rlimits"]} == {
        ("RLIMIT_NOFILE", 1024, 1024), ("RLIMIT_CORE", 0, 0)
    }  # fmt: skip
    assert found["noNewPrivileges"] is spec.process.no_new_privs is True
    assert described(no_new_privs=False)[1]["process"]["noNewPrivileges"] is False
    assert found["terminal"] is False and described(tty=True)[1]["process"]["terminal"] is True


def test_every_field_of_a_spec_is_said_or_refused_or_named() -> None:
    """Whoever adds a wall to `Spec` has to say here what a bundle makes of it."""
    said = {
        "process",
        "hostname",
        "limits",
        "read_only",
        "volumes",
        "network",
        "publish",
        "namespaces",
        "masked_paths",
    }
    ours_alone = {"id", "name", "rootfs", "limits_required", "remove", "detach"}
    assert set(Spec._fields) == said | ours_alone
    program = {
        "command",
        "environment",
        "workdir",
        "user",
        "tty",
        "capabilities",
        "seccomp",
        "no_new_privs",
        "rlimits",
    }
    watched = {"observed"}  # by us while it runs (labkernel.observe): no wall, and nothing for a bundle
    for_init = {"init_too"}  # a runtime has an init only if it is told to
    assert set(described()[0].process._fields) == program | watched | for_init


def test_namespaces_and_ids() -> None:
    _, config = described(hostname="box")
    kinds = [one["type"] for one in config["linux"]["namespaces"]]
    assert sorted(kinds) == ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"]
    assert config["ociVersion"] == "1.1.0" and config["hostname"] == "box"
    assert config["linux"]["uidMappings"] == [{"containerID": 0, "hostID": 100_000, "size": 65_536}]
    assert config["linux"]["gidMappings"] == config["linux"]["uidMappings"]
    _, config = described("1.0", namespaces={"mnt", "pid", "time"})
    assert [one["type"] for one in config["linux"]["namespaces"]] == ["mount", "pid"] and config[
        "ociVersion"
    ] == "1.0.2"
    assert "hostname" not in config and "uidMappings" not in config["linux"]
    _, config = described(network="host")
    assert "network" not in [one["type"] for one in config["linux"]["namespaces"]]
    assert config["mounts"][-1] == {
        "destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind"]
    }  # fmt: skip
    _, config = described(namespaces={"mnt", "pid"})
    assert "/dev/mqueue" not in [one["destination"] for one in config["mounts"]]


def test_files(tmp_path: Path) -> None:
    _, config = described(volumes=[f"{tmp_path}:/data:ro"], read_only=True)
    assert config["root"] == {"path": "rootfs", "readonly": True}
    assert config["mounts"][-1] == {
        "destination": "/data", "type": "bind", "source": str(tmp_path), "options": ["rbind", "nosuid", "nodev", "ro"]
    }  # fmt: skip
    assert config["linux"]["maskedPaths"] == list(mounts.MASKED_PATHS)
    assert config["linux"]["readonlyPaths"] == list(mounts.READONLY_PATHS)
    assert described(masked_paths=False)[1]["linux"]["maskedPaths"] == []


def test_limits() -> None:
    limits: dict[str, Any] = {
        "memory": "64M", "memory_swap": "80M", "memory_reservation": "32M", "cpus": 0.5, "cpu_weight": 200,
        "cpuset_cpus": "0", "pids_limit": 7,
    }  # fmt: skip
    two = described(**limits)[1]["linux"]["resources"]
    assert two == {
        "memory": {"limit": 64 << 20, "swap": 80 << 20}, "cpu": {"quota": 50_000, "period": 100_000, "cpus": "0"},
        "pids": {"limit": 7}, "unified": {"memory.high": str(32 << 20), "cpu.weight": "200"},
    }  # fmt: skip
    one = described(cgroup_version=1, **limits)[1]["linux"]["resources"]
    assert one["memory"]["reservation"] == 32 << 20 and one["cpu"]["shares"] == 2048 and "unified" not in one
    spec, _ = described()
    rated = spec.limits._replace(read_bps={"8:0": 1000}, write_bps={"8:16": 2000})
    assert bundle.resources(rated)["blockIO"] == {
        "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1000}],
        "throttleWriteBpsDevice": [{"major": 8, "minor": 16, "rate": 2000}],
    }


def test_what_a_bundle_cannot_say_is_refused() -> None:
    for options in ({"network": "bridge"}, {"publish": ["8000:80"]}):
        with pytest.raises(BadOption, match="a bundle cannot say this"):
            described(**options)


def answer_of(
    filter: dict[str, Any], name: str, arguments: tuple[int, ...] = (0,) * 6
) -> tuple[str, int | None]:
    """What the rules of config.json answer to a call, by the specification's words."""
    compare = {
        "EQ": lambda a, rule: a == rule["value"], "NE": lambda a, rule: a != rule["value"],
        "MASKED_EQ": lambda a, rule: a & rule["value"] == rule["valueTwo"],
    }  # fmt: skip
    for rule in filter["syscalls"]:
        if name in rule["names"] and all(
            compare[one["op"].removeprefix("SCMP_CMP_")](arguments[one["index"]], one)
            for one in rule.get("args", ())
        ):
            return rule["action"], rule.get("errnoRet")
    return filter["defaultAction"], filter["defaultErrnoRet"]


def test_system_calls() -> None:
    spec, config = described()
    found = config["linux"]["seccomp"]
    assert answer_of(found, "read") == ("SCMP_ACT_ALLOW", None)
    assert answer_of(found, "mount") == ("SCMP_ACT_ERRNO", 1)
    assert answer_of(found, "clone3") == ("SCMP_ACT_ERRNO", 38)
    assert answer_of(found, "clone", (0x10000000,) + (0,) * 5) == ("SCMP_ACT_ERRNO", 1), "CLONE_NEWUSER"
    assert answer_of(found, "clone") == ("SCMP_ACT_ALLOW", None)
    _, config = described(cap_add=["SYS_ADMIN"])
    assert answer_of(config["linux"]["seccomp"], "mount") == ("SCMP_ACT_ALLOW", None)
    assert "seccomp" not in described(seccomp="unconfined")[1]["linux"]
    rules = [rule for rule in seccomp.default_profile().rules if rule.needs <= spec.process.capabilities
             and not rule.unless & spec.process.capabilities]  # fmt: skip
    assert [rule["names"] for rule in found["syscalls"]] == [list(rule.calls) for rule in rules]


# ---------------------------------------------------------------------- under the runtimes


def mounted(text: str) -> dict[str, tuple[str, str, bool]]:
    """Where something is mounted: what kind, and whether it can be written to; but for the root and the devices."""
    found = {}
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        point, options, kind = left.split()[4], left.split()[5].split(","), right.split()[0]
        flags = ",".join(sorted({"nosuid", "nodev", "noexec"} & set(options)))
        if point != "/" and kind != "devtmpfs":
            found[point] = (kind, flags if kind != "proc" or point == "/proc" else "", "ro" in options)
    return found


@pytest.mark.parametrize("name", ["runc", "crun"])
def test_a_runtime_does_what_our_container_does(busybox: store.Image, place: Path, name: str) -> None:
    call = runtime(name)
    options: dict[str, Any] = {"hostname": "box", "env": {"COLOUR": "blue"}, "workdir": "/tmp", "user": "7:8"}
    ours = Container("busybox", ["/bin/sh", "-c", LOOK], **options).run()
    looks = {"look": LOOK, "mounts": "cat /proc/self/mountinfo"}
    theirs = {}
    for what, script in looks.items():
        spec = Container("busybox", ["/bin/sh", "-c", script], **options).spec
        bundle.make(place / what, spec, busybox.tarball)
        theirs[what] = run(*call, "run", "--bundle", place / what, f"lk-{name}-{what}")
    assert ours.stdout.decode() == theirs["look"]
    assert (
        "NoNewPrivs:\t1" in theirs["look"]
        and "Seccomp:\t2" in theirs["look"]
        and "no namespaces" in theirs["look"]
    )
    seen = Container("busybox", ["cat", "/proc/self/mountinfo"], **options).run().stdout.decode()
    assert mounted(seen) == mounted(theirs["mounts"])


def limits_of(pid: int) -> dict[str, str]:
    """The limits of the group that a process is in, from the files of either version of cgroups."""
    files = {
        "memory": ("memory.max", "memory.limit_in_bytes"), "pids": ("pids.max",), "cpu": ("cpu.max", "cpu.cfs_quota_us")
    }  # fmt: skip
    paths, found = cgroups.own_paths(pid), {}
    for mount in cgroups.mounts():
        for controller, names in files.items():
            path = paths.get("" if mount.version == 2 else controller)
            if path is not None and (mount.version == 2 or controller in mount.controllers):
                for name in names:
                    if (file := cgroups.below_mount(mount, path) / name).exists():
                        found[controller] = file.read_text().split()[0]
    return found


@pytest.mark.parametrize("name", ["runc", "crun"])
def test_limits_hold_under_a_runtime(busybox: store.Image, place: Path, name: str) -> None:
    call = runtime(name)
    spec = Container("busybox", ["sleep", "1000"], memory="64M", cpus=0.5, pids_limit=7).spec
    bundle.make(place / "b", spec, busybox.tarball)
    identity = f"lk-{name}-limits"
    # Its output is not ours to read: it would not end before the container does.
    with (place / "output").open("w") as output:
        command = [*call, "run", "--detach", "--bundle", str(place / "b"), identity]
        subprocess.run(command, input=b"", stdout=output, stderr=output, check=True, timeout=60)
    try:
        pid = json.loads(run(*call, "state", identity))["pid"]
        assert limits_of(pid) == {"memory": str(64 << 20), "pids": "7", "cpu": "50000"}
    finally:
        run(*call, "delete", "--force", identity)


@needs_root
@pytest.mark.parametrize("name", ["runc", "crun"])
def test_a_runtime_is_given_no_device_of_the_machines(busybox: store.Image, place: Path, name: str) -> None:
    """crun makes the container's root the owner of its streams, and /dev/null is everybody's."""
    runtime(name)
    bundle.make(place / "b", Container("busybox", ["echo", "ran"]).spec, busybox.tarball)
    before = os.stat("/dev/null")
    assert runtimes.run_bundle(name, place / "b").printed == "ran\n"
    after = os.stat("/dev/null")
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


@needs_root
@pytest.mark.parametrize("name", ["runc", "crun"])
@pytest.mark.parametrize("who", ["the caller", "its launcher"])
def test_a_runtime_that_is_killed_in_a_notebook_leaves_no_groups(
    busybox: store.Image, place: Path, name: str, who: str
) -> None:
    """Each makes its groups by its own rules, in trees that the lab does not use, too."""
    runtime(name)
    spec = Container("busybox", ["sleep", "1000"]).spec
    bundle.make(place / "b", spec, busybox.tarball)
    program = (
        "from pathlib import Path; from labkernel.lab import runtimes\n"
        f"runtimes.run_bundle({name!r}, Path('{place}/b'))"
    )
    before = snapshot(descriptors=False)
    caller = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 30
    while not [
        path for path in snapshot(descriptors=False).since(before).get("cgroups", []) if "bundle" in path
    ]:
        assert time.monotonic() < end and caller.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    launcher = launcher_of(caller.pid)
    assert launcher
    os.kill(caller.pid if who == "the caller" else launcher, signal.SIGKILL)
    caller.wait(30)
    if who == "its launcher":
        children.close_launcher()
        children.launcher()  # which begins with what others have left
        children.close_launcher()
    assert_nothing_left(before)


def test_crun_takes_the_time_namespace(busybox: store.Image, place: Path) -> None:
    call = runtime("crun")
    spec = Container("busybox", ["readlink", "/proc/self/ns/time"]).spec
    bundle.make(place / "b", spec, busybox.tarball, version="1.1")
    said = run(*call, "run", "--bundle", place / "b", "lk-crun-time").strip()
    assert re.fullmatch(r"time:\[\d+\]", said) and said != os.readlink("/proc/self/ns/time")


# ---------------------------------------------------------------------- made, or not at all


def test_the_files_belong_to_the_containers_root(busybox: store.Image, tmp_path: Path) -> None:
    content = bundle.make(tmp_path / "b", Container("busybox", ["true"]).spec, busybox.tarball)
    owner = (tmp_path / "b/rootfs/bin/busybox").stat().st_uid
    assert owner == content["linux"]["uidMappings"][0]["hostID"]
    with pytest.raises(FileExistsError, match="not empty"):
        bundle.make(tmp_path / "b", Container("busybox", ["true"]).spec, busybox.tarball)
    children.in_child(shutil.rmtree, tmp_path / "b")


@needs_root
def test_no_file_belongs_to_somebody_outside_the_containers_ids(tmp_path: Path) -> None:
    """Neither where containers have it, nor in a bundle."""
    (tmp_path / "far.tar").write_bytes(header("su", mode=0o4755, uid=70_000) + END)
    image = exchange.import_image(tmp_path / "far.tar", "far")
    content = bundle.make(tmp_path / "b", Container("far", ["/su"]).spec, image.tarball)
    nobody = content["linux"]["uidMappings"][0]["hostID"] + 65_534
    for root in (images.rootfs("far"), tmp_path / "b/rootfs"):
        found = (root / "su").stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (nobody, nobody, 0o755), root


def test_an_unpacking_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "many.tar").write_bytes(b"".join(header(str(number)) for number in range(50_000)) + END)
    place = tmp_path / "b"

    def kill() -> None:
        """Kill who has a file open in there: the child that unpacks."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            for pid in descendants():
                with contextlib.suppress(OSError):
                    if any(
                        os.readlink(fd).startswith(f"{place}/") for fd in Path(f"/proc/{pid}/fd").iterdir()
                    ):
                        os.kill(pid, signal.SIGTERM)
                        return
            time.sleep(0.005)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(children.ChildFailed):
        bundle.make(place, Container("/", ["true"]).spec, tmp_path / "many.tar")
    killer.join()
    assert list(place.iterdir()) == []


def test_a_hostile_tarball_or_an_unknown_user_leaves_nothing(busybox: store.Image, tmp_path: Path) -> None:
    (tmp_path / "evil.tar").write_bytes(tar(("../out", "x")))
    with pytest.raises(UnsafeArchive):
        bundle.make(tmp_path / "b", Container("busybox", ["true"]).spec, tmp_path / "evil.tar")
    with pytest.raises(OSError, match="no user 'nobody-at-all'"):
        bundle.make(
            tmp_path / "b", Container("busybox", ["true"], user="nobody-at-all").spec, busybox.tarball
        )
    assert list((tmp_path / "b").iterdir()) == []


def test_the_command(busybox: store.Image, tmp_path: Path) -> None:
    done = cli(
        "bundle", "busybox", str(tmp_path / "b"), "--memory", "64M", "--hostname", "box", "--", "hostname"
    )
    assert "left out: the time namespace" in done.stderr and "runc run" in done.stdout
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert (
        config["process"]["args"] == ["hostname"]
        and config["linux"]["resources"]["memory"]["limit"] == 64 << 20
    )
    failed = cli("bundle", "busybox", str(tmp_path / "c"), "--network", "bridge", status=125)
    assert "a bundle cannot say this" in failed.stderr and not (tmp_path / "c/config.json").exists()
    children.in_child(shutil.rmtree, tmp_path / "b")
