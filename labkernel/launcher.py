"""The one process that starts children and containers, watches them, and cleans up after them.

It is small and has a single thread, so that it can `clone3` quickly and safely: forking a notebook's kernel, with
its threads and its memory, would be neither. It is told what to do over a socket; when that socket closes, because
the notebook ended in whatever way, it kills what it started and removes what it made.

Each request comes with a socket of its own, its *channel*: the answers go there, and when the asker closes it early,
the child is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import pickle
import select
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

from labkernel import cleanup, empty, state, walls
from labkernel.linux import capabilities, cgroups, mounts, namespaces, syscalls, users
from labkernel.processes import end_now, fork, kill
from labkernel.spec import Order, Process, Spec, Volume

Message = dict[str, Any]

SLICE = 0.1
"""Seconds that removing what was thrown away takes at first, while nobody asks for anything."""

QUIET = 0.005
"""Seconds without anything to do after which we tidy up, and make an empty container for the next one."""


class Child(NamedTuple):
    """A process that the launcher started, and what has to be done when it ends."""

    pid: int
    pidfd: int
    channel: socket.socket
    at_end: Callable[[int], Message]
    """Given the wait status: tidies up, and makes the last message."""
    killers: list[Callable[[], None]]
    keep_after_hangup: bool = False
    afterwards: Callable[[], None] = lambda: None
    """What remains to be done when the last message has been sent."""


class Running(NamedTuple):
    """A container that runs: what `at_end` needs to take it down."""

    spec: Spec
    record: Message
    group: cgroups.Cgroup | None
    relay: tuple[int, int] | None = None
    """pid and pidfd of the process that carries its published ports."""


class Launcher:
    """State and loop of the launcher process."""

    def __init__(self, control: socket.socket, no_containers: str = "") -> None:
        self.control: socket.socket | None = control
        self.no_containers = no_containers
        self.id_maps = users.own_map()
        self.container_map = users.container_map(self.id_maps)
        if os.geteuid() == 0:  # of the machine, or of a user namespace: ours, or one that we were started in
            try:
                _own_mounts()
            except OSError as error:
                self.no_containers = error.strerror or str(error)
        self.parent, self.no_cgroup = _cgroup_parent()
        self.key = state.ProcessKey.of(os.getpid())
        self.poll = select.epoll()
        self.children: dict[int, Child] = {}  # by pidfd, and by the channel's descriptor
        self.detached = False
        self.ending = False
        self.network_helper: Any = None
        self.spare: empty.Empty | None = None
        self.chores: list[Callable[[], None]] = []
        """What can wait until there is nothing else to do."""
        self.last: Message = {}
        """The last request for a container."""
        self.containers = str(state.containers())
        self.ended, self.made_in = str(state.ended(os.getpid())), str(state.spare(os.getpid()))
        self.poll.register(control, select.EPOLLIN)
        self.wakeup, signal_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.poll.register(self.wakeup, select.EPOLLIN)
        signal.set_wakeup_fd(signal_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._told_to_end)

    def run(self) -> None:
        """Serve until the control socket closes and, if told to detach, the last container has ended."""
        try:
            while not self.ending and (self.control or (self.detached and self.children)):
                events = self.poll.poll(QUIET if self.chores and self.control else None)
                if not events:
                    with contextlib.suppress(OSError):
                        self.chores.pop(0)()
                for fd, _ in events:
                    if fd in self.children:
                        self._child_event(fd)
                    elif self.control and fd == self.control.fileno():
                        self._control_event(self.control)
                    elif fd == self.wakeup:
                        with contextlib.suppress(BlockingIOError):
                            os.read(self.wakeup, 4096)
                self._reap_adopted()
        finally:
            self._kill_everything()

    def _told_to_end(self, *_: object) -> None:
        """Not at once: what is half begun would be forgotten. The loop wakes up by the same signal."""
        self.ending = True

    def _control_event(self, control: socket.socket) -> None:
        data, fds = walls.received(control, 64)
        if not data:
            self.poll.unregister(control)
            control.close()
            self.control = None
            return
        channel = socket.socket(fileno=fds[0])
        try:
            request: Message = pickle.loads(_contents(fds[1]))
            getattr(self, f"do_{request['do']}")(request, channel, fds[1:])
        except Exception as error:
            _send(channel, _described(error))
            channel.close()
        finally:
            for fd in fds[1:]:
                os.close(fd)

    def _child_event(self, fd: int) -> None:
        child = self.children[fd]
        if fd != child.pidfd:  # the asker hung up
            self.poll.unregister(fd)
            del self.children[fd]
            if not child.keep_after_hangup:
                _run_all(child.killers)
            return
        _, status = os.waitpid(child.pid, 0)
        self.poll.unregister(child.pidfd)
        del self.children[child.pidfd]
        try:
            message = child.at_end(status)
        except OSError as error:
            message = {"status": walls.exit_status(status), "trouble": str(error)}
        _send(child.channel, message)
        if self.children.pop(child.channel.fileno(), None):
            self.poll.unregister(child.channel)
        child.channel.close()
        os.close(child.pidfd)
        child.afterwards()

    def _watch(self, child: Child) -> None:
        for fd in (child.pidfd, child.channel.fileno()):
            self.children[fd] = child
        self.poll.register(child.pidfd, select.EPOLLIN)
        self.poll.register(child.channel, 0)  # 0: only hang-ups

    def _reap_adopted(self) -> None:
        """Reap orphans that came to us as their subreaper: a pid namespace ends only when all of it is reaped."""
        ours = {child.pid for child in self.children.values()}
        with contextlib.suppress(ChildProcessError):
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if ended.si_pid in ours:
                    return  # its pidfd tells in a moment, and then we come here again
                os.waitpid(ended.si_pid, 0)

    # ------------------------------------------------------------------ requests

    def do_facts(self, _: Message, channel: socket.socket, __: list[int]) -> None:
        """Tell what this launcher has to work with: the doctor's question."""
        maps = self.container_map
        facts = {
            "id_maps": [entry._asdict() for entry in self.id_maps],
            "container_map": maps[0]._asdict() | {"count": sum(entry.count for entry in maps)},
            "cgroup_version": self.parent.version if self.parent else None,
            "controllers": sorted(self.parent.controllers) if self.parent else [],
            "no_cgroup": self.no_cgroup,
            "no_containers": self.no_containers,
        }
        _send(channel, facts)
        channel.close()

    def do_preload(self, request: Message, channel: socket.socket, _: list[int]) -> None:
        """Import modules here, so that no child that follows has to do it for itself."""
        _preload(*request["modules"])
        _send(channel, {})
        channel.close()

    def do_child(self, _: Message, channel: socket.socket, fds: list[int]) -> None:
        """Run a pickled function in a plain child."""
        _preload("cloudpickle")  # not earlier: containers copy all that we have, and do without it
        stdin, stdout, stderr, result, function = fds[1:]

        def child() -> NoReturn:
            os.setpgid(0, 0)
            walls.keep_only(fds[1:])
            syscalls.block_signals(0)
            _run_function((stdin, stdout, stderr), result, _contents(function))

        pid, pidfd = fork(child)
        _send(channel, {"pid": pid})
        killers = [lambda: _kill_group(pid), lambda: kill(pidfd)]

        def at_end(status: int) -> Message:
            cleanup.remove_groups_of_child(pid, self.parent)
            return {"status": status}

        self._watch(Child(pid, pidfd, channel, at_end, killers))

    def do_container(self, request: Message, channel: socket.socket, fds: list[int]) -> None:
        """Start a container from its specification."""
        spec: Spec = request["spec"]
        if self.no_containers and "user" in spec.namespaces:
            raise PermissionError(errno.EPERM, self.no_containers)
        self.last = request
        directory = self._directory(spec)
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as closing:
            limits, listeners = self._limits(spec), _listeners(spec, closing)
            undo.callback(cleanup.remove_tree, directory)
            undo.callback(state.free_name, spec.name, spec.id)
            vessel = self._take_spare(spec, limits)
            if vessel:
                undo.callback(cleanup.remove_tree, self.made_in)
                undo.callback(vessel.end)
                # First of all: what it does with the order takes as long as what is left for us.
                order = self._order(request, self.made_in, channel, fds, closing)
                with vessel.elsewhere():
                    vessel.give(order)
            record = self._record(request)
            # Where no port of the host was named, the kernel has chosen one.
            record["publish"] = [one.text(listener.getsockname()[1]) for one, listener in listeners]
            if vessel:
                vessel.limit(limits)
                record |= _running(vessel, limits)
                with _explained_home():
                    state.write_record(self.made_in, record)
                    self._move_in(spec, directory)
            else:
                self._sweep()
                record["group"] = state.PREFIX + spec.id
                with _explained_home(), _holding_containers():
                    os.mkdir(directory)
                    state.take_name(spec.name, spec.id)
                    state.write_record(directory, record)  # before anything that it names
                vessel = self._make_empty(spec, directory, record["group"], limits)
                undo.callback(vessel.end)
                vessel.give(self._order(request, directory, channel, fds, closing))
                record |= _running(vessel, limits)
                with _explained_home():
                    state.write_record(directory, record)
            pid, group = vessel.pid, vessel.group
            relay = None
            if listeners:
                relay = _start_relay(listeners, pid)
                undo.callback(os.close, relay[1])
                undo.callback(end_now, *relay)
            if spec.network == "bridge":
                self._network().attach(pid, spec.id, spec.name)
                undo.callback(self._detach, spec.id)
            killers = [lambda: kill(vessel.pidfd), *([lambda: _thaw(group)] if group else [])]
            vessel.go()  # before the asker is told anything: he would take the processor from it
            undo.pop_all()
        running = Running(spec, record, group, relay)
        _send(channel, {"pid": pid, "cgroup": record["cgroup"]})
        self.detached = self.detached or spec.detach
        self._watch(
            Child(
                pid, vessel.pidfd, channel, lambda status: self._ended(running, status), killers, spec.detach,
                afterwards=lambda: os.close(vessel.mounts),
            )
        )  # fmt: skip

    def do_exec(self, request: Message, channel: socket.socket, fds: list[int]) -> None:
        """Run one more program in a container that runs."""
        record, process = request["record"], request["process"]
        stdin, stdout, stderr = fds[1:]
        _open_up_pipes(fds[1:])
        go_read, go_write = os.pipe()

        def child() -> NoReturn:
            walls.keep_only((channel.fileno(), go_read, stdin, stdout, stderr))
            if not os.read(
                go_read, 1
            ):  # the launcher is gone, and whoever asked is told so by the channel's end
                os._exit(walls.SET_UP_FAILED)
            os.umask(empty.UMASK)
            _enter_and_run(record, process, channel, (stdin, stdout, stderr))

        try:
            pid, pidfd = fork(child)
            _send(channel, {"pid": pid})
            os.write(go_write, b"g")
        finally:
            os.close(go_read)
            os.close(go_write)
        status_of = walls.exit_status
        self._watch(
            Child(
                pid,
                pidfd,
                channel,
                lambda status: {"status": status_of(status)},
                [lambda: _ask_to_end(pidfd)],
            )
        )

    def do_clean(self, _: Message, channel: socket.socket, __: list[int]) -> None:
        """Remove what launchers that were killed have left behind."""
        _send(channel, {"removed": cleanup.clean(self.parent)})
        channel.close()

    def do_remove(self, request: Message, channel: socket.socket, __: list[int]) -> None:
        """Remove a container that has ended: its writable layer, log and record."""
        _send(channel, {"removed": cleanup.remove_leftovers(request["record"], self.parent)})
        channel.close()

    # ------------------------------------------------------------------ parts of a container's life

    def _limits(self, spec: Spec) -> cgroups.Limits:
        """The limits that are set: all but those defaults of ours that cannot be had."""
        lacking = self.parent.lacking(spec.limits) if self.parent else list(spec.limits.given())
        if refused := [name for name in lacking if name in spec.limits_required]:
            missing = dict.fromkeys(cgroups.CONTROLLERS[name] for name in refused)
            raise cgroups.CgroupUnavailable(
                errno.ENOTSUP,
                f"limits are asked for ({', '.join(refused)}) that cannot be set here: "
                + (self.no_cgroup or f"the controllers {', '.join(missing)} are not handed to us"),
            )
        if not lacking:
            return spec.limits
        none = cgroups.Limits()
        return spec.limits._replace(**{name: getattr(none, name) for name in lacking})

    def _record(self, request: Message) -> Message:
        """What is written down of a container before it is made."""
        spec: Spec = request["spec"]
        return {
            "id": spec.id, "name": spec.name, "state": "created", "created": time.time(), "image": request["image"],
            "command": list(spec.process.command), "launcher": self.key._asdict(),
            "publish": list(spec.publish), "remove": spec.remove, "network": spec.network,
            "process": spec.process.as_record(), "namespaces": sorted(spec.namespaces),
        }  # fmt: skip

    def _directory(self, spec: Spec) -> str:
        return f"{self.containers}/{spec.id}"

    def _id_maps(self, spec: Spec) -> tuple[users.IdMap, ...]:
        return self.container_map if "user" in spec.namespaces else ()

    def _order(
        self, request: Message, directory: str,
        channel: socket.socket, fds: list[int], closing: contextlib.ExitStack,
    ) -> Order:  # fmt: skip
        with _explained_home():
            return _order(request, directory, self._id_maps(request["spec"]), channel, fds, closing)

    def _make_empty(self, like: Spec, directory: str, name: str, limits: cgroups.Limits) -> empty.Empty:
        with _explained_home():
            return empty.make(like, directory, self._id_maps(like), self.parent, name, limits)

    def _take_spare(self, spec: Spec, limits: cgroups.Limits) -> empty.Empty | None:
        """The empty container that was made in advance, where this one is like the last."""
        spare = self.spare
        if spare is None or spec.limits.cpuset_cpus or not spare.fits(spec):
            return None
        if spare.limits != limits and not spare.limits.given().keys() <= limits.given().keys():
            return None  # one would have to be taken away again
        self.spare = None
        return spare

    def _move_in(self, spec: Spec, directory: str) -> None:
        """Let what an empty container was made in be the directory of this one.

        It has a record already, so nobody takes it for one that was left behind. But a name is held by a directory.
        """
        with contextlib.ExitStack() as holding:
            if spec.name != spec.id or not os.path.isdir(self.containers):
                holding.enter_context(_holding_containers())
                state.take_name(spec.name, spec.id)
            os.rename(self.made_in, directory)

    def _make_spare(self) -> None:
        """Make an empty container for the next one; where that fails, the next one will say why.

        Not on a root file system of the reader's own: the reader may change it, and overlay forbids that beneath it.
        """
        like: Spec = self.last["spec"]
        if self.spare and self.spare.fits(like):
            return
        self._end_spare()
        if not like.rootfs.startswith(f"{state.home()}/"):
            return
        directory, name = self.made_in, state.PREFIX + _random_name()
        with contextlib.suppress(OSError), contextlib.ExitStack() as undo:
            undo.callback(cleanup.remove_tree, directory)
            os.mkdir(directory)
            state.write_group(directory, name)  # before it is made
            spare = self._make_empty(like, directory, name, cgroups.Limits())
            undo.callback(spare.end)
            state.write_group(directory, f" {spare.pid}")
            # To make a file takes longer than to write it: where many were removed lately, ext4 looks at each of them.
            os.close(state.open_record(directory, "running"))
            undo.pop_all()
            self.spare = spare
            self.chores.append(lambda: self._rehearse(spare))

    def _rehearse(self, spare: empty.Empty) -> None:
        """Do what the next start will take: until we write to it, our memory is shared with those just made, and
        to get a page of one's own takes longer than to use it."""
        request: Message = pickle.loads(pickle.dumps(self.last))
        spec: Spec = request["spec"]
        if self.spare is not spare or not spare.fits(spec):
            return
        limits = self._limits(spec)
        if not (limits.cpuset_cpus or limits.read_bps or limits.write_bps):  # for the rest see `_take_spare`
            spare.limit(limits)
        if spare.group:
            spare.group.stats()
            spare.group.pids()
        with contextlib.ExitStack() as closing:
            _listeners(spec._replace(publish=()), closing)
            json.dumps(self._record(request) | _running(spare, limits))

    def _end_spare(self) -> None:
        if self.spare:
            self.spare.end()
            self.spare = None
        cleanup.remove_spare(state.spare(os.getpid()), self.parent)

    def _ended(self, running: Running, status: int) -> Message:
        """Remove what the container was made of, and say how it ended and what it used."""
        spec, group, directory = running.spec, running.group, self._directory(running.spec)
        self.chores = [self._sweep, self._make_spare]
        if running.relay:
            end_now(*running.relay)
            os.close(running.relay[1])
        if spec.network == "bridge" and self.network_helper:
            self._detach(spec.id)
        message: Message = {"status": walls.exit_status(status), "stats": group.stats() if group else None}
        if group:
            if group.pids():  # all died with their pid 1; only what was sent in from outside may be left
                group.kill()
            group.remove()
        if spec.remove:
            state.free_name(spec.name, spec.id)
            self._throw_away(directory)
        else:
            record = running.record | {"state": "exited", "exit_code": message["status"]}
            state.write_record(directory, record)
            self._throw_away(f"{directory}/work")
        return message

    def _throw_away(self, directory: str) -> None:
        """Put a directory where it will be removed: that takes as long as the disk wants, and nobody waits for it.

        The first one becomes that place, and those that follow are put into it.
        """
        try:
            try:
                os.rename(directory, self.ended)
            except OSError:
                os.rename(directory, f"{self.ended}/{_random_name()}")
        except OSError:  # a full disk may have no room for the rename, but it has for this
            cleanup.remove_tree(directory, cleanup.PATIENCE)

    def _sweep(self, seconds: float = SLICE) -> None:
        """Remove what was thrown away. Where that takes long, requests come first, and then we have more time."""
        if not cleanup.remove_tree(self.ended, seconds):
            self.chores.append(lambda: self._sweep(min(2 * seconds, cleanup.PATIENCE)))

    def _network(self) -> Any:
        """The lab's own network, made when the first container is attached to it."""
        if self.network_helper is None:
            from labkernel.lab_network import Helper

            self.network_helper = Helper()
        return self.network_helper

    def _detach(self, identity: str) -> None:
        with contextlib.suppress(OSError):
            self.network_helper.detach(identity)

    def _kill_everything(self) -> None:
        """The end: kill all children, tidy up after each, and after orphans that they left to us."""
        for fd, child in list(self.children.items()):
            if fd == child.pidfd:
                _run_all(child.killers)
        while pidfds := [fd for fd, child in self.children.items() if fd == child.pidfd]:
            for fd, _ in self.poll.poll(1.0):
                if fd in pidfds:
                    self._child_event(fd)
            self._reap_adopted()
        self._end_spare()  # also one that we were told to end amid
        cleanup.remove_tree(self.ended, cleanup.PATIENCE)
        if self.network_helper:
            self.network_helper.close()
        cleanup.end_session(os.getpid())
        cleanup.remove_groups_of_ended_children(self.parent)


