"""What the first process of a container does: put up the walls, start the program, and be its init.

`put_up` reads like a boot sequence, top to bottom. It runs in the child that the launcher made with `clone3`, so
the new namespaces are there already; what follows fills them and locks the doors.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
from array import array
from collections.abc import Callable, Iterable
from functools import cache
from typing import NoReturn, TypeVar

from labkernel.linux import capabilities, mounts, network, seccomp, syscalls
from labkernel.linux.namespaces import FLAGS
from labkernel.linux.syscalls import (
    MOUNT_ATTR_RDONLY,
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
)
from labkernel.spec import Order, Process, Spec

T = TypeVar("T")

NEW_ROOT = "/tmp"
"""Where the new root is put together. Any directory of the host does: the mount hides it from this process alone."""

CANNOT_RUN, NOT_FOUND, SET_UP_FAILED = 126, 127, 125
"""Exit statuses of the field: the program cannot be run, is not there; the container could not be made."""


def ignored_signals() -> tuple[int, ...]:
    """By Python itself (SIGPIPE, SIGXFSZ), and by whoever started us, as `nohup` ignores SIGHUP."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        mask = next(int(line.split()[1], 16) for line in file if line.startswith("SigIgn:"))
    return tuple(number for number in range(1, 65) if mask >> (number - 1) & 1)


IGNORED = ignored_signals()

SETTABLE = tuple(sorted(signal.valid_signals() & set(IGNORED)))
"""Those that posix_spawn can set. Of libc's own it keeps none; Python would warn of each, in every init."""

CHANGE_USER = frozenset({capabilities.Capability.CAP_SETUID, capabilities.Capability.CAP_SETGID})
"""What it takes to become the program's user: held until uid 0 is left, or the next execve."""

FORWARD = frozenset({capabilities.Capability.CAP_KILL})
"""All that init needs once it has started the program: to forward signals."""

ROOT = "0:0"
"""The user that a program is if nobody says otherwise."""

MOST_DESCRIPTORS = 253
"""That the kernel sends in one message: SCM_MAX_FD, man 7 unix."""

TIOCSPTLCK, TIOCGPTN = 0x40045431, 0x80045430
"""Unlock a pseudo-terminal, and ask for its number; <asm-generic/ioctls.h>, man 2 TIOCSPTLCK."""


def put_up(
    orders: socket.socket, doors: tuple[int, ...], like: Spec, words: bytes, rootfs: int, writable: int
) -> NoReturn:
    """Be the first process of a container: build it, start the program in it, and be its init.

    What is built first is the same for all containers `like` this. Then comes the order, whose words are likely to be
    `words`: at once, or when there is a use for a container made in advance. Before the program runs we wait for one
    more word, until the launcher has set the limits and written down what there will be to remove.
    """
    keep_only((orders.fileno(), *doors, rootfs, writable))
    trouble = None
    try:
        import_no_more()
        take_place(orders, like.namespaces, doors)
        build(like, rootfs, writable)
        # In advance as well, since it takes a call for each that goes. It holds for what a program can get.
        capabilities.drop_bounding(like.process.capabilities)
    except Exception as error:
        trouble = error  # told when there is somebody to tell it to
    keep_only((orders.fileno(),))
    orders.send(b"failed" if trouble else b"built")
    rehearse(orders, words)
    order = receive(orders)
    try:
        if trouble:
            raise trouble
        spec, logged = read_spec(order)
        furnish(spec, order.volumes)
    except Exception as error:
        tell_failure(order.channel, error)
    if spawns(spec.process):
        program = spawn_program(spec.process, order.stdio, order.channel, orders.fileno())
    elif (program := os.fork()) == 0:
        start_program(spec.process, order.stdio, order.channel, orders.fileno(), logged)
    capabilities.capset(FORWARD, FORWARD)
    keep_only(())
    be_init(program)


def take_place(orders: socket.socket, kinds: frozenset[str], doors: tuple[int, ...]) -> None:
    """Enter the group, become root of the new user namespace, and cut the ties of the other namespaces."""
    for fd in doors:
        os.write(fd, b"0")  # 0 is this process
    if not orders.recv(16):  # the launcher is gone, or could not write our id map
        os._exit(SET_UP_FAILED)
    if "user" in kinds:
        become(0, 0)
        syscalls.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # again: a change of the user resets it
    syscalls.prctl(PR_SET_DUMPABLE, 0)  # nobody inside may look into this process
    if "cgroup" in kinds:
        syscalls.unshare(syscalls.CLONE_NEWCGROUP)  # only now: its root is the cgroup that we are in
    if "net" in kinds:
        network.loopback_up()
    mounts.set_propagation("/", "private")


