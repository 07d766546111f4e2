"""Observing: which files of its root a container's program names, whether it finds them or not.

The program runs in a container as always. Beside the container's own filter it has a second one, which asks us about
each call that names a file (`USER_NOTIF`, as in `labkernel.linux.seccomp_notify`): the call waits, we read the name
from the caller's memory, and say "go on".

Why in this way. `strace` sees the same calls, by ptrace(2), but it has to be installed, and stops the program at every
call, not only at these. fanotify(7) tells of a file and not of a name, so nothing escapes it, also what the kernel
itself opens; but it takes the rights of the machine's root, and it is silent about who only looks (stat) and about what
was not there. `LD_DEBUG=files` is told by the dynamic loader, so it knows of libraries and of nothing else.

What this one does not see: files that the kernel opens for execve (the ELF interpreter, or the one of a script), which
are found by reading (`labkernel.image.trim`); and what a directory's listing shows. It is no guard: a program with
several threads could change the name between our look and the kernel's. The names of files that it made itself are
told, too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import struct
import time
from dataclasses import dataclass, field
from functools import cache

from labkernel.container import Container
from labkernel.linux import seccomp
from labkernel.linux.seccomp_notify import (
    ANSWER,
    NOTIFICATION,
    SECCOMP_IOCTL_NOTIF_RECV,
    SECCOMP_IOCTL_NOTIF_SEND,
    SECCOMP_USER_NOTIF_FLAG_CONTINUE,
)

OPENING = ("open", "creat", "openat", "openat2", "execve", "execveat", "uselib")
"""Calls after which the file's content is used."""

AT_0 = (
    "open", "creat", "execve", "uselib", "stat", "lstat", "stat64", "lstat64", "oldstat", "oldlstat", "access",
    "readlink", "chdir", "chroot", "statfs", "statfs64", "chmod", "chown", "lchown", "chown32", "lchown32", "truncate",
    "truncate64", "unlink", "rmdir", "mkdir", "utime", "utimes", "rename", "link", "getxattr", "lgetxattr",
    "listxattr", "llistxattr", "setxattr", "lsetxattr", "removexattr", "lremovexattr", "swapon", "acct",
)  # fmt: skip
"""Calls whose first argument is a path."""

AT_1 = ("rename", "link", "symlink", "inotify_add_watch", "pivot_root", "mount")
"""Calls whose second argument is a path, counted from the working directory."""

BELOW_0 = (
    "openat", "openat2", "execveat", "newfstatat", "fstatat64", "statx", "faccessat", "faccessat2", "readlinkat",
    "fchmodat", "fchmodat2", "fchownat", "unlinkat", "mkdirat", "mknodat", "utimensat", "utimensat_time64",
    "futimesat", "name_to_handle_at", "renameat", "renameat2", "linkat", "open_tree", "setxattrat", "getxattrat",
    "listxattrat", "removexattrat",
)  # fmt: skip
"""Calls whose second argument is a path, counted from the directory in the first one."""

BELOW_2 = ("renameat", "renameat2", "linkat", "move_mount")
"""Calls whose fourth argument is a path, counted from the directory in the third one."""

AT_FDCWD = -100
PATH_MAX = 4096
PAGE = 4096
LINKS = 40
"""Symbolic links that the kernel follows in one path; man 7 path_resolution."""

KERNELS = ("/proc", "/dev", "/sys")
"""What is mounted there is no part of an image."""

STOPS_WITHIN = 10.0
"""Seconds that a program gets to end by itself when it has been observed for long enough."""


@dataclass(frozen=True)
class Observation:
    """What a program did with its root file system; all paths are absolute, real, and as seen from inside."""

    command: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes
    stopped: bool = False
    """Whether it was still running when it had been observed for long enough, and was asked to end."""
    opened: frozenset[str] = frozenset()
    """What was opened or executed, and was there."""
    asked: frozenset[str] = frozenset()
    """What was there, and about which it only asked: size, permissions, the target of a link."""
    links: frozenset[str] = frozenset()
    """The symbolic links on the way to these."""
    missing: frozenset[str] = frozenset()
    """What it named, and was not there."""

    @property
    def named(self) -> frozenset[str]:
        """All that was there, and that it has named."""
        return self.opened | self.asked | self.links

    @property
    def succeeded(self) -> bool:
        """Whether it ended with status 0, or did not end."""
        return self.stopped or self.returncode == 0


