"""Containers, as a notebook handles them: `Container("python", ["python3", "-c", "…"], memory="64M").run()`.

The launcher does the work; here a container is described, checked, started and watched.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import secrets
import selectors
import signal
import subprocess
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, Protocol, Self

from labkernel import children, spec, state
from labkernel.children import Channel
from labkernel.linux import cgroups
from labkernel.linux.cgroups import Cgroup, Limits, Stats
from labkernel.spec import BadOption, Process, Spec, Volume

DEVNULL = subprocess.DEVNULL
DEFAULT_LIMITS = {"memory": "512M", "cpus": 1.0, "pids_limit": 256}
"""What a container may use where nothing else is said: no wall is left out by forgetting it."""

NOFILE = 1024

cgroup_at = cgroups.at


class File(Protocol):
    """An open file, the end of a pipe, or a socket."""

    def fileno(self) -> int:
        """The number of its descriptor."""


class ContainerError(OSError):
    """A container could not be made, or its program could not be prepared; the text says at what."""


@dataclass(frozen=True)
class Completed:
    """How a container ended."""

    returncode: int
    """As the field has it: the exit code, 128 and the signal's number, or 126 and 127 for a program not run."""
    stdout: bytes
    stderr: bytes
    stats: Stats | None
    """What it used in all; None where it had no cgroup."""

    @property
    def oom_killed(self) -> bool:
        """Whether the kernel killed a process of it for the memory limit."""
        return bool(self.stats and self.stats.oom_kills)