# ---------------------------------------------------------------------- in children


def _run_function(stdio: tuple[int, int, int], result: int, pickled: bytes) -> NoReturn:
    """Call the function with the cell's standard streams, send back what it returns or raises, and end."""
    import cloudpickle

    for target, fd in enumerate(stdio):
        os.dup2(fd, target)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1, closefd=False)
    code = 0
    try:
        function, arguments, keywords = pickle.loads(pickled)
        answer: Message = {"value": function(*arguments, **keywords)}
    except SystemExit as end:
        answer = {"exit": end.code}
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        answer, code = _described(error), 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        with os.fdopen(result, "wb") as file:
            file.write(cloudpickle.dumps(answer))
    except Exception as error:  # the value cannot be pickled
        with contextlib.suppress(OSError):
            os.write(2, f"labkernel: the child's value could not be sent back: {error}\n".encode())
        code = 1
    os._exit(code & 0xFF)


def _enter_and_run(
    record: Message, process: Process, channel: socket.socket, stdio: tuple[int, int, int]
) -> NoReturn:
    """Join the container's cgroup and namespaces, start the program in a child there, and end as it ends."""
    try:
        init = state.ProcessKey(**record["init"])
        if not init.alive():
            raise ProcessLookupError(errno.ESRCH, f"container {record['name']} does not run any more")
        group = cgroups.at(record["cgroup"])
        doors = group.door_fds() if group else ()
        into = group.into_fd if group else None
        own_view = os.open(f"/proc/{init.pid}/ns/cgroup", os.O_RDONLY | os.O_CLOEXEC)
        kinds = set(record["namespaces"])
        # What comes in is a copy of us until it executes the program; the container's root may be our own user.
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
        namespaces.enter(init.pid, kinds - {"cgroup"})
        walls.import_no_more()

        def inside() -> NoReturn:
            try:
                for fd in doors:
                    os.write(fd, b"0")
                # The last of them: from inside, the way from our group into the container's is closed.
                if "cgroup" in kinds:
                    syscalls.setns(own_view, syscalls.CLONE_NEWCGROUP)
                walls.become(0, 0)
                syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
                capabilities.drop_bounding(process.capabilities)
            except Exception as error:
                walls.tell_failure(channel.fileno(), error)
            walls.start_program(process, stdio, channel.fileno())

        pid, _ = fork(inside, into=into)  # the pid namespace that we entered holds for children only
    except Exception as error:
        walls.tell_failure(channel.fileno(), error)
    walls.keep_only(())
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if signal.sigwait({signal.SIGCHLD, signal.SIGTERM}) == signal.SIGTERM:  # the asker hung up
            for end in (os.killpg, os.kill):  # what it has started, too; it leads a group of its own
                with contextlib.suppress(ProcessLookupError):
                    end(pid, signal.SIGKILL)
    os._exit(walls.exit_status(ended[1]))


