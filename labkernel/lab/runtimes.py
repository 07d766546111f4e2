"""Other people's runtimes, where they are installed: what does the same container print under them?

Each runs in a child with a mount namespace of its own, in which its files lie at /mnt: nothing of it is left, Podman
takes no long paths, and runc takes no bundle below a directory that is closed to the ids of the container's root.
They are tried as root only; for an ordinary user each of them wants to be set up first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from labkernel import cleanup
from labkernel.children import in_child
from labkernel.lab.scratch import scratch
from labkernel.linux import cgroups, mounts, syscalls

PATIENCE = 60.0
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
UNIFIED = "/sys/fs/cgroup/unified"


@dataclass(frozen=True)
class Answer:
    """What came of it; `printed` is None where the runtime did not run it, and `words` say why."""

    printed: str | None
    words: str


def run_bundle(name: str, bundle: Path) -> Answer:
    """Run a bundle under runc or crun."""
    return _tried(name, "--root", "/mnt/state", "run", "--bundle", "/mnt/bundle", bundle=bundle)


def run_image(layout: Path, tag: str) -> Answer:
    """Run an image of an OCI layout under Podman, with a store of its own that is removed afterwards."""
    store = ("--root", "/mnt/store/root", "--runroot", "/mnt/store/run", "--storage-driver", "vfs")
    # Within the limits that this process has: to raise one takes a capability that root may lack in a container.
    limits = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000")
    how = ("--cgroup-manager", "cgroupfs", "--log-level", "error")
    words = ("run", *limits, "--rm", "--network", "none", f"oci:/mnt/layout:{tag}")
    place = scratch() / "podman"
    place.mkdir(exist_ok=True)
    return _tried("podman", *store, *how, *words, store=place, layout=layout)


def _tried(name: str, *words: str, **directories: Path) -> Answer:
    path = shutil.which(name, path=SEARCH_PATH)
    if not path:
        return Answer(None, "not installed here")
    if os.geteuid() != 0:
        return Answer(None, "tried as root only")
    try:
        done: subprocess.CompletedProcess[str] = in_child(_run, [path, *words], directories)
    except subprocess.TimeoutExpired:
        return Answer(None, f"no answer in {PATIENCE:.0f} seconds")
    if done.returncode:
        return Answer(None, f"exit status {done.returncode}: {' '.join(done.stderr.split())[-160:]}")
    return Answer(done.stdout, "ran it")


def _run(command: list[str], directories: dict[str, Path]) -> subprocess.CompletedProcess[str]:
    syscalls.unshare(syscalls.CLONE_NEWNS)
    mounts.set_propagation("/", "private")
    if os.path.ismount(UNIFIED) and any(one.version == 1 for one in cgroups.mounts()):
        syscalls.umount2(UNIFIED, syscalls.MNT_DETACH)  # crun refuses a machine with both versions
    mounts.tmpfs("/mnt")
    if (
        "bundle" in directories
    ):  # a name by which its control groups are found, should it not come to remove them
        command = [*command, cleanup.groups_of_child(os.getpgrp()) + "bundle"]
    for name, directory in directories.items():
        Path("/mnt", name).mkdir()
        mounts.bind(directory, f"/mnt/{name}")
    # An empty pipe, and not /dev/null: crun gives its streams to the container's root, and that is the machine's own.
    return subprocess.run(command, input="", capture_output=True, text=True, timeout=PATIENCE)
