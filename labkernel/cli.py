"""The command line: the same containers as in the notebooks, with the options of `docker run`.

Every verb is a few lines over `Container`, the records in `labkernel.state`, and the launcher. What goes wrong is
told in one line, with Docker's exit status for "not a matter of the program inside": 125.
Source: https://docs.docker.com/reference/cli/docker/
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from labkernel.children import Channel
    from labkernel.container import Container

FAILED = 125
"""Docker's exit status where labkernel, not the program inside, has failed."""

TIDIED_WITHIN = 10.0
"""Seconds in which a killed container is gone, with all that it was made of."""

Command = TypeVar("Command", bound=Callable[..., Any])


class Verbs(click.Group):
    """The verbs in the order in which one needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """As defined here, not as in the alphabet."""
        return list(self.commands)


@click.group(cls=Verbs, context_settings={"max_content_width": 110})
def verbs() -> None:
    """Containers from scratch: build a root file system, run a program behind all walls, watch it, remove it.

    "[07-uts]" behind an option names the notebook that teaches what it does.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end with its exit status."""
    try:
        status = verbs.main(arguments, prog_name="labkernel", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        status = FAILED
    except click.UsageError as error:
        verb = error.ctx.command_path if error.ctx else "labkernel"
        status = _failed(f"{error.format_message()} ({verb} --help lists what there is)")
    except (click.Abort, KeyboardInterrupt):
        status = 128 + signal.SIGINT
    except Exception as error:
        if os.environ.get("LABKERNEL_DEBUG"):
            raise
        status = _failed(_in_words(error))
    sys.exit(status)


def _failed(text: str) -> int:
    click.echo("labkernel: " + " ".join(text.split()), err=True)
    return FAILED


def _in_words(error: Exception) -> str:
    """What an exception says, without Python's "[Errno 2]"; one that nobody expected says so."""
    if isinstance(error, OSError):
        text = error.strerror or str(error) or type(error).__name__
        return f"{text}: {error.filename}" if error.filename else text
    if isinstance(error, (ValueError, LookupError, RuntimeError)) and str(error):
        return str(error)
    return f"an error of labkernel itself, {type(error).__name__}: {error}; LABKERNEL_DEBUG=1 shows where"


# ---------------------------------------------------------------------- options that several verbs have


def option(*names: str, teaches: str, help: str, **settings: Any) -> Callable[[Command], Command]:
    """An option whose help names the notebook that teaches what it does."""
    return click.option(*names, help=f"{help} [{teaches}]", **settings)


def json_option(teaches: str) -> Callable[[Command], Command]:
    """--json, where something is listed."""
    return option("--json", "as_json", is_flag=True, teaches=teaches, help="Print JSON, for other programs.")


