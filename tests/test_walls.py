"""Attacks from inside a container: each wall is tried by what it must not let through.

Where it can be shown, the same attempt is made with that one wall taken away, so that a refusal is known to be the
wall's work.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import platform
import re
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labkernel import children, walls
from labkernel.children import in_child
from labkernel.container import Container
from labkernel.linux import capabilities, mounts, seccomp, syscalls
from labkernel.spec import NAMESPACES
from tests.helpers import facts, inside, logged, needs_ids, own_home, rootless


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        yield place


REFUSED = {"EPERM", "EACCES", "EROFS", "ENOSYS"}
EVERYTHING_ALLOWED: dict[str, Any] = {"seccomp": "unconfined", "cap_add": ["ALL"], "no_new_privs": False}
"""No capability missing, no call filtered: what is left are the namespaces, the mounts, and the cgroup."""

# ---------------------------------------------------------------------- system calls that change the machine

CALLS = {
    "mount a tmpfs": "call('mount', b'none', b'/tmp', b'tmpfs', 0, None)",
    "bind the root elsewhere": "call('mount', b'/', b'/tmp', None, 0x1000, None)",
    "remount the root writable": "call('mount', None, b'/', None, 0x20 | 0x1000, None)",
    "mount another proc": "call('mount', b'proc', b'/tmp', b'proc', 0, None)",
    "mount a cgroup tree": "call('mount', b'none', b'/tmp', b'cgroup2', 0, None)",
    "uncover what a mask hides": "call('umount2', b'/proc/timer_list', 2)",
    "unmount proc": "call('umount2', b'/proc', 2)",
    "open a file system": "call('syscall', N('fsopen'), b'tmpfs', 0)",
    "copy a mount": "call('syscall', N('open_tree'), -100, b'/', 1)",
    "turn the root": "call('pivot_root', b'/', b'/tmp')",
    "new mount namespace": "call('unshare', 0x20000)",
    "new user namespace": "call('unshare', 0x10000000)",
    "new user namespace by clone": "call('syscall', N('clone'), 0x10000000 | 17, 0, 0, 0, 0)",
    "new network namespace": "call('unshare', 0x40000000)",
    "enter a namespace": "call('setns', os.open('/proc/self/ns/uts', 0), 0)",
    "host name": "call('sethostname', b'pwned', 5)",
    "domain name": "call('setdomainname', b'pwned', 5)",
    "system time": "call('settimeofday', ctypes.byref((ctypes.c_long * 2)(int(time.time()), 0)), None)",
    "clock": "call('clock_settime', 0, ctypes.byref((ctypes.c_long * 2)(int(time.time()), 0)))",
    "kernel's clock discipline": "call('adjtimex', ctypes.byref((ctypes.c_long * 30)(1)))",
    "kernel log": "call('klogctl', 3, ctypes.create_string_buffer(4096), 4096)",
    "reboot": "call('reboot', 0)",
    "load a module": "call('syscall', N('init_module'), b'', 0, b'')",
    "load a module by descriptor": "call('syscall', N('finit_module'), 0, b'', 0)",
    "unload a module": "call('syscall', N('delete_module'), b'nosuch', 0)",
    "another kernel": "call('syscall', N('kexec_file_load'), -1, -1, 0, b'', 0)",
    "swap": "call('swapon', b'/tmp/x', 0)",
    "process accounting": "call('acct', b'/tmp/x')",
    "quota": "call('quotactl', 0, None, 0, None)",
    "kernel keys": "call('syscall', N('keyctl'), 0, -3, 1)",
    "add a key": "call('syscall', N('add_key'), b'user', b'k', b'v', 1, -3)",
    "bpf": "call('syscall', N('bpf'), 0, ctypes.byref((ctypes.c_int * 32)(2, 4, 4, 1)), 128)",
    "performance counters": "call('syscall', N('perf_event_open'), "
    "ctypes.byref((ctypes.c_uint64 * 16)(112 << 32)), 0, -1, -1, 0)",
    "page faults in user space": "call('syscall', N('userfaultfd'), 0)",
    "open by handle": "call('syscall', N('open_by_handle_at'), -100, ctypes.byref((ctypes.c_int * 8)(8, 1)), 0)",
    "input and output ports": "call('ioperm', 0x80, 1, 1)",
    "all ports": "call('iopl', 3)",
    "an io_uring": "call('syscall', N('io_uring_setup'), 1, ctypes.create_string_buffer(120))",
    "limits raised": "call('prlimit', 0, 7, ctypes.byref((ctypes.c_uint64 * 2)(1 << 20, 1 << 20)), None)",
    "priority raised": "call('setpriority', 0, 0, -10)",
    "real time": "call('sched_setscheduler', 0, 1, ctypes.byref(ctypes.c_int(1)))",
    "a socket to the hypervisor": "attempt(socket.socket, 40)",
    "trace pid 1": "call('ptrace', 16, 1, 0, 0)",
    "read pid 1's memory": "call('process_vm_readv', 1, ctypes.byref((ctypes.c_void_p * 2)(id(os), 8)), 1, "
    "ctypes.byref((ctypes.c_void_p * 2)(id(os), 8)), 1, 0)",
    "take pid 1's files": "call('syscall', N('pidfd_getfd'), os.pidfd_open(1), 0, 0)",
    "swear off the out-of-memory killer": "attempt(open('/proc/self/oom_score_adj', 'w', 1).write, '-1000\\n')",
}


FREE_WITHOUT_WALLS = (
    "mount a tmpfs", "bind the root elsewhere", "mount another proc", "mount a cgroup tree",
    "uncover what a mask hides", "unmount proc", "open a file system", "copy a mount", "new mount namespace",
    "new user namespace", "new network namespace", "enter a namespace", "host name", "domain name", "kernel keys",
    "add a key",
)  # fmt: skip
"""What the root of a user namespace may do: of these it is known that the filter and the capabilities stop them."""


def attack(what: str, **options: Any) -> str:
    def number(name: re.Match[str]) -> str:
        return str(seccomp.call_number(platform.machine(), name[1]))

    return str(inside("result = " + re.sub(r"N\('(\w+)'\)", number, CALLS[what]), **options))


@pytest.mark.parametrize("what", CALLS)
def test_the_call_is_refused(what: str) -> None:
    assert attack(what) in REFUSED


@pytest.mark.parametrize("what", FREE_WITHOUT_WALLS)
def test_the_call_is_free_without_filter_and_with_all_capabilities(what: str) -> None:
    assert attack(what, **EVERYTHING_ALLOWED) == "done"


THE_MACHINES_OWN = (
    "system time", "clock", "kernel's clock discipline", "kernel log", "load a module", "load a module by descriptor",
    "unload a module", "another kernel", "swap", "process accounting", "bpf", "performance counters",
    "open by handle", "input and output ports", "all ports", "limits raised", "priority raised", "real time",
    "trace pid 1", "read pid 1's memory", "take pid 1's files", "swear off the out-of-memory killer",
)  # fmt: skip
"""What even all capabilities do not reach, since they hold in the container's user namespace only."""


