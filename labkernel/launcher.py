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
import json
import os
import pickle
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import cloudpickle

from labkernel import relay, state, walls
from labkernel.container import cgroup_at
from labkernel.linux import cgroups, mounts, namespaces, syscalls, users
from labkernel.spec import Prepared, Process, Spec, Volume

Message = dict[str, Any]


@dataclass
class Child:
    """A process that the launcher started, and what has to be done when it ends."""

    pid: int
    pidfd: int
    channel: socket.socket
    at_end: Callable[[int], Message]
    """Given the wait status: tidies up, and makes the last message."""
    keep_after_hangup: bool = False
    killers: list[Callable[[], None]] = field(default_factory=list)


class Launcher:
    """State and loop of the launcher process."""

    def __init__(self, control: socket.socket, join: int | None = None) -> None:
        self.control = control
        self.id_maps = _enter_user_namespace(join)
        self.parent, self.no_cgroup = _cgroup_parent()
        self.poll = select.epoll()
        self.children: dict[int, Child] = {}  # by pidfd and by the channel's descriptor
        self.detached = False
        self.network_helper: Any = None
        self.poll.register(control, select.EPOLLIN)

    def run(self) -> None:
        """Serve until the control socket closes and, if told to detach, the last container has ended."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            while not self.control._closed or (self.detached and self.children):  # type: ignore[attr-defined]
                for fd, _ in self.poll.poll():
                    if fd in self.children:
                        self._child_event(fd)
                    elif not self.control._closed and fd == self.control.fileno():  # type: ignore[attr-defined]
                        self._control_event()
        finally:
            self._kill_everything()

    def _control_event(self) -> None:
        data, fds, _, _ = socket.recv_fds(self.control, 1 << 16, 64)
        if not data:
            self.poll.unregister(self.control)
            self.control.close()
            if not self.detached:
                raise SystemExit(0)
            return
        for fd in fds:
            os.set_inheritable(fd, False)
        channel = socket.socket(fileno=fds[0])
        try:
            request: Message = pickle.loads(_contents(fds[1]))
            getattr(self, f"do_{request['do']}")(request, channel, fds[2:])
        except Exception as error:
            _send(channel, _described(error))
            channel.close()
        finally:
            for fd in fds[1:]:
                os.close(fd)

    def _child_event(self, fd: int) -> None:
        child = self.children[fd]
        if fd == child.channel.fileno() and fd != child.pidfd:  # the asker hung up
            self.poll.unregister(fd)
            del self.children[fd]
            if not child.keep_after_hangup:
                for killer in child.killers:
                    killer()
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

    def _watch(self, child: Child) -> None:
        child.killers.append(lambda: _kill(child.pidfd))
        for fd in (child.pidfd, child.channel.fileno()):
            self.children[fd] = child
        self.poll.register(child.pidfd, select.EPOLLIN)
        self.poll.register(child.channel, 0)  # 0: only hang-ups

    # ------------------------------------------------------------------ requests

    def do_facts(self, _: Message, channel: socket.socket, __: list[int]) -> None:
        """Tell what this launcher has to work with: the doctor's question."""
        facts = {
            "id_maps": [asdict(entry) for entry in self.id_maps],
            "container_map": asdict(users.container_map(self.id_maps)),
            "cgroup_version": self.parent.version if self.parent else None,
            "controllers": sorted(self.parent.controllers) if self.parent else [],
            "no_cgroup": self.no_cgroup,
        }
        _send(channel, facts)
        channel.close()

    def do_child(self, _: Message, channel: socket.socket, fds: list[int]) -> None:
        """Run a pickled function in a plain child."""
        stdin, stdout, stderr, result, function = fds
        pid, pidfd = syscalls.clone3(0)
        if pid == 0:
            os.setpgid(0, 0)
            walls.keep_only((stdin, stdout, stderr, result, function))
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            _run_function((stdin, stdout, stderr), result, _contents(function))
        _send(channel, {"pid": pid})
        self._watch(
            Child(pid, pidfd, channel, lambda status: {"status": status}, killers=[lambda: _kill_group(pid)])
        )

    def do_container(self, request: Message, channel: socket.socket, fds: list[int]) -> None:
        """Start a container from its specification."""
        spec: Spec = request["spec"]
        record = {
            "id": spec.id, "name": spec.name, "state": "created", "created": time.time(), "image": request["image"],
            "command": list(spec.process.command), "launcher": asdict(state.ProcessKey.of(os.getpid())),
            "publish": list(spec.publish), "remove": spec.remove, "network": spec.network,
            "process": request["process_defaults"], "namespaces": sorted(spec.namespaces),
        }  # fmt: skip
        undo = contextlib.ExitStack()
        with undo:
            directory = spec.directory
            directory.mkdir(parents=True)
            undo.callback(shutil.rmtree, directory, ignore_errors=True)
            state.write_record(directory, record)  # before anything that it names
            listeners = [
                (relay.parse_publish(text), undo.enter_context(_listen(text))) for text in spec.publish
            ]
            group = self._make_cgroup(spec, undo)
            record |= {
                "cgroup": group.paths if group else None,
                "limits": spec.limits.given() if group else {},
            }
            id_map = users.container_map(self.id_maps) if "user" in spec.namespaces else None
            with contextlib.ExitStack() as closing:
                if request["logged"]:
                    log = os.open(
                        directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
                    )
                    closing.callback(os.close, log)
                    fds = [log if number in request["logged"] else fd for number, fd in enumerate(fds)]
                given = self._prepare(spec, directory, id_map, group, channel, fds, closing)
                pid, pidfd, go = self._clone(spec, given, group)
            record |= {"state": "running", "init": asdict(state.ProcessKey.of(pid)), "pid": pid}
            try:
                if id_map:
                    users.write_maps(pid, (id_map,))
                relays = [_start_relay(listeners, pid)] if listeners else []
                if spec.network == "bridge":
                    self._network().attach(pid, spec.id, spec.name)
                state.write_record(directory, record)
                os.write(go, b"g")
            except BaseException:
                _kill(pidfd)
                os.waitpid(pid, 0)
                raise
            finally:
                os.close(go)
            undo.pop_all()
        for _, listener in listeners:
            listener.close()
        self.detached = self.detached or spec.detach

        def at_end(status: int) -> Message:
            return self._container_ended(spec, record, group, relays, status)

        _send(channel, {"pid": pid, "cgroup": record["cgroup"]})
        self._watch(Child(pid, pidfd, channel, at_end, keep_after_hangup=spec.detach))

    def do_exec(self, request: Message, channel: socket.socket, fds: list[int]) -> None:
        """Run one more program in a container that runs."""
        record, process = request["record"], request["process"]
        pid, pidfd = syscalls.clone3(0)
        if pid == 0:
            walls.keep_only((channel.fileno(), *fds))
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            _enter_and_run(record, process, channel, (fds[0], fds[1], fds[2]))
        _send(channel, {"pid": pid})
        self._watch(Child(pid, pidfd, channel, lambda status: {"status": walls.exit_status(status)}))

    def do_clean(self, _: Message, channel: socket.socket, __: list[int]) -> None:
        """Remove what launchers that were killed have left behind."""
        _send(channel, {"removed": clean(self.parent)})
        channel.close()

    def do_remove(self, request: Message, channel: socket.socket, __: list[int]) -> None:
        """Remove a container that has ended: its writable layer, log and record."""
        _send(channel, {"removed": _remove_leftovers(request["record"], self.parent)})
        channel.close()

    # ------------------------------------------------------------------ parts of a container's start

    def _make_cgroup(self, spec: Spec, undo: contextlib.ExitStack) -> cgroups.Cgroup | None:
        """The container's group with its limits set; None only where no limit was asked for and none can be had."""
        missing = self.parent.missing(spec.limits) if self.parent else list(spec.limits.given())
        if missing and spec.limits_required:
            raise cgroups.CgroupUnavailable(
                errno.ENOTSUP,
                f"limits are asked for ({', '.join(spec.limits.given())}) that cannot be set here: "
                + (self.no_cgroup or f"the controllers {', '.join(missing)} are not handed to us"),
            )
        if self.parent is None:
            return None
        group = self.parent.create(state.PREFIX + spec.id)
        undo.callback(group.remove)
        if not missing:
            group.set(spec.limits)
        return group

    def _prepare(
        self, spec: Spec, directory: Any, id_map: users.IdMap | None, group: cgroups.Cgroup | None,
        channel: socket.socket, fds: list[int], closing: contextlib.ExitStack,
    ) -> Prepared:  # fmt: skip
        """Open what the child needs; it could not walk there itself, our directories are closed to its ids."""

        owner = id_map.outside if id_map else 0
        for name in ("upper", "work", "upper/etc"):
            os.mkdir(f"{directory}/{name}")
            os.chown(f"{directory}/{name}", owner, owner)
        hosts = f"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {spec.hostname}\n"
        for name, text in (("hostname", f"{spec.hostname}\n"), ("hosts", hosts)):
            with open(f"{directory}/upper/etc/{name}", "w", encoding="ascii") as file:
                file.write(text)
            os.chown(f"{directory}/upper/etc/{name}", owner, owner)
        trees = [_tree(path, closing) for path in (spec.rootfs, str(directory))]
        volumes = tuple(_volume_tree(volume, id_map, closing) for volume in spec.volumes)
        ready, go = os.pipe()
        closing.callback(os.close, ready)
        self._go = go
        doors = group.door_fds() if group else ()
        for fd in doors:
            closing.callback(os.close, fd)
        return Prepared(
            id_map, channel.fileno(), ready, trees[0], trees[1], doors, volumes, (fds[0], fds[1], fds[2])
        )  # fmt: skip

    def _clone(self, spec: Spec, given: Prepared, group: cgroups.Cgroup | None) -> tuple[int, int, int]:
        """The child, in all its namespaces but the cgroup's (it takes that one itself, once it is in its group)."""
        flags = namespaces.flags(spec.namespaces - {"cgroup"})
        into = group.into_fd if group else None
        try:
            pid, pidfd = syscalls.clone3(flags, into)
        finally:
            if into is not None:
                os.close(into)
        if pid == 0:
            walls.put_up(spec, given)
        return pid, pidfd, self._go

    def _container_ended(
        self, spec: Spec, record: Message, group: cgroups.Cgroup | None, relays: list[Child], status: int
    ) -> Message:
        """Remove what the container was made of, and say how it ended and what it used."""
        for one in relays:
            _kill(one.pidfd)
            os.waitpid(one.pid, 0)
            os.close(one.pidfd)
        if spec.network == "bridge" and self.network_helper:
            self.network_helper.detach(spec.id)
        message: Message = {"status": walls.exit_status(status), "stats": group.stats() if group else None}
        if group:
            if (
                group.pids()
            ):  # all died with their pid 1; only a process that was sent in from outside may be left
                group.kill()
            group.remove()
        if spec.remove:
            remove_tree(str(spec.directory))
        else:
            state.write_record(spec.directory, record | {"state": "exited", "exit_code": message["status"]})
            shutil.rmtree(spec.directory / "work", ignore_errors=True)
        return message

    def _network(self) -> Any:
        """The lab's own network, made when the first container is attached to it."""
        if self.network_helper is None:
            from labkernel.lab_network import Helper

            self.network_helper = Helper()
        return self.network_helper

    def _kill_everything(self) -> None:
        """The end: kill all children, tidy up after each, and after orphans that they left to us."""
        for child in set(map(id, self.children.values())):
            one = next(c for c in self.children.values() if id(c) == child)
            for killer in one.killers:
                killer()
        while pidfds := [fd for fd, child in self.children.items() if fd == child.pidfd]:
            self._child_event(pidfds[0])
        if self.network_helper:
            self.network_helper.close()
        end_session(os.getpid())


