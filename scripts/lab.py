"""Start JupyterLab on the first notebook, as `make lab` does.

    .venv/bin/python scripts/lab.py [ARGUMENTS OF jupyter lab]

Its settings are in jupyter_config/; what it writes goes to .jupyter/ in this directory. Nothing of the
reader's own Jupyter is read or changed.
"""

from __future__ import annotations

import os
import sys

from notebook_tools import ROOT, surroundings


def main(arguments: list[str]) -> None:
    """Become jupyter lab."""
    program = str(ROOT / ".venv" / "bin" / "jupyter-lab")
    # Only warnings, and the address with its token: the log of every request is of no use to the reader.
    options = ["--log-level=WARN", *(["--no-browser"] if not browser() else []), *arguments]
    os.execve(program, [program, *options], surroundings())


def browser() -> bool:
    """Tell whether there is a screen to open a browser on (below WSL it is Windows' own)."""
    screen = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "WSL_DISTRO_NAME"))
    return screen and "CI" not in os.environ


if __name__ == "__main__":
    main(sys.argv[1:])