class Container:
    """One container. As a context manager it is started on entry, and killed and removed on exit.

    All walls are up unless an argument takes one away: the eight namespaces, pivot_root onto a writable layer over
    the read-only root file system, limits, Docker's default capabilities, the seccomp filter, no_new_privs, masked
    paths, and a network of its own.

    rootfs: the name of an image that `labkernel build` made, or the path of an unpacked one.
    memory, memory_reservation, memory_swap: bytes, or text such as "64M". cpus: cores. pids_limit: processes.
    publish: "8000:80" or "127.0.0.1:8000:80". volumes: "SRC:DST" or "SRC:DST:ro".
    seccomp: "default", "unconfined", or the path of a profile. namespaces: the kinds that are new; the mount
    namespace is always among them. Raises BadOption for a value that cannot be meant, before anything is started.
    """

    def __init__(
        self,
        rootfs: str | os.PathLike[str] = "python",
        command: Sequence[str] = ("python3",),
        *,
        name: str | None = None,
        hostname: str | None = None,
        env: Mapping[str, str] | None = None,
        workdir: str = "/",
        user: str = "0:0",
        memory: str | int | None = None,
        memory_reservation: str | int | None = None,
        memory_swap: str | int | None = None,
        cpus: float | str | None = None,
        cpu_weight: int | None = None,
        cpuset_cpus: str | None = None,
        pids_limit: int | None = None,
        device_read_bps: Mapping[str, str | int] | None = None,
        device_write_bps: Mapping[str, str | int] | None = None,
        publish: Iterable[str] = (),
        volumes: Iterable[str] = (),
        read_only: bool = False,
        network: str = "none",
        cap_drop: Iterable[str] = (),
        cap_add: Iterable[str] = (),
        seccomp: str = "default",
        no_new_privs: bool = True,
        namespaces: Iterable[str] = spec.NAMESPACES,
        masked_paths: bool = True,
        tty: bool = False,
        remove: bool = True,
        detach: bool = False,
    ) -> None:
        self.image = os.fspath(rootfs)
        given = {
            "memory": memory, "memory_reservation": memory_reservation, "memory_swap": memory_swap, "cpus": cpus,
            "cpu_weight": cpu_weight, "cpuset_cpus": cpuset_cpus, "pids_limit": pids_limit,
            "device_read_bps": device_read_bps, "device_write_bps": device_write_bps,
        }  # fmt: skip
        asked: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        defaults = {key: value for key, value in _defaults().items() if key not in asked}
        ours = _default_limits(frozenset(defaults))
        limits = spec.make_limits(**(defaults | asked)) if asked else ours
        identity = secrets.token_hex(6)
        self.name = _checked_name(name) if name else identity
        command = _checked_command(command)
        environment = _checked_environment(env or {})
        if not workdir.startswith("/") or "\0" in workdir:
            raise BadOption(f"--workdir {workdir!r}: give an absolute path inside")
        kinds = frozenset(namespaces)
        if not {"mnt", "pid"} <= kinds <= set(spec.NAMESPACES):
            raise BadOption(
                f"namespaces {sorted(kinds)}: choose among {spec.NAMESPACES}; mnt and pid are always needed"
            )
        if network not in spec.NETWORKS:
            raise BadOption(f"--network {network!r}: choose one of {', '.join(spec.NETWORKS)}")
        publish = tuple(publish)
        if network == "bridge" and "net" not in kinds:  # the cable would end in the host's network
            raise BadOption("--network 'bridge': it takes a network namespace, so 'net' among the namespaces")
        if publish and (network == "host" or "net" not in kinds):
            raise BadOption(
                f"--publish {publish[0]!r}: in the host's network every port is the host's already"
            )
        kept = _capabilities(cap_drop, cap_add)
        process = Process(
            command=command,
            environment={"PATH": spec.PATH, "HOME": "/root", "HOSTNAME": hostname or identity, **environment},
            workdir=workdir,
            user=user,
            tty=tty,
            capabilities=kept,
            seccomp=_program(seccomp, kept),
            no_new_privs=no_new_privs,
            init_too=seccomp in ("default", "unconfined"),
            rlimits=((resource.RLIMIT_NOFILE, NOFILE), (resource.RLIMIT_CORE, 0)),
        )
        self.spec = Spec(
            id=identity,
            name=self.name,
            rootfs="",
            process=process,
            hostname=_checked_hostname(hostname) if hostname else identity,
            limits=limits,
            limits_required=frozenset(limits.given()) - set(ours.given()) if asked else frozenset(),
            read_only=read_only,
            volumes=tuple(Volume.parse(text) for text in volumes),
            network=network,
            publish=publish,
            namespaces=kinds - {"net"} if network == "host" else kinds,
            masked_paths=masked_paths,
            remove=remove,
            detach=detach,
        )
        _check_publish(self.spec.publish)
        self._channel: Channel | None = None
        self._cgroup: Cgroup | None = None
        self._ended: children.Message | None = None
        self.pid: int | None = None
        """The pid of the container's init in our pid namespace, once it is started."""
        self.terminal: int | None = None
        """With tty: the outer end of the container's terminal."""
        self.listener: int | None = None
        """Where its program's calls are told, if it is observed (see `labkernel.observe`)."""

    # ------------------------------------------------------------------ life

    def start(
        self, stdin: int | File = DEVNULL, stdout: int | File | None = None, stderr: int | File | None = None
    ) -> Self:
        """Start the container and return when its walls are up and its program is about to run.

        Its streams are descriptors, what has one (a file, a socket), or DEVNULL. With none given, what the program
        prints goes to the container's log, see `logs`. Raises ContainerError, CgroupUnavailable, ValueError for
        something else as a stream, or the OSError of the system call that failed.
        """
        if self._channel:
            raise RuntimeError("this container has been started already; make another")
        rootfs = _rootfs(self.image)
        self.spec = self.spec._replace(rootfs=rootfs)
        launcher = children.launcher()
        with contextlib.ExitStack() as closing:
            fds = [_opened(stdin, os.O_RDONLY, closing)]
            fds += [_opened(DEVNULL if fd is None else fd, os.O_WRONLY, closing) for fd in (stdout, stderr)]
            request = {
                "do": "container", "spec": self.spec, "image": self.image,
                "logged": [number for number, fd in ((1, stdout), (2, stderr)) if fd is None],
            }  # fmt: skip
            self._channel = launcher.ask(request, fds)
        launcher.detached = launcher.detached or self.spec.detach
        try:
            self._until_ready()
        except BaseException:
            self._channel.close()
            self._end(self._ended or {"status": 125, "stats": None})
            for fd in (self.terminal, self.listener):
                if fd is not None:
                    os.close(fd)
            self.terminal = self.listener = None
            raise
        return self

    def run(self, input: bytes | None = None, timeout: float | None = None) -> Completed:
        """Start the container, feed it `input`, and wait for its end; its output is returned.

        Raises what `start` raises, and TimeoutError after `timeout` seconds (the container is killed and removed).
        """
        pipes = [os.pipe() for _ in range(2)]
        stdin = DEVNULL if input is None else children.memory_file(input)
        if input is not None:
            os.lseek(stdin, 0, os.SEEK_SET)
        end = None if timeout is None else time.monotonic() + timeout
        try:
            try:
                self.start(stdin, pipes[0][1], pipes[1][1])
            finally:
                for fd in (pipes[0][1], pipes[1][1], *([stdin] if input is not None else [])):
                    os.close(fd)
            output = _read_all([read for read, _ in pipes], end)
            code = self.wait(None if end is None else max(0.0, end - time.monotonic()))
        except BaseException:
            self.kill()
            raise
        finally:
            for read, _ in pipes:
                os.close(read)
        return Completed(code, output[0], output[1], self.final_stats)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the container's end and return its exit status.

        Raises TimeoutError (the container goes on), and ContainerError where its filter of system calls was refused.
        """
        if self._ended is None:
            if self._channel is None:
                raise RuntimeError("this container has not been started")
            try:
                message, _ = self._channel.answer_and_fds(timeout)
                if isinstance(message, bytes):  # its last step has failed: the filter of system calls
                    self._failure = message
                    message = self._channel.answer(children.STARTED_WITHIN)
                self._end(message)
            except children.LauncherDied:  # and the container with it
                self._channel.close()
                self._end({"status": 128 + signal.SIGKILL, "stats": None})
                raise
            self._channel.close()
        if self._failure:
            _, number, text = self._failure.decode().split(" ", 2)
            raise ContainerError(int(number), f"the container could not be made: {text}")
        assert self._ended
        return int(self._ended["status"])

    def stop(self, timeout: float = 10.0) -> int:
        """Ask the program to end (SIGTERM), and kill the container after `timeout` seconds; its exit status."""
        self.signal(signal.SIGTERM)
        try:
            return self.wait(timeout)
        except TimeoutError:
            return self.kill()

    def kill(self) -> int:
        """Kill every process of the container, and wait until it is removed; its exit status (137).

        Removed means: no process, no group, no name, no directory. What the program has written is out of sight, and
        leaves the disk when the launcher has nothing else to do, or makes the next container.
        """
        if self.pid and self._ended is None and self._channel:
            self.signal(signal.SIGKILL)
            if self._cgroup:
                with contextlib.suppress(OSError):
                    self._cgroup.thaw()  # frozen processes of cgroup v1 do not even die
            with contextlib.suppress(children.LauncherDied, ContainerError):
                return self.wait(children.STARTED_WITHIN)
        return int(self._ended["status"]) if self._ended else 128 + signal.SIGKILL

    def signal(self, number: int) -> None:
        """Send a signal to the program, by way of the container's init."""
        if self._ended is None and self._pidfd is not None:  # the pid may be somebody else's by now
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def running(self) -> bool:
        """Whether the container has been started and has not ended."""
        if self._channel is None or self._ended is not None:
            return False
        try:
            self.wait(0)
        except (TimeoutError, BlockingIOError):
            return True
        except (children.LauncherDied, ContainerError):
            return False
        return False

    def pause(self) -> None:
        """Stop all processes of the container where they are (cgroup.freeze). Raises CgroupUnavailable."""
        self.cgroup.freeze()

    def unpause(self) -> None:
        """Let a paused container go on."""
        self.cgroup.thaw()

    # ------------------------------------------------------------------ looking and acting inside

    def exec(
        self, command: Sequence[str], *, input: bytes | None = None, timeout: float | None = None,
        user: str | None = None, env: Mapping[str, str] | None = None, workdir: str | None = None,
    ) -> Completed:  # fmt: skip
        """Run one more program inside, behind the same walls, and wait for its end. Raises as `run` does."""
        process = self.spec.process._replace(
            command=_checked_command(command),
            tty=False,
            environment={**self.spec.process.environment, **_checked_environment(env or {})},
            user=self.spec.process.user if user is None else user,
            workdir=self.spec.process.workdir if workdir is None else workdir,
        )
        record = state.find(self.spec.id)
        return run_inside(children.launcher(), record, process, input, timeout)

    def stats(self) -> Stats:
        """What the container has used until now; after its end, what it used in all. Raises CgroupUnavailable."""
        return self.final_stats or self.cgroup.stats()

    @property
    def final_stats(self) -> Stats | None:
        """What the container had used when it ended; None before, and where it had no cgroup."""
        return self._ended.get("stats") if self._ended else None

    @property
    def cgroup(self) -> Cgroup:
        """The container's control group. Raises CgroupUnavailable where it has none."""
        if self._cgroup is None:
            from labkernel.linux.cgroups import CgroupUnavailable

            raise CgroupUnavailable(f"container {self.name} has no control group on this machine")
        return self._cgroup

    def set_limits(self, **limits: Any) -> list[tuple[str, str]]:
        """Change limits while the container runs, named as in the constructor; what was written: (file, text)."""
        return self.cgroup.set(spec.make_limits(**limits))

    @property
    def limits(self) -> Limits:
        """The limits with which the container was started."""
        return self.spec.limits

    def logs(self) -> bytes:
        """What the program has printed, where its output goes to the log; nothing once the container is removed."""
        with contextlib.suppress(FileNotFoundError):
            return (self.spec.directory / "log").read_bytes()
        return self._last_log

    # ------------------------------------------------------------------ inner parts

    _last_log = b""
    _failure = b""
    _pidfd: int | None = None
    """Of its init: a pid alone may be somebody else's as soon as the launcher has reaped it."""

    _close_pidfd: weakref.finalize[..., Any] | None = None

    def __enter__(self) -> Self:
        return self if self._channel else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._last_log = self.logs()
        self.kill()

    def __repr__(self) -> str:
        return f"Container({self.image!r}, {list(self.spec.process.command)!r}, name={self.name!r})"

    def _end(self, message: children.Message) -> None:
        self._ended, self._pidfd = message, None
        if self._close_pidfd:
            self._close_pidfd()

    def _until_ready(self) -> None:
        """Read what the launcher and the container say, until we know its pid and its program is about to run."""
        assert self._channel
        ready, failure = False, b""
        while not (ready and self.pid):
            try:
                message, fds = self._channel.answer_and_fds(children.STARTED_WITHIN)
            except (children.LauncherDied, OSError):
                if not failure:  # else the launcher has found out what the container has told us already
                    raise
                message = {"status": 125, "stats": None}
            if message == b"ready":
                ready = True
            elif message == b"tty":
                self.terminal = fds[0]
            elif message == b"listener":
                self.listener = fds[0]
            elif isinstance(message, bytes):
                failure = message
            elif "pid" in message:
                self.pid, self._cgroup = message["pid"], cgroup_at(message["cgroup"])
                with contextlib.suppress(ProcessLookupError):  # it has ended already
                    self._pidfd = os.pidfd_open(self.pid)
                    self._close_pidfd = weakref.finalize(self, os.close, self._pidfd)
            elif not failure:
                self._ended = message
                raise ContainerError(
                    f"the container ended with status {message['status']} before its program ran"
                )
            else:
                self._ended = message
                _, number, text = failure.decode().split(" ", 2)
                if int(number) == errno.ENOSPC:
                    text += f": its files are below {state.home()} (LABKERNEL_HOME names another place)"
                raise ContainerError(int(number), f"the container could not be made: {text}")
        self._failure = failure  # of the last step, if it was quicker than the launcher's word of the pid


