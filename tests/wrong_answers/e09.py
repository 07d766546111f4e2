"""Answers that somebody might give to the exercises of notebook 09; each must fail."""

APART = "syscalls.unshare(syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNS)"
PRIVATE = "mounts.set_propagation('/', 'private')"
PROC = "mounts.proc('/proc')\n        program()"
FIND = "for pid in filter(str.isdigit, os.listdir('/proc')):\n        try:\n            numbers = nspid(int(pid))"
NEXT = "        except OSError:\n            continue\n"
START = "child = os.fork()\n    if child == 0:\n        program()\n        os._exit(0)"
FORWARD = (
    "for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):\n"
    "        signal.signal(number, lambda got, _: os.kill(child, got))"
)
END = "code = os.waitstatus_to_exitcode(status)\n    os._exit(code if code >= 0 else 128 - code)"

WRONG: dict[str, list[str]] = {
    "09.1": [
        "def boxed(program):\n    pass",
        "def boxed(program):\n    program()",
        "def boxed(program):\n    lab.in_fork(program)",
        f"def boxed(program):\n    {APART}\n    {PRIVATE}\n    program()",
        f"def boxed(program):\n    {APART}\n    {PRIVATE}\n    lab.in_fork(program)",
        f"def boxed(program):\n    {APART}\n    {PRIVATE}\n    mounts.proc('/proc')\n    lab.in_fork(program)",
        f"def boxed(program):\n    def inside():\n        {PROC}\n    {APART}\n    lab.in_fork(inside)",
        f"def boxed(program):\n    def inside():\n        {PROC}\n"
        "    syscalls.unshare(syscalls.CLONE_NEWPID)\n    lab.in_fork(inside)",
        "def boxed(program):\n    def inside():\n        mounts.tmpfs('/proc')\n        program()\n"
        f"    {APART}\n    {PRIVATE}\n    lab.in_fork(inside)",
        "def boxed(program):\n    os._exit(0)",
    ],
    "09.2": [
        "def outside_number(init, inside):\n    return inside",
        "def outside_number(init, inside):\n    return init",
        "def outside_number(init, inside):\n    return init + inside - 1",
        "def outside_number(init, inside):\n    return str(init)",
        f"def outside_number(init, inside):\n    {FIND}\n            if numbers[-1] == inside:\n"
        f"                return int(pid)\n{NEXT}",
        f"def outside_number(init, inside):\n    {FIND}\n"
        "            if os.readlink(f'/proc/{pid}/ns/pid') == os.readlink(f'/proc/{init}/ns/pid'):\n"
        f"                return int(pid)\n{NEXT}",
    ],
    "09.3": [
        "def my_init(program):\n    pass",
        "def my_init(program):\n    os._exit(7)",
        f"def my_init(program):\n    {START}\n    _, status = os.waitpid(child, 0)\n    {END}",
        f"def my_init(program):\n    {START}\n    {FORWARD}\n    _, status = os.waitpid(child, 0)\n    {END}",
        f"def my_init(program):\n    {START}\n    {FORWARD}\n    _, status = os.wait()\n    {END}",
        f"def my_init(program):\n    {START}\n    while os.wait()[0] != child:\n        pass\n    os._exit(7)",
        f"def my_init(program):\n    {START}\n    {FORWARD}\n    while os.wait()[0] != child:\n        pass",
        f"def my_init(program):\n    {START}\n    {FORWARD}\n    while os.wait()[0] != child:\n        pass\n"
        "    os._exit(7)",
        f"def my_init(program):\n    {START}\n    signal.signal(signal.SIGTERM, lambda got, _: os.kill(child, got))\n"
        f"    while True:\n        pid, status = os.wait()\n        if pid == child:\n            break\n    {END}",
        f"def my_init(program):\n    {START}\n    {FORWARD}\n    signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "    while True:\n        signal.pause()",
    ],
}