@pytest.mark.parametrize("what", THE_MACHINES_OWN)
def test_the_machine_itself_is_out_of_reach_of_all_capabilities(what: str) -> None:
    assert attack(what, **EVERYTHING_ALLOWED) in REFUSED


def test_the_new_host_name_of_a_container_is_not_the_hosts() -> None:
    before = socket.gethostname()
    program = "result = [call('sethostname', b'pwned', 5), socket.gethostname()]"
    assert inside(program, **EVERYTHING_ALLOWED) == ["done", "pwned"]
    assert socket.gethostname() == before


# ---------------------------------------------------------------------- the file system


@pytest.fixture
def host_file(tmp_path: Path) -> Path:
    """A file that everybody could read who reached it."""
    path = tmp_path / "secret"
    path.write_text("secret")
    path.chmod(0o644)
    return path


ESCAPES = {
    "a second chroot": """
os.mkdir('/tmp/jail'); os.chroot('/tmp/jail')
for _ in range(64): os.chdir('..')
os.chroot('.')""",
    "an open directory": """
out = os.open('/', os.O_RDONLY)
os.mkdir('/tmp/jail'); os.chroot('/tmp/jail'); os.fchdir(out)
for _ in range(64): os.chdir('..')
os.chroot('.')""",
    "the parent of the root": "os.chdir('/' + '../' * 64)",
    "the root of pid 1": "found = attempt(os.chdir, '/proc/1/root')",
    "the directory of pid 1": "found = attempt(os.chdir, '/proc/1/cwd')",
    "the parent's files": "found = attempt(os.chdir, f'/proc/{os.getppid()}/root')",
    "a descriptor left open": """
for name in os.listdir('/proc/self/fd'):
    if attempt(os.chdir, f'/proc/self/fd/{name}/..') == 'done': break""",
}


@pytest.mark.parametrize("way", ESCAPES)
@pytest.mark.parametrize("options", [{}, EVERYTHING_ALLOWED], ids=["as it is", "all capabilities"])
def test_no_way_out_of_the_root(way: str, options: dict[str, Any], host_file: Path) -> None:
    program = f"""
def place(path): return [os.stat(path).st_dev, os.stat(path).st_ino]
before = place('/')
{ESCAPES[way]}
for _ in range(64): os.chdir('..')
result = [before == place('.'), os.path.exists({str(host_file)!r}) or os.path.exists('.' + {str(host_file)!r})]
"""
    assert inside(program, **options) == [True, False]
    assert host_file.exists()