# ---------------------------------------------------------------------- in children


def _run_function(stdio: tuple[int, int, int], result: int, pickled: bytes) -> NoReturn:
    """Call the function with the cell's standard streams, send back what it returns or raises, and end."""
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
        # The pid namespace holds for children only, so the program is started in a child.
        group = cgroup_at(record["cgroup"])
        doors = group.door_fds() if group else ()
        into = group.into_fd if group else None
        namespaces.enter(init.pid, record["namespaces"])
        pid, _ = syscalls.clone3(0, into)
        if pid == 0:
            for fd in doors:
                os.write(fd, b"0")
            walls.become(0, 0)
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            walls.start_program(process, stdio, channel.fileno())
    except OSError as error:
        walls.tell_failure(channel.fileno(), error)
    walls.keep_only(())
    _, status = os.waitpid(pid, 0)
    os._exit(walls.exit_status(status))


# ---------------------------------------------------------------------- helpers


def _enter_user_namespace(join: int | None) -> tuple[users.IdMap, ...]:
    """An ordinary user's launcher works in a user namespace in which it is root; a later one can join an earlier's."""
    if os.geteuid() == 0:
        return ()
    if join is not None and not namespaces.shared("self", join)["user"]:
        with namespaces.opened(join, "user") as fd:
            syscalls.setns(fd, syscalls.CLONE_NEWUSER)
        with open("/proc/self/uid_map", encoding="ascii") as file:
            lines = [line.split() for line in file]
        walls.become(0, 0)
        _own_mounts()
        return tuple(users.IdMap(int(a), int(b), int(c)) for a, b, c in lines)
    try:
        id_maps = users.become_root_of_own_namespace()
        _own_mounts()
    except OSError:
        return ()  # the doctor finds out why and says it; a plain child still works
    return id_maps