def run_inside(
    launcher: children.Launcher,
    record: Mapping[str, Any],
    process: Process,
    input: bytes | None,
    timeout: float | None,
) -> Completed:
    """Run `process` in the container of `record` and collect its output."""
    pipes = [os.pipe() for _ in range(2)]
    stdin = os.open(os.devnull, os.O_RDONLY) if input is None else children.memory_file(input)
    if input is not None:
        os.lseek(stdin, 0, os.SEEK_SET)
    end = None if timeout is None else time.monotonic() + timeout
    theirs = [stdin, pipes[0][1], pipes[1][1]]
    try:
        channel = launcher.ask({"do": "exec", "record": dict(record), "process": process}, theirs)
    finally:
        for fd in theirs:
            os.close(fd)
    try:
        channel.answer(children.STARTED_WITHIN)
        output = _read_all([read for read, _ in pipes], end)
        message: Any = b""
        while not isinstance(message, dict):
            message = channel.message(None if end is None else max(0.0, end - time.monotonic()))
            if isinstance(message, bytes) and message.startswith(b"failed "):
                _, number, text = message.decode().split(" ", 2)
                raise ContainerError(int(number), text)
    finally:
        channel.close()
        for read, _ in pipes:
            os.close(read)
    return Completed(message["status"], output[0], output[1], None)