@pytest.mark.parametrize("kind", ["stat.S_IFBLK", "stat.S_IFCHR"])
@pytest.mark.parametrize("options", [{}, EVERYTHING_ALLOWED], ids=["as it is", "all capabilities"])
def test_no_device_can_be_made(kind: str, options: dict[str, Any]) -> None:
    # 7:0 and 1:1: the first loop device, and the machine's memory
    number = "os.makedev(7, 0)" if kind == "stat.S_IFBLK" else "os.makedev(1, 1)"
    assert inside(f"result = attempt(os.mknod, '/tmp/x', {kind} | 0o666, {number})", **options) in REFUSED


def test_a_fifo_can_be_made_so_mknod_is_not_simply_off() -> None:
    assert inside("result = attempt(os.mknod, '/tmp/x', stat.S_IFIFO | 0o666)") == "done"


def test_the_devices_are_the_harmless_ones() -> None:
    program = """
result = []
for top, _, names in os.walk('/dev'):
    for name in names:
        status = os.lstat(os.path.join(top, name))
        if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            result.append([os.path.join(top, name), os.major(status.st_rdev), os.minor(status.st_rdev)])
"""
    expected = [
        ["/dev/full", 1, 7], ["/dev/null", 1, 3], ["/dev/pts/ptmx", 5, 2], ["/dev/random", 1, 8],
        ["/dev/tty", 5, 0], ["/dev/urandom", 1, 9], ["/dev/zero", 1, 5],
    ]  # fmt: skip
    assert sorted(inside(program)) == expected


def test_a_device_of_a_volume_cannot_be_opened(tmp_path: Path) -> None:
    try:
        os.mknod(tmp_path / "zero", 0o20666, os.makedev(1, 5))
        (tmp_path / "zero").chmod(0o666)
    except PermissionError:
        pytest.skip("an ordinary user can make no device, so none can lie in a volume of theirs")
    assert (tmp_path / "zero").open("rb").read(1) == b"\0"
    tmp_path.chmod(0o755)
    assert inside("result = attempt(open, '/v/zero')", volumes=[f"{tmp_path}:/v"]) == "EACCES"


UNWRITABLE = (
    "/proc/sys/kernel/hostname", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/sysrq", "/proc/sys/vm/drop_caches",
    "/proc/sys/user/max_user_namespaces", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv4/conf/all/forwarding",
    "/proc/sysrq-trigger", "/proc/irq/default_smp_affinity", "/proc/self/uid_map",
    "/proc/1/comm", "/proc/1/mem", "/sys/kernel/profiling", "/sys/class/net/lo/mtu", "/sys/power/state",
)  # fmt: skip


@pytest.mark.parametrize("path", UNWRITABLE)
def test_the_kernels_switches_cannot_be_written(path: str) -> None:
    if not os.path.exists(path):
        pytest.skip(f"this kernel has no {path}")
    # What would be written is what is there, so that a wall that fell does no harm.
    program = f"""
def write():
    try: now = open({path!r}, 'rb').read(64)
    except OSError: now = b''
    fd = os.open({path!r}, os.O_WRONLY); os.write(fd, now or b'0')
result = attempt(write)"""
    assert inside(program) in REFUSED | {"ENOENT"} | ({"EINVAL"} if path == "/proc/1/comm" else set())


@pytest.mark.parametrize(
    "path", ["/proc/sys/kernel/hostname", "/proc/sys/net/ipv4/ip_forward", "/proc/sysrq-trigger"]
)
def test_all_capabilities_of_the_container_do_not_write_the_machines_switches(path: str) -> None:
    if not os.path.exists(path):
        pytest.skip(f"this kernel has no {path}")
    assert inside(f"result = attempt(os.open, {path!r}, os.O_WRONLY)", **EVERYTHING_ALLOWED) in REFUSED


def test_the_hosts_sys_is_read_only_with_all_that_is_mounted_in_it() -> None:
    """With the host's network comes the host's /sys, and its control groups with it."""
    program = """
flags = [line.split()[1:4] for line in open('/proc/self/mounts') if line.split()[1].startswith('/sys')]
result = [[place for place, _, options in flags if 'ro' not in options.split(',')],
          attempt(os.chmod, '/sys/kernel', 0o755)]"""
    assert inside(program, network="host") == [[], "EROFS"]


@pytest.mark.parametrize("name", ["proc", "dev", "sys"])
def test_nothing_is_mounted_by_way_of_a_link_of_the_image(name: str, tmp_path: Path) -> None:
    """/proc would be somewhere else, and nothing of it would be masked."""
    tmp_path.chmod(0o755)
    for place in {"proc", "dev", "sys", "tmp/x"} - {name}:
        (tmp_path / "rootfs" / place).mkdir(parents=True)
    (tmp_path / "rootfs" / name).symlink_to("/tmp/x")
    (tmp_path / "rootfs").chmod(0o755)
    with pytest.raises(OSError, match=f"/{name} is a symbolic link in the image") as caught:
        Container(str(tmp_path / "rootfs"), ["/nothing"]).run()
    assert caught.value.errno == errno.ELOOP


