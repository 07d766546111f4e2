"""What shout's own Dockerfile asks for, and all that comes with it.

    FROM node:latest
    RUN npm install -g shout

Source: github.com/erming/shout, Dockerfile and "Docker Installation.md", where the image of 2015 has 833.1 MB. Docker's
`node` is `buildpack-deps` with a node and npm. Here these two are the distribution's, installed as `apt-get install`
does it when it is not told otherwise: with all that they recommend.

Docker would keep npm's cache too, and node's headers; we do not count them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from from_packages import install

from labkernel.image import Progress
from labkernel.image.recipes import Recipe

# Versions and digests of shout and what it needs are those of package-lock.json, in which no registry is named: npm
# asks the one that it is set to on this machine. shout asks for a socket.io of the year 2014, three of whose parts
# came from GitHub without a digest; the last 1.x, which speaks the same protocol, has all of its own on the registry.
NPM = """
mkdir -p "$1/dev" "$1/proc"
touch "$1/etc/resolv.conf" "$1/tmp/npmrc"
for place in /dev /proc /etc/ssl/certs; do mount --rbind "$place" "$1$place"; done
mount --bind /etc/resolv.conf "$1/etc/resolv.conf"
if [ -f ~/.npmrc ]; then mount --bind ~/.npmrc "$1/tmp/npmrc"; fi
mount --bind "$2" "$1/mnt"
npm_config_userconfig=/tmp/npmrc exec chroot "$1" npm ci --prefix /usr/local/lib --cache /mnt --omit=dev \
    --ignore-scripts --no-audit --no-fund --no-update-notifier
"""
"""Runs the image's npm with this machine's settings: names, certificates, registry. The mounts end with the shell."""


def build(root: Path, recipe: Recipe, tell: Progress) -> list[Path]:
    """Install the packages, then shout, where `npm install -g` puts it."""
    lines = (recipe.folder / "packages.txt").read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    used = install(
        root, recipe, tell, variant="minbase", packages=packages, with_recommended=("nodejs", "npm")
    )
    tell("npm ci", 0, 1)
    library = root / "usr/local/lib"
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(recipe.folder / name, library / name)
    cache = recipe.cache / "npm"
    cache.mkdir(exist_ok=True)
    recipe.run("unshare", "--mount", "sh", "-euc", NPM, "sh", root, cache)
    for left in ("package.json", "package-lock.json", "node_modules/.package-lock.json"):
        (library / left).unlink()
    for left in ("tmp/npmrc", "etc/resolv.conf"):
        (root / left).unlink()
    (root / "usr/local/bin/shout").symlink_to("../lib/node_modules/shout/index.js")
    return used