def _own_mounts() -> None:
    """A mount namespace that belongs to our user namespace: copying a mount takes CAP_SYS_ADMIN over it."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    mounts.set_propagation("/", "slave")


def _cgroup_parent() -> tuple[cgroups.CgroupParent | None, str]:
    try:
        return cgroups.parent(), ""
    except OSError as error:
        return None, error.strerror or str(error)


def _tree(path: str, closing: contextlib.ExitStack) -> int:
    """A detached copy of the mount at `path`: a bind mount that waits to be attached somewhere."""
    tree = syscalls.open_tree(path, syscalls.OPEN_TREE_CLONE)
    closing.callback(os.close, tree)
    return tree


def _volume_tree(volume: Volume, id_map: users.IdMap | None, closing: contextlib.ExitStack) -> int:
    """A detached copy of the volume's mount, ready to be attached inside."""
    tree = _tree(volume.source, closing)
    attributes = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
    syscalls.mount_setattr(
        tree, attr_set=attributes | (syscalls.MOUNT_ATTR_RDONLY if volume.read_only else 0)
    )
    if (
        id_map and id_map.outside
    ):  # root's container: let files of the host's root be those of the container's root
        with contextlib.suppress(OSError), _user_namespace(id_map) as fd:
            syscalls.mount_setattr(tree, attr_set=syscalls.MOUNT_ATTR_IDMAP, userns_fd=fd)
    return tree


