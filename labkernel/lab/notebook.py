"""The first and the last cell of a notebook: can it run here, and is anything of it left behind?"""

from __future__ import annotations

import inspect
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkernel import children, state


def requirements(directory: Path | str = ".") -> dict[str, list[str]]:
    """What each notebook of a directory needs of the machine, by its name; read from the notebooks' metadata."""
    return {path.stem: _requires(path) for path in sorted(Path(directory).glob("[0-9][0-9]-*.ipynb"))}


def begin(name: str) -> None:
    """Ask the doctor whether this notebook can run here. If it cannot, say why; then its cells stay quiet.

    What it needs stands in one place, the notebook's own metadata (`labkernel.requires`), from which the tests and
    `make run` read it too.
    """
    from labkernel.lab import doctor

    _be_quiet(False)
    _asked.clear()
    path = Path(f"{name}.ipynb")
    requires = _requires(path) if path.is_file() else []
    lacking = doctor.missing(requires)
    if lacking:
        print(f"{name} cannot run on this machine yet:")
        for reason in lacking:
            print(f"  - {reason}")
        print(
            "Until that is mended, the cells below do nothing. Notebook 00-start-here shows the whole picture."
        )
        _be_quiet(True)
        return
    global _before
    _before = _ours()
    wants = f"it needs {', '.join(requires)}" if requires else "it needs nothing special"
    print(f"{name} can run here: {wants}.")


def allows(name: str) -> bool:
    """Ask the doctor for something that only some cells need; where the machine does not allow it, say why.

    Such a cell has the tag `needs-NAME`, and where the answer is no, its output is not compared.
    """
    from labkernel.lab import doctor

    if name not in _asked:
        _asked[name] = doctor.missing([name])
    for reason in _asked[name]:
        print(f"Not on this machine: {reason}")
    return not _asked[name]


def end() -> None:
    """End what the notebook started, and show, from the kernel, that nothing is left behind.

    The launcher is ended with everything that it runs; the next cell that needs one starts another.
    """
    from labkernel.lab import checks
    from labkernel.lab.scratch import remove

    started = _descendants()
    remove()
    children.close_launcher()
    checks.forget()
    left = _left(started)
    for _ in range(40):  # the kernel takes a moment to remove what nobody uses any more
        if not any(left.values()):
            break
        time.sleep(0.05)
        # What another launcher is just making looks like ours, but not for long: its groups get their processes.
        again = _left(started)
        left = {what: [name for name in names if name in again[what]] for what, names in left.items()}
    print("left behind by this notebook:")
    for what, names in left.items():
        print(f"  {what:<12} {', '.join(sorted(names)) or 'none'}")


def show_source(function: Callable[..., Any] | type) -> None:
    """Show how a function of labkernel looks: the source that runs, with the name of its file."""
    from IPython.display import display

    module = inspect.getmodule(function)
    place = module.__name__.replace(".", "/") + ".py" if module else "?"
    source = inspect.getsource(function).rstrip()
    bundle = {
        "text/markdown": f"`{place}`\n```python\n{source}\n```",
        "text/plain": f"# {place}\n{source}",
    }
    display(bundle, raw=True)  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------------- inner parts


def _requires(path: Path) -> list[str]:
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
    except (OSError, ValueError, KeyError):
        return []
    return list(metadata.get("labkernel", {}).get("requires", []))


def _be_quiet(quiet: bool) -> None:
    """Let the cells after this one do nothing, or something again."""
    try:
        from IPython.core.getipython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    if shell is None:
        return
    transformers = shell.input_transformers_post
    if _nothing in transformers:
        transformers.remove(_nothing)
    if quiet:
        transformers.append(_nothing)


def _nothing(lines: list[str]) -> list[str]:
    """What is left of a cell where the notebook cannot run; the set-up cell may be tried again."""
    return lines if any("lab.begin(" in line for line in lines) else []


@dataclass(frozen=True)
class Ours:
    """What of the lab's is to be seen on this machine at one moment."""

    mounts: frozenset[str]
    cgroups: frozenset[str]
    interfaces: frozenset[str]
    directories: frozenset[str]


_asked: dict[str, list[str]] = {}
"""What `allows` has been told, by name: nothing where the machine allows it."""

_before = Ours(frozenset(), frozenset(), frozenset(), frozenset())


def _ours() -> Ours:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    mine = (line.split()[4] for line in lines if str(state.home()) in line or f"/{state.PREFIX}" in line)
    interfaces = (
        line.partition(":")[0].strip() for line in Path("/proc/self/net/dev").read_text().splitlines()
    )
    groups = (
        os.path.join(place, name)
        for place, names, _ in os.walk("/sys/fs/cgroup")
        for name in names
        if name.startswith(state.PREFIX)
    )
    directories = state.containers().iterdir() if state.containers().is_dir() else ()
    return Ours(
        mounts=frozenset(mine),
        cgroups=frozenset(groups),
        interfaces=frozenset(name for name in interfaces if name.startswith("lk-")),
        directories=frozenset(path.name for path in directories),
    )


def _left(started: list[state.ProcessKey]) -> dict[str, list[str]]:
    """What is new since `begin` and still there. A running container of another notebook's is not ours."""
    now = _ours()
    others = {
        record["id"] for record in state.records() if record["state"] in ("created", "running", "paused")
    }
    return {
        "processes": [str(key.pid) for key in started if key.alive()],
        "mounts": sorted(now.mounts - _before.mounts),
        "cgroups": [path for path in now.cgroups - _before.cgroups if not _in_use(path)],
        "interfaces": sorted(now.interfaces - _before.interfaces),
        "directories": sorted(now.directories - _before.directories - others),
    }


def _in_use(group: str) -> bool:
    """Whether there are processes in a group, or below it: ours have all ended by then."""
    for place, _, files in os.walk(group):
        if "cgroup.procs" in files:
            try:
                if Path(place, "cgroup.procs").read_text():
                    return True
            except OSError:
                continue
    return not os.path.isdir(group)


def _descendants() -> list[state.ProcessKey]:
    """This process's children, their children, and so on."""
    import psutil

    keys = []
    for process in psutil.Process().children(recursive=True):
        try:
            keys.append(state.ProcessKey.of(process.pid))
        except ProcessLookupError:
            continue
    return keys