HIDDEN = tuple(path for path in mounts.MASKED_PATHS if os.path.exists(path))


@pytest.mark.parametrize("path", HIDDEN)
def test_a_masked_path_shows_nothing(path: str) -> None:
    program = (
        f"result = os.listdir({path!r}) if os.path.isdir({path!r}) else list(open({path!r}, 'rb').read(64))"
    )
    assert inside(program) == []


def test_without_masks_something_would_be_seen() -> None:
    program = "result = len(open('/proc/interrupts').read())"
    assert inside(program, masked_paths=False) > 0
    assert inside(program) == 0


INIT_IS_CLOSED = (
    "environ", "exe", "cwd", "root", "fd", "maps", "mem", "auxv", "stack", "syscall", "ns/mnt", "ns/user", "fdinfo/0",
    "map_files", "pagemap", "io", "smaps",
)  # fmt: skip


@pytest.mark.parametrize("options", [{}, EVERYTHING_ALLOWED], ids=["as it is", "all capabilities"])
def test_nobody_looks_into_init(options: dict[str, Any]) -> None:
    program = f"""
def look(name):
    path = '/proc/1/' + name
    if os.path.islink(path): return os.readlink(path)
    if os.path.isdir(path): return [os.readlink(path + '/' + name) for name in os.listdir(path)]
    return open(path, 'rb').read(1)
result = {{name: attempt(look, name) for name in {INIT_IS_CLOSED!r}}}"""
    seen = inside(program, **options)
    assert {name: answer for name, answer in seen.items() if answer == "done"} == {}


def test_a_user_of_the_container_has_no_power_over_init() -> None:
    """Init is root, who is somebody else."""
    needs_ids()
    program = """
import resource
attempts = [
    lambda: os.kill(1, signal.SIGTERM),
    lambda: resource.prlimit(1, resource.RLIMIT_CPU, (0, 0)),
    lambda: os.setpriority(os.PRIO_PROCESS, 1, 5),
]
result = []
for attempt in attempts:
    try:
        result.append(attempt())
    except OSError as error:
        result.append(error.errno)"""
    refused = inside(program, user="1000:1000")
    assert refused == [errno.EPERM] * 3


INIT = "dict(line.split(':', 1) for line in open('/proc/1/status').read().splitlines())"


def test_init_gives_up_what_the_program_gives_up() -> None:
    """All but the right to send signals: the program may become another user."""
    names = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")
    program = f"result = [int({INIT}[name], 16) for name in {names}]"
    docker = sum(1 << number for number in capabilities.DOCKER_DEFAULT)
    kill = 1 << capabilities.Capability.CAP_KILL
    assert inside(program) == [0, kill, kill, docker, 0, 1, 2]
    assert inside(program, cap_drop=["ALL"]) == [0, kill, kill, 0, 0, 1, 2]
    assert inside(program, seccomp="unconfined", no_new_privs=False)[5:] == [0, 0]


def test_another_user_without_any_capability() -> None:
    """To become that user takes two, which are gone afterwards, from the bounding set too."""
    needs_ids()
    names = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    status = "dict(line.split(':', 1) for line in open('/proc/self/status').read().splitlines())"
    program = f"status = {status}\nresult = [os.getuid(), os.getgid(), *(int(status[name], 16) for name in {names})]"
    for user, ids in (("1000:1000", [1000, 1000]), ("0:1000", [0, 1000]), ("1000:0", [1000, 0])):
        for no_new_privs in (True, False):
            options: dict[str, Any] = {"user": user, "cap_drop": ["ALL"], "no_new_privs": no_new_privs}
            assert inside(program, **options) == [*ids, 0, 0, 0, 0, 0], options


def test_a_filter_of_ones_own_is_not_inits(tmp_path: Path) -> None:
    """It may forbid what init does, and then nobody would reap, or forward a signal."""
    profile = tmp_path / "profile.json"
    profile.write_text(
        json.dumps(
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["wait4", "waitid", "kill", "vfork"], "action": "SCMP_ACT_ERRNO"}],
            }
        )
    )
    program = "import os, signal, time; signal.signal(15, lambda *_: os._exit(9))"
    command = ["python3", "-c", f"{program}; print('on', flush=True)\nwhile True: time.sleep(0.1)"]
    with Container("python", command, seccomp=str(profile)) as container:
        logged(container, "on")
        assert container.stop(20) == 9


def test_where_spawn_cannot_begin_a_session_init_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an old libc, as conda's Python is built for, init makes a copy of itself."""
    process = Container("python", ["true"]).spec.process
    walls.spawn_makes_sessions.cache_clear()
    assert walls.spawns(process)
    assert not walls.spawns(process._replace(tty=True))

    def spawn(*_: object, setsid: bool) -> int:
        raise NotImplementedError("posix_spawn: setsid unavailable on this platform")

    monkeypatch.setattr(os, "posix_spawn", spawn)
    walls.spawn_makes_sessions.cache_clear()
    assert not walls.spawns(process)
    walls.spawn_makes_sessions.cache_clear()