def _read_all(fds: list[int], end: float | None) -> list[bytes]:
    """Read several pipes to their ends. Raises TimeoutError at the time `end`."""
    found = {fd: bytearray() for fd in fds}
    with selectors.DefaultSelector() as selector:
        for fd in fds:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map():
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError("the program was still running and has been killed")
            for key, _ in selector.select(left):
                data = os.read(key.fd, 1 << 16)
                if data:
                    found[key.fd] += data
                else:
                    selector.unregister(key.fd)
    return [bytes(found[fd]) for fd in fds]


@cache
def _defaults() -> dict[str, Any]:
    """Our default limits, as far as this machine is large enough for them."""
    small = spec.machine_memory() < spec.parse_size(str(DEFAULT_LIMITS["memory"]), "--memory")
    return {key: value for key, value in DEFAULT_LIMITS.items() if not (small and key == "memory")}


@cache
def _default_limits(options: frozenset[str]) -> Limits:
    """What our defaults for these options come to."""
    return spec.make_limits(**{key: value for key, value in _defaults().items() if key in options})


def _opened(stream: int | File, flags: int, closing: contextlib.ExitStack) -> int:
    """The descriptor of a stream, as `start` is given it."""
    fd = stream if isinstance(stream, int) else stream.fileno()
    if fd >= 0:
        return fd
    if fd != DEVNULL:
        raise ValueError(
            f"{fd} is no stream: give a descriptor or a file; for a pipe, the end of one by os.pipe()"
        )
    null = os.open(os.devnull, flags)
    closing.callback(os.close, null)
    return null