# ---------------------------------------------------------------------- what a container needs before its start


def _listeners(spec: Spec, closing: contextlib.ExitStack) -> list[tuple[Any, socket.socket]]:
    """The sockets of the published ports, made here: a socket belongs to the network in which it was made."""
    if not spec.publish:
        return []
    from labkernel import relay

    published = [relay.parse_publish(text) for text in spec.publish]
    return [(one, closing.enter_context(relay.listen(one))) for one in published]


def _running(vessel: empty.Empty, limits: cgroups.Limits) -> Message:
    """What the record of a container says as soon as it has a process."""
    return {
        "group": vessel.name,
        "cgroup": vessel.group.places if vessel.group else None,
        "limits": limits.given(),
        "state": "running",
        "init": vessel.init._asdict(),
        "pid": vessel.pid,
    }


def _order(
    request: Message, directory: str, id_maps: tuple[users.IdMap, ...],
    channel: socket.socket, fds: list[int], closing: contextlib.ExitStack,
) -> Order:  # fmt: skip
    """Open what the child needs; it could not walk there itself, our directories are closed to its ids."""
    spec, logged = request["spec"], request["logged"]
    file, *stdio = fds

    def opened(fd: int) -> int:
        closing.callback(os.close, fd)
        return fd

    volumes = tuple(opened(_volume_tree(volume, id_maps)) for volume in spec.volumes)
    if logged:  # opened by way of the copied mount: /proc/self/fd/1 then says "/log", and no path of the host
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        writable = opened(empty.copied_mount(directory))
        log = opened(os.open("log", flags, 0o600, dir_fd=writable))
        if id_maps:  # so that /dev/stdout can be opened inside
            os.fchown(log, id_maps[0].outside, id_maps[0].outside)
        stdio = [log if number in logged else fd for number, fd in enumerate(stdio)]
    _open_up_pipes(stdio)
    return Order(file, channel.fileno(), (stdio[0], stdio[1], stdio[2]), volumes)