@contextlib.contextmanager
def _user_namespace(id_map: users.IdMap) -> Any:
    """A descriptor of a user namespace with this map, made by a child that only lives until it is opened."""
    pid, pidfd = syscalls.clone3(syscalls.CLONE_NEWUSER)
    if pid == 0:
        signal.pause()
        os._exit(0)
    try:
        users.write_maps(pid, (id_map,))
        with namespaces.opened(pid, "user") as fd:
            yield fd
    finally:
        _kill(pidfd)
        os.waitpid(pid, 0)
        os.close(pidfd)


def _listen(publish: str) -> socket.socket:
    return relay.listen(relay.parse_publish(publish))


def _start_relay(listeners: list[tuple[Any, socket.socket]], container_pid: int) -> Child:
    """The process that carries connections from the published ports into the container."""
    pid, pidfd = syscalls.clone3(0)
    if pid == 0:
        walls.keep_only(listener.fileno() for _, listener in listeners)
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            relay.serve(listeners, container_pid)
        finally:
            os._exit(0)
    return Child(pid, pidfd, socket.socket(), lambda status: {})


def _send(channel: socket.socket, message: Message) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        channel.send(b"pickle" + pickle.dumps(message))


def _contents(fd: int) -> bytes:
    """What the asker wrote into a memfd."""
    os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, "rb", closefd=False) as file:
        return file.read()