def _checked_command(command: Sequence[str]) -> tuple[str, ...]:
    words = () if isinstance(command, str | bytes) else tuple(command)
    if not words or not words[0] or not all(isinstance(word, str) and "\0" not in word for word in words):
        raise BadOption(f"command {command!r}: give the program and its arguments as a list of texts")
    return tuple(map(_plain, words))


def _plain(text: str) -> str:
    """The text alone, of whatever class it is: containers' first processes know no other than str."""
    return str.__str__(text)


def _checked_environment(env: Mapping[str, str]) -> dict[str, str]:
    for name, value in env.items():
        texts = isinstance(name, str) and isinstance(value, str) and name
        if not texts or "=" in name or "\0" in name + value:
            raise BadOption(
                f"--env {name!r}={value!r}: give texts; a name has no '=' in it, and neither has a zero byte"
            )
    return {_plain(name): _plain(value) for name, value in env.items()}


def _checked_name(name: str) -> str:
    import re

    if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}", name):
        raise BadOption(f"--name {name!r}: use letters, digits, and _ . - (at most 63 characters)")
    with contextlib.suppress(state.NoSuchContainer):
        if state.find(name)["name"] == name:
            raise BadOption(
                f"--name {name!r}: there is a container of that name already; labkernel rm {name} removes it"
            )
    return name


def _checked_hostname(name: str) -> str:
    import re

    if not re.fullmatch(r"[a-zA-Z0-9]([a-zA-Z0-9.-]{0,61}[a-zA-Z0-9])?", name):
        raise BadOption(f"--hostname {name!r}: use letters, digits, dots and hyphens (at most 63 characters)")
    return name


def _check_publish(texts: Sequence[str]) -> None:
    if not texts:
        return
    from labkernel.relay import parse_publish

    for text in texts:
        try:
            parse_publish(text)
        except ValueError as error:
            raise BadOption(f"--publish {text!r}: {error}") from None


def _capabilities(drop: Iterable[str], add: Iterable[str]) -> frozenset[int]:
    """Docker's default set, less `drop`, plus `add`; ALL is every one."""
    from labkernel.linux import capabilities

    try:
        return frozenset(capabilities.docker_set(add, drop))
    except ValueError as error:
        raise BadOption(f"--cap-drop, --cap-add: {error}") from None


def _program(profile: str, kept: frozenset[int]) -> bytes | None:
    """The seccomp program for a profile, compiled once for each set of capabilities."""
    if profile == "unconfined":
        return None
    from labkernel.linux import seccomp

    try:
        return seccomp.compiled(profile, kept)
    except FileNotFoundError as error:
        if profile == "default":  # libseccomp is missing: the option is not what is wrong
            raise
        raise BadOption(
            f"--security-opt seccomp={profile}: {error.strerror}; give unconfined, or a profile's path"
        ) from None


def _rootfs(image: str) -> str:
    """The directory of an image's root file system, unpacked when it is first needed."""
    from labkernel.images import rootfs

    return str(rootfs(image))
