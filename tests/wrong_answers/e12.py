"""Answers that somebody might give to the exercises of notebook 12; each must fail."""

MOVE = "lab.group('mine').add(os.getpid())"
APART = "syscalls.unshare(syscalls.CLONE_NEWCGROUP)"

SEARCH = (
    "def company(pid):\n    import contextlib\n    found = set()\n    for name in os.listdir('/proc'):\n"
    "        if name.isdigit():\n            with contextlib.suppress(OSError):\n                if "
)

WRONG: dict[str, list[str]] = {
    "12.1": [
        "def settle(program):\n    pass",
        "def settle(program):\n    program()",
        f"def settle(program):\n    {MOVE}\n    program()",
        f"def settle(program):\n    {APART}\n    program()",
        f"def settle(program):\n    {APART}\n    {MOVE}\n    program()",
        f"def settle(program):\n    lab.in_fork(lambda: {MOVE})\n    {APART}\n    program()",
        f"def settle(program):\n    {MOVE}\n    lab.in_fork(lambda: {APART})\n    program()",
        f"def settle(program):\n    program()\n    {MOVE}\n    {APART}",
        "def settle(program):\n    lab.group('mine')\n    syscalls.unshare(syscalls.CLONE_NEWCGROUP)\n    program()",
    ],
    "12.2": [
        "def company(pid):\n    return {pid}",
        "def company(pid):\n    return None",
        "def company(pid):\n    return set()",
        "def company(pid):\n    return {int(name) for name in os.listdir('/proc') if name.isdigit()}",
        SEARCH
        + "path_of(name).startswith(path_of(pid)):\n                    found.add(int(name))\n    return found",
        SEARCH + "path_of(name) == path_of():\n                    found.add(int(name))\n    return found",
        SEARCH
        + "path_of(name) == path_of(pid):\n                    found.add(int(name))\n    return found - {pid}",
    ],
    "12.3": [
        "def root_of(pid):\n    return path_of(pid)",
        "def root_of(pid):\n    return '/'",
        "def root_of(pid):\n    return os.path.dirname(path_of(pid))",
        "def root_of(pid):\n    return path_of()",
        "def root_of(pid):\n    namespaces.enter(pid, ['cgroup'])\n    return path_of(pid)",
        "def root_of(pid):\n    def inside():\n        namespaces.enter(pid, ['cgroup'])\n        return path_of(pid)\n"
        "    return path_of(pid) + lab.in_fork(inside)",
    ],
}
