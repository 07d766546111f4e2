"""Expected failures, shown calmly: which call, which errno, what it means; not a traceback."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from labkernel import state


@contextmanager
def calmly(*expected: type[BaseException]) -> Iterator[None]:
    """Run something that is meant to fail in one of these ways, and say in words how it did.

    Raises AssertionError when it does not fail: then the text around it would not be true here.
    """
    try:
        yield
    except expected as error:
        print(f"As expected, it fails: {in_words(error)}")
    else:
        names = " or ".join(kind.__name__ for kind in expected)
        raise AssertionError(f"this was expected to fail with {names}, and it went through")


def in_words(error: BaseException) -> str:
    """`EPERM, Operation not permitted: …`, without what is particular to this machine."""
    if isinstance(error, OSError) and error.errno:
        name, meaning = errno.errorcode.get(error.errno, str(error.errno)), os.strerror(error.errno)
        text = error.strerror or meaning
        if meaning not in text or text == meaning:
            text = f"{name}, {meaning}" + ("" if text == meaning else f": {text}")
        if error.filename is not None:
            text += f": {os.fsdecode(error.filename)}"
    else:
        text = f"{type(error).__name__}: {error}".removesuffix(": ")  # some say no more than their name
    return scrub(text)


def scrub(text: str) -> str:
    """Take out what differs from machine to machine: where the lab keeps its things."""
    home = re.escape(str(state.home()))
    return re.sub(home, "LAB", re.sub(rf"{home}/rootfs/[\w.-]+", "ROOTFS", text))