def _open_up_pipes(fds: list[int]) -> None:
    """Let /dev/stdout be opened inside where it is a pipe: its owner is nobody there.

    Who owns it stays as it is, since the caller's other programs may want to open it too. That everybody may is no
    harm: a pipe has no name but the descriptors of those who hold it, and these the kernel guards (man 2 ptrace).
    """
    for fd in fds:
        if stat.S_ISFIFO(os.fstat(fd).st_mode) and os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:"):
            with contextlib.suppress(PermissionError):  # somebody else's, that our caller was given
                os.fchmod(fd, 0o666)


def _volume_tree(volume: Volume, id_maps: tuple[users.IdMap, ...]) -> int:
    """A detached copy of the volume's mount, ready to be attached inside."""
    tree = empty.copied_mount(volume.source)
    attributes = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
    syscalls.mount_setattr(
        tree, attr_set=attributes | (syscalls.MOUNT_ATTR_RDONLY if volume.read_only else 0)
    )
    if id_maps and id_maps[0].outside:  # let files of the host's root be those of the container's root
        with contextlib.suppress(OSError), _user_namespace(id_maps) as fd:
            syscalls.mount_setattr(tree, attr_set=syscalls.MOUNT_ATTR_IDMAP, userns_fd=fd)
    return tree


@contextlib.contextmanager
def _user_namespace(id_maps: tuple[users.IdMap, ...]) -> Iterator[int]:
    """A descriptor of a user namespace with this map, made by a child that only lives until it is opened."""

    def wait() -> NoReturn:
        walls.keep_only(())  # an asker's channel is to close when the launcher does
        while True:
            signal.sigwait({signal.SIGTERM})

    pid, pidfd = fork(wait, syscalls.CLONE_NEWUSER)
    try:
        users.write_maps(pid, id_maps)
        with namespaces.opened(pid, "user") as fd:
            yield fd
    finally:
        end_now(pid, pidfd)
        os.close(pidfd)


