"""The notebook's side of the launcher: run a function in a child process, and see what it printed and returned.

def hostname():
    unshare(CLONE_NEWUTS)
    sethostname("box")
    return gethostname()

in_child(hostname)          # the notebook's own kernel is still where it was
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import os
import pickle
import secrets
import selectors
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, Any, Protocol, TypeVar

from labkernel import state

T = TypeVar("T")
Message = dict[str, Any]

STARTED_WITHIN = 30.0
"""Seconds after which a launcher that has not answered is given up."""


class LauncherDied(RuntimeError):
    """The launcher process ended while we waited for it; what it ran has ended. The next call starts another."""


class ChildFailed(RuntimeError):
    """A child ended without a value: it was killed, or called exit with a status."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text, status)  # both: an exception is pickled by its arguments
        self.status = status
        """As a shell reports it: the exit code, or 128 and the signal's number."""

    def __str__(self) -> str:
        return str(self.args[0])


class Launcher:
    """A connection to a launcher process, which is started with it and ends with it."""

    def __init__(self, join: int | None = None) -> None:
        self.join = join
        self.detached = False
        """Whether it has been given a container that is to go on without us."""
        scope = _delegated_scope()
        state.check_home()
        try:
            self._start(scope)
        except LauncherDied:
            if not scope:
                raise
            self._start(
                []
            )  # systemd did not give us a group; the launcher's facts tell that limits are missing

    def _start(self, scope: list[str]) -> None:
        join = self.join
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = ours
        self._lock = threading.Lock()
        start = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            f"from labkernel.launcher import main; main({theirs.fileno()}, {join})"
        )
        command = [*scope, sys.executable, "-S", "-c", start]
        with theirs:
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=_where_launchers_complain(),
            )  # fmt: skip
        self.facts: Message = self.ask({"do": "facts"}).answer(STARTED_WITHIN)

    def ask(self, request: Message, fds: Sequence[int] = ()) -> Channel:
        """Send a request; the answers come by the channel that is returned. Raises LauncherDied."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        content = memory_file(pickle.dumps(request))
        try:
            with self._lock, theirs:
                socket.send_fds(self._control, [b"ask"], [theirs.fileno(), content, *fds])
        except (BrokenPipeError, ConnectionResetError):
            ours.close()
            raise LauncherDied("the launcher process has ended") from None
        finally:
            os.close(content)
        return Channel(ours)

    def alive(self) -> bool:
        """Whether the launcher process still runs; a dead one's connection is closed."""
        if self.process.poll() is None:
            return True
        self._control.close()
        return False

    def close(self, timeout: float = 30.0) -> None:
        """Let the launcher end what it runs and tidy up, and wait for it (at most `timeout` seconds)."""
        self._control.close()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def detach(self) -> None:
        """Close the connection without waiting: the launcher stays as long as its detached containers do."""
        self._control.close()
        self.process.returncode = 0  # not ours to wait for any more


class Channel:
    """The answers to one request. Closing it before the last one kills what the request started."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    def message(self, timeout: float | None = None) -> Message | bytes:
        """The next message: one of the launcher's, or bytes that the container's first process sent.

        Raises TimeoutError, LauncherDied.
        """
        return self.message_and_fds(timeout)[0]

    def message_and_fds(self, timeout: float | None = None) -> tuple[Message | bytes, list[int]]:
        """The next message and the descriptors that came with it."""
        self.socket.settimeout(timeout)
        try:
            size = self.socket.recv_into(bytearray(1), 0, socket.MSG_PEEK | socket.MSG_TRUNC)
            data, fds, _, _ = socket.recv_fds(self.socket, size, 4)
        except ConnectionResetError:
            data, fds = b"", []
        if not data:
            raise LauncherDied("the launcher process has ended, and what it ran has ended with it")
        if data.startswith(b"pickle"):
            answer: Message = pickle.loads(data[6:])
            return answer, fds
        return data, fds

    def answer(self, timeout: float | None = None) -> Message:
        """The next message of the launcher; an error that it reports is raised here."""
        message, _ = self.answer_and_fds(timeout)
        assert isinstance(message, dict)
        return message

    def answer_and_fds(self, timeout: float | None = None) -> tuple[Message | bytes, list[int]]:
        """The next message of whoever it is, and its descriptors; an error of the launcher's is raised here."""
        message, fds = self.message_and_fds(timeout)
        if isinstance(message, dict) and "error" in message:
            raise _with_note(message["error"], message.get("traceback", ""))
        return message, fds

    def close(self) -> None:
        """Hang up."""
        self.socket.close()