def test_the_machines_own_null_device_is_left_alone() -> None:
    """The log is given to the program's group, by descriptors 1 and 2: which init has open on the null device.

    Only root can take harm from it, and only without a user namespace: there our root is the machine's.
    """
    if rootless():
        pytest.skip("an ordinary user could not change the machine's null device")
    needs_ids()
    null = os.stat("/dev/null")
    kinds = [kind for kind in NAMESPACES if kind != "user"]
    try:
        with Container(
            "python", ["sh", "-c", "echo said; sleep 60"], user="1000:1000", namespaces=kinds
        ) as container:
            logged(container, "said")
        after = os.stat("/dev/null")
        assert (after.st_mode, after.st_uid, after.st_gid) == (null.st_mode, null.st_uid, null.st_gid)
    except AssertionError:
        os.chown("/dev/null", null.st_uid, null.st_gid)
        os.chmod("/dev/null", stat.S_IMODE(null.st_mode))
        raise


def test_nothing_in_proc_tells_of_the_host(home: Path) -> None:
    """Everything readable in /proc and /sys, searched for the paths and names of this machine."""
    words = [str(home), sys.prefix, sys.base_prefix, str(Path(__file__).parent.parent), str(Path.home())]
    if len(socket.gethostname()) > 5:  # a short one is part of other words
        words.append(socket.gethostname())
    words = [word for word in dict.fromkeys(words) if word not in ("/", "/usr", "/usr/local", "/root")]
    program = f"""
words = [word.encode() for word in {words!r}]
result, looked = [], 0
def look(path):
    global looked
    try:
        if os.path.islink(path): content = os.readlink(path).encode()
        else:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try: content = os.read(fd, 1 << 20)
            finally: os.close(fd)
    except OSError: return
    looked += 1
    result.extend([path, word.decode()] for word in words if word in content and 'cmdline' not in path)
for top in ('/proc/1', '/proc/self', '/proc/sys/kernel', '/sys/class', '/proc/net', '/etc'):
    for directory, inner, names in os.walk(top):
        inner[:] = [d for d in inner if d not in ('task', 'map_files')]
        for name in names + inner:
            look(os.path.join(directory, name))
for name in os.listdir('/proc'):
    if os.path.isfile('/proc/' + name): look('/proc/' + name)
look('/proc/1/cmdline') or look('/proc/1/comm')
result = [result, looked]"""
    told, looked = inside(program)
    assert looked > 100
    assert told == []


def test_the_programs_own_streams_do_not_tell_where_the_hosts_files_are(home: Path) -> None:
    """Without a caller's pipes the output goes to a file of the host; its path is none of the program's business."""
    program = "import os, time; print([os.readlink(f'/proc/self/fd/{n}') for n in (0, 1, 2)]); time.sleep(60)"
    with Container("python", ["python3", "-uc", program]) as container:
        told = logged(container, "]")
    assert str(home) not in told
    assert "containers" not in told


def test_init_calls_itself_labkernel_and_no_more() -> None:
    program = "result = [open('/proc/1/cmdline').read().strip(chr(0)), open('/proc/1/comm').read().strip()]"
    assert inside(program) == ["labkernel", "labkernel"]


# ---------------------------------------------------------------------- what is given to the program


def test_only_three_descriptors_are_open() -> None:
    descriptors = inside("result = sorted(os.listdir('/proc/self/fd'))")
    assert descriptors == ["0", "1", "2", "3"]  # 3 is listdir's own
    with Container("python", ["sleep", "60"]) as container:
        ended = container.exec(["sh", "-c", "ls /proc/$$/fd"])
    assert set(ended.stdout.split()) <= {b"0", b"1", b"2"}


@pytest.mark.skipif(
    rootless(), reason="only root may look at the descriptors of a process that is not dumpable"
)
def test_init_itself_keeps_no_descriptor_of_the_host() -> None:
    links = set[str]()
    with Container("python", ["sleep", "60"], volumes=["/etc:/v:ro"]) as container:
        end = time.monotonic() + 10  # it says that the program is started before it closes what it was given
        while links != {"/dev/null"}:
            assert time.monotonic() < end, links
            with contextlib.suppress(FileNotFoundError):
                links = {file.readlink().as_posix() for file in Path(f"/proc/{container.pid}/fd").iterdir()}


def test_the_environment_is_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKERNEL_TEST_SECRET", "1")
    with Container("python", ["sleep", "60"], hostname="box", env={"A": "ä b"}) as container:
        second = container.exec(["env"], env={"B": "2"})
    first = Container("python", ["env"], hostname="box", env={"A": "ä b", "HOME": "/tmp"}).run()
    names = dict(line.split("=", 1) for line in first.stdout.decode().splitlines())
    assert names == {"PATH": names["PATH"], "HOME": "/tmp", "HOSTNAME": "box", "A": "ä b"}
    assert sorted(dict(line.split("=", 1) for line in second.stdout.decode().splitlines())) == [
        "A", "B", "HOME", "HOSTNAME", "PATH",
    ]  # fmt: skip