def import_no_more() -> None:
    """Know no module that is not there already: it would be looked for, and run, in the file system of the image."""
    sys.meta_path[:] = [NoMore()]


class NoMore:
    """Finds no module (see `sys.meta_path` in Python's documentation)."""

    def find_spec(self, name: str, *_: object) -> None:
        """Raises ModuleNotFoundError."""
        raise ModuleNotFoundError(f"{name} is not known in a container", name=name)


def rehearse(orders: socket.socket, words: bytes) -> None:
    """While there is no order: do what it will take, so that the memory for it is ours then, and not the launcher's.

    Nothing of it changes anything, or it is done again: what cannot be done now fails then, and in words.
    """
    if select.select([orders], [], [], 0)[0]:
        return
    with contextlib.suppress(Exception):
        process = spec_in(words)[0].process
        for limit, _ in process.rlimits:
            resource.getrlimit(limit)
        look_up_user(process.user)
        for path in ("/etc/hostname", "/etc/hosts"):
            os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
        capabilities.capset(capabilities.ALL, capabilities.ALL)
        seccomp.install(b"")  # EINVAL; this comes last


def receive(orders: socket.socket) -> Order:
    """Wait for the order; without a launcher there will be none."""
    fds: list[int] = []
    while not fds:  # what comes without is older: what was not read because something failed before
        words, fds = received(orders, MOST_DESCRIPTORS)
        if not words:
            os._exit(SET_UP_FAILED)
    return Order.received(fds)


def received(sock: socket.socket, most: int) -> tuple[bytes, list[int]]:
    """A short message and the descriptors that came with it, which no execve shall hand on; b"" for a closed socket.

    `socket.recv_fds` leaves out the flag that says so, and would have each be closed to execve by a call of its own.
    """
    fds = array("i")
    words, ancillary, _, _ = sock.recvmsg(16, socket.CMSG_LEN(most * fds.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data)
    return words, fds.tolist()


def read_spec(order: Order) -> tuple[Spec, list[int]]:
    """What the container shall be, and which streams go to its log, from the order's file."""
    return spec_in(os.pread(order.spec, os.fstat(order.spec).st_size, 0))


def spec_in(words: bytes) -> tuple[Spec, list[int]]:
    """What such a file says."""
    request = pickle.loads(words)
    return request["spec"], request["logged"]


def build(like: Spec, rootfs: int, writable: int) -> None:
    """Fill the new mount namespace: a root of its own with nothing of the host in it."""
    root = NEW_ROOT
    shared = set(FLAGS) - like.namespaces
    lower, layer = attach(rootfs, root), attach(writable, root)
    mounts.overlay(root, [lower], f"{layer}/upper", f"{layer}/work")
    for name in ("proc", "dev", "sys"):
        if os.path.islink(f"{root}/{name}"):  # what it leads to would be mounted on, and nothing be masked
            raise OSError(
                errno.ELOOP, f"/{name} is a symbolic link in the image, and something is mounted there"
            )
    mounts.proc(f"{root}/proc")
    mounts.minimal_dev(f"{root}/dev", own_mqueue="ipc" not in shared)
    if "net" in shared:
        mounts.bind("/sys", f"{root}/sys", recursive=True, read_only=True)  # with the host's cgroups in it
    else:
        mounts.sysfs(f"{root}/sys")
    mounts.pivot_root_into(root)
    if like.masked_paths:
        for path in mounts.MASKED_PATHS:
            mounts.mask(path)
        for path in mounts.READONLY_PATHS:
            mounts.make_read_only(path)


def furnish(spec: Spec, volumes: Iterable[int]) -> None:
    """What no other container has: a name, volumes, and whether its root may be written to."""
    if "uts" in spec.namespaces:
        socket.sethostname(spec.hostname)
    hosts = f"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {spec.hostname}\n"
    for path, text in (("/etc/hostname", f"{spec.hostname}\n"), ("/etc/hosts", hosts)):
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, text.encode())
        os.close(fd)
    for volume, tree in zip(spec.volumes, volumes, strict=True):
        mount_point(volume.target, os.path.isdir(f"/proc/self/fd/{tree}"))
        syscalls.move_mount(tree, volume.target)
    if spec.read_only:
        syscalls.mount_setattr(syscalls.AT_FDCWD, "/", attr_set=MOUNT_ATTR_RDONLY)


