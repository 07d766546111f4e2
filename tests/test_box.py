"""The box of notebook 18: whoever runs the lab, in it one is root with everything, and reaches nothing outside."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkernel.children import ChildFailed, in_child
from labkernel.lab import doctor
from labkernel.lab.box import in_box, strangers
from labkernel.linux import capabilities, namespaces, syscalls, users
from labkernel.linux.capabilities import ALL, FileCapabilities
from tests.helpers import own_home


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        if lacking := doctor.missing(["userns", "subuid", "overlay"]):
            pytest.skip("; ".join(lacking))
        yield place


def test_it_is_process_1_and_root_with_every_capability() -> None:
    def work() -> tuple[int, int, int, capabilities.CapabilitySets]:
        return os.getpid(), os.getuid(), os.getgid(), capabilities.read()

    pid, uid, gid, sets = in_box(work)
    assert (pid, uid, gid) == (1, 0, 0)
    assert sets.permitted == sets.effective == sets.bounding == ALL
    assert sets.inheritable == sets.ambient == frozenset()


def test_what_it_sees_is_its_own() -> None:
    def work() -> tuple[dict[str, int], list[str], str, list[str]]:
        return namespaces.inodes(), os.listdir("/tmp"), socket.gethostname(), os.listdir("/proc")

    theirs, files, name, processes = in_box(work)
    ours = in_child(namespaces.inodes)
    assert {kind for kind in ours if theirs[kind] != ours[kind]} == {
        "user",
        "mnt",
        "uts",
        "ipc",
        "pid",
        "net",
    }
    assert files == []
    assert name == "box"
    assert [entry for entry in processes if entry.isdigit()] == ["1"]


def test_nobody_in_it_is_somebody_outside() -> None:
    def work() -> list[int]:
        return [int(word) for word in Path("/proc/self/uid_map").read_text().split()]

    inside, outside, count = in_box(work)
    assert inside == 0
    assert (
        outside != 0
    )  # as the lab's children count; in there, the file shows the parent namespace's numbers
    assert count >= 65535


def test_the_image_cannot_be_changed_and_programs_in_tmp_are_honoured() -> None:
    def work() -> tuple[int, int]:
        with pytest.raises(OSError, match="Read-only"):
            Path("/usr/new").touch()
        Path("/tmp/cat").write_bytes(Path("/usr/bin/cat").read_bytes())
        os.chmod("/tmp/cat", 0o4755)
        os.setresuid(1000, 1000, 1000)
        done = subprocess.run(["/tmp/cat", "/proc/self/status"], capture_output=True, text=True)
        return len(capabilities.decode(done.stdout).effective), os.getuid()

    assert in_box(work) == (len(ALL), 1000)


def test_modules_are_found_in_it() -> None:
    """Also those of a package that was imported outside, as the codecs are, which sockets look for by name."""

    def work() -> tuple[str, bytes]:
        import wave

        return wave.__name__, "A".encode("cp1140")

    assert in_box(work) == ("wave", b"\xc1")


def test_values_errors_and_prints_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert in_box(lambda a, b: a + b, 1, 2) == 3
    in_box(print, "hello")
    assert capsys.readouterr().out == "hello\n"
    with pytest.raises(ZeroDivisionError):
        in_box(lambda: 1 // 0)
    with pytest.raises(ChildFailed, match="exit status 7"):
        in_box(os._exit, 7)


def test_what_it_leaves_running_ends_with_it() -> None:
    mark = f"sleep {os.getpid()}1"

    def work() -> None:
        subprocess.Popen(mark.split())

    in_box(work)
    commands = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            commands.append((entry / "cmdline").read_text().replace("\0", " ").strip())
        except OSError:
            continue
    assert mark not in commands


def test_the_map_is_of_strangers() -> None:
    assert strangers(()) == users.IdMap(0, users.ROOT_BASE, users.RANGE)
    own = (users.IdMap(0, 1000, 1), users.IdMap(1, 100000, 65536))
    assert strangers(own) == users.IdMap(0, 1, 65536)
    assert strangers((users.IdMap(0, 100000, 65536),)) == users.IdMap(0, 1, 65535)
    with pytest.raises(OSError, match="range of ids"):
        strangers((users.IdMap(0, 1000, 1),))


# ---------------------------------------------------------------------- capabilities on files, for which it is needed


def test_capabilities_on_a_file_are_kept_and_counted() -> None:
    given = FileCapabilities(permitted=frozenset({10}), inheritable=frozenset({40}), effective=False)

    def work() -> tuple[FileCapabilities | None, FileCapabilities | None]:
        Path("/tmp/with").touch()
        capabilities.set_on_file("/tmp/with", given)
        Path("/tmp/without").touch()
        return capabilities.on_file("/tmp/with"), capabilities.on_file("/tmp/without")

    assert in_box(work) == (given, None)


def test_where_a_file_system_keeps_none_the_message_says_so() -> None:
    def work() -> FileCapabilities | None:
        os.mkdir("/tmp/ram")
        syscalls.mount("none", "/tmp/ram", "ramfs")
        Path("/tmp/ram/file").touch()
        with pytest.raises(OSError, match="keeps no such attributes"):
            capabilities.set_on_file("/tmp/ram/file", FileCapabilities())
        return capabilities.on_file("/tmp/ram/file")

    assert in_box(work) is None


def test_without_setfcap_none_can_be_given() -> None:
    def work() -> None:
        Path("/tmp/file").touch()
        capabilities.limit_to(ALL - capabilities.parse(["SETFCAP"]))
        with pytest.raises(PermissionError, match="CAP_SETFCAP"):
            capabilities.set_on_file("/tmp/file", FileCapabilities())

    in_box(work)