@cache
def program() -> bytes:
    """The filter: ask about every call that names a file, allow all others."""
    names = sorted({*AT_0, *AT_1, *BELOW_0, *BELOW_2})
    return seccomp.compile_profile(
        seccomp.Profile((seccomp.Rule(tuple(names), seccomp.USER_NOTIF),), seccomp.ALLOW)
    )


@cache
def _calls() -> dict[tuple[int, int], tuple[str, tuple[tuple[int | None, int], ...]]]:
    """For an architecture and a call's number: its name, and the places of (directory, path) in its arguments."""
    table = {}
    places: dict[str, list[tuple[int | None, int]]] = {}
    for names, place in ((AT_0, (None, 0)), (AT_1, (None, 1)), (BELOW_0, (0, 1)), (BELOW_2, (2, 3))):
        for name in names:
            places.setdefault(name, []).append(place)
    for machine, token in seccomp.ARCHITECTURES.items():
        for name, found in places.items():
            if (number := seccomp.call_number(machine, name)) >= 0:
                table[token, number] = (name, tuple(found))
    return table


def observe(container: Container, *, timeout: float = 60.0, enough: float | None = None) -> Observation:
    """Run a container that has not been started, and return what its program named.

    *timeout*: seconds after which it is killed, and TimeoutError raised. *enough*: for a program that does not end,
    the seconds after which it is asked to (SIGTERM). Raises what `Container.start` raises.
    """
    process = container.spec.process._replace(observed=program())
    container.spec = container.spec._replace(process=process)
    now = time.monotonic()
    with contextlib.ExitStack() as closing:
        ends = [os.pipe(), os.pipe()]
        for read, _ in ends:
            closing.callback(os.close, read)
        closing.callback(container.kill)
        try:
            container.start(stdout=ends[0][1], stderr=ends[1][1])
        finally:
            for _, write in ends:
                os.close(write)
        assert container.listener is not None
        closing.callback(os.close, container.listener)
        watch = _Watch(container, [read for read, _ in ends])
        stopped = watch.until(now + timeout, None if enough is None else now + enough)
        code = container.wait(STOPS_WITHIN)
    stdout, stderr = map(bytes, watch.said.values())
    return Observation(
        command=tuple(process.command),
        returncode=code,
        stdout=stdout,
        stderr=stderr,
        stopped=stopped,
        opened=frozenset(watch.opened),
        asked=frozenset(watch.asked - watch.opened),
        links=frozenset(watch.links),
        missing=frozenset(watch.missing),
    )