def spawns(process: Process) -> bool:
    """Whether init starts the program by posix_spawn, and not by a copy of itself that goes on to become the program.

    To make such a copy, and to take it down again when it executes the program, takes longer than the rest. But what
    the program gives up init gives up, too, and between the two there is nobody who could open a terminal. And init
    stays root: of its own user's processes anybody may set the limits, or end them.
    """
    plain = process.init_too and process.user == ROOT and not process.tty and process.observed is None
    return plain and spawn_makes_sessions()


@cache
def spawn_makes_sessions() -> bool:
    """Not where this Python was built on a libc older than glibc 2.26; man 3 posix_spawn."""
    try:
        os.posix_spawn("", ["none"], {}, setsid=True)
    except NotImplementedError:
        return False
    except OSError:  # there is no program of that name
        pass
    return True


def spawn_program(process: Process, stdio: tuple[int, int, int], channel: int, go: int) -> int:
    """Lock the doors for init and everything it starts, wait for a word from `go`, start the program; its pid."""
    try:
        lock_doors(process, go, until_execve=FORWARD)
        last_door(process)
    except Exception as error:
        tell_failure(channel, error)
    actions = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(stdio)]

    def start(path: str, command: list[str], environment: dict[str, str]) -> int:
        os.lstat(path)  # to see that there is no such file takes less time here than in a new process
        return os.posix_spawn(
            path, command, environment, file_actions=actions, setsid=True, setsigmask=(), setsigdef=SETTABLE
        )

    try:
        program = execute(process, start)
    except CannotRun as error:
        program = os.fork()
        if program == 0:  # signals must end it where nobody reads what it says, as they would the program
            mind_signals()
            error.end(stdio[2])
    tell_ready(channel)
    os.chdir("/")  # a mount that we stand in cannot be removed
    return program


def mind_signals() -> None:
    """Ignore and block none, as a program finds it that nobody has prepared."""
    for number in IGNORED:
        syscalls.default_signal(number)  # what is ignored stays ignored over exec
    syscalls.block_signals(0)


def start_program(
    process: Process,
    stdio: tuple[int, int, int],
    channel: int,
    go: int | None = None,
    logged: Iterable[int] = (),
) -> NoReturn:
    """Lock the doors for this process and everything it starts, wait for a word from `go`, become the program."""
    try:
        os.setsid()
        if process.tty:
            stdio = open_terminal(channel)
        for target, fd in enumerate(stdio):
            os.dup2(fd, target)
        lock_doors(process, go, logged)
        if process.observed is not None:
            be_observed(process.observed, channel)
        mind_signals()
        tell_ready(channel)
        last_door(process)
    except Exception as error:
        tell_failure(channel, error)
    try:
        execute(process, os.execve)
    except CannotRun as error:
        error.end(2)


def lock_doors(
    process: Process, go: int | None, logged: Iterable[int] = (), until_execve: frozenset[int] = frozenset()
) -> None:
    """Become the program's user, with its limits and capabilities, and until the next execve some more.

    Waits for the word from `go`, if there is one to wait for, as late as it can.
    """
    for limit, value in process.rlimits:
        resource.setrlimit(limit, (value, value))
    uid, gid, groups = look_up_user(process.user)
    check_ids(process.user, uid, gid)
    if uid:
        hand_over(uid, gid, process.tty, logged)
    change_directory(process.workdir)
    if process.seccomp is not None and not process.no_new_privs:
        wait_for(go)  # now: the filter may forbid to read
        seccomp.install(process.seccomp)  # takes CAP_SYS_ADMIN where no_new_privs is not set
        go = None
    another_user = bool(uid or gid or groups)
    if another_user:
        until_execve |= CHANGE_USER
    held = process.capabilities | until_execve
    capabilities.capset(held, held)  # the bounding set is limited already
    if another_user:
        become(uid, gid, groups)  # leaving uid 0 gives up the capabilities too
    if process.no_new_privs:
        syscalls.prctl(PR_SET_NO_NEW_PRIVS, 1)
    wait_for(go)


def last_door(process: Process) -> None:
    """Put up the filter, if that is not done yet: it may forbid whatever comes before."""
    if process.seccomp is not None and process.no_new_privs:
        seccomp.install(process.seccomp)