class Listener(Protocol):
    """Who can be given what a child prints."""

    def write(self, text: str, /) -> object:
        """Take some of it."""

    def flush(self) -> object:
        """Hold nothing back."""


class Child:
    """A function that runs in a child process of the launcher."""

    def __init__(self, channel: Channel, stdout: IO[bytes], stderr: IO[bytes], result: IO[bytes]) -> None:
        self._channel = channel
        self._streams: dict[IO[bytes], Listener] = {stdout: sys.stdout, stderr: sys.stderr}
        self._result = result
        self._decoders = {
            stream: codecs.getincrementaldecoder("utf-8")("replace") for stream in self._streams
        }
        self.pid: int = channel.answer(STARTED_WITHIN)["pid"]
        """The child's pid in our pid namespace."""

    def wait(self, timeout: float | None = None) -> Any:
        """Stream what the child prints, and return its value once it has ended.

        An exception of the child is raised here, with the child's traceback as a note. Raises ChildFailed when it
        was killed or exited with a status other than 0, TimeoutError after `timeout` seconds (the child is killed).
        """
        try:
            raw, status = self._pump(None if timeout is None else time.monotonic() + timeout)
        finally:
            self.close()
        if not raw:
            code = os.waitstatus_to_exitcode(status)
            if code < 0:
                raise ChildFailed(f"the child was killed by {_signal_name(-code)}", 128 - code)
            raise ChildFailed(f"the child ended with exit status {code} and no value", code)
        answer: Message = pickle.loads(raw)
        if "error" in answer:
            raise _with_note(answer["error"], answer["traceback"])
        if answer.get("exit") not in (None, 0) and "value" not in answer:
            raise ChildFailed(
                f"the child ended with exit status {answer['exit']}", os.waitstatus_to_exitcode(status)
            )
        return answer.get("value")

    def send_output(self, target: Listener) -> None:
        """Let what the child prints go to `target`, and not to our own standard output."""
        self._streams[next(iter(self._streams))] = target

    def kill(self) -> None:
        """Kill the child and its process group."""
        self.close()

    def close(self) -> None:
        """Forget the child; it is killed if it still runs."""
        self._channel.close()
        for stream in (*self._streams, self._result):
            stream.close()

    def _pump(self, end: float | None) -> tuple[bytes, int]:
        """Copy output to the cell as it comes, until the launcher says that the child has ended."""
        raw = bytearray()
        status: int | None = None
        with selectors.DefaultSelector() as selector:
            for stream in (*self._streams, self._result):
                selector.register(stream, selectors.EVENT_READ)
            selector.register(self._channel.socket, selectors.EVENT_READ)
            while status is None or selector.get_map():
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError("the child was still running and has been killed")
                # After the child's end only what is in the pipes already is taken: a process that it left
                # behind may hold them open for ever.
                events = selector.select(0 if status is not None else left)
                if status is not None and not events:
                    break
                for key, _ in events:
                    if key.fileobj is self._channel.socket:
                        selector.unregister(key.fileobj)
                        status = self._channel.answer()["status"]
                        continue
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is self._result:
                        raw += data
                    else:
                        target = self._streams[key.fileobj]  # type: ignore[index]
                        target.write(self._decoders[key.fileobj].decode(data))  # type: ignore[index]
                        target.flush()
        return bytes(raw), status


