"""What the recipes of Buildroot share: fetch the pinned release, check it, configure, build, take the tarball.

Buildroot (https://buildroot.org) is a heap of makefiles that download a compiler, a C library and every program from
their authors, build all of them, and pack what is to run. What we add to it is the tree buildroot-python/external.
Source: https://buildroot.org/downloads/manual/manual.html, "Keeping customizations outside of Buildroot".

    python3 rootfs-recipes/from_buildroot.py VERSION [KEYRING]

checks the signature of another release, and prints the lines for buildroot-python/release.toml. The maker's key comes
from KEYRING (a file that `gpg --export` has written), or from the key server that gpg is set up with.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meanwhile import meanwhile

from labkernel.image import Progress, kconfig
from labkernel.image.recipes import BuildError, NotHere, Recipe
from labkernel.image.unpack import unpack

FOLDER = Path(__file__).with_name("buildroot-python")
TREE = FOLDER / "external"

ARCHITECTURES = {"x86_64": "BR2_x86_64", "aarch64": "BR2_aarch64"}
"""Of this machine, and what Buildroot calls it: the image is to run here."""

OTHERS = (
    "MAKEFLAGS",
    "MAKELEVEL",
    "MFLAGS",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "CC",
    "CFLAGS",
    "O",
)
"""Variables that would get into the build: of a `make recipes` around us, or of the reader's."""


def release() -> dict[str, str]:
    """Which release is built: version, url, sha256, key."""
    return tomllib.loads((FOLDER / "release.toml").read_text())


def make_image(root: Path, recipe: Recipe, tell: Progress, defconfig: str) -> list[Path]:
    """Build what *defconfig* of our tree describes, and unpack it to the empty directory *root*.

    Returns the files that it was made from, besides the recipe's own. Raises BuildError. What an interrupted build has
    finished is kept in recipe.cache, and the next one goes on from there; it is removed when the image is done.
    """
    tarball = fetch(release(), recipe.cache, tell)
    made_from = sorted(path for path in [Path(__file__), *FOLDER.rglob("*")] if path.is_file())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in made_from) + defconfig.encode())
    place = recipe.cache / f"build-{digest.hexdigest()[:16]}"
    source, output = place / "source", place / "output"
    for earlier in recipe.cache.glob("build-*"):
        if earlier != place:
            shutil.rmtree(earlier)
    if not source.is_dir():
        place.mkdir(exist_ok=True)
        tell("unpack Buildroot", 0, 1)
        (part := place / "unpacked").mkdir(exist_ok=True)
        recipe.run("tar", "-xf", tarball, "-C", part, "--strip-components=1", "--no-same-owner")
        part.rename(source)
    environment = surroundings(recipe.cache / "downloads")
    make = ["make", "-C", source, f"O={output}", f"BR2_EXTERNAL={TREE}"]
    configure(make, (TREE / "configs" / defconfig).read_text(), place, recipe, environment)
    total = len(order(make, environment))
    with meanwhile(lambda: tell_built(output, total, tell), 2):
        recipe.run(*make, env=environment)
    print((output / "images" / "sizes.txt").read_text())
    tell("collect licences", 0, 1)
    recipe.run(*make, "legal-info", env=environment)
    shutil.copy(output / "legal-info" / "manifest.csv", recipe.cache / "licences.csv")
    unpack(output / "images" / "rootfs.tar", root, same_owner=True)
    shutil.rmtree(place)
    return [path for path in made_from if not path.is_relative_to(recipe.folder)]


# ---------------------------------------------------------------------- fetched and checked


def fetch(which: Mapping[str, str], cache: Path, tell: Progress) -> Path:
    """The tarball of the release, in *cache*: downloaded unless it is there. Its SHA-256 is the pinned one.

    Raises BuildError where there is no internet, or where what came is not what is pinned; nothing is left then.
    """
    name = which["url"].rpartition("/")[2]
    place, part = cache / name, cache / f"{name}.part"
    if not place.is_file():
        try:
            with urllib.request.urlopen(which["url"], timeout=60) as answer, part.open("wb") as file:
                total = int(answer.headers.get("Content-Length") or 0)
                while data := answer.read(1 << 18):
                    file.write(data)
                    tell(f"download {name}", file.tell(), total)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise BuildError(
                f"{which['url']} cannot be fetched ({error}): this takes the internet, or the file in {cache}"
            ) from error
        part.rename(place)
    with place.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != which["sha256"]:
        place.unlink()
        raise BuildError(
            f"{name} is not the file that is pinned: its SHA-256 is {found}, and not {which['sha256']}; removed"
        )
    return place


