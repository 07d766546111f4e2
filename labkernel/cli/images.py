"""Root file systems: build, weigh and trim them, take them from others, and give them to others."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from labkernel.cli.common import failed, in_words, json_option, option, print_table, progress_bar
from labkernel.cli.options import LIMITS, PROGRAM, WALLS, environment, for_container


@click.command()
@click.argument("name", default="python")
@option(
    "--all",
    "everything",
    is_flag=True,
    teaches="21-buildroot",
    help="Every recipe, but those that want more than this machine has.",
)
@option(
    "--again",
    is_flag=True,
    teaches="02-tarball",
    help="Also where nothing has changed: the digest must be the same.",
)
@json_option
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
    rows, status = [], 0
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
            status = failed(in_words(error))
        else:
            if not as_json:
                click.echo(_in_one_line(rows[-1]))
    if as_json:
        click.echo(json.dumps(rows))
    return status


def _built(name: str, again: bool) -> dict[str, Any]:
    """An image that is built, unpacked and proved, as facts. Raises what `recipes.build` and `images.prove` raise."""
    from labkernel import images
    from labkernel.image import recipes, store

    with progress_bar() as progress:
        if name == images.STANDARD:
            image = store.build_rootfs(again=again, progress=progress)
            place = images.rootfs(progress=progress)
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


@click.command()
@json_option
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
    print_table(table)
    built = {image.name for image in found}
    if others := [recipe.name for recipe in recipes.all_recipes() if recipe.name not in built]:
        click.echo(f"not built: {', '.join(others)} (labkernel build NAME)")


@click.command()
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
@option("--user", "-u", metavar="USER[:GROUP]", teaches="11-user", help="Who the program is.")
@option("--workdir", "-w", metavar="DIR", teaches="03-chroot", help="Directory in which it starts.")
@json_option
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
    user: str | None,
    workdir: str | None,
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
            env=environment(env),
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
    print_table(rows)
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


@click.command()
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
@json_option
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


@click.command("import")
@click.argument("source", metavar="SRC")
@click.argument("name")
@option("--tag", teaches="22-oci", help="Which image, where SRC has several.")
@json_option
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


@click.command()
@click.argument("reference", metavar="HOST/NAME[:TAG|@DIGEST]")
@click.argument("name", required=False)
@option("--username", "-u", teaches="22-oci", help="Asks for the password, which is stored nowhere.")
@json_option
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


@click.command()
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
    asked = for_container(name, command, options)
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