def wait_for(go: int | None) -> None:
    """Wait for the launcher's word, if there is still one to wait for."""
    if go is not None and not os.read(go, 16):  # it is gone, or could not do its part
        os._exit(SET_UP_FAILED)


def hand_over(uid: int, gid: int, own_terminal: bool, logged: Iterable[int]) -> None:
    """Let the program's user open /dev/stdout too, where it is the container's own terminal, or its log.

    The log by the group: its owner has to read it, who may be an ordinary user.
    """
    with contextlib.suppress(OSError):  # a file system that knows no such group
        if own_terminal:
            os.fchown(0, uid, -1)
            return
        for stream in logged:
            os.fchown(stream, -1, gid)
            os.fchmod(stream, 0o620)


def be_observed(program: bytes, channel: int) -> None:
    """From here on, let the caller be asked about the calls that a filter names: its listener goes to him."""
    listener = seccomp.install(program, listener=True)
    socket.send_fds(socket.socket(fileno=os.dup(channel)), [b"listener"], [listener])
    os.close(listener)


class CannotRun(Exception):
    """A program that cannot be started, with the exit status that a shell has for it, and why."""

    def __init__(self, program: str, status: int, why: str) -> None:
        super().__init__(f"labkernel: cannot run {program!r}: {why}")
        self.status = status

    def end(self, stderr: int) -> NoReturn:
        """Say so on the program's standard error, and exit for it."""
        with contextlib.suppress(OSError):  # it may be full, or nobody listen
            os.write(stderr, f"{self}\n".encode(errors="replace"))
        os._exit(self.status)


def execute(process: Process, start: Callable[[str, list[str], dict[str, str]], T]) -> T:
    """Look the command up in the container's PATH, and `start` it: by execve, or in a child. Raises CannotRun."""
    program = process.command[0]
    environment = dict(process.environment)
    places = (
        [""] if "/" in program else [f"{place}/" for place in environment.get("PATH", "").split(":") if place]
    )
    status, why = NOT_FOUND, "not found in " + (environment.get("PATH", "") or "an empty PATH")
    for place in places:
        try:
            return start(f"{place}{program}", list(process.command), environment)
        except FileNotFoundError:
            if os.path.lexists(f"{place}{program}"):
                why = "it is there, but the interpreter it names, or what its link points to, is not"
            elif "/" in program:
                why = "no such file in the container"
        except OSError as error:
            status, why = CANNOT_RUN, error.strerror or str(error)
        except ValueError as error:  # an argument that no program can be given
            status, why = CANNOT_RUN, str(error)
    raise CannotRun(program, status, why)


def be_init(payload: int) -> NoReturn:
    """pid 1: reap every orphan, forward signals to the program, and end as it ends (man 7 pid_namespaces)."""
    everything = [*range(1, 32), *range(34, 65)]  # 32 and 33 are libc's own; all are blocked since our birth
    while True:
        pid, status = reap()
        if pid == payload:
            os._exit(exit_status(status))
        if pid:
            continue
        number = signal.sigwait(everything)
        if number != signal.SIGCHLD:
            try:
                os.kill(payload, number)
            except ProcessLookupError:
                continue


def reap() -> tuple[int, int]:
    """One child that has ended: (pid, status); pid 0 when none has."""
    try:
        return os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return 0, 0


def exit_status(status: int) -> int:
    """A wait status as shells and Docker report it: the exit code, or 128 and the signal's number."""
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def become(uid: int, gid: int, groups: Iterable[int] = ()) -> None:
    """Take these ids, with no group that is not named."""
    try:
        os.setgroups(list(groups))
    except (
        PermissionError
    ):  # a map of a single id goes with setgroups denied: there is no other group to have
        if list(groups):
            raise
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def look_up_user(text: str) -> tuple[int, int, list[int]]:
    """(uid, gid, further groups) for "user", "uid", "user:group" or "uid:gid", by the container's own files."""
    user, _, group = text.partition(":")
    entry = None if user.isdigit() and group.isdigit() else _entry("/etc/passwd", user)
    if entry is None and not user.isdigit():
        raise OSError(errno.EINVAL, f"--user {text!r}: the container's /etc/passwd has no user {user!r}")
    uid = int(entry[2]) if entry else int(user)
    gid = int(entry[3]) if entry else 0
    if group:
        found = None if group.isdigit() else _entry("/etc/group", group)
        if found is None and not group.isdigit():
            raise OSError(errno.EINVAL, f"--user {text!r}: the container's /etc/group has no group {group!r}")
        return uid, int(found[2]) if found else int(group), []
    members = (line.split(":") for line in _lines("/etc/group")) if entry and uid else ()
    return (
        uid,
        gid,
        [int(line[2]) for line in members if len(line) > 3 and entry and entry[0] in line[3].split(",")],
    )