def together(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order in which they are given."""

    def decorate(function: Any) -> Any:
        for one in reversed(options):
            function = one(function)
        return function

    return decorate


LIMITS = together(
    option("--memory", "-m", metavar="BYTES", teaches="16-memory", help='Memory limit, as in "64M".'),
    option("--memory-reservation", metavar="BYTES", teaches="16-memory",
           help="Soft limit: above it memory is taken back."),
    option("--memory-swap", metavar="BYTES", teaches="16-memory", help="Limit of memory and swap together."),
    option("--cpus", metavar="NUMBER", teaches="15-cpu", help='Cores, as in "0.5".'),
    option("--cpu-weight", metavar="1-10000", teaches="15-cpu",
           help="Share of a busy machine; others have 100."),
    option("--cpuset-cpus", metavar="LIST", teaches="15-cpu", help='Which cores, as in "0-1" or "0,2".'),
    option("--pids-limit", metavar="NUMBER", teaches="17-pids-io-freezer", help="Most processes and threads."),
    option("--device-read-bps", metavar="DEVICE:RATE", multiple=True, teaches="17-pids-io-freezer",
           help='Most bytes read a second, as in "/dev/sda:1M".'),
    option("--device-write-bps", metavar="DEVICE:RATE", multiple=True, teaches="17-pids-io-freezer",
           help="Most bytes written a second."),
)  # fmt: skip

WALLS = together(
    option("--hostname", metavar="NAME", teaches="07-uts", help="Host name inside."),
    option("--network", metavar="none|bridge|host", default="none", teaches="10-network",
           help="A network of its own, alone (the default) or with the other containers; or the host's."),
    option("--publish", "-p", metavar="[[IP:]PORT:]PORT", multiple=True, teaches="10-network",
           help="Make a port of the container one of this machine; without IP, of 127.0.0.1."),
    option("--volume", "-v", "volumes", metavar="SRC:DST[:ro]", multiple=True, teaches="04-mount-namespace",
           help="Show SRC of this machine as DST inside."),
    option("--read-only", is_flag=True, teaches="04-mount-namespace", help="A root file system nobody can write to."),
    option("--cap-drop", metavar="CAP|ALL", multiple=True, teaches="18-capabilities", help="Take a capability away."),
    option("--cap-add", metavar="CAP|ALL", multiple=True, teaches="18-capabilities", help="Give a capability."),
    option("--security-opt", metavar="WALL=VALUE", multiple=True, teaches="19-seccomp",
           help="seccomp=unconfined, seccomp=FILE, or no-new-privileges=false."),
)  # fmt: skip

PROGRAM = together(
    option("--env", "-e", metavar="KEY=VALUE", multiple=True, teaches="01-process",
           help="Set a variable; KEY alone copies ours."),
    option("--user", "-u", metavar="USER[:GROUP]", teaches="11-user", help="Who the program is, by name or number."),
    option("--workdir", "-w", metavar="DIR", teaches="03-chroot", help="Directory in which it starts."),
    option("--interactive", "-i", is_flag=True, teaches="23-python-container", help="Let it read our standard input."),
    option("--tty", "-t", is_flag=True, teaches="23-python-container", help="Give it a terminal of its own."),
)  # fmt: skip


# ---------------------------------------------------------------------- before the first container


@verbs.command()
@json_option("00-start-here")
def doctor(as_json: bool) -> int:
    """Tell what this machine allows, by trying it, and for every "no" what to do. [00-start-here]

    The exit status is 1 where something is lacking without which some notebook cannot run.
    """
    from dataclasses import asdict

    from labkernel.lab.doctor import examine

    findings = examine()
    click.echo(json.dumps([asdict(finding) for finding in findings]) if as_json else findings)
    return int(not all(finding.ok or finding.optional for finding in findings))


@verbs.command()
@click.argument("name", default="python")
@option(
    "--all",
    "everything",
    is_flag=True,
    teaches="20-trimming",
    help="Every recipe, but those that want more than this machine has.",
)
@option(
    "--again",
    is_flag=True,
    teaches="02-tarball",
    help="Also where nothing has changed: the digest must be the same.",
)
@json_option("02-tarball")
def build(name: str, everything: bool, again: bool, as_json: bool) -> int:
    """Build the root file system NAME, unpack it, and prove that it works. [02-tarball]

    "python", which is built where no other is named, is the lab's standard one: Python, a shell and a few tools, from
    this machine's own programs. The others are recipes: the folders in rootfs-recipes, or one of your own, as in
    ./mine. Nothing is done where it is there and nothing has changed that it was built from.
    """
    from labkernel.image.recipes import NotHere, all_recipes

    _clean_up_when_told_to_end()
    if not everything:
        facts = _built(name, again)
        click.echo(json.dumps(facts) if as_json else _in_one_line(facts))
        return 0
    rows, failed = [], 0
    for recipe in all_recipes():
        reason = recipe.by_hand or (
            "only root can build it" if recipe.user == "root" and os.geteuid() else ""
        )
        if reason:
            click.echo(f"{recipe.name}: left out: {reason}", err=True)
            continue
        try:
            rows.append(_built(recipe.name, again))
        except NotHere as error:
            click.echo(f"{recipe.name}: left out: {error.text}", err=True)
        except (RuntimeError, OSError, ValueError) as error:
            failed = _failed(_in_words(error))
        else:
            if not as_json:
                click.echo(_in_one_line(rows[-1]))
    if as_json:
        click.echo(json.dumps(rows))
    return failed


def _built(name: str, again: bool) -> dict[str, Any]:
    """An image that is built, unpacked and proved, as facts. Raises what `recipes.build` and `images.prove` raise."""
    from labkernel import images
    from labkernel.image import recipes, store

    with progress_bar() as progress:
        if name == images.STANDARD:
            place = images.rootfs(progress=progress)
            image = store.build_rootfs()
        else:
            try:
                image = recipes.build(name, again=again, progress=progress)
            except recipes.NotHere:
                raise
            except recipes.BuildError as error:
                _show_log(error.tail)
                raise RuntimeError(error.text) from error
            place = images.rootfs(image.name, progress=progress)
            images.prove(name, progress=progress)
    return {
        "name": image.name, "digest": image.digest, "files": image.files, "bytes": image.bytes,
        "tarball": str(image.tarball), "tarball_bytes": image.zstd_bytes, "rootfs": str(place),
    }  # fmt: skip


def _show_log(tail: str) -> None:
    for line in tail.splitlines():
        click.echo(f"    {line}", err=True)


def _in_one_line(facts: Mapping[str, Any]) -> str:
    from labkernel.spec import human

    sizes = f"{human(facts['bytes'])} in {facts['files']} files, {human(facts['tarball_bytes'])} as a tarball"
    return f"{facts['name']}: {sizes}, {facts['digest']}"


@verbs.command()
@json_option("20-trimming")
def images(as_json: bool) -> None:
    """List the images that are built: how big, which, and what can be run in them. [20-trimming]

    SIZE is that of the files when unpacked (apparent: bytes of content), then come the same as a tarball that is
    compressed by gzip or by zstd.
    """
    from labkernel.image import recipes, store
    from labkernel.spec import human

    found = store.stored()
    columns = ("name", "bytes", "gzip_bytes", "zstd_bytes", "files", "digest")
    if as_json:
        click.echo(json.dumps([{column: getattr(image, column) for column in columns} for image in found]))
        return
    table: list[Sequence[str]] = [("NAME", "SIZE", "GZIP", "ZSTD", "FILES", "DIGEST", "RUNS")]
    for image in found:
        record = store.read_record(image.name) or {}
        table.append((
            image.name, *(human(size) for size in (image.bytes, image.gzip_bytes or 0, image.zstd_bytes)),
            str(image.files), image.digest[:19], ", ".join(record.get("runs", ())),
        ))  # fmt: skip
    _print_table(table)
    built = {image.name for image in found}
    if others := [recipe.name for recipe in recipes.all_recipes() if recipe.name not in built]:
        click.echo(f"not built: {', '.join(others)} (labkernel build NAME)")


@verbs.command()
@click.argument("rootfs", metavar="ROOTFS")
@click.argument("command", nargs=-1, metavar="-- COMMAND...")
@option(
    "--apply",
    is_flag=True,
    teaches="20-trimming",
    help="Make the trimmed copy, ROOTFS-trimmed, if the proof succeeds in it.",
)
@option("--undo", is_flag=True, teaches="20-trimming", help="Remove the trimmed copy, and its report.")
@option(
    "--also",
    metavar="'COMMAND...'",
    multiple=True,
    teaches="20-trimming",
    help="Observe this run, too: what is needed on Tuesdays only.",
)
@option(
    "--keep",
    metavar="PATTERN",
    multiple=True,
    teaches="20-trimming",
    help="Keep these paths in any case, as in '/usr/share/zoneinfo/*'.",
)
@option(
    "--only-observed",
    is_flag=True,
    teaches="20-trimming",
    help="Let go also what lies beside what was used: smaller, and it may break on a Tuesday.",
)
@option(
    "--proof",
    metavar="'COMMAND...'",
    multiple=True,
    teaches="20-trimming",
    help="Run this in the trimmed copy, in place of COMMAND.",
)
@option(
    "--seconds",
    type=click.FloatRange(min=0.1),
    teaches="20-trimming",
    help="For a program that does not end, a server perhaps: watch it for so long.",
)
@option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=60.0,
    show_default=True,
    teaches="20-trimming",
    help="Seconds that each run may take.",
)
@option("--list", "listed", is_flag=True, teaches="20-trimming", help="List every path that goes.")
@option("--env", "-e", metavar="KEY=VALUE", multiple=True, teaches="01-process", help="Set a variable.")
@option("--user", "-u", metavar="USER[:GROUP]", default="0:0", teaches="11-user", help="Who the program is.")
@option(
    "--workdir", "-w", metavar="DIR", default="/", teaches="03-chroot", help="Directory in which it starts."
)
@json_option("20-trimming")
def trim(
    rootfs: str,
    command: tuple[str, ...],
    apply: bool,
    undo: bool,
    also: tuple[str, ...],
    keep: tuple[str, ...],
    only_observed: bool,
    proof: tuple[str, ...],
    seconds: float | None,
    timeout: float,
    listed: bool,
    env: tuple[str, ...],
    user: str,
    workdir: str,
    as_json: bool,
) -> None:
    """Say what of ROOTFS COMMAND does not need, and make a copy without it. [20-trimming]

    ROOTFS is an image (labkernel images), a directory or a tarball; it is never changed. COMMAND is run in a container
    of it and observed. Without --apply nothing is made: you see what would go, in groups, and how much that saves.
    """
    import shlex

    from labkernel.image import trim as trimming

    _clean_up_when_told_to_end()
    if undo:
        trimming.undo(rootfs)
        click.echo(f"{trimming.trimmed_name(rootfs)} is removed")
        return
    if not command:
        raise click.UsageError("say what has to run in it: labkernel trim ROOTFS -- COMMAND...")
    also_run, proofs = ([words for text in texts if (words := shlex.split(text))] for texts in (also, proof))
    with (
        progress_bar() as progress,
        trimming.studied(
            rootfs,
            [list(command), *also_run],
            keep=keep,
            only_observed=only_observed,
            timeout=timeout,
            enough=seconds,
            progress=progress,
            env=_environment(env),
            user=user,
            workdir=workdir,
        ) as study,
    ):
        result = trimming.apply(study, proofs, timeout=timeout, progress=progress) if apply else None
    _tell_trimmed(study.plan, rootfs, result, listed, as_json)


def _tell_trimmed(plan: Any, rootfs: str, result: Any, listed: bool, as_json: bool) -> None:
    from labkernel.image.trim import trimmed_name
    from labkernel.spec import human

    before, after = plan.bytes
    if as_json:
        groups = [
            {"name": group.name, "goes": group.goes, "files": len(group.paths), "bytes": group.bytes}
            | ({"paths": group.paths} if listed else {})
            for group in plan.groups
        ]
        made = None if result is None else str(result)
        click.echo(
            json.dumps(
                {"rootfs": rootfs, "bytes": before, "trimmed_bytes": after, "groups": groups, "made": made}
            )
        )
        return
    rows: list[Sequence[str]] = [("", "GROUP", "FILES", "SIZE", "WHY")]
    for group in plan.groups:
        rows.append(
            (
                "goes" if group.goes else "stays",
                group.name,
                str(len(group.paths)),
                human(group.bytes),
                group.why,
            )
        )
    _print_table(rows)
    if listed:
        for path in sorted(plan.gone):
            click.echo(path)
    share = f"{after / before:.0%}" if before else "-"
    click.echo(f"{human(before)} before, {human(after)} after: {share}")
    if result is None:
        click.echo(f"nothing is changed; --apply makes {trimmed_name(rootfs)}, if COMMAND runs in it")
    else:
        click.echo(f"{result} is made, and proved; --undo removes it")


# ---------------------------------------------------------------------- images, from others and for others


def _clean_up_when_told_to_end() -> None:
    """Let SIGTERM and SIGHUP raise, so that what is half done is removed."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))


@verbs.command()
@click.argument("name")
@click.argument("destination", metavar="DEST")
@click.argument("command", nargs=-1, metavar="[-- COMMAND...]")
@option(
    "--tag", default="latest", show_default=True, teaches="22-oci", help="The image's name in the layout."
)
@option(
    "--compression",
    type=click.Choice(["gzip", "zstd", "none"]),
    default="gzip",
    show_default=True,
    teaches="22-oci",
    help="Of the layer; not every program reads zstd.",
)
@json_option("22-oci")
def export(
    name: str, destination: str, command: tuple[str, ...], tag: str, compression: Any, as_json: bool
) -> None:  # fmt: skip
    """Write the image NAME as an OCI image: into a layout, the directory DEST, or as an archive, DEST.tar. [22-oci]

    COMMAND is what is run in it where nothing else is said. The archive is also one that `docker load` reads.
    """
    from pathlib import Path

    from labkernel import images
    from labkernel.image import exchange

    _clean_up_when_told_to_end()
    with progress_bar() as progress:
        image = exchange.export_image(
            images.stored(name, progress=progress), Path(destination), tag=tag, command=command,
            compression=compression, progress=progress,
        )  # fmt: skip
    facts = {"name": name, "destination": destination, "tag": tag, "digest": image.manifest.digest}
    click.echo(json.dumps(facts) if as_json else f"{destination}: {tag}, {image.manifest.digest}")


@verbs.command("import")
@click.argument("source", metavar="SRC")
@click.argument("name")
@option("--tag", teaches="22-oci", help="Which image, where SRC has several.")
@json_option("22-oci")
def import_(source: str, name: str, tag: str | None, as_json: bool) -> None:
    """Keep an image that others made as NAME; `labkernel run NAME` runs it. [22-oci]

    SRC is an OCI layout (a directory, or an archive of one), an archive that `docker save` made, or the tarball of a
    root file system. Every digest is checked, and an archive that would write outside of its place is refused.
    """
    from pathlib import Path

    from labkernel.image import exchange

    _clean_up_when_told_to_end()
    with progress_bar() as progress:
        image = exchange.import_image(Path(source), name, tag=tag, progress=progress)
    _tell_kept(image, as_json)


@verbs.command()
@click.argument("reference", metavar="HOST/NAME[:TAG|@DIGEST]")
@click.argument("name", required=False)
@option("--username", "-u", teaches="22-oci", help="Asks for the password, which is stored nowhere.")
@json_option("22-oci")
def pull(reference: str, name: str | None, username: str | None, as_json: bool) -> None:
    """Fetch an image from a registry and keep it as NAME (if left out: the last part of its name). [22-oci]

    What is printed ends with the image's digest: that name is the same image for ever. Only https is spoken, but to
    this machine itself.
    """
    from labkernel.image import exchange, registry
    from labkernel.image.oci import Layout

    _clean_up_when_told_to_end()
    asked = registry.Reference.parse(reference)
    name = name or asked.name.rpartition("/")[2]
    exchange.check_name(name)
    password = click.prompt("Password", hide_input=True, err=True) if username else ""
    credentials = (username, password) if username else None
    with exchange.working_directory() as work, progress_bar() as progress:
        layout = Layout.create(work / "layout")
        found, pinned = registry.pull(reference, layout, credentials=credentials, progress=progress)
        image = exchange.import_layout(
            layout, name, tag=found.manifest.digest, facts={"pulled": pinned}, progress=progress
        )
    _tell_kept(image, as_json, pinned=pinned)


def _tell_kept(image: Any, as_json: bool, **facts: str) -> None:
    from labkernel.spec import human

    columns = ("name", "digest", "files", "bytes")
    if as_json:
        click.echo(json.dumps({column: getattr(image, column) for column in columns} | facts))
        return
    sizes = f"{human(image.bytes)} in {image.files} files"
    click.echo(f"{image.name}: {sizes}, {', '.join(facts.values()) or image.digest}")


@verbs.command()
@click.argument("name")
@click.argument("directory", metavar="DIR")
@click.argument("command", nargs=-1, metavar="[-- COMMAND...]")
@option(
    "--oci-version",
    type=click.Choice(["1.0", "1.1"]),
    default="1.0",
    show_default=True,
    teaches="22-oci",
    help="Of the runtime specification: 1.1 has the time namespace, which runc reads since 1.2.",
)
@PROGRAM
@LIMITS
@WALLS
def bundle(
    name: str, directory: str, command: tuple[str, ...], oci_version: str, interactive: bool, **options: Any
) -> None:  # fmt: skip
    """Write the image NAME as an OCI bundle: a root file system, and a config.json with what `run` would do. [22-oci]

    Any OCI runtime starts it: runc run --bundle DIR ID. The options are those of `labkernel run`.
    """
    from pathlib import Path

    from labkernel import bundle as bundles
    from labkernel import images
    from labkernel.container import Container

    _clean_up_when_told_to_end()
    asked = _for_container(name, command, options)
    spec = Container(name, **asked).spec
    with progress_bar() as progress:
        image = images.stored(name, progress=progress)
    bundles.make(
        Path(directory), spec, image.tarball, profile=asked.get("seccomp", "default"), version=oci_version
    )
    click.echo(f"{directory}: runc run --bundle {directory} ID")
    if closed := [str(one) for one in Path(directory).absolute().parents if not one.stat().st_mode & 0o001]:
        click.echo(
            f"{closed[0]} is closed to others, also to the ids of the container: runc may refuse", err=True
        )
    if oci_version == "1.0" and "time" in spec.namespaces:
        click.echo(
            "left out: the time namespace, for which version 1.0 has no word (--oci-version 1.1)", err=True
        )


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on standard error, where somebody looks at it; it appears only if there is something to wait for."""
    if not sys.stderr.isatty():
        yield None
        return
    bar: Any = None

    def progress(what: str, done: int, total: int) -> None:
        nonlocal bar
        from tqdm import tqdm

        if bar is None:
            bar = tqdm(leave=False, bar_format="{desc:<24} {percentage:3.0f}% |{bar}| {elapsed}")
        bar.set_description_str(what, refresh=False)
        bar.total, bar.n = total, done
        bar.update(0)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


# ---------------------------------------------------------------------- running


@verbs.command(context_settings={"allow_interspersed_args": False})
@click.argument("words", nargs=-1, metavar="[IMAGE] [COMMAND]...")
@option(
    "--name", metavar="NAME", teaches="23-python-container", help="A name to find it by; otherwise its id."
)
@option(
    "--rm", "remove", is_flag=True, teaches="06-overlay", help="Remove it, with what it wrote, when it ends."
)
@option(
    "--detach", "-d", is_flag=True, teaches="23-python-container", help="Print the id and leave it running."
)
@PROGRAM
@LIMITS
@WALLS
def run(words: tuple[str, ...], interactive: bool, detach: bool, **options: Any) -> int:
    """Run COMMAND in a new container, behind all walls; the exit status is the command's.

    IMAGE is one that `labkernel images` lists; where the first word is none, it is "python". Without COMMAND, python3
    is run. A container may
    use 512M of memory, one core and 256 processes where nothing else is said. 125: the container could not be made;
    126: the command cannot be run; 127: there is none of that name.
    """
    from labkernel import children, images
    from labkernel.container import Container
    from labkernel.image import store

    named = words and (words[0] == images.STANDARD or store.whole(words[0]))
    image, command = (words[0], words[1:]) if named else (images.STANDARD, words)
    _check_streams(interactive, options["tty"], detach)
    threading.Thread(target=_start_launcher).start()  # it takes as long as all that we have to do meanwhile
    container = Container(image, detach=detach, **_for_container(image, command, options))
    with progress_bar() as progress:
        images.rootfs(image, progress=progress)
    if detach:
        container.start()
        failed = _could_not_run(container)
        children.launcher().detach()
        if not failed:
            click.echo(container.spec.id)
        return failed
    stdio = () if container.spec.process.tty else (0 if interactive else subprocess.DEVNULL, 1, 2)
    with _signals_held_back():
        container.start(*stdio)
        _forward_signals(container.signal)
    if container.terminal is not None:
        _attend(container.terminal, interactive)
    return container.wait()


def _for_container(image: str, command: tuple[str, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """What `Container` is to be called with. What nobody says is as an imported image wants it, else as ever."""
    from labkernel.image import store

    wanted = dict((store.read_record(image) or {}).get("settings") or {})
    inside = dict(item.partition("=")[::2] for item in wanted.get("Env", ()))
    found = dict(options) | _security(options["security_opt"])
    del found["security_opt"]
    found["user"] = options["user"] or wanted.get("User") or "0:0"
    found["workdir"] = options["workdir"] or wanted.get("WorkingDir") or "/"
    found["env"] = inside | _environment(options["env"])
    for name in ("device_read_bps", "device_write_bps"):
        found[name] = _rates("--" + name.replace("_", "-"), options[name])
    words = [*wanted.get("Entrypoint", ()), *(command or wanted.get("Cmd", ()))]
    return found | {"command": words or ["python3"]}


def _could_not_run(container: Container) -> int:
    """Wait until the program of a detached container runs; 126 or 127, and a word of why, where it cannot be run."""
    assert container.pid
    while not _has_executed(container.pid):
        if container.running():
            time.sleep(0.001)
            continue
        status, log = container.wait(), container.logs().decode(errors="replace")
        # With --rm the log has gone with the rest.
        if status not in (126, 127) or not (log.startswith("labkernel: cannot run") or container.spec.remove):
            return 0
        unknown = f"labkernel: {container.spec.process.command[0]!r} ended at once, with status {status}"
        click.echo(log.rstrip() or unknown, err=True)
        return status
    return 0


PF_FORKNOEXEC = 0x40
"""Among a process's flags: it is a copy of its parent still; <linux/sched.h>, and "flags" in man 5 proc_pid_stat."""


def _has_executed(init: int) -> bool:
    """Whether the first program of the container of this init has taken over from what put up the walls."""
    from labkernel.monitor import descendants

    for program in descendants(init)[1:2]:
        with contextlib.suppress(OSError), open(f"/proc/{program}/stat", "rb") as file:
            return not int(file.read().rpartition(b")")[2].split()[6]) & PF_FORKNOEXEC
    return False


@verbs.command("exec", context_settings={"allow_interspersed_args": False})
@click.argument("name")
@click.argument("command", nargs=-1, required=True)
@PROGRAM
def execute(
    name: str, command: tuple[str, ...], env: tuple[str, ...], user: str | None, workdir: str | None,
    interactive: bool, tty: bool,
) -> int:  # fmt: skip
    """Run one more COMMAND in the container NAME, behind the same walls. [14-enter]

    What is not said here is as for the container's own program: its variables, user and directory.
    """
    from labkernel import children

    _check_streams(interactive, tty)
    record = _running(name)
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that it is tidied up, and our terminal is as it was
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    # An ordinary user's launcher has to be in the user namespace of the one that started the container.
    launcher = children.Launcher(join=record["launcher"]["pid"])
    try:
        with open(os.devnull, "r+b") as null:
            nothing = null.fileno()
            stdio = (nothing, nothing, nothing) if tty else (0 if interactive else nothing, 1, 2)
            process = _one_more(record, command, _environment(env), user, workdir, tty)
            channel = launcher.ask({"do": "exec", "record": record, "process": process}, stdio)
        return _until_ended(channel, interactive)
    finally:
        launcher.close()


def _until_ended(channel: Channel, interactive: bool) -> int:
    """Attend a program that `exec` has started, and return its status.  If we end before it, the launcher kills it."""
    while True:
        message, fds = channel.message_and_fds()
        if isinstance(message, dict):
            if "error" in message:
                raise message["error"]
            if "status" in message:
                return int(message["status"])
        elif message == b"tty":
            _attend(fds[0], interactive)
        elif message.startswith(b"failed "):
            raise RuntimeError(message.decode().split(" ", 2)[2])


def _start_launcher() -> None:
    from labkernel import children

    with contextlib.suppress(Exception):  # whoever needs the launcher tries again, and hears why it fails
        children.launcher()


def _check_streams(interactive: bool, tty: bool, detach: bool = False) -> None:
    from labkernel.spec import BadOption

    if detach and (interactive or tty):
        raise BadOption(
            "--detach with --interactive or --tty: nobody would be there to type; leave one of them out"
        )
    if interactive and tty and not os.isatty(0):
        raise BadOption("--tty with --interactive: standard input is not a terminal; leave out --tty")


def _attend(terminal: int, interactive: bool) -> None:
    from labkernel.terminal import attend

    attend(terminal, 0 if interactive else None)


FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Let signals wait, so that one that comes while the container starts reaches it, and does not just end us."""
    from labkernel import children

    children.launcher()  # it must not inherit what is blocked
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _forward_signals(send: Callable[[int], None]) -> None:
    """What is sent to us goes to the container's program; a second Ctrl-C kills it."""
    interrupts = 0

    def forward(number: int, _: object) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        send(signal.SIGKILL if interrupts > 1 else number)

    for number in FORWARDED:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, and a shell's background jobs
            signal.signal(number, forward)


def _environment(items: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE sets, KEY alone copies ours, where we have it."""
    from labkernel.spec import BadOption

    found = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not key:
            raise BadOption(f"--env {item!r}: write KEY=VALUE, or KEY to copy ours")
        if equals or key in os.environ:
            found[key] = value if equals else os.environ[key]
    return found


def _security(items: Sequence[str]) -> dict[str, Any]:
    """The two walls that --security-opt can change."""
    from labkernel.spec import BadOption

    found: dict[str, Any] = {}
    for item in items:
        wall, _, value = item.partition("=")
        if wall == "seccomp" and value:
            found["seccomp"] = value
        elif wall == "no-new-privileges" and value in ("", "true", "false"):
            found["no_new_privs"] = value != "false"
        else:
            allowed = "seccomp=unconfined, seccomp=FILE, no-new-privileges=true or no-new-privileges=false"
            raise BadOption(f"--security-opt {item!r}: give {allowed}")
    return found


def _rates(name: str, items: Sequence[str]) -> dict[str, str] | None:
    """DEVICE:RATE for each device; None where nothing is asked for."""
    from labkernel.spec import BadOption

    for item in items:
        if not item.rpartition(":")[0]:
            raise BadOption(f'{name} {item!r}: write DEVICE:RATE, as in "/dev/sda:1M"')
    return {item.rpartition(":")[0]: item.rpartition(":")[2] for item in items} or None


def _one_more(
    record: Mapping[str, Any], command: tuple[str, ...], env: Mapping[str, str], user: str | None,
    workdir: str | None, tty: bool,
) -> Any:  # fmt: skip
    """A further program for a running container, with all that its first one was given; options go before."""
    from dataclasses import replace

    from labkernel.spec import Process

    like_the_first = Process.from_record(record["process"], command, tty)
    return replace(
        like_the_first,
        environment={**like_the_first.environment, **env},
        user=user or like_the_first.user,
        workdir=workdir or like_the_first.workdir,
    )


def _running(name: str) -> dict[str, Any]:
    """The record of a container that runs. Raises NoSuchContainer, RuntimeError."""
    from labkernel import state

    record = state.find(name)
    if record["state"] not in ("running", "paused"):
        raise RuntimeError(f"container {name} does not run: it is {record['state']}")
    return record


# ---------------------------------------------------------------------- looking


@verbs.command()
@json_option("09-pid")
def ps(as_json: bool) -> None:
    """List the containers of this machine and what they are doing. [09-pid]"""
    from labkernel import state

    rows = [_row(record) for record in state.records()]
    if as_json:
        click.echo(json.dumps(rows))
        return
    table = [("ID", "NAME", "IMAGE", "COMMAND", "CREATED", "STATE", "PID", "PORTS")]
    for row in rows:
        command = " ".join(row["command"])
        state_ = row["state"] + (f" ({row['exit_code']})" if row["exit_code"] is not None else "")
        table.append((
            row["id"], row["name"], row["image"], command if len(command) <= 30 else command[:29] + "…",
            _ago(time.time() - row["created"]), state_, str(row["pid"] or ""), ", ".join(row["publish"]),
        ))  # fmt: skip
    _print_table(table)


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    alive = record["state"] in ("running", "paused")
    same = {key: record[key] for key in ("id", "name", "image", "command", "created", "state", "publish")}
    return same | {"pid": record["pid"] if alive else None, "exit_code": record.get("exit_code")}


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} seconds ago"


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@verbs.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@option(
    "--no-stream",
    is_flag=True,
    teaches="16-memory",
    help="Print it once, not every second until all have ended.",
)
@json_option("16-memory")
def stats(names: tuple[str, ...], no_stream: bool, as_json: bool) -> None:
    """Tell what containers use at this moment: the named ones, or all that run. [16-memory]

    CPU: 100% is one core. With --json it is told once.
    """
    records = [_running(name) for name in names] if names else _all_running()
    watched = [Watched(record) for record in records]
    once = no_stream or as_json
    while True:
        time.sleep(0.5 if once else 1.0)
        rows = [row for one in watched if (row := one.row())]
        if as_json:
            click.echo(json.dumps(rows))
        elif rows or once:
            if not once and sys.stdout.isatty():
                click.clear()
            _print_table([STATS_HEAD, *map(_stats_line, rows)])
        if once or not rows:
            return


STATS_HEAD = ("ID", "NAME", "CPU", "MEMORY / LIMIT", "MEMORY", "NET IN / OUT", "DISK READ / WRITTEN", "PIDS")


class Watched:
    """A container of which we read the counters, now and then."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        from labkernel import monitor
        from labkernel.container import cgroup_at

        self.record = record
        group = cgroup_at(record["cgroup"])
        self.source = (
            monitor.CgroupSource(group, record["pid"]) if group else monitor.ProcessSource(record["pid"])
        )
        self.before = self.source.sample(), time.monotonic()

    def row(self) -> dict[str, Any] | None:
        """What it uses, its CPU since the last call; None when it has ended."""
        from labkernel import state
        from labkernel.spec import machine_memory

        try:
            sample, now = self.source.sample(), time.monotonic()
        except OSError:
            return None
        if not state.ProcessKey(**self.record["init"]).alive():
            return None
        (before, then), self.before = self.before, (sample, now)
        limit = sample.memory_limit_bytes or machine_memory()
        return {
            "id": self.record["id"],
            "name": self.record["name"],
            "cpu_percent": round((sample.cpu_usec - before.cpu_usec) / (now - then) / 1e4, 1),
            "memory_bytes": sample.memory_bytes,
            "memory_limit_bytes": limit,
            "memory_percent": round(100 * sample.memory_bytes / limit, 1),
            "net_received_bytes": sample.net_received_bytes,
            "net_sent_bytes": sample.net_sent_bytes,
            "io_read_bytes": sample.io_read_bytes,
            "io_write_bytes": sample.io_write_bytes,
            "pids": sample.pids,
        }


def _stats_line(row: Mapping[str, Any]) -> tuple[str, ...]:
    from labkernel.spec import human

    def both(one: str, other: str) -> str:
        return f"{human(row[one])} / {human(row[other])}"

    return (
        row["id"], row["name"], f"{row['cpu_percent']:.1f}%", both("memory_bytes", "memory_limit_bytes"),
        f"{row['memory_percent']:.1f}%", both("net_received_bytes", "net_sent_bytes"),
        both("io_read_bytes", "io_write_bytes"), str(row["pids"]),
    )  # fmt: skip


def _all_running() -> list[dict[str, Any]]:
    from labkernel import state

    return [record for record in state.records() if record["state"] in ("running", "paused")]


# ---------------------------------------------------------------------- ending


@verbs.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@option("--time", "-t", "seconds", type=click.FloatRange(0), default=10.0, show_default=True, teaches="09-pid",
        help="Seconds until it is killed.")  # fmt: skip
def stop(names: tuple[str, ...], seconds: float) -> None:
    """End containers: SIGTERM to the program, and SIGKILL to all where that does not help. [09-pid]"""
    for name in names:
        _end(_running(name), seconds)
        click.echo(name)


@verbs.command()
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


@verbs.command()
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
        for record in _all_running():
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