@dataclass
class _Watch:
    """Our end of the listener, until nobody is left who could ask."""

    container: Container
    streams: list[int]
    opened: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)
    links: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)
    said: dict[int, bytearray] = field(default_factory=dict)
    executing: set[int] = field(default_factory=set)

    def until(self, end: float, enough: float | None) -> bool:
        """Answer until the program has ended; whether it had to be asked to end."""
        listener = self.container.listener
        assert listener is not None
        self.said = {stream: bytearray() for stream in self.streams}
        poll = select.poll()
        for fd in (listener, *self.streams):
            poll.register(fd, select.POLLIN)
        stopped, running = False, {listener}
        while running:
            now = time.monotonic()
            if enough is not None and now >= enough and not stopped:
                stopped, end = True, now + STOPS_WITHIN
                self.container.signal(signal.SIGTERM)
            if now >= end:
                if not stopped:
                    raise TimeoutError("the program was still running and has been killed")
                self.container.kill()
            until = end if enough is None or stopped else min(end, enough)
            for fd, events in poll.poll(max(1, int(1000 * (until - now)))):
                if fd == listener and not events & select.POLLIN:
                    running.clear()  # all that were under the filter have ended
                elif fd == listener:
                    self.answer(listener)
                elif data := os.read(fd, 1 << 16):
                    self.said[fd] += data
                else:
                    poll.unregister(fd)
        for stream in self.streams:
            while select.select([stream], [], [], 0)[0] and (data := os.read(stream, 1 << 16)):
                self.said[stream] += data
        return stopped

    def answer(self, listener: int) -> None:
        """Take one question, look at it, and let the call go on."""
        try:
            told = fcntl.ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, bytes(struct.calcsize(NOTIFICATION)))
            number, pid, _, call, architecture, _, *arguments = struct.unpack(NOTIFICATION, told)
            with contextlib.suppress(ProcessLookupError):
                self.look(pid, (architecture, call), arguments)
            go_on = struct.pack(ANSWER, number, 0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE)
            fcntl.ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, go_on)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINTR):  # the caller was killed while it waited
                raise

    def look(self, pid: int, call: tuple[int, int], arguments: list[int]) -> None:
        """Note down what a call names."""
        name, places = _calls().get(call, ("", ()))
        if pid in self.executing:  # the path that execve was given could not be read before
            self.executing.discard(pid)
            with contextlib.suppress(OSError):
                if not os.path.samefile(f"/proc/{pid}/exe", f"/proc/{self.container.pid}/exe"):
                    self.opened.add(os.readlink(f"/proc/{pid}/exe"))
        if name in ("execve", "execveat"):
            self.executing.add(pid)
        for directory, path in places:
            text = self.name(pid, arguments[path])
            if not text:
                continue  # the descriptor itself is meant; or the memory of our own code before execve
            if not text.startswith("/"):
                text = f"{self.directory(pid, None if directory is None else arguments[directory])}/{text}"
            real, found = self.walk(pid, text)
            if real.startswith(KERNELS):
                continue
            if not found:
                self.missing.add(real)
            elif name in OPENING:
                self.opened.add(real)
            else:
                self.asked.add(real)

    @staticmethod
    def name(pid: int, address: int) -> str:
        """The text that ends with a zero at an address of a process's memory; "" where it cannot be read."""
        found = b""
        try:
            memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return ""
        try:
            while b"\0" not in found and len(found) < PATH_MAX:
                data = os.pread(memory, PAGE - address % PAGE, address)
                if not data:  # its memory has gone: it was killed meanwhile
                    return ""
                found += data
                address += len(data)
        except (OSError, OverflowError):
            return ""
        finally:
            os.close(memory)
        return os.fsdecode(found.partition(b"\0")[0])

    @staticmethod
    def directory(pid: int, descriptor: int | None) -> str:
        """What a relative path is counted from: a directory that is open, or the working directory."""
        number = (
            AT_FDCWD
            if descriptor is None
            else struct.unpack("=i", struct.pack("=I", descriptor & 0xFFFFFFFF))[0]
        )
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/{pid}/cwd" if number == AT_FDCWD else f"/proc/{pid}/fd/{number}")
        return "/"

    def walk(self, pid: int, path: str) -> tuple[str, bool]:
        """Follow a path as the kernel does, in the process's root; where it leads, and whether anything is there.

        The links on the way are noted down.
        """
        left = [part for part in path.split("/") if part not in ("", ".")][::-1]
        done: list[str] = []
        followed = 0
        while left:
            part = left.pop()
            if part == "..":
                done = done[:-1]
                continue
            here = "/".join(["", *done, part])
            if here in KERNELS:
                return here, True
            try:
                target = os.readlink(f"/proc/{pid}/root{here}")
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR):
                    return "/".join(["", *done, part, *left[::-1]]), False
                done.append(part)  # EINVAL: no link
                continue
            self.links.add(here)
            followed += 1
            if followed > LINKS:
                return here, True
            if target.startswith("/"):
                done = []
            left += [part for part in target.split("/") if part not in ("", ".")][::-1]
        return "/" + "/".join(done), True
