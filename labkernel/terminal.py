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
from contextlib import contextmanager

CHUNK = 1 << 16


def attend(terminal: int, keyboard: int | None = None, screen: int = 1) -> None:
    """Copy between the container's terminal and ours until every program inside has closed its own end.

    keyboard: the descriptor to read keys from, in raw mode meanwhile; None sends the container nothing.
    """
    follow_size(terminal, screen)
    signal.signal(signal.SIGWINCH, lambda *_: follow_size(terminal, screen))
    if keyboard is None:
        _copy(terminal, None, screen)
    else:
        with raw(keyboard):
            _copy(terminal, keyboard, screen)


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
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _copy(terminal: int, keyboard: int | None, screen: int) -> None:
    os.set_blocking(terminal, False)
    typed = b""  # read from the keyboard and not yet taken by the container
    with selectors.DefaultSelector() as selector:
        selector.register(terminal, selectors.EVENT_READ)
        if keyboard is not None:
            selector.register(keyboard, selectors.EVENT_READ)
        while True:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if typed else 0)
            selector.modify(terminal, wanted)
            for key, events in selector.select():
                if key.fd == keyboard:
                    data = os.read(keyboard, CHUNK)
                    typed += data
                    if not data:  # our own terminal is gone
                        selector.unregister(keyboard)
                    continue
                if events & selectors.EVENT_READ:
                    try:
                        printed = os.read(terminal, CHUNK)
                    except BlockingIOError:
                        continue
                    except OSError:  # EIO: nobody inside has it open any more
                        return
                    _write_all(screen, printed)
                if events & selectors.EVENT_WRITE and typed:
                    typed = typed[os.write(terminal, typed) :]


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