def test_signals_umask_and_priority_are_as_a_program_expects() -> None:
    program = """
status = dict(line.split(':', 1) for line in open('/proc/self/status').read().splitlines())
result = [status['SigBlk'].strip(), status['ShdPnd'].strip(), os.nice(0), os.umask(0), os.getcwd(),
          os.getpgid(0) == os.getpid()]
"""
    nice = os.nice(0)  # these tests may be run with less urgency than others
    assert inside(program) == ["0" * 16, "0" * 16, nice, 0o022, "/", True]


def test_the_starters_umask_is_not_the_containers() -> None:
    needs_ids()
    children.close_launcher()
    before = os.umask(0o077)
    try:
        with Container("python", ["sleep", "60"], user="1000", workdir="/tmp/a/b") as container:
            said = container.exec(["sh", "-c", "umask; cat /etc/hostname; ls -ld / /etc /tmp/a/b"]).stdout
            ended = Container("python", ["sh", "-c", "umask"], user="1000").run()
    finally:
        os.umask(before)
        children.close_launcher()
    umask, hostname, *directories = said.decode().splitlines()
    assert (umask, hostname) == ("0022", container.spec.hostname)
    assert [line.split()[0] for line in directories] == ["drwxr-xr-x"] * 3
    assert ended.stdout == b"0022\n"


STARTER = """
import ctypes, os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
ignore = (ctypes.c_ulong * 4)(1)
number = int(sys.argv[1])
assert ctypes.CDLL(None).syscall(number, 32, ignore, None, ctypes.c_size_t(8)) == 0
os.execv(sys.executable, [sys.executable, "-c", sys.argv[2]])
"""
STARTED = """
from labkernel import Container
print(open("/proc/self/status").read())
print(Container("python", ["cat", "/proc/self/status"]).run().stdout.decode())
"""


def test_what_the_starter_ignores_the_program_does_not() -> None:
    """As with nohup. 32 and 33 are libc's own: it lets nobody set them, and ignores them in what posix_spawn starts.

    What make starts (make 4.3 does it by posix_spawn) has them ignored, too. Nobody complains of it.
    """
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "LABKERNEL_DEBUG": "1"}
    command = [sys.executable, "-c", STARTER, str(syscalls.SYS_rt_sigaction), STARTED]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    masks = [int(line.split()[1], 16) for line in done.stdout.splitlines() if line.startswith("SigIgn")]
    assert masks[0] & (1 << 31 | 1) == 1 << 31 | 1
    assert masks[1] & ~(3 << 31) == 0
    assert done.stderr == ""


# ---------------------------------------------------------------------- processes


def test_no_process_of_the_host_is_seen_or_killed() -> None:
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        program = f"""
kill = attempt(os.kill, {victim.pid}, 9) if {victim.pid} not in (1, os.getpid()) else 'ESRCH'
result = [kill, sorted(int(n) for n in os.listdir('/proc') if n.isdigit()), os.getpid(), os.getppid(), os.getsid(0)]"""
        killed, seen, own, parent, session = inside(program)
        assert killed == "ESRCH"
        assert (seen, parent, session) == ([1, own], 1, own)
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_killing_everybody_kills_nobody_else() -> None:
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with Container("python", ["sleep", "60"]) as neighbour:
            assert inside("result = attempt(os.kill, -1, 9)", **EVERYTHING_ALLOWED) in ("done", "ESRCH")
            assert neighbour.running()
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_init_cannot_be_killed_from_inside() -> None:
    program = """
for number in (signal.SIGKILL, signal.SIGSTOP): os.kill(1, number)
time.sleep(0.05)
result = open('/proc/1/stat').read().split()[2]"""
    assert inside(program) == "S"


def test_a_process_that_comes_in_by_exec_is_behind_the_same_walls() -> None:
    wanted = (
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp",
        "Uid",
        "Gid",
        "Groups",
    )
    program = f"""
import json, os
status = dict(line.split(':', 1) for line in open('/proc/self/status').read().splitlines())
found = {{key: status[key].split() for key in {wanted!r}}}
found['ns'] = {{kind: os.stat('/proc/self/ns/' + kind).st_ino for kind in os.listdir('/proc/self/ns')}}
found['root'] = [os.stat('/').st_dev, os.stat('/').st_ino]
found['cgroup'] = open('/proc/self/cgroup').read()
found['limits'] = open('/proc/self/limits').read()
print(json.dumps(found))"""
    with Container("python", ["sh", "-c", 'python3 -c "$P" && sleep 60'], env={"P": program}) as container:
        first = json.loads(logged(container, "}"))
        second = json.loads(container.exec(["python3", "-c", program]).stdout)
    assert first == second
    assert first["NoNewPrivs"] == ["1"]
    assert first["Seccomp"] == ["2"]


