"""Layers: what a container has changed in its root file system, as a tarball that can be laid over others.

An overlay keeps changes in its upper directory: new and changed files as they are, a deleted one as a *whiteout* (a
character device 0:0), a directory that hides what is below as *opaque* (an extended attribute). A tarball can hold
neither for everybody, so there both are empty files with reserved names.
Sources: https://docs.kernel.org/filesystems/overlayfs.html, and "Whiteouts" in
https://github.com/opencontainers/image-spec/blob/main/layer.md.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from pathlib import Path

WHITEOUT = ".wh."
"""Before the name of what is deleted."""

OPAQUE = ".wh..wh..opq"
"""In a directory below which nothing of the layers below is seen."""


def is_whiteout(path: Path) -> bool:
    """Whether overlay has marked `path` in an upper directory as deleted."""
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(0, 0)


def is_opaque(directory: Path) -> bool:
    """Whether a directory of an upper directory hides what is below it.

    The mark is `trusted.overlay.opaque`, or with the mount option "userxattr" `user.overlay.opaque`.
    """
    for space in ("user", "trusted"):
        try:
            if os.getxattr(directory, f"{space}.overlay.opaque") == b"y":
                return True
        except OSError:  # no such attribute, or no right to see it
            continue
    return False


def pack_layer(upper: Path, destination: Path) -> str:
    """Write an overlay's upper directory as a layer, a plain tarball, to `destination`; returns its digest.

    Twice the same bits: the entries are sorted, times are fixed, everything belongs to 0:0. In each directory the
    whiteouts come first, as the image specification wants it.
    """
    with tarfile.open(destination, "w", format=tarfile.PAX_FORMAT) as tar:
        for directory, directories, files in os.walk(upper):
            directories.sort()
            here = Path(directory)
            if is_opaque(here):
                tar.addfile(_plain(tarfile.TarInfo(str(here.relative_to(upper) / OPAQUE))))
            paths = sorted(here / name for name in (*directories, *files))
            for path in sorted(paths, key=is_whiteout, reverse=True):
                name = path.relative_to(upper)
                if is_whiteout(path):
                    tar.addfile(_plain(tarfile.TarInfo(str(name.with_name(WHITEOUT + name.name)))))
                else:
                    tar.add(path, str(name), recursive=False, filter=_plain)
    with open(destination, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """The entry without what differs from machine to machine."""
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mtime = 0
    return info
