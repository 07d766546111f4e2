"""The command line: the same containers as in the notebooks, with the options of `docker run`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

SET_UP_FAILED = 125


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """What goes wrong is told in one line, and ends with Docker's status for "no container was made"."""
    try:
        yield
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        text = getattr(error, "strerror", None) or str(error)
        click.echo(f"labkernel: {text}", err=True)
        sys.exit(SET_UP_FAILED)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Containers from scratch: build a root file system, run a program behind all walls, watch it, remove it."""


@main.command()
@click.argument("name", default="python")
@click.option("--json", "as_json", is_flag=True, help="Print what was built as JSON.")
def build(name: str, as_json: bool) -> None:
    """Build the root file system NAME from this machine's own programs, and unpack it (notebook 23)."""
    from tqdm import tqdm

    from labkernel.image.store import build_rootfs
    from labkernel.images import STANDARD, NoSuchImage, rootfs

    with _plain_errors(), tqdm(total=None, unit="", disable=not sys.stderr.isatty(), leave=False) as bar:
        if name != STANDARD:
            raise NoSuchImage(f"no recipe {name!r}; there is: {STANDARD}")

        def progress(what: str, done: int, total: int) -> None:
            bar.set_description(what, refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        image = build_rootfs(name, progress=progress)
        rootfs(name)
    if as_json:
        facts = {
            "name": image.name,
            "bytes": image.bytes,
            "zstd_bytes": image.zstd_bytes,
            "files": image.files,
        }
        click.echo(json.dumps([facts | {"digest": image.digest}]))
    else:
        click.echo(f"{image.name}: {image.files} files, {image.bytes / 1e6:.0f} MB, {image.digest}")


_OPTIONS: list[Callable[[Any], Any]] = [
    click.option("--name", help="A name instead of a random one."),
    click.option("--hostname", help="The container's host name (notebook 07)."),
    click.option("--memory", help="Memory limit, as in 64M (notebook 16)."),
    click.option("--cpus", help="Cores, as in 0.5 (notebook 15)."),
    click.option("--pids-limit", type=int, help="Processes and threads (notebook 17)."),
    click.option("--cpuset-cpus", help="Which cores, as in 0-1 (notebook 15)."),
    click.option("--publish", "-p", multiple=True, help="HOST:CONTAINER port on 127.0.0.1 (notebook 10)."),
    click.option("--volume", "-v", "volumes", multiple=True, help="SRC:DST or SRC:DST:ro (notebook 04)."),
    click.option("--env", "-e", multiple=True, help="KEY=VALUE (notebook 01)."),
    click.option("--read-only", is_flag=True, help="No writable layer to write to (notebook 06)."),
    click.option("--cap-drop", multiple=True, help="A capability to take away, or ALL (notebook 18)."),
    click.option("--cap-add", multiple=True, help="A capability to give (notebook 18)."),
    click.option("--security-opt", multiple=True, help="seccomp=unconfined or seccomp=FILE (notebook 19)."),
    click.option("--user", "-u", default="0:0", help="User or uid, with :group (notebook 11)."),
    click.option("--workdir", "-w", default="/", help="Where the program starts (notebook 01)."),
    click.option("--network", default="none", help="none, bridge or host (notebook 10)."),
    click.option(
        "--rm", "remove", is_flag=True, help="Remove the container when it has ended (notebook 06)."
    ),
    click.option("--detach", "-d", is_flag=True, help="Print the id and leave it running (notebook 23)."),
]


def _with_options(function: Any) -> Any:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@main.command(context_settings={"allow_interspersed_args": False})
@_with_options
@click.argument("words", nargs=-1, required=True, metavar="[IMAGE] COMMAND...")
def run(words: tuple[str, ...], env: tuple[str, ...], security_opt: tuple[str, ...], **options: Any) -> None:
    """Run a program in a new container; the exit status is the program's."""
    from labkernel import children
    from labkernel.container import Container
    from labkernel.images import STANDARD
    from labkernel.spec import BadOption

    with _plain_errors():
        image, command = (words[0], words[1:]) if words[0] == STANDARD and words[1:] else (STANDARD, words)
        for text in security_opt:
            if not text.startswith("seccomp="):
                raise BadOption(f"--security-opt {text!r}: give seccomp=unconfined or seccomp=FILE")
        seccomp = security_opt[-1].removeprefix("seccomp=") if security_opt else "default"
        environment = dict(item.partition("=")[::2] for item in env)
        container = Container(image, command, env=environment, seccomp=seccomp, **options)
        if options["detach"]:
            container.start()
            click.echo(container.spec.id)
            children.launcher().detach()
            os._exit(0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda received, _: container.signal(received))
        container.start(0, 1, 2)
        status = container.wait()
    sys.exit(status)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def ps(as_json: bool) -> None:
    """List the containers on this machine."""
    from labkernel import state

    keys = ("id", "name", "pid", "state", "image", "command", "publish")
    if as_json:
        click.echo(json.dumps([{key: record.get(key) for key in keys} for record in state.records()]))
        return
    click.echo(f"{'NAME':<20} {'STATE':<8} {'PID':>8}  COMMAND")
    for record in state.records():
        click.echo(
            f"{record['name']:<20} {record['state']:<8} {record.get('pid', ''):>8}  {' '.join(record['command'])}"
        )


@main.command()
@click.argument("name")
@click.option("--time", "seconds", default=10.0, help="Seconds before it is killed.")
def stop(name: str, seconds: float) -> None:
    """End a container: SIGTERM to its program, SIGKILL when that takes too long (notebook 09)."""
    import time

    from labkernel import state

    with _plain_errors():
        init = state.ProcessKey(**state.find(name)["init"])
        for number, wait in ((signal.SIGTERM, seconds), (signal.SIGKILL, 10.0)):
            end = time.monotonic() + wait
            if init.alive():
                os.kill(init.pid, number)
            while init.alive() and time.monotonic() < end:
                time.sleep(0.02)
    click.echo(name)


@main.command()
@click.argument("name")
@click.option("--force", "-f", is_flag=True, help="Kill it first if it runs.")
def rm(name: str, force: bool) -> None:
    """Remove a container that has ended: its writable layer, its log, its record (notebook 06)."""
    from labkernel import children, state

    with _plain_errors():
        record = state.find(name)
        if record["state"] in ("running", "paused") and not force:
            raise RuntimeError(f"container {name} is running; stop it first, or give --force")
        children.launcher().ask({"do": "remove", "record": record}).answer()
        children.close_launcher()
    click.echo(name)


@main.command("exec", context_settings={"allow_interspersed_args": False})
@click.argument("name")
@click.argument("command", nargs=-1, required=True)
def exec_(name: str, command: tuple[str, ...]) -> None:
    """Run one more program in a container that runs; the exit status is the program's (notebook 14)."""
    from labkernel import children, state
    from labkernel.container import Container, run_inside

    with _plain_errors():
        record = state.find(name)
        launcher = children.Launcher(join=record["launcher"]["pid"])
        # The same walls as the container's own, as far as its record tells them.
        process = Container("python", command, seccomp=record["process"]["seccomp"]).spec.process
        ended = run_inside(launcher, record, process, None, None)
        launcher.close()
    sys.stdout.buffer.write(ended.stdout)
    sys.stderr.buffer.write(ended.stderr)
    sys.stdout.flush()
    sys.exit(ended.returncode)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def stats(as_json: bool) -> None:
    """Show once what each running container uses (notebooks 15 to 17)."""
    from dataclasses import asdict

    from labkernel import state
    from labkernel.container import cgroup_at
    from labkernel.spec import human

    rows = []
    for record in state.records():
        group = cgroup_at(record.get("cgroup"))
        if record["state"] == "running" and group:
            rows.append({"name": record["name"], **asdict(group.stats())})
    if as_json:
        click.echo(json.dumps(rows))
        return
    click.echo(f"{'NAME':<20} {'CPU SECONDS':>12} {'MEMORY':>8} {'PIDS':>5}")
    for row in rows:
        memory = human(row["memory_bytes"])
        click.echo(f"{row['name']:<20} {row['cpu_usec'] / 1e6:>12.2f} {memory:>8} {row['pids']:>5}")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def doctor(as_json: bool) -> None:
    """Try what this machine allows: a container, and limits; exit status 1 where no container can be made."""
    from labkernel import children
    from labkernel.container import Container

    try:
        ended = Container("python", ["true"]).run(timeout=60)
        trouble = "" if ended.returncode == 0 else f"`true` ended with status {ended.returncode}"
    except (OSError, RuntimeError) as error:
        trouble = getattr(error, "strerror", None) or str(error)
    facts = children.launcher().facts
    children.close_launcher()
    if as_json:
        click.echo(json.dumps({"container": trouble or "yes", **facts}))
    else:
        version = facts["cgroup_version"]
        click.echo(f"containers: {trouble or 'yes, one was started'}")
        click.echo(
            f"limits:     {facts['no_cgroup'] or f'cgroup v{version}, ' + ', '.join(facts['controllers'])}"
        )
    sys.exit(1 if trouble else 0)


@main.command()
def clean() -> None:
    """Remove what a killed lab has left behind."""
    from labkernel import children

    with _plain_errors():
        removed = children.launcher().ask({"do": "clean"}).answer()["removed"]
        children.close_launcher()
    click.echo("\n".join(f"removed {what}" for what in removed) or "nothing was left behind")
