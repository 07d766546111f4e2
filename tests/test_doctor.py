"""The doctor: what it says is what the machine does; where it says no, it says what to do; it never raises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest

import labkernel
from labkernel import Container, children, in_child
from labkernel.lab import doctor
from labkernel.lab.doctor import Finding, Findings, examine, missing
from labkernel.linux import disks, syscalls
from tests.helpers import assert_nothing_left, own_home, snapshot

NAMES = {
    *(
        "root",
        "children",
        "userns",
        "subuid",
        "overlay",
        "seccomp",
        "cgroup",
        "network",
        "publish",
        "psi",
        "landlock",
    ),
    *(f"namespace:{kind}" for kind in ("mnt", "uts", "ipc", "pid", "net", "cgroup", "time")),
    *(f"cgroup:{controller}" for controller in ("cpu", "memory", "pids", "cpuset")),
}

AS_JSON = """
import json
from dataclasses import asdict
from labkernel.lab import doctor
print(json.dumps([asdict(finding) for finding in doctor.examine()]))
"""


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


@pytest.fixture(scope="module")
def here(home: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine()}


def works(*command: str) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


def on_a_machine_that_forbids(script: str) -> tuple[int, str, str]:
    """Run a script as an ordinary user of a machine with user.max_user_namespaces=0: status, stdout, stderr.

    The user and the setting belong to a user namespace, made for it.
    """

    def run() -> tuple[int, str, str]:
        uid, gid = os.geteuid(), os.getegid()
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"1000 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"1000 {gid} 1")
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    return in_child(run, timeout=90)


def test_each_thing_is_asked_once(here: dict[str, Finding]) -> None:
    assert set(here) == NAMES
    assert len(examine()) == len(NAMES)


def test_it_agrees_with_the_tools_of_util_linux(here: dict[str, Finding]) -> None:
    become_root = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    assert here["userns"].ok == works("unshare", "--user", "--map-root-user", "true")
    for kind, option in (
        ("mnt", "mount"),
        ("uts", "uts"),
        ("ipc", "ipc"),
        ("net", "net"),
        ("cgroup", "cgroup"),
    ):
        assert here[f"namespace:{kind}"].ok == works("unshare", *become_root, f"--{option}", "true"), kind
    assert here["namespace:pid"].ok == works("unshare", *become_root, "--pid", "--fork", "true")
    assert here["root"].ok == (os.geteuid() == 0)


def test_it_agrees_with_containers(here: dict[str, Finding]) -> None:
    limits = {
        "cgroup:memory": {"memory": "64M"},
        "cgroup:pids": {"pids_limit": 9},
        "cgroup:cpu": {"cpus": 0.5},
    }
    for name, limit in limits.items():
        try:
            ran = Container("python", ["true"], **limit).run(timeout=60).returncode == 0  # type: ignore[arg-type]
        except OSError:
            ran = False
        assert here[name].ok == ran, here[name]
    if here["overlay"].ok:
        assert Container("python", ["true"]).run(timeout=60).returncode == 0


def test_every_no_comes_with_words_and_advice(here: dict[str, Finding]) -> None:
    for finding in here.values():
        assert finding.detail
        assert finding.ok or finding.remedy, finding


def test_it_leaves_nothing_behind() -> None:
    before = snapshot()
    examine()
    children.close_launcher()
    assert_nothing_left(before)


def test_nothing_is_missing_for_who_wants_nothing() -> None:
    assert missing([]) == []


def test_what_nobody_knows_is_missing() -> None:
    assert missing(["wings"]) == ["wings: the doctor knows no such thing."]


def test_what_is_here_is_not_missing(here: dict[str, Finding]) -> None:
    assert missing([name for name, finding in here.items() if finding.ok]) == []


def test_whether_a_disk_can_be_limited_is_tried_when_it_is_asked_for(home: Path) -> None:
    said = missing(["cgroup:io"])
    assert "cgroup:io" not in {finding.name for finding in examine()}
    if disks.below(home) is None or "io" not in children.launcher().facts["controllers"]:
        assert said and "What to do: " in said[0]
    else:
        assert said == []


def test_where_there_is_no_disk_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if not children.launcher().facts["cgroup_version"]:
        pytest.skip("no groups here, which is told first")
    monkeypatch.setattr(disks, "below", lambda path: None)
    (said,) = missing(["cgroup:io"])
    assert said.startswith("cgroup:io: the lab's directory lies on no disk") and "LABKERNEL_HOME" in said


def test_a_limit_that_nothing_heeds_is_a_no(monkeypatch: pytest.MonkeyPatch) -> None:
    if missing(["cgroup:io"]):
        pytest.skip("no disk here that can be limited")
    monkeypatch.setattr(doctor, "DISK_RATE", 1 << 40)  # a limit of which nobody notices anything
    monkeypatch.setattr(doctor, "DISK_BLOCK", 1 << 12)
    assert doctor._disk().ok  # 24 KiB at that rate take no time, so any time is enough
    monkeypatch.setattr(doctor, "_write_limited", lambda number, path: 0.0)
    found = doctor._disk()
    assert not found.ok and "nothing heeds it" in found.detail and found.remedy


def test_as_text_and_as_html_the_same_is_told() -> None:
    findings = Findings(
        [
            Finding("a", True, "works"),
            Finding("b<", False, "does not", "mend it"),
            Finding("c", False, "-", "-", True),
        ]
    )
    text, page = repr(findings), findings._repr_html_()
    for word in ("works", "does not", "mend it", "no*"):
        assert word in text
        assert word in page
    assert "b&lt;" in page


def test_a_machine_that_forbids_user_namespaces_gets_clear_words() -> None:
    status, out, errors = on_a_machine_that_forbids(AS_JSON)
    assert status == 0, errors
    assert errors == ""
    found = {row["name"]: row for row in json.loads(out)}
    assert set(found) == NAMES
    assert "ENOSPC" in found["userns"]["detail"]
    assert "sudo sysctl user.max_user_namespaces=" in found["userns"]["remedy"]
    for name in NAMES - {"root", "children", "psi", "landlock", "cgroup"}:
        assert not found[name]["ok"], name
    assert all(row["ok"] or row["remedy"] for row in found.values())


def test_without_a_directory_of_its_own_it_says_so(tmp_path: Path) -> None:
    home = tmp_path / "file"
    home.write_text("in the way")
    done = subprocess.run(
        [sys.executable, "-m", "labkernel", "doctor", "--json"],
        env=os.environ | {"LABKERNEL_HOME": str(home)}, capture_output=True, text=True,
    )  # fmt: skip
    found = {row["name"]: row for row in json.loads(done.stdout)}
    assert "Not a directory" in found["children"]["detail"]
    assert str(home) in found["children"]["remedy"]


def test_there_missing_says_why_in_one_line() -> None:
    script = "from labkernel.lab import doctor; print(doctor.missing(['userns', 'psi', 'namespace:pid'])[0])"
    _, out, errors = on_a_machine_that_forbids(script)
    assert errors == ""
    assert out.startswith(
        "userns: the machine does not let you make user namespaces: unshare(CLONE_NEWUSER): ENOSPC"
    )
    assert "What to do: sudo sysctl" in out
    assert out.count("\n") == 1


def test_there_missing_tells_what_all_fail_for_and_once() -> None:
    """Who is skipped reads the machine's answer, not "see userns"."""
    wanted = ["publish", "seccomp", "overlay", "wings"]
    script = f"from labkernel.lab import doctor; print(*doctor.missing({wanted}), sep='\\n')"
    _, out, errors = on_a_machine_that_forbids(script)
    assert errors == ""
    first, second = out.splitlines()
    assert first.startswith("userns: ") and "What to do: sudo sysctl" in first
    assert second == "wings: the doctor knows no such thing."


