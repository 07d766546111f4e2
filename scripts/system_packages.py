"""The system packages that the lab can use: which, why and when; and their installation.

    python3 scripts/system_packages.py GROUP     installs what GROUP lacks (asks first, unless run as root)
    python3 scripts/system_packages.py           prints the table

Standard library only: this runs before there is an environment. Packages are named as Debian and Ubuntu name
them. On another distribution the script says what is missing and leaves the installation to the reader.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

# An ordinary user's PATH may lack these on Debian, where mkfs, runc and friends live.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


class Package(NamedTuple):
    """A package, what shows that it is here (a program, or a file by its path; "": dpkg), its groups, its reason."""

    name: str
    seen_by: str
    groups: tuple[str, ...]
    why: str


# The groups are the make targets that want them. `make lab` and `make run` need python3 with its venv module
# (set_up.py asks for that), and nothing else; what is in the group "lab" is recommended, and only told of.
TABLE = (
    Package(
        "uidmap", "newuidmap", ("lab", "test"), "an ordinary user's container gets many user ids, not one"
    ),
    Package("bubblewrap", "bwrap", ("test", "bench"), "a container program to compare with"),
    Package("crun", "crun", ("test", "bench"), "an OCI runtime to compare with"),
    Package("runc", "runc", ("test", "bench"), "the OCI runtime of Docker and containerd, to compare with"),
    Package("gcc", "gcc", ("test", "bench"), "compiles the benchmark's C program and some tests' probes"),
    Package("libc6-dev", "/usr/include/stdio.h", ("test", "bench"), "the C headers for gcc"),
    Package(
        "busybox-static", "busybox", ("test", "bench"), "one static binary: the smallest root file system"
    ),
    Package(
        "zstd", "zstd", ("test", "bench"), "compresses for tar, which unpacking and packing are compared with"
    ),
    Package("podman", "podman", ("test",), "runs the images that are made here"),
    Package("umoci", "umoci", ("test",), "unpacks images for runc and crun, and makes some to be read here"),
    Package("skopeo", "skopeo", ("test",), "copies images between the forms that there are"),
    Package("buildah", "buildah", ("test",), "makes images of several layers, to be read here"),
    Package("docker-registry", "docker-registry", ("test",), "the registry to pull from, on this machine"),
    Package("strace", "strace", ("test",), "shows which system calls a program really makes"),
    Package("shellcheck", "shellcheck", ("test",), "checks the shell scripts (make lint)"),
    Package(
        "vagrant", "vagrant", ("test",), "reads the Vagrantfile, and takes the box that vm/pack-box packs"
    ),
    Package("qemu-utils", "qemu-img", ("test",), "converts the disk of that box"),
    Package("xorriso", "xorriso", ("test",), "makes the disk from which the box's cloud-init reads"),
    Package("gnupg", "gpg", ("test",), "checks Ubuntu's signature before a box is packed"),
    Package(
        "kconfig-frontends-nox", "kconfig-conf", ("test",), "Kconfig itself, to compare our defconfigs with"
    ),
    Package("curl", "curl", ("test",), "downloads the image for the box; in the tests from this machine"),
    Package("chromium", "chromium", ("browser",), "the browser in which the notebooks and widgets are tried"),
)

RECIPES = Path(__file__).parent.parent / "rootfs-recipes"


def table() -> list[Package]:
    """Return the table, and what the recipes of root file systems say they need (the group "recipes")."""
    wanted: dict[str, list[str]] = {}
    for file in sorted(RECIPES.glob("*/recipe.toml")):
        recipe = tomllib.loads(file.read_text())
        for name in (
            () if recipe.get("by_hand") else recipe.get("needs", ())
        ):  # that one says itself what it lacks
            wanted.setdefault(name, []).append(recipe["name"])
    return [*TABLE, *(Package(name, "", ("recipes",), f"for {', '.join(of)}") for name, of in wanted.items())]


def missing(group: str) -> list[Package]:
    """Return the packages of a group that are not on this machine, and that its distribution has."""
    return [p for p in table() if group in p.groups and not present(p) and (p.seen_by or offered(p.name))]


def offered(name: str) -> bool:
    """Tell whether apt knows a package (a distribution may lack it); where apt has no lists yet, it may."""
    if shutil.which("apt-cache") is None or not any(Path("/var/lib/apt/lists").glob("*_Packages*")):
        return True
    return subprocess.run(["apt-cache", "show", name], capture_output=True).returncode == 0


def present(package: Package) -> bool:
    """Tell whether a package is here, by what it brings: that works whatever installed it."""
    if not package.seen_by:
        return _installed(package.name)
    if "/" in package.seen_by:
        return Path(package.seen_by).exists()
    return shutil.which(package.seen_by, path=SEARCH_PATH) is not None


def _installed(name: str) -> bool:
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status}", name]
    try:
        return "installed" in subprocess.run(query, capture_output=True, text=True).stdout.split()
    except FileNotFoundError:
        return False


def install(packages: list[Package], purpose: str) -> bool:
    """Install packages with apt, as root or by sudo. Tell whether that went well.

    Says first what is missing, why it is wanted and what installs it; asks, where somebody can answer.
    """
    if not packages:
        return True
    print(f"{purpose} wants system packages that are not here:")
    for package in packages:
        print(f"    {package.name:<16} {package.why}")
    command = [
        "apt-get",
        "install",
        "--yes",
        "--no-install-recommends",
        *(package.name for package in packages),
    ]
    if os.geteuid() != 0:
        command = ["sudo", *command]
    print("To install them:  " + " ".join(command), flush=True)
    if shutil.which("apt-get") is None:
        print("There is no apt-get here: please install them in your distribution's way.")
        return False
    return agreed() and apt(command)


def agreed() -> bool:
    """Ask whether to install, if somebody sits there; otherwise root does, and an ordinary user does not."""
    if sys.stdin.isatty() and "CI" not in os.environ:
        return input("Now? [Y/n] ").strip().lower() in ("", "y", "yes")
    return os.geteuid() == 0


def apt(command: list[str]) -> bool:
    """Run an apt-get install, with fresh package lists if the ones at hand do not do."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    update = [*command[: command.index("install")], "update"]
    # Old lists name versions that the mirrors have dropped; so one failure is answered by an update.
    return quiet(command, environment) or (
        quiet(update, environment) and quiet(command, environment, last=True)
    )


def quiet(command: list[str], environment: dict[str, str], last: bool = False) -> bool:
    """Run a command without its chatter; when the last try fails, show what it said."""
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode and last:
        print(done.stdout)
    return done.returncode == 0


def main(arguments: list[str]) -> int:
    """Install one group, or print the table."""
    groups = sorted({group for package in table() for group in package.groups})
    if not arguments:
        for package in table():
            state = "here" if present(package) else "missing"
            print(f"{package.name:<16} {state:<8} {', '.join(package.groups):<12} {package.why}")
        return 0
    if len(arguments) != 1 or arguments[0] not in groups:
        print(f"usage: system_packages.py [{'|'.join(groups)}]", file=sys.stderr)
        return 2
    if not install(missing(arguments[0]), f"make {arguments[0]}"):
        print("Going on without: what needs them will say so.")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