def signed_digest(message: Path, key: str, name: str, keyring: Path | None = None) -> str:
    """The SHA-256 of the file *name*, as *message* says, which must be signed with the key of that fingerprint.

    Raises BuildError. The key comes from *keyring*, or from a key server; the reader's own keys are not touched.
    """
    with tempfile.TemporaryDirectory(prefix="gpg-") as home:
        gpg = ["gpg", "--homedir", home, "--batch", "--no-tty", "--quiet"]
        bring = ["--import", str(keyring)] if keyring else ["--recv-keys", key]
        brought = subprocess.run([*gpg, *bring], capture_output=True, text=True)
        status = ["--status-fd", "2", "--output", "-", "--decrypt", str(message)]
        done = subprocess.run([*gpg, *status], capture_output=True, text=True)
        subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], capture_output=True)
    # Of the last word: the primary key, also where a subkey has signed. Source: gnupg's doc/DETAILS, VALIDSIG.
    signers = re.findall(r"^\[GNUPG:\] VALIDSIG .*?(\w+)$", done.stderr, re.MULTILINE)
    if done.returncode or signers != [key]:
        raise BuildError(f"{message.name} is not signed with the key {key}: {brought.stderr}{done.stderr}")
    # Only what was signed is looked at, and not what else may stand in the file.
    digests = re.findall(rf"^SHA256: ([0-9a-f]{{64}})  {re.escape(name)}$", done.stdout, re.MULTILINE)
    if len(digests) != 1:
        raise BuildError(f"{message.name} names {len(digests)} digests of {name}, and not one")
    return str(digests[0])


# ---------------------------------------------------------------------- configured and built


def surroundings(downloads: Path) -> dict[str, str]:
    """The environment of the build: ours, without what would get into it."""
    clean = {name: value for name, value in os.environ.items() if name not in OTHERS}
    # We are root of our own namespace at the most; GNU's configure scripts refuse that, and this is their way around.
    return clean | {"BR2_DL_DIR": str(downloads), "FORCE_UNSAFE_CONFIGURE": "1"}


def for_machine(defconfig: str, machine: str) -> str:
    """The defconfig, which says x86_64, for this machine. Raises NotHere."""
    if machine not in ARCHITECTURES:
        raise NotHere(f"this recipe builds for {' and '.join(ARCHITECTURES)}, and this machine is {machine}")
    return defconfig.replace("BR2_x86_64=y\n", f"{ARCHITECTURES[machine]}=y\n")


def configure(
    make: list[Any], defconfig: str, place: Path, recipe: Recipe, environment: Mapping[str, str]
) -> None:
    """Have Buildroot make its .config of ours. Raises BuildError where it has dropped a line of it.

    Kconfig drops without a word what it does not know, and what depends on something that is not there.
    """
    wanted = place / "defconfig"
    wanted.write_text(for_machine(defconfig, platform.machine()))
    recipe.run(*make, f"BR2_DEFCONFIG={wanted}", "defconfig", env=environment)
    config = kconfig.read_config((place / "output" / ".config").read_text())
    if lost := kconfig.lost(kconfig.read_config(wanted.read_text()), config):
        raise BuildError(f"Buildroot {release()['version']} does not take what we ask for: {', '.join(lost)}")


def order(make: list[Any], environment: Mapping[str, str]) -> list[str]:
    """The packages that will be built, those for the compiler among them."""
    done = subprocess.run(
        [*map(str, make), "-s", "show-build-order"], env=environment, capture_output=True, text=True
    )
    return done.stdout.split()


def tell_built(output: Path, total: int, tell: Progress) -> None:
    """Tell how many packages are installed: Buildroot leaves a stamp for each."""
    stamps = len(list(output.glob("build/*/.stamp_installed")))
    tell("build packages", min(stamps, total), total)


def main(arguments: list[str]) -> int:
    """Check another release's signature, and print the lines that pin it."""
    if len(arguments) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 2
    version = arguments[0]
    name = f"buildroot-{version}.tar.xz"
    url = f"https://buildroot.org/downloads/{name}"
    with tempfile.TemporaryDirectory() as place:
        message = Path(place) / f"{name}.sign"
        with urllib.request.urlopen(f"{url}.sign", timeout=60) as answer:
            message.write_bytes(answer.read())
        keyring = Path(arguments[1]) if len(arguments) == 2 else None
        digest = signed_digest(message, release()["key"], name, keyring)
    print(f'version = "{version}"\nurl = "{url}"\nsha256 = "{digest}"')
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (BuildError, OSError) as error:
        sys.exit(f"from_buildroot.py: {error}")
