"""Where the lab keeps what must outlive a process: images, unpacked root file systems, one record a container."""

from __future__ import annotations

import os
from pathlib import Path

PREFIX = "labkernel-"


def home() -> Path:
    """The lab's own directory: `LABKERNEL_HOME`, or `labkernel` below `XDG_DATA_HOME` (`~/.local/share`).

    Nothing is made; whoever writes there makes what it needs.
    Source: https://specifications.freedesktop.org/basedir-spec/latest/
    """
    if chosen := os.environ.get("LABKERNEL_HOME"):
        return Path(chosen)
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "labkernel"
