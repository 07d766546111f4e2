"""The tree of mounts: mounts are followed by their numbers, and the picture shows what the lists say."""

from __future__ import annotations

from labkernel.lab import mount_tree
from labkernel.linux.mounts import Mount

JAIL = "/home/somebody/rootfs"
NAMES = {"/": "the machine's root", JAIL: "the rootfs", f"{JAIL}/run": "the rootfs's tmpfs"}


def mount(number: int, parent: int, place: str) -> Mount:
    return Mount(number, parent, "0:1", "/", place, (), (), "tmpfs", "tmpfs", ())


LISTS = {
    "before": [
        mount(10, 1, "/"),
        mount(11, 10, "/proc"),
        mount(12, 10, "/home"),
        mount(13, 12, JAIL),
        mount(14, 13, f"{JAIL}/run"),
    ],
    "after pivot_root": [
        mount(13, 1, "/"),
        mount(14, 13, "/run"),
        mount(10, 13, "/tmp"),
        mount(11, 10, "/tmp/proc"),
        mount(12, 10, "/tmp/home"),
    ],
    "after umount -l": [mount(13, 1, "/"), mount(14, 13, "/run")],
}


def test_mounts_are_followed_by_their_numbers() -> None:
    trees = mount_tree.trees(LISTS, NAMES, JAIL)
    assert [str(tree) for tree in trees.values()] == [
        "the machine's root at /, the rootfs at ROOTFS, the rootfs's tmpfs at ROOTFS/run, and others",
        "the rootfs at /, the rootfs's tmpfs at /run, the machine's root at /tmp, and others",
        "the rootfs at /, the rootfs's tmpfs at /run",
    ]


def test_a_mount_between_two_that_have_names_does_not_move_them() -> None:
    """Somebody's /home may be a disk of its own: the words and the picture are the same."""
    trees = mount_tree.trees(LISTS, NAMES, JAIL)
    assert [len(branch.above) for branch in trees["before"].branches] == [0, 1, 2]
    assert [len(branch.above) for branch in trees["after pivot_root"].branches] == [0, 1, 1]


def test_a_root_that_is_its_own_parent_ends_the_way_up() -> None:
    trees = mount_tree.trees({"now": [mount(1, 1, "/"), mount(2, 1, JAIL)]}, NAMES, JAIL)
    assert [branch.above for branch in trees["now"].branches] == [(), ("the machine's root",)]


def test_the_picture_has_a_box_for_each_and_dashes_for_the_machine() -> None:
    trees = mount_tree.trees(LISTS, NAMES, JAIL)
    before, between, after = mount_tree.figure(trees).axes
    dashed = {
        text.get_text()
        for text in before.texts
        if (box := text.get_bbox_patch()) and box.get_linestyle() == "--"
    }
    assert dashed == {"the machine's root: /", "2 more of the machine's"}
    assert [text.get_text() for text in after.texts if text.get_text()] == [
        "the rootfs: /",
        "the rootfs's tmpfs: /run",
    ]
    assert between.get_title() == "after pivot_root"
    words = mount_tree.describe(trees)
    assert (
        "after pivot_root: the rootfs at /; the rootfs's tmpfs at /run, which hangs from the rootfs; "
        in words
    )
    assert (
        "the machine's root at /tmp, which hangs from the rootfs; the others hang from the machine's root."
        in words
    )
    assert words.endswith(
        "after umount -l: the rootfs at /; the rootfs's tmpfs at /run, which hangs from the rootfs."
    )
