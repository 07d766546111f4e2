"""The table and the picture of the walls: read from /proc, in words that are the same on every machine."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.patches import Rectangle

from labkernel import Container, in_child, lab, state
from labkernel.images import rootfs
from labkernel.lab.look import Sight, _interfaces, look, look_at, program_of
from labkernel.lab.table import Table, _rows, inside_outside
from labkernel.lab.walls import Wall, draw, in_words, walls
from labkernel.linux import capabilities, cgroups, namespaces, syscalls
from labkernel.linux.capabilities import Capability
from tests.helpers import facts, own_home


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


OWN_NAMESPACES = {"mnt", "uts", "ipc", "net", "cgroup"}


def nothing() -> None:
    pass


def unshare(kind: str) -> None:
    syscalls.unshare(namespaces.FLAGS[kind])


def enter_jail(path: str) -> None:
    os.chroot(path)
    os.chdir("/")


def rename() -> None:
    syscalls.unshare(syscalls.CLONE_NEWUTS)
    socket.sethostname("box")


def drop(*names: str) -> None:
    capabilities.limit_to(capabilities.read().permitted - capabilities.parse(names))


def keep(*names: str) -> None:
    capabilities.limit_to(capabilities.parse(names))


def changed(table: Table) -> set[str]:
    return set(table.changed())


@pytest.fixture(scope="module")
def container(home: Path) -> Iterator[Container]:
    with Container("python", ["sleep", "100"], hostname="box") as running:
        yield running


def test_a_plain_child_is_as_outside() -> None:
    assert changed(inside_outside(None)) == set()
    assert changed(inside_outside(nothing)) == set()


def test_look_agrees_with_proc() -> None:
    seen = look()
    assert seen.namespaces == namespaces.inodes()
    assert seen.pid == os.getpid()
    assert seen.uid == os.getuid()
    assert seen.hostname == os.uname().nodename
    assert seen.capabilities == capabilities.read().effective
    assert seen.root == (os.stat("/").st_dev, os.stat("/").st_ino)
    assert seen.cgroup == Path("/proc/self/cgroup").read_text()


@pytest.mark.parametrize("kind", sorted(OWN_NAMESPACES))
def test_each_namespace_is_named(kind: str) -> None:
    table = inside_outside(unshare, kind)
    assert table["namespaces"].inside == f"its own: {kind}"
    assert table["namespaces"].changed


def test_chroot_changes_the_root_directory_alone() -> None:
    table = inside_outside(enter_jail, str(rootfs()))
    assert table.changed() == ["root directory"]
    assert table["pids"].inside == "the machine's (but no /proc to list them)"


def test_a_new_uts_namespace_is_a_copy_until_it_is_renamed() -> None:
    assert inside_outside(unshare, "uts")["hostname"].inside == "a copy of the machine's"
    assert inside_outside(rename)["hostname"].inside == "its own: box"


def test_a_new_mount_namespace_is_a_copy() -> None:
    assert inside_outside(unshare, "mnt")["mounts"].inside == "a copy of the machine's"


def test_a_new_network_namespace_has_loopback_alone() -> None:
    assert inside_outside(unshare, "net")["network"].inside == "its own: lo"


def test_devices_that_some_kernels_add_by_themselves_are_not_told() -> None:
    lines = ["Inter-|", " face |", "    lo: 0 0", "  sit0: 0 0", "  eth0: 0 0"]
    assert _interfaces("\n".join(lines)) == ("eth0", "lo")


def test_a_cgroup_namespace_does_not_make_another_cgroup() -> None:
    assert inside_outside(unshare, "cgroup")["cgroup"].inside == "the lab's, which it sees as /"


def test_a_cgroup_and_a_cgroup_namespace_are_two_things(container: Container) -> None:
    if container._cgroup is None:
        pytest.skip("this user gets no control group here")
    pid = program_of(container)
    name = f"{state.PREFIX}table"

    def move_and_unshare() -> None:
        group = cgroups.parent().create(name)
        for path in group.paths.values():
            Path(path, "cgroup.procs").write_text("0")
        unshare("cgroup")

    def enter_namespace_only() -> Sight:
        namespaces.enter(pid, ["cgroup"])
        return look()

    try:
        assert inside_outside(move_and_unshare)["cgroup"].inside == "its own, which it sees as /"
    finally:
        in_child(lambda: cgroups.parent().open(name).remove())
    assert inside_outside(enter_namespace_only)["cgroup"].inside == "the lab's, which it sees above its /"
    assert inside_outside(container)["cgroup"].inside == "its own, which it sees as /"


def test_lost_capabilities_are_named() -> None:
    assert (
        inside_outside(drop, "CHOWN", "KILL")["capabilities"].inside
        == "all of root's but CAP_CHOWN, CAP_KILL"
    )
    assert inside_outside(keep, "KILL")["capabilities"].inside == "only CAP_KILL"
    assert inside_outside(keep)["capabilities"].inside == "none"


def test_without_any_capability_outside_none_is_said_to_be_lost() -> None:
    bare = replace(look(), capabilities=frozenset())
    (row,) = [row for row in _rows(bare, bare) if row.what == "capabilities"]
    assert (row.outside, row.inside, row.changed) == ("none", "none", False)


def test_a_container_has_everything_of_its_own(container: Container) -> None:
    table = inside_outside(container)
    assert table["hostname"].inside == "its own: box"
    assert table["pids"].inside == "its own: this is pid 2, /proc lists 2"
    assert table["network"].inside == "its own: lo"
    assert table["user"].inside == "root of its own user namespace"
    assert table["capabilities"].inside.startswith("Docker's default 14")
    assert table["namespaces"].inside == "its own: all eight"
    assert {row.what for row in table} - changed(table) in (set(), {"cgroup"})  # cgroup: where users get none


def test_a_pid_can_be_looked_at(container: Container) -> None:
    assert look_at(program_of(container)) == look_at(container)


def test_a_container_that_is_not_there_is_said_to_be_so() -> None:
    with pytest.raises(ProcessLookupError, match="has not been started"):
        look_at(Container("python", ["true"]))


def test_as_text_and_as_html_the_same_is_told(container: Container) -> None:
    table = inside_outside(container)
    text, page = repr(table), re.sub(r"<[^>]+>", " ", table._repr_html_().replace("&#x27;", "'"))
    for row in table:
        assert row.inside in text
        assert row.inside in page
    assert text.count("CHANGED") == page.count("changed") == len(table.changed())


def test_no_number_of_this_machine_is_shown() -> None:
    """Neither an inode, nor a pid, nor its name: the stored outputs hold for every machine."""
    text = repr(inside_outside(enter_jail, str(rootfs())))
    assert not re.search(r"\d", text)
    assert os.uname().nodename not in text


def test_all_walls_are_down_around_a_plain_child() -> None:
    assert {wall.state for wall in walls()} == {"down"}
    assert in_words(walls()) == "Down: all."


def test_chroot_is_half_a_wall() -> None:
    standing = {wall.name: wall.state for wall in walls(enter_jail, str(rootfs())) if wall.state != "down"}
    assert standing == {"root directory": "half"}


def test_around_a_container_the_walls_are_up(container: Container) -> None:
    down = [wall.name for wall in walls(container) if wall.state != "up"]
    assert down in (
        [],
        ["limits"],
    )  # limits: half up where none was asked for; down where there are no groups
    if not down:
        assert in_words(walls(container)) == "Up: all."


def limits_wall(limits: cgroups.Limits, *kinds: str) -> str:
    def move_in() -> None:
        group = lab.group("box")
        group.set(limits)
        group.add(os.getpid())
        syscalls.unshare(namespaces.flags(kinds))

    return next(wall.state for wall in walls(move_in) if wall.name == "limits")


@pytest.mark.parametrize("kinds", [(), ("cgroup",)])
@pytest.mark.parametrize(
    ("limits", "state"),
    [
        (cgroups.Limits(), "half"),
        (cgroups.Limits(cpu_weight=50), "half"),
        (cgroups.Limits(memory=64 << 20), "up"),
        (cgroups.Limits(cpus=0.5), "up"),
        (cgroups.Limits(pids=16), "up"),
    ],
)
def test_a_group_is_half_a_wall_until_something_is_limited(
    limits: cgroups.Limits, state: str, kinds: tuple[str, ...]
) -> None:
    if why := facts()["no_cgroup"]:
        pytest.skip(f"no control group can be made here: {why}")
    if missing := cgroups_missing(limits):
        pytest.skip(f"no controller here: {missing}")
    assert limits_wall(limits, *kinds) == state


def test_a_container_with_a_limit_has_all_walls_up() -> None:
    if why := facts()["no_cgroup"]:
        pytest.skip(f"no control group can be made here: {why}")
    if cgroups_missing(cgroups.Limits(pids=64)):
        pytest.skip("processes cannot be limited here")
    with Container("python", ["sleep", "1000"], pids_limit=64) as limited:
        assert in_words(walls(limited)) == "Up: all."


def cgroups_missing(limits: cgroups.Limits) -> list[str]:
    return in_child(lambda: cgroups.parent().lacking(limits))


def promise() -> Sight:
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    return look()


def test_no_new_privs_is_a_wall() -> None:
    up = [wall.name for wall in walls(promise) if wall.state == "up"]
    assert up == ["no new privs"]


def test_the_picture_shows_each_wall_by_form_and_word_not_by_colour_alone() -> None:
    figure = draw([Wall("mounts", "up"), Wall("root directory", "half"), Wall("ipc", "down")], "three walls")
    (axes,) = figure.axes
    words = [text.get_text() for text in axes.texts]
    assert words == ["UP", "mounts", "HALF", "root\ndirectory", "down", "ipc"]
    bricks = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_fill()]
    columns = [sum(place < patch.get_x() < place + 1 for patch in bricks) for place in range(3)]
    assert columns[0] == 2 * columns[1] > 0 == columns[2]


def test_calm_says_the_call_and_the_errno(capsys: pytest.CaptureFixture[str]) -> None:
    with lab.calmly(FileNotFoundError):
        in_child(os.listdir, "/no/such/place")
    with lab.calmly(OSError):
        in_child(syscalls.umount2, "/no/such/place")
    first, second = capsys.readouterr().out.splitlines()
    assert first == "As expected, it fails: ENOENT, No such file or directory: /no/such/place"
    assert second.startswith("As expected, it fails: umount2(/no/such/place): E")


def test_calm_adds_nothing_to_an_error_without_words(capsys: pytest.CaptureFixture[str]) -> None:
    with lab.calmly(MemoryError):
        raise MemoryError
    assert capsys.readouterr().out == "As expected, it fails: MemoryError\n"


def test_calm_shows_no_place_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    with lab.calmly(FileNotFoundError):
        os.listdir(f"{rootfs()}/no-such-place")
    assert capsys.readouterr().out.strip().endswith(": ROOTFS/no-such-place")


def test_calm_is_not_calm_when_nothing_fails_or_something_else_does() -> None:
    with pytest.raises(AssertionError, match="expected to fail"), lab.calmly(PermissionError):
        pass
    with pytest.raises(ZeroDivisionError), lab.calmly(PermissionError):
        _ = 1 / 0


def test_the_capability_of_the_lesson_is_there() -> None:
    assert Capability.CAP_SYS_CHROOT in look_at(None).capabilities
