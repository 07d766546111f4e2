"""Answers that somebody might give to the exercises of notebook 04; each must fail."""

HEAD = "def look_but_do_not_touch(path, program):\n"
WORDS = (
    "def hears(speaker, listener, path):\n"
    "    first, second = (next(m.propagation for m in mounts.mountinfo(pid) if m.mount_point == path)\n"
    "                     for pid in (speaker, listener))\n"
)

WRONG: dict[str, list[str]] = {
    "04.1": [
        HEAD + "    pass",
        HEAD + "    program()",
        HEAD + "    alone()\n    program()",
        HEAD + "    mounts.bind(path, path, recursive=True, read_only=True)\n    program()",
        HEAD
        + "    syscalls.unshare(syscalls.CLONE_NEWNS)\n    syscalls.mount(None, path, None, MS_REMOUNT | MS_RDONLY)\n"
        "    program()",
        HEAD + "    alone()\n    mounts.bind(path, path, read_only=True)\n    program()",
        HEAD
        + "    alone()\n    syscalls.mount(path, path, None, MS_BIND | MS_REC | MS_RDONLY)\n    program()",
        HEAD + "    alone()\n    mounts.tmpfs(path)\n    program()",
        HEAD + "    os.chmod(path, 0o500)\n    program()",
        HEAD + "    syscalls.unshare(syscalls.CLONE_NEWNS)\n"
        "    mounts.bind(path, path, recursive=True, read_only=True)\n    program()",
        HEAD + "    syscalls.unshare(syscalls.CLONE_NEWNS)\n    mounts.set_propagation(path, 'shared')\n"
        "    mounts.bind(path, path, recursive=True, read_only=True)\n    program()",
        HEAD + "    program()\n    alone()\n    mounts.bind(path, path, recursive=True, read_only=True)",
    ],
    "04.2": [
        "def arrives(outside, inside, way):\n    return True",
        "def arrives(outside, inside, way):\n    return False",
        "def arrives(outside, inside, way):\n    return outside == inside == 'shared'",
        "def arrives(outside, inside, way):\n    return inside == 'shared' or (inside == 'slave' and way == 'inwards')",
        "def arrives(outside, inside, way):\n    return outside == 'shared' and inside in ('shared', 'slave')",
        "def arrives(outside, inside, way):\n    return outside == 'shared' and (\n"
        "        inside == 'shared' or (inside == 'slave' and way == 'outwards'))",
        "def arrives(outside, inside, way):\n    return 'yes'",
    ],
    "04.3": [
        "def hears(speaker, listener, path):\n    return False",
        "def hears(speaker, listener, path):\n    return True",
        WORDS + "    return first == second",
        WORDS + "    return bool(first) and bool(second)",
        WORDS + "    return any(word.startswith('shared') for word in first) and bool(second)",
        WORDS + "    return any(word in second for word in first)",
        WORDS + "    numbers = [{w.split(':')[1] for w in words if ':' in w} for words in (first, second)]\n"
        "    return bool(numbers[0] & numbers[1])",
    ],
}