def start_child(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Child:
    """Start `function` in a child of the launcher and return at once.

    For an ordinary user the child is root of a user namespace of the lab's own. The function may be defined in the
    notebook; its value must be picklable.
    """
    import cloudpickle

    pickled = memory_file(cloudpickle.dumps((function, arguments, keywords)))
    pipes = [os.pipe() for _ in range(3)]
    stdin = os.open(os.devnull, os.O_RDONLY)
    theirs = [stdin, *(write for _, write in pipes), pickled]
    try:
        channel = launcher().ask({"do": "child"}, theirs)
    except BaseException:
        for read, _ in pipes:
            os.close(read)
        raise
    finally:
        for fd in theirs:
            os.close(fd)
    stdout, stderr, result = (os.fdopen(read, "rb", buffering=0) for read, _ in pipes)
    return Child(channel, stdout, stderr, result)


def in_child(function: Callable[..., T], *arguments: Any, timeout: float | None = None, **keywords: Any) -> T:
    """Run `function` in a child process: print what it prints, raise what it raises, return what it returns.

    The child may unshare, chroot, mount, or kill itself; this process stays as it is. See `start_child` and
    `Child.wait` for the parameters and errors.
    """
    value: T = start_child(function, *arguments, **keywords).wait(timeout)
    return value


def preload(*modules: str) -> None:
    """Let the launcher import these modules once, for all children that follow: each would else do so itself.

    A child is a copy of the launcher, and the launcher has only what it needs itself. Raises ImportError.
    """
    with contextlib.closing(launcher().ask({"do": "preload", "modules": modules})) as channel:
        channel.answer(STARTED_WITHIN)


_launcher: Launcher | None = None
_launcher_owner = 0
_launcher_lock = threading.Lock()


def launcher() -> Launcher:
    """The launcher of this process, started when it is first needed and again after its death."""
    global _launcher, _launcher_owner
    with _launcher_lock:
        if _launcher is None or _launcher_owner != os.getpid() or not _launcher.alive():
            _launcher, _launcher_owner = Launcher(), os.getpid()
            atexit.register(close_launcher)
        return _launcher


def close_launcher() -> None:
    """End this process's launcher, with everything that it runs, unless some of that was started to be left alone."""
    global _launcher
    if _launcher is not None and _launcher_owner == os.getpid():
        if _launcher.detached:
            _launcher.detach()
        else:
            _launcher.close()
    _launcher = None


def memory_file(content: bytes) -> int:
    """A descriptor of an anonymous file with this content."""
    fd = os.memfd_create("labkernel", os.MFD_CLOEXEC)
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(fd, rest) :]
    return fd


def _with_note(error: BaseException, text: str) -> BaseException:
    if text:
        error.add_note(f"in the child process:\n{text.rstrip()}")
    return error


def _signal_name(number: int) -> str:
    import signal

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _where_launchers_complain() -> int | IO[bytes]:
    """A traceback of the launcher itself would be our own fault; LABKERNEL_DEBUG shows it."""
    return (
        sys.__stderr__.fileno()
        if os.environ.get("LABKERNEL_DEBUG") and sys.__stderr__
        else subprocess.DEVNULL
    )


def _delegated_scope() -> list[str]:
    """How to start the launcher in a control group of its own, where systemd hands them out (v2 only).

    Source: https://systemd.io/CGROUP_DELEGATION/
    """
    unified = os.path.exists("/sys/fs/cgroup/cgroup.controllers")
    if not (unified and os.path.isdir("/run/systemd/system") and shutil.which("systemd-run")):
        return []
    user = ["--user"] if os.geteuid() else []
    unit = f"--unit=labkernel-{secrets.token_hex(6)}.scope"
    return ["systemd-run", *user, "--scope", "--quiet", "--collect", "--property=Delegate=yes", unit, "--"]