def test_in_a_container_it_says_that_no_child_can_be_started(here: dict[str, Finding]) -> None:
    if not here["seccomp"].ok:
        pytest.skip(f"no container here: {here['seccomp'].detail}")
    volumes = [f"{Path(m.__file__ or '').parent}:/opt/{m.__name__}:ro" for m in (labkernel, cloudpickle)]
    box = Container("python", ["python3", "-c", AS_JSON], env={"PYTHONPATH": "/opt"}, volumes=volumes)
    ended = box.run(timeout=60)
    assert ended.returncode == 0, ended.stderr
    found = {row["name"]: row for row in json.loads(ended.stdout)}
    assert set(found) == NAMES
    assert "clone3" in found["children"]["detail"]
    assert not any(row["ok"] for name, row in found.items() if name not in ("root", "psi", "landlock"))


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("user/max_user_namespaces", "0", "sysctl user.max_user_namespaces"),
        ("kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    ],
)
def test_the_setting_that_forbids_is_named(
    setting: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not every such machine can be had here, so the settings are made up; that they forbid is not."""
    monkeypatch.setattr(doctor, "_read", lambda path: value if path == f"/proc/sys/{setting}" else "")
    assert words in doctor._why_no_user_namespace("unshare: EPERM")


def test_without_such_a_setting_a_filter_is_suspected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_read", lambda path: "")
    assert "seccomp" in doctor._why_no_user_namespace("unshare: EPERM")
    assert "max_user_namespaces" in doctor._why_no_user_namespace("unshare: ENOSPC")


def test_power_in_the_namespace_is_tried_not_taken_for_granted() -> None:
    """AppArmor lets the namespace be made and nothing be done in it; a filter that refuses sethostname does, too."""

    def without_power() -> str | None:
        return refusing("sethostname", doctor._try_user_namespace)

    assert doctor._try_user_namespace.__module__ == "labkernel.lab.doctor"
    words = in_child(without_power)
    assert words is not None
    assert "EPERM" in words


def refusing(call: str, function: object) -> str | None:
    """Run a function behind a filter that answers EPERM to one system call (x86_64 and aarch64)."""
    import platform
    import struct

    from labkernel.linux import seccomp

    number = {"x86_64": {"sethostname": 170}, "aarch64": {"sethostname": 161}}[platform.machine()][call]
    statements = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    seccomp.install(b"".join(struct.pack("HBBI", *statement) for statement in statements))
    assert callable(function)
    value: str | None = function()
    return value


def test_the_launcher_keeps_no_descriptors_of_what_was_tried() -> None:
    """Its next container would stand on a directory of the doctor's, and that is gone by then: making one fails."""
    doctor.examine()

    def open_ones() -> int:
        return len(os.listdir(f"/proc/{children.launcher().process.pid}/fd"))

    time.sleep(0.5)  # it does its chores when nobody asks for anything
    before = open_ones()
    for _ in range(3):
        doctor.examine()
        end = time.monotonic() + 20
        while open_ones() > before and time.monotonic() < end:
            time.sleep(0.05)
        assert open_ones() <= before