def check_ids(text: str, *ids: int) -> None:
    """Refuse ids that this user namespace does not have; (uid_t) -1 would even mean "stay root"."""
    if not any(ids):
        return
    with open("/proc/self/uid_map", encoding="ascii") as file:
        there = [range(int(first), int(first) + int(count)) for first, _, count in map(str.split, file)]
    for number in ids:
        if not any(number in part for part in there):
            last = max(part.stop for part in there) - 1
            raise OSError(errno.EINVAL, f"--user {text!r}: the ids in this container go from 0 to {last}")


def _entry(path: str, key: str) -> list[str] | None:
    """The line of passwd or group whose name, or number, is `key`."""
    rows = (line.split(":") for line in _lines(path))
    return next((row for row in rows if len(row) > 2 and key in (row[0], row[2])), None)


def _lines(path: str) -> list[str]:
    try:
        with open(path, "rb") as file:  # to open it as a text may take a module, and we can import none
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def open_terminal(channel: int) -> tuple[int, int, int]:
    """A pseudo-terminal from the container's own /dev/pts; its outer end goes to the caller through the channel."""
    master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
    fcntl.ioctl(master, TIOCSPTLCK, struct.pack("i", 0))
    number = struct.unpack("i", fcntl.ioctl(master, TIOCGPTN, b"\0" * 4))[0]
    inner = os.open(f"/dev/pts/{number}", os.O_RDWR)  # the first terminal of a new session becomes its own
    socket.send_fds(socket.socket(fileno=os.dup(channel)), [b"tty"], [master])
    os.close(master)
    return inner, inner, inner


def attach(tree: int, where: str) -> str:
    """Attach a tree that the launcher opened, and name it by a descriptor: the next mount there will hide it.

    Overlay takes only trees of our own mount namespace, and we could not walk to these: they lie behind
    directories that are closed to our ids.
    """
    syscalls.move_mount(tree, where)
    return f"/proc/self/fd/{os.open(where, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)}"


def mount_point(target: str, is_directory: bool) -> None:
    """Make what a volume is mounted on, without following a link of the image."""
    current = ""
    parts = target.strip("/").split("/")
    for number, part in enumerate(parts):
        current = f"{current}/{part}"
        if os.path.islink(current):
            raise OSError(
                errno.ELOOP,
                f"--volume {target}: {current} is a symbolic link in the image",
            )
        if number + 1 < len(parts) or is_directory:
            os.makedirs(current, exist_ok=True)
        elif not os.path.exists(current):
            os.close(os.open(current, os.O_CREAT | os.O_WRONLY, 0o644))


def change_directory(workdir: str) -> None:
    """Go to --workdir, made where it is missing, as Docker does."""
    try:
        if workdir != "/":
            os.makedirs(workdir, exist_ok=True)
        os.chdir(workdir)
    except OSError as error:
        raise OSError(error.errno, f"--workdir {workdir!r}: {error.strerror}") from None


def keep_only(descriptors: Iterable[int]) -> None:
    """Close every descriptor but these and the first three, and those point to /dev/null unless they are among them."""
    first = 3
    for fd in sorted(set(descriptors)):
        if fd > first:
            syscalls.close_range(first, fd - 1)
        first = max(first, fd + 1)
    syscalls.close_range(first)


def tell_ready(channel: int) -> None:
    """Say that all is done. Who has asked for a container that is left alone may be gone by then, his post unread."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        os.write(channel, b"ready")


def tell_failure(channel: int, error: Exception) -> NoReturn:
    """Send what failed to whoever started us, and end."""
    if isinstance(error, OSError):
        number, text = error.errno or 0, error.strerror or str(error)
    else:
        number, text = errno.EINVAL, f"{type(error).__name__}: {error}"
    with contextlib.suppress(OSError):
        socket.send_fds(socket.socket(fileno=channel), [f"failed {number} {text}".encode()], [])
    os._exit(SET_UP_FAILED)