def _start_relay(listeners: list[tuple[Any, socket.socket]], container_pid: int) -> tuple[int, int]:
    """The process that carries connections from the published ports into the container."""
    from labkernel import relay

    def carry() -> NoReturn:
        walls.keep_only(listener.fileno() for _, listener in listeners)
        syscalls.block_signals(0)
        relay.serve(listeners, container_pid)
        os._exit(0)

    return fork(carry)


@contextlib.contextmanager
def _holding_containers() -> Iterator[None]:
    """No other launcher may take a directory that has no record yet for one that was left behind."""
    state.containers().mkdir(parents=True, exist_ok=True)
    with state.locked(state.containers()):
        yield


@contextlib.contextmanager
def _explained_home() -> Iterator[None]:
    """Let an error in the lab's own directory say where that is: a full disk has many directories."""
    try:
        yield
    except OSError as error:
        ours = error.strerror == os.strerror(error.errno or 0)  # else it says already which call has failed
        if ours and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            where = f"{os.strerror(error.errno)}, while the container's files were made below {state.home()}"
            raise type(error)(error.errno, f"{where} (LABKERNEL_HOME names another place)") from None
        raise


# ---------------------------------------------------------------------- helpers


def _own_mounts() -> None:
    """A mount namespace for us and our children, whose mounts are then never the machine's, also where we are root.

    It belongs to our user namespace: copying a mount takes CAP_SYS_ADMIN over it. What the machine mounts still
    comes in.
    """
    syscalls.unshare(syscalls.CLONE_NEWNS)
    mounts.set_propagation("/", "slave")