def _described(error: BaseException) -> Message:
    """An exception as a message: itself where it can be pickled, and its traceback in words."""
    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return {"error": RuntimeError(f"{type(error).__name__}: {error}"), "traceback": text}
    return {"error": error, "traceback": text}


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def end_session(session: int) -> int:
    """Kill every process of the launcher's session but the launcher; what it started cannot leave it unnoticed."""
    killed = 0
    for _ in range(100):
        members = [
            pid for pid in _pids() if pid not in (session, os.getpid()) and _session_of(pid) == session
        ]
        if not members:
            break
        for pid in members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
                killed += 1
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.005)
    return killed


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _session_of(pid: int) -> int:
    """A process's session; 0 when it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[3])


def remove_tree(path: str) -> None:
    """Remove a container's directory. Overlay leaves a work directory that its owner may not even list."""

    def open_up(function: Any, where: str, _: object) -> None:
        with contextlib.suppress(OSError):
            os.chmod(os.path.dirname(where), 0o700)
            os.chmod(where, 0o700)
            function(where)

    shutil.rmtree(path, onerror=open_up)


def clean(parent: cgroups.CgroupParent | None) -> list[str]:
    """Finish what launchers that were killed could not: processes, cgroups, directories. Returns what was removed."""
    removed = []
    for path in sorted(state.launchers().glob("*.json")) if state.launchers().is_dir() else ():
        try:
            key = state.ProcessKey(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            key = None
        if key and key.alive():
            continue
        if key and key.boot == state.boot_id() and (killed := end_session(key.pid)):
            removed.append(f"{killed} processes of launcher {key.pid}")
        path.unlink(missing_ok=True)
        removed.append(f"the record of launcher {path.stem}")
    for record in state.records():
        if record["state"] == "dead":
            removed += _remove_leftovers(record, parent)
    if state.containers().is_dir():  # a directory without a record: its launcher died between the two
        for directory in state.containers().iterdir():
            if state.read_record(directory) is None and time.time() - directory.stat().st_mtime > 5:
                remove_tree(str(directory))
                removed.append(f"directory {directory.name}")
    return removed


def _remove_leftovers(record: Message, parent: cgroups.CgroupParent | None) -> list[str]:
    """Kill and remove all of one container whose launcher is gone, or that has ended."""
    if record.get("init"):
        init = state.ProcessKey(**record["init"])
        if init.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(init.pid, signal.SIGKILL)
    name = state.PREFIX + record["id"]
    group = parent.open(name) if parent else None
    group = cgroup_at(record.get("cgroup")) or group
    if group and any(os.path.isdir(path) for path in group.paths.values()):
        with contextlib.suppress(OSError):
            group.kill()
        group.remove()
    remove_tree(record["directory"])
    return [f"container {record['name']}"]


def main(control_fd: int, join: int | None = None) -> None:
    """Entry point of the launcher process; `control_fd` is our end of the socket to the notebook."""
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
    _take_name("labkernel")
    key = state.ProcessKey.of(os.getpid())
    record = state.launchers() / f"{key.pid}.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(asdict(key)))
    try:
        launcher = Launcher(socket.socket(fileno=control_fd), join)
        clean(launcher.parent)
        gc.collect()
        gc.freeze()  # children share this memory; the collector must not touch (and so copy) it
        launcher.run()
    finally:
        record.unlink(missing_ok=True)


def _take_name(name: str) -> None:
    """Be `name` to ps, here and in the containers, whose init is a copy of us: our arguments tell paths of the host."""
    with open("/proc/self/comm", "w", encoding="ascii") as file:
        file.write(name)
    with open("/proc/self/stat", "rb") as stat:
        start, end = map(
            int, stat.read().rpartition(b")")[2].split()[45:47]
        )  # arg_start, arg_end; man 5 proc
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, name.encode(), min(len(name), end - start - 1))
