"""Answers that somebody might give to the exercises of notebook 14; each must fail."""

import os

SET = "syscalls.setns(os.pidfd_open(pid), namespaces.flags"
ALL = f"{SET}(namespaces.FLAGS))"
END = "return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])"
LIMIT = "capabilities.limit_to(capabilities.DOCKER_DEFAULT)"

WRONG: dict[str, list[str]] = {
    "14.1": [
        f"def join(pid):\n    {SET}({{'net'}}))",
        f"def join(pid):\n    {ALL}",
        f"def join(pid):\n    {SET}({{'net', 'ipc', 'uts'}}))",
        "def join(pid):\n    syscalls.unshare(namespaces.flags({'net', 'ipc'}))",
        f"def join(pid):\n    {SET}({{'net', 'ipc'}}))\n    syscalls.unshare(syscalls.CLONE_NEWUTS)",
        f"def join(pid):\n    {SET}({{'net', 'ipc'}}))\n    os._exit(0)",
    ],
    "14.2": [
        "def my_exec(pid, command):\n    return os.spawnvp(os.P_WAIT, command[0], command)",
        f"def my_exec(pid, command):\n    {SET}({{'mnt', 'user', 'net'}}))\n    be_root()\n    {LIMIT}\n"
        "    return os.spawnvp(os.P_WAIT, command[0], command)",
        f"def my_exec(pid, command):\n    {ALL}\n    be_root()\n    {LIMIT}\n"
        "    os.spawnvp(os.P_WAIT, command[0], command)",
        f"def my_exec(pid, command):\n    {SET}(set(namespaces.FLAGS) - {{'mnt'}}))\n    child = os.fork()\n"
        f"    if child == 0:\n        be_root()\n        {LIMIT}\n        os.execvp(command[0], command)\n    {END}",
        f"def my_exec(pid, command):\n    {ALL}\n    child = os.fork()\n"
        f"    if child == 0:\n        be_root()\n        os.execvp(command[0], command)\n    {END}",
        f"def my_exec(pid, command):\n    {ALL}\n    be_root()\n    {LIMIT}\n    os.execvp(command[0], command)",
        "def my_exec(pid, command):\n    return 7",
    ],
    "14.3": [
        f"def with_my_tool(pid, tool):\n    {SET}({{'pid', 'net'}}))\n    in_fork(tool)",
        f"def with_my_tool(pid, tool):\n    {ALL}\n    be_root()\n    in_fork(tool)",
        f"def with_my_tool(pid, tool):\n    {SET}({{'pid', 'net'}}))\n    syscalls.unshare(syscalls.CLONE_NEWNS)\n"
        "    mounts.set_propagation('/', 'private')\n    mounts.proc('/proc')\n    in_fork(tool)",
        f"def with_my_tool(pid, tool):\n    {SET}({{'pid', 'net'}}))\n"
        "    in_fork(lambda: (mounts.proc('/proc'), tool()) and None)",
        f"def with_my_tool(pid, tool):\n    {SET}({{'pid'}}))\n    syscalls.unshare(syscalls.CLONE_NEWNS)\n"
        "    mounts.set_propagation('/', 'private')\n    in_fork(lambda: (mounts.proc('/proc'), tool()) and None)",
        f"def with_my_tool(pid, tool):\n    {SET}({{'pid', 'net'}}))\n    syscalls.unshare(syscalls.CLONE_NEWNS)\n"
        "    in_fork(lambda: (mounts.proc('/proc'), tool()) and None)",
        "def with_my_tool(pid, tool):\n    print('HTTP on port 8000')",
    ],
}
if os.geteuid() == 0:  # an ordinary user's own number is the one of root inside
    WRONG["14.2"] += [
        f"def my_exec(pid, command):\n    {ALL}\n    child = os.fork()\n"
        f"    if child == 0:\n        {LIMIT}\n        os.execvp(command[0], command)\n    {END}",
    ]