def _cgroup_parent() -> tuple[cgroups.CgroupParent | None, str]:
    try:
        return cgroups.parent(), ""
    except OSError as error:
        return None, error.strerror or str(error)


def _send(channel: socket.socket, message: Message) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        channel.send(b"pickle" + pickle.dumps(message))


def _contents(fd: int) -> bytes:
    """What the asker wrote into a memfd."""
    content, size = b"", os.fstat(fd).st_size
    while part := os.pread(fd, size - len(content), len(content)):  # one call gives 2 GiB at most
        content += part
    return content


def _described(error: BaseException) -> Message:
    """An exception as a message: itself where it can be pickled, and its traceback in words."""
    import traceback

    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return {"error": RuntimeError(f"{type(error).__name__}: {error}"), "traceback": text}
    return {"error": error, "traceback": text}


def _preload(*modules: str) -> None:
    if not sys.modules.keys() >= set(modules):
        for name in modules:
            importlib.import_module(name)
        gc.freeze()  # see `main`


def _random_name() -> str:
    return os.urandom(6).hex()


def _run_all(actions: list[Callable[[], None]]) -> None:
    for action in actions:
        action()


def _ask_to_end(pidfd: int) -> None:
    """SIGTERM a process of ours that kills what it has started, and then ends."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _thaw(group: cgroups.Cgroup) -> None:
    """A frozen process of cgroup v1 does not even die before it is thawed."""
    with contextlib.suppress(OSError):
        group.thaw()


def _enter_user_namespace(control_fd: int, join: int | None) -> str:
    """An ordinary user's launcher becomes root of a user namespace: of its own, or of an earlier launcher's.

    It then executes itself anew, because who may look into a process is decided by the user namespace in which its
    program was started (man 2 ptrace): the children would else belong to the host. Returns only where the machine
    forbids it: then with the reason.
    """
    try:
        if join is None:
            users.become_root_of_own_namespace()
        else:
            with namespaces.opened(join, "user") as fd:
                syscalls.setns(fd, syscalls.CLONE_NEWUSER)
            walls.become(0, 0)
    except OSError as error:
        needs = "an ordinary user's containers need user namespaces: labkernel doctor tells what to do"
        return f"{error.strerror}; {needs}"
    os.set_inheritable(control_fd, True)
    os.execv(sys.executable, [sys.executable, "-S", "-c", start_text(control_fd)])


def start_text(control_fd: int, join: int | None = None) -> str:
    """The program that a launcher process is started with: the caller's import path, and `main`."""
    return (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        f"from labkernel.launcher import main; main({control_fd}, {join})"
    )


