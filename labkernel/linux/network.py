"""Network namespaces: the loopback interface."""

from __future__ import annotations

import fcntl
import socket
import struct

SIOCSIFFLAGS = 0x8914  # <linux/sockios.h>
IFF_UP = 0x1  # <linux/if.h>


def loopback_up() -> None:
    """Switch the loopback interface of the current network namespace on; the kernel adds 127.0.0.1 and ::1.

    One ioctl, without netlink: every container's start does it. man 7 netdevice.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as anything:
        fcntl.ioctl(anything, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
