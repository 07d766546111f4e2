"""`labkernel run -it`: the reader's own terminal made transparent, so that the container's is what they see.

Every key goes to the container's terminal as it is (also Ctrl-C: the line discipline inside turns it into a signal),
and what is printed there comes back. Source: man 7 pty, man 3 termios, man 2 ioctl_tty.
"""

from __future__ import annotations

import os
import selectors
import signal
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

CHUNK = 1 << 16


def attend(terminal: int, keyboard: int | None = None, screen: int = 1) -> None:
    """Copy between the container's terminal and ours until every program inside has closed its end, or we are cut off.

    The container's terminal is closed then: a program that still has it is told by SIGHUP that nobody is there.
    keyboard: the descriptor to read keys from, in raw mode meanwhile; None sends the container nothing.
    """
    follow_size(terminal, screen)
    signal.signal(signal.SIGWINCH, lambda *_: follow_size(terminal, screen))
    try:
        with raw(keyboard) if keyboard is not None else nullcontext():
            _copy(terminal, keyboard, screen)
    finally:
        signal.signal(signal.SIGWINCH, signal.SIG_DFL)
        os.close(terminal)


def follow_size(terminal: int, screen: int) -> None:
    """Make the container's terminal as large as ours; the programs in it are told by SIGWINCH."""
    if os.isatty(screen):
        termios.tcsetwinsize(terminal, termios.tcgetwinsize(screen))


@contextmanager
def raw(keyboard: int) -> Iterator[None]:
    """Let our terminal pass on every key, unechoed, and afterwards be as it was."""
    before = termios.tcgetattr(keyboard)
    tty.setraw(keyboard)
    try:
        yield
    finally:
        with suppress(termios.error):  # it may be gone
            termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _copy(terminal: int, keyboard: int | None, screen: int) -> None:
    os.set_blocking(terminal, False)
    typed = b""  # read from the keyboard and not yet taken by the container
    with selectors.DefaultSelector() as selector:
        selector.register(terminal, selectors.EVENT_READ)
        if keyboard is not None:
            selector.register(keyboard, selectors.EVENT_READ)
        while True:
            selector.modify(terminal, selectors.EVENT_READ | (selectors.EVENT_WRITE if typed else 0))
            for key, events in selector.select():
                try:
                    if key.fd == keyboard:
                        keys = os.read(keyboard, CHUNK)
                        if not keys:  # our own terminal is gone
                            return
                        typed += keys
                        continue
                    if events & selectors.EVENT_READ:
                        _write_all(screen, os.read(terminal, CHUNK))
                    if events & selectors.EVENT_WRITE:
                        typed = typed[os.write(terminal, typed) :]
                except BlockingIOError:
                    continue
                except OSError:  # EIO: the other end is closed, of theirs or of ours
                    return


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