def main(control_fd: int, join: int | None = None) -> None:
    """Entry point of the launcher process; `control_fd` is our end of the socket to the notebook."""
    os.set_inheritable(control_fd, False)
    no_containers = _enter_user_namespace(control_fd, join) if os.geteuid() != 0 else ""
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    _take_name("labkernel")
    key = state.ProcessKey.of(os.getpid())
    record = state.launchers() / f"{key.pid}.json"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # until it is the loop that has to end
    try:
        with _explained_home():
            record.parent.mkdir(parents=True, exist_ok=True)
            cleanup.remember_launcher(record, key)
        launcher = Launcher(socket.socket(fileno=control_fd), no_containers)
        cleanup.clean(launcher.parent)
        walls.spawn_makes_sessions()  # found out here once, and not by each container
        gc.collect()
        gc.freeze()  # children share this memory; the collector must not touch (and so copy) it
        launcher.run()
    finally:
        cleanup.forget_launcher(record, key)


def _take_name(name: str) -> None:
    """Be `name` to ps, here and in the containers, whose init is a copy of us: our arguments tell paths of the host."""
    with open("/proc/self/comm", "w", encoding="ascii") as file:
        file.write(name)
    with open("/proc/self/stat", "rb") as file:
        start, end = map(
            int, file.read().rpartition(b")")[2].split()[45:47]
        )  # arg_start, arg_end; man 5 proc
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, name.encode(), min(len(name), end - start - 1))
