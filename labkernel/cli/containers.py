"""Running: a new container, or one more program in one that runs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from labkernel.cli.common import option, progress_bar, running
from labkernel.cli.options import LIMITS, PROGRAM, WALLS, environment, for_container

if TYPE_CHECKING:
    from labkernel.children import Channel
    from labkernel.container import Container


@click.command(context_settings={"allow_interspersed_args": False})
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
    126: the command cannot be run; 127: there is none of that name. [23-python-container]
    """
    from labkernel import children, images
    from labkernel.container import Container
    from labkernel.image import store

    named = words and (words[0] == images.STANDARD or store.whole(words[0]))
    image, command = (words[0], words[1:]) if named else (images.STANDARD, words)
    _check_streams(interactive, options["tty"], detach)
    threading.Thread(target=_start_launcher).start()  # it takes as long as all that we have to do meanwhile
    container = Container(image, detach=detach, **for_container(image, command, options))
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


@click.command("exec", context_settings={"allow_interspersed_args": False})
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
    record = running(name)
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that it is tidied up, and our terminal is as it was
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    # An ordinary user's launcher has to be in the user namespace of the one that started the container.
    launcher = children.Launcher(join=record["launcher"]["pid"])
    try:
        with open(os.devnull, "r+b") as null:
            nothing = null.fileno()
            stdio = (nothing, nothing, nothing) if tty else (0 if interactive else nothing, 1, 2)
            process = _one_more(record, command, environment(env), user, workdir, tty)
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


def _one_more(
    record: Mapping[str, Any], command: tuple[str, ...], env: Mapping[str, str], user: str | None,
    workdir: str | None, tty: bool,
) -> Any:  # fmt: skip
    """A further program for a running container, with all that its first one was given; options go before."""
    from labkernel.spec import Process

    like_the_first = Process.from_record(record["process"], command, tty)
    return like_the_first._replace(
        environment={**like_the_first.environment, **env},
        user=user or like_the_first.user,
        workdir=workdir or like_the_first.workdir,
    )