def test_a_process_that_is_just_coming_in_cannot_be_caught(home: Path) -> None:
    """What `docker exec` once got wrong: between setns and execve a process still has something of the host.

    A program inside watches for new processes, and tries to reach the host through them.
    """
    program = """
import os, time
known = set(os.listdir('/proc'))
caught, end = set(), time.monotonic() + 60
print('watching', flush=True)
while not os.path.exists('/tmp/stop') and time.monotonic() < end:
    for pid in set(os.listdir('/proc')) - known:
        if not pid.isdigit(): continue
        for name in ('exe', 'cwd', 'root'):
            try: path = os.readlink(f'/proc/{pid}/{name}')
            except OSError: continue
            try: ours = name != 'exe' or os.path.samefile(f'/proc/{pid}/exe', path)
            except OSError: ours = os.path.exists(path)
            if not ours: caught.add(path)
            if name != 'exe' and path not in ('/',): caught.add(f'{name} {path}')
        try:
            for fd in os.listdir(f'/proc/{pid}/fd'):
                path = os.readlink(f'/proc/{pid}/fd/{fd}')
                if path.startswith('/') and not path.startswith('/proc') and not os.path.exists(path): caught.add(path)
        except OSError: pass
print(sorted(caught), flush=True)
time.sleep(60)"""
    with Container("python", ["python3", "-u", "-c", program]) as container:
        logged(container, "watching")
        for _ in range(40):
            container.exec(["true"])
        container.exec(["touch", "/tmp/stop"])
        told = logged(container, "]")
    assert told.splitlines() == ["watching", "[]"]


# ---------------------------------------------------------------------- rights that could be gained

SET_UID = """
import shutil
shutil.copy('/usr/bin/python3', '/tmp/become'); os.chown('/tmp/become', 0, 0); os.chmod('/tmp/become', 0o4755)
read, write = os.pipe()
if os.fork() == 0:
    os.dup2(write, 1)
    os.setgroups([]); os.setgid(1000); os.setuid(1000)
    os.execv('/tmp/become', ['become', '-c', 'import os; print(os.geteuid())'])
os.wait()
result = int(os.read(read, 100))"""


def test_a_setuid_program_gains_nothing() -> None:
    needs_ids()
    assert inside(SET_UID) == 1000


def test_without_no_new_privs_it_would() -> None:
    needs_ids()
    assert inside(SET_UID, no_new_privs=False) == 0


FILE_CAPABILITY = """
import shutil, struct
shutil.copy('/usr/bin/python3', '/tmp/become')
os.setxattr('/tmp/become', 'security.capability', struct.pack('<5I', 0x02000001, 1 << 10, 0, 0, 0))
read, write = os.pipe()
if os.fork() == 0:
    os.dup2(write, 1)
    os.setgroups([]); os.setgid(1000); os.setuid(1000)
    os.execv('/tmp/become', ['become', '-c', 'print(open("/proc/self/status").read().split("CapEff:")[1].split()[0])'])
os.wait()
result = int(os.read(read, 100), 16)"""


@pytest.mark.parametrize(("no_new_privs", "gained"), [(True, 0), (False, 1 << 10)])
def test_a_file_capability_gains_nothing(no_new_privs: bool, gained: int) -> None:
    needs_ids()
    assert inside(FILE_CAPABILITY, no_new_privs=no_new_privs) == gained


def test_the_capabilities_are_dockers() -> None:
    program = """
status = dict(line.split(':', 1) for line in open('/proc/self/status').read().splitlines())
result = [int(status[key], 16) for key in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb')]"""
    docker = sum(1 << number for number in capabilities.DOCKER_DEFAULT)
    assert inside(program) == [0, docker, docker, docker, 0]
    assert inside(program, cap_drop=["ALL"]) == [0] * 5
    assert inside(program, cap_drop=["ALL"], cap_add=["NET_RAW"]) == [0, 1 << 13, 1 << 13, 1 << 13, 0]


def test_somebody_who_is_not_root_has_no_capability() -> None:
    needs_ids()
    program = """
status = dict(line.split(':', 1) for line in open('/proc/self/status').read().splitlines())
result = [int(status[key], 16) for key in ('CapInh', 'CapPrm', 'CapEff', 'CapAmb')]"""
    assert inside(program, user="1000:1000") == [0] * 4


def test_no_group_of_the_caller_comes_along() -> None:
    needs_ids()
    assert inside("result = os.getgroups()") in ([], [0])
    assert inside("result = os.getgroups()", user="65534:65534") == []


