"""User namespaces: maps of ids, ranges of a user, and who owns a file, seen from both sides."""

from __future__ import annotations

import errno
import os
import pwd
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labkernel import children
from labkernel.children import in_child
from labkernel.container import Container
from labkernel.linux import syscalls, users
from labkernel.linux.users import IdMap
from tests.helpers import facts, inside, logged, needs_ids, own_home, rootless


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


NAME = pwd.getpwuid(os.getuid()).pw_name


# ---------------------------------------------------------------------- ranges


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{NAME}:100000:65536\n", (100000, 65536)),
        (f"{os.getuid()}:200000:1000\n", (200000, 1000)),
        (f"somebody:1:2\n{NAME}:300000:65536\n", (300000, 65536)),
        (f"  {NAME}:5:6  \n", (5, 6)),
        (f"{NAME}x:1:2\nx{NAME}:1:2\n", None),
        ("", None),
        ("# a comment\n\n", None),
        (f"# {NAME}:1:2\n", None),
    ],
)
def test_a_range_is_found_by_name_or_number(
    text: str, expected: tuple[int, int] | None, tmp_path: Path
) -> None:
    (tmp_path / "subuid").write_text(text)
    assert users.subid_range(tmp_path / "subuid") == expected


@pytest.mark.parametrize(
    "text", [f"{NAME}\n", f"{NAME}:\n", f"{NAME}:a:b\n", f"{NAME}:1\n", f"{NAME}:1:2:3\n"]
)
def test_a_line_that_is_none_gives_no_range(text: str, tmp_path: Path) -> None:
    (tmp_path / "subuid").write_text(text)
    assert users.subid_range(tmp_path / "subuid") is None


def test_without_a_file_there_is_no_range(tmp_path: Path) -> None:
    assert users.subid_range(tmp_path / "nosuch") is None


# ---------------------------------------------------------------------- maps


def test_a_map_as_the_kernel_takes_it() -> None:
    assert IdMap(0, 1000, 1).line() == "0 1000 1\n"


def test_the_map_of_a_container() -> None:
    assert users.container_map(()) == (IdMap(0, users.ROOT_BASE, users.RANGE),)
    assert users.container_map((IdMap(0, 1000, 1),)) == (IdMap(0, 0, 1),)
    assert users.container_map((IdMap(0, 1000, 1), IdMap(1, 100000, 65536))) == (
        IdMap(0, 0, 1),
        IdMap(1, 1, users.RANGE - 1),
    )
    assert users.container_map((IdMap(0, 1000, 1), IdMap(1, 100000, 1000))) == (
        IdMap(0, 0, 1),
        IdMap(1, 1, 1000),
    )


def in_new_user_namespace(maps: tuple[IdMap, ...]) -> Any:
    """What a child in a new user namespace sees of itself, after its parent wrote the maps."""

    def work() -> Any:
        read, write = os.pipe()
        go_read, go_write = os.pipe()
        pid, _ = syscalls.clone3(syscalls.CLONE_NEWUSER)
        if pid == 0:
            os.read(go_read, 1)
            maps_seen = [Path(f"/proc/self/{name}_map").read_text().split() for name in ("uid", "gid")]
            groups = Path("/proc/self/setgroups").read_text().strip()
            os.write(write, repr((os.getuid(), os.getgid(), maps_seen, groups)).encode())
            os._exit(0)
        try:
            users.write_maps(pid, maps)
        finally:
            os.write(go_write, b".")
            os.waitpid(pid, 0)
        import ast

        return ast.literal_eval(os.read(read, 10000).decode())

    return in_child(work)


def test_a_single_id_goes_with_setgroups_denied() -> None:
    uid, gid, maps, groups = in_new_user_namespace((IdMap(0, 0, 1),))
    assert (uid, gid, maps, groups) == (0, 0, [["0", "0", "1"]] * 2, "deny")


def test_a_range() -> None:
    if facts()["id_maps"] and facts()["container_map"]["count"] == 1:
        pytest.skip("a single user id is all there is here")
    _, _, maps, groups = in_new_user_namespace((IdMap(0, 1, 10),))
    assert (maps, groups) == ([["0", "1", "10"]] * 2, "allow")


def test_several_ranges() -> None:
    if facts()["id_maps"] and facts()["container_map"]["count"] == 1:
        pytest.skip("a single user id is all there is here")
    _, _, maps, _ = in_new_user_namespace((IdMap(0, 0, 1), IdMap(1, 5, 3)))
    assert maps == [["0", "0", "1", "1", "5", "3"]] * 2


def test_without_a_map_everybody_is_nobody() -> None:
    def work() -> tuple[int, int]:
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        return os.getuid(), os.getgid()

    overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
    assert in_child(work) == (overflow, overflow)


def test_a_map_is_written_once_and_the_error_explains() -> None:
    def work() -> str:
        pid, _ = syscalls.clone3(syscalls.CLONE_NEWUSER)
        if pid == 0:
            import time

            time.sleep(60)
        try:
            users.write_maps(pid, (IdMap(0, 0, 1),))
            users.write_maps(pid, (IdMap(0, 0, 1),))
        except OSError as error:
            return f"{errno.errorcode[error.errno or 0]} {error.strerror}"
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        return "done"

    answer = in_child(work)
    assert answer.startswith("EPERM write ")
    assert "written once" in answer


