"""Check the types in the notebooks' code, as mypy does for the rest (a step of `make lint`).

Each notebook becomes one source file below build/. What mypy says is told with the notebook's name and cell.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from nbformat import NotebookNode
from notebook_tools import NOTEBOOKS, ROOT, code_cells, read

PLACE = ROOT / "build" / "notebook-sources"
# What every notebook has without asking; and cells may use a name again for something else.
HEAD = ["from IPython.display import display as display"]
OPTIONS = ["--strict", "--allow-redefinition", "--disable-error-code=no-redef"]


def source(notebook: NotebookNode) -> tuple[str, list[str]]:
    """Return a notebook's code as one module, and for each of its lines where it comes from."""
    lines, origins = list(HEAD), ["the start"] * len(HEAD)
    for number, (_, cell) in enumerate(code_cells(notebook), 1):
        for place, line in enumerate(cell.source.splitlines(), 1):
            magic = line.lstrip().startswith(("%", "!"))
            lines.append("# " + line if magic else line)
            origins.append(f"cell {number}, line {place}")
    return "\n".join(lines) + "\n", origins


def main() -> int:
    """Check all notebooks; return mypy's exit status."""
    PLACE.mkdir(parents=True, exist_ok=True)
    origins: dict[str, tuple[Path, list[str]]] = {}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        target = PLACE / ("notebook_" + re.sub(r"\W", "_", path.stem) + ".py")
        text, where = source(read(path))
        target.write_text(text)
        origins[str(target.relative_to(ROOT))] = (path, where)
    if not origins:
        return 0
    command = [sys.executable, "-m", "mypy", *OPTIONS, *origins]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in done.stdout.splitlines():
        match = re.match(r"(\S+?):(\d+): (.*)", line)
        if match and match[1] in origins:
            path, where = origins[match[1]]
            line = f"{path.relative_to(ROOT)}: {where[int(match[2]) - 1]}: {match[3]}"
        print(line)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