@pytest.mark.skipif(rootless(), reason="files of the host's root are out of reach of an ordinary user anyway")
def test_root_inside_is_not_root_of_the_hosts_files(tmp_path: Path) -> None:
    """A container's root owns what is in its volume, and nothing of what else it might get hold of."""
    with Container("python", ["sleep", "60"]) as container:
        status = Path(f"/proc/{container.pid}/status").read_text()
        uid = int(status.split("Uid:")[1].split()[0])
    assert uid == facts()["container_map"]["outside"] != 0


def test_limits_of_a_process_are_set_and_cannot_be_raised() -> None:
    program = """
import resource
result = []
for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_CORE):
    soft, hard = resource.getrlimit(kind)
    try: resource.setrlimit(kind, (hard + 1, hard + 1))
    except ValueError as error: result.append([soft, hard, str(error)])"""
    refusal = "not allowed to raise maximum limit"
    assert inside(program) == [[1024, 1024, refusal], [0, 0, refusal]]


# ---------------------------------------------------------------------- cgroups


def test_the_container_finds_no_control_group_to_change() -> None:
    program = "result = [[top, names] for top, _, names in os.walk('/sys/fs/cgroup') if names]"
    assert inside(program) == []


def test_its_own_place_looks_like_the_root() -> None:
    program = "result = sorted({line.split(':', 2)[2].strip() for line in open('/proc/self/cgroup')})"
    assert inside(program) == ["/"]


# ---------------------------------------------------------------------- the network


def listening(family: int, address: Any) -> socket.socket:
    sock = socket.socket(family)
    sock.bind(address)
    sock.listen()
    return sock


def test_a_port_of_the_host_is_not_there() -> None:
    with listening(socket.AF_INET, ("127.0.0.1", 0)) as host:
        program = f"result = attempt(socket.create_connection, ('127.0.0.1', {host.getsockname()[1]}), 5)"
        assert inside(program) == "ECONNREFUSED"
        if not rootless():
            assert inside(program, network="host") == "done"


def test_an_abstract_socket_of_the_host_is_not_there() -> None:
    name = f"labkernel-test-{os.getpid()}"
    with listening(socket.AF_UNIX, f"\0{name}"):
        program = f"result = attempt(socket.socket(socket.AF_UNIX).connect, chr(0) + {name!r})"
        assert inside(program) == "ECONNREFUSED"
        assert inside(program, network="host") == "done"


def test_there_is_only_the_loopback() -> None:
    program = """
result = [[name for _, name in socket.if_nameindex()], open('/proc/net/route').read().count(chr(10)),
          attempt(socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect, ('192.0.2.1', 9))]"""
    assert inside(program) == [["lo"], 1, "ENETUNREACH"]


def test_a_raw_socket_hears_only_the_containers_own() -> None:
    """CAP_NET_RAW is in Docker's set, for ping; it holds in the container's own network."""
    program = """
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)); raw.settimeout(0.3)
try: result = len(raw.recv(2048))
except TimeoutError: result = 'silence'"""
    with contextlib.ExitStack() as closing:
        host = closing.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        noise = subprocess.Popen(
            [sys.executable, "-c", "import socket, time\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
             f"while True: s.sendto(b'x', ('127.0.0.1', {_free_port(host)})); time.sleep(0.01)"],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert inside(program) == "silence"
        finally:
            noise.kill()
            noise.wait()


def _free_port(sock: socket.socket) -> int:
    sock.bind(("127.0.0.1", 0))
    return int(sock.getsockname()[1])


def test_the_hosts_interfaces_cannot_be_changed_even_when_they_are_shared() -> None:
    program = """
import fcntl, struct
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
request = struct.pack('16sh22x', b'lo', 0)
answer = fcntl.ioctl(s, 0x8913, request)
result = attempt(fcntl.ioctl, s, 0x8914, answer)   # SIOCSIFFLAGS, with the flags that it has"""
    assert inside(program, network="host", **EVERYTHING_ALLOWED) == "EPERM"
    assert inside(program) == "EPERM"
    assert inside(program, **EVERYTHING_ALLOWED) == "done"


def test_the_hosts_network_switches_cannot_be_written_when_the_network_is_shared() -> None:
    program = """
path = '/proc/sys/net/ipv4/ip_forward'
now = open(path).read()
result = attempt(lambda: os.write(os.open(path, os.O_WRONLY), now.encode()))"""
    assert inside(program, network="host", masked_paths=False, **EVERYTHING_ALLOWED) in REFUSED


# ---------------------------------------------------------------------- an empty container


def test_what_cannot_be_rehearsed_does_no_harm() -> None:
    like = Container("python", ["true"], user="\u00b2").spec  # a digit, and no number

    def work() -> None:
        _, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        walls.rehearse(theirs, pickle.dumps({"spec": like, "logged": []}))

    in_child(work)


def test_what_was_not_read_before_is_not_taken_for_the_order() -> None:
    def work() -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.send(b"mapped")
        socket.send_fds(ours, [b"order"], [0, 1, 2, 0, 1, 2])
        return len(walls.receive(theirs).volumes)

    assert in_child(work) == 1