def test_ids_of_others_cannot_be_mapped_without_rights() -> None:
    def work() -> str:
        uid = os.geteuid()
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        try:
            users._write("/proc/self/uid_map", f"0 {uid + 1} 1\n")
        except OSError as error:
            return f"{errno.errorcode[error.errno or 0]} {error.strerror}"
        return "done"

    answer = in_child(work)
    assert answer.startswith("EPERM write ")
    assert "man 5 subuid" in answer


def test_root_of_a_namespace_of_ones_own() -> None:
    def work() -> tuple[list[tuple[int, int, int]], int, int, str]:
        maps = users.become_root_of_own_namespace()
        return (
            [(m.inside, m.outside, m.count) for m in maps],
            os.getuid(),
            os.getgid(),
            Path("/proc/self/uid_map").read_text(),
        )

    maps, uid, gid, kernels = in_child(work)
    assert (uid, gid) == (0, 0)
    assert [list(map(int, line.split())) for line in kernels.splitlines()] == [list(entry) for entry in maps]
    assert maps[0][0] == 0


def test_where_it_is_forbidden_the_error_names_the_switch() -> None:
    def work() -> str:
        uid = os.geteuid()
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
        try:
            users.become_root_of_own_namespace()
        except OSError as error:
            return str(error.strerror)
        return "done"

    assert "/proc/sys/user/max_*_namespaces" in in_child(work)


def test_the_launchers_map_is_what_the_user_was_given() -> None:
    maps = facts()["id_maps"]
    if not rootless():
        assert maps == []
        return
    assert maps[0] == {"inside": 0, "outside": os.getuid(), "count": 1}
    given = users.subid_range()
    if given and len(maps) > 1:
        assert (maps[1]["outside"], maps[1]["count"]) == given


# ---------------------------------------------------------------------- both sides of a container


def outside_uid(container: Container) -> int:
    status = Path(f"/proc/{container.pid}/status").read_text()
    return int(status.split("Uid:")[1].split()[0])


def test_root_inside_is_somebody_else_outside() -> None:
    with Container("python", ["sleep", "60"]) as container:
        assert container.exec(["id", "-u"]).stdout == b"0\n"
        assert outside_uid(container) == (os.getuid() if rootless() else users.ROOT_BASE)


def test_a_user_inside_is_an_id_of_the_range_outside() -> None:
    needs_ids()
    program = "import time; print('here', flush=True); time.sleep(60)"
    with Container("python", ["python3", "-c", program], user="1000:1000") as container:
        below = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()
        uid = int(Path(f"/proc/{below[0]}/status").read_text().split("Uid:")[1].split()[0])
    if rootless():
        given = users.subid_range()
        assert given
        assert uid == given[0] + 999  # inside, 0 is the user's own id, and the range begins at 1
    else:
        assert uid == users.ROOT_BASE + 1000


def test_files_that_the_container_makes_belong_to_its_ids() -> None:
    """Seen on disk, in the writable layer, while it runs."""
    needs_ids()
    program = """
import os, time
for name in ('root', 'other'): open('/tmp/' + name, 'w').close()
os.chown('/tmp/other', 7, 8)
print('done', flush=True); time.sleep(60)"""
    with Container("python", ["python3", "-c", program]) as container:
        logged(container, "done")

        def look(path: str) -> list[tuple[int, int]]:
            return [(os.stat(f"{path}/{n}").st_uid, os.stat(f"{path}/{n}").st_gid) for n in ("root", "other")]

        owners = in_child(look, str(container.spec.directory / "upper" / "tmp"))
    base = facts()["container_map"]["outside"]
    assert owners == [(base, base), (base + 7, base + 8)]


def test_files_of_nobody_inside_stay_closed(tmp_path: Path) -> None:
    """A file of an id that the container does not have belongs to nobody there, and even its root may not read it."""
    if rootless():
        pytest.skip("an ordinary user can give no file to somebody else")
    (tmp_path / "file").write_text("secret")
    os.chown(tmp_path / "file", 99_999_999, 99_999_999)
    (tmp_path / "file").chmod(0o600)
    program = (
        "result = [os.stat('/v/file').st_uid, attempt(open, '/v/file'), attempt(os.chown, '/v/file', 0, 0)]"
    )
    uid, reading, owning = inside(program, volumes=[f"{tmp_path}:/v"])
    assert (uid, reading) == (65534, "EACCES")
    assert owning in ("EPERM", "EOVERFLOW")


def test_a_user_who_may_not_write_here_may_not_there(tmp_path: Path) -> None:
    """The mode of a volume holds for the container's other users, whatever its root may do."""
    needs_ids()
    tmp_path.chmod(0o755)
    (tmp_path / "mine").write_text("x")
    (tmp_path / "mine").chmod(0o600)
    program = "result = [attempt(open, '/v/new', 'w'), attempt(open, '/v/mine')]"
    assert inside(program, volumes=[f"{tmp_path}:/v"], user="1000:1000") == ["EACCES", "EACCES"]


def test_the_record_of_ids_is_the_same_for_the_next_launcher() -> None:
    before = facts()["container_map"]
    children.close_launcher()
    assert facts()["container_map"] == before
