"""The command line: the same containers as in the notebooks, with the options of `docker run`.

Every verb is a few lines over `Container`, the records in `labkernel.state`, and the launcher. What goes wrong is
told in one line, with Docker's exit status for "not a matter of the program inside": 125.
Source: https://docs.docker.com/reference/cli/docker/
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from labkernel.cli import containers, ending, images, looking
from labkernel.cli.common import FAILED, failed, in_words

VERBS: tuple[click.Command, ...] = (
    looking.doctor, images.build, images.images, images.trim, images.export, images.import_, images.pull, images.bundle,
    containers.run, containers.execute, looking.ps, looking.stats, ending.stop, ending.rm, ending.clean,
)  # fmt: skip
"""In the order in which one needs them."""


class Verbs(click.Group):
    """The verbs, listed in their own order."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """As added here, not as in the alphabet."""
        return list(self.commands)


@click.group(cls=Verbs, context_settings={"max_content_width": 110})
def verbs() -> None:
    """Containers from scratch: build a root file system, run a program behind all walls, watch it, remove it.

    "[07-uts]" behind an option names the notebook that teaches what it does.
    """


for verb in VERBS:
    verbs.add_command(verb)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end with its exit status."""
    try:
        status = verbs.main(arguments, prog_name="labkernel", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        status = FAILED
    except click.UsageError as error:
        verb = error.ctx.command_path if error.ctx else "labkernel"
        status = failed(f"{error.format_message()} ({verb} --help lists what there is)")
    except (click.Abort, KeyboardInterrupt):
        status = 128 + signal.SIGINT
    except Exception as error:
        if os.environ.get("LABKERNEL_DEBUG"):
            raise
        status = failed(in_words(error))
    sys.exit(status)
