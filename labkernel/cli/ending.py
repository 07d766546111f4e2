"""Ending: stop, remove, and tidy up."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

import click

from labkernel.cli.common import all_running, option, running

TIDIED_WITHIN = 10.0
"""Seconds in which a killed container is gone, with all that it was made of."""


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@option("--time", "-t", "seconds", type=click.FloatRange(0), default=10.0, show_default=True, teaches="09-pid",
        help="Seconds until it is killed.")  # fmt: skip
def stop(names: tuple[str, ...], seconds: float) -> None:
    """End containers: SIGTERM to the program, and SIGKILL to all where that does not help. [09-pid]"""
    for name in names:
        _end(running(name), seconds)
        click.echo(name)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@option("--force", "-f", is_flag=True, teaches="06-overlay", help="Also one that runs: it is killed.")
def rm(names: tuple[str, ...], force: bool) -> None:
    """Remove containers that have ended: what they wrote, their log, their record. [06-overlay]"""
    from labkernel import state

    for name in names:
        record = state.find(name)
        if record["state"] in ("running", "paused"):
            if not force:
                raise RuntimeError(f"container {name} runs: labkernel stop {name}, or rm --force")
            _end(record, 0)
        _remove(record)
        click.echo(name)


@click.command()
@option(
    "--all", "everything", is_flag=True, teaches="23-python-container",
    help="Also end what runs, and remove the images: leave nothing.",
)  # fmt: skip
def clean(everything: bool) -> None:
    """Remove what is left behind: containers that have ended, and all of those whose launcher was killed.

    A launcher is the process that starts containers and tidies up after them. [23-python-container]
    """
    from labkernel import children, state

    before = state.records()
    if everything:
        for record in all_running():
            _end(record, 0)
    # The first thing that a launcher does is to finish what killed ones could not.
    removed: list[str] = children.launcher().ask({"do": "clean"}).answer()["removed"]
    for record in state.records():
        if record["state"] == "exited":
            _remove(record)
    left = {record["id"] for record in state.records()}
    removed += [
        name for r in before if r["id"] not in left and (name := f"container {r['name']}") not in removed
    ]
    if everything:
        removed += _remove_images()
    for what in removed:
        click.echo(f"removed {what}")
    if left:
        names = ", ".join(record["name"] for record in state.records())
        click.echo(f"still running: {names}; labkernel clean --all ends that too")
    elif not removed:
        click.echo("nothing was left behind")


def _end(record: Mapping[str, Any], patience: float) -> None:
    """Ask the program to end, kill it after so many seconds, and wait until its launcher has tidied up."""
    from labkernel import state
    from labkernel.container import cgroup_at

    init, launcher = (state.ProcessKey(**record[who]) for who in ("init", "launcher"))
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(init.pid)
        try:
            if init.alive():  # asked after opening: from now on the pid cannot be somebody else's
                if record["state"] == "paused" and (group := cgroup_at(record["cgroup"])):
                    group.thaw()
                if patience:
                    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
                if not _ends_within(pidfd, patience):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    _ends_within(pidfd, TIDIED_WITHIN)
        finally:
            os.close(pidfd)
    end = time.monotonic() + TIDIED_WITHIN
    while (
        launcher.alive() and (found := state.read_record(_directory(record))) and found["state"] != "exited"
    ):
        if time.monotonic() > end:
            raise RuntimeError(f"container {record['name']} was killed, and does not end: see ps {init.pid}")
        time.sleep(0.01)


def _ends_within(pidfd: int, seconds: float) -> bool:
    import select

    return bool(select.select([pidfd], [], [], seconds)[0])


def _remove(record: Mapping[str, Any]) -> None:
    """Remove a container that has ended, if that was not done at its end. A launcher has the rights to."""
    from labkernel import children, state

    if state.read_record(_directory(record)):
        children.launcher().ask({"do": "remove", "record": dict(record)}).answer()


def _directory(record: Mapping[str, Any]) -> Any:
    from pathlib import Path

    return Path(record["directory"])


def _remove_images() -> list[str]:
    """Images, root file systems, what builds keep; an ordinary user's have owners that only a child may touch."""
    import shutil

    from labkernel import children, state

    removed = []
    for name in ("rootfs", "images", "builds"):
        for path in sorted((state.home() / name).glob("*")):
            removed.append(f"{name}/{path.name}")
        children.in_child(shutil.rmtree, state.home() / name, ignore_errors=True)
    children.close_launcher()
    for path in (state.containers(), state.launchers(), state.names(), state.home()):
        with contextlib.suppress(OSError):  # somebody else's lab is running
            path.rmdir()
    return removed
