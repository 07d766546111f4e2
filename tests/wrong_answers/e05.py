"""Answers that somebody might give to the exercises of notebook 05; each must fail."""

APART = "syscalls.unshare(syscalls.CLONE_NEWNS)"
PRIVATE = "mounts.set_propagation('/', 'private')"
BIND = "mounts.bind(path, path)"

WRONG: dict[str, list[str]] = {
    "05.1": [
        "def lock_up(path):\n    pass",
        f"def lock_up(path):\n    {APART}\n    {PRIVATE}\n    os.chroot(path)\n    os.chdir('/')",
        f"def lock_up(path):\n    {APART}\n    {PRIVATE}\n    {BIND}\n    os.chroot(path)\n    os.chdir('/')",
        f"def lock_up(path):\n    {PRIVATE}\n    {BIND}\n    mounts.pivot_root_into(path)",
        f"def lock_up(path):\n    {APART}\n    {BIND}\n    mounts.pivot_root_into(path)",
        f"def lock_up(path):\n    {APART}\n    {PRIVATE}\n    mounts.pivot_root_into(path)",
        f"def lock_up(path):\n    {APART}\n    {PRIVATE}\n    {BIND}\n    os.mkdir(f'{{path}}/old')\n"
        "    syscalls.pivot_root(path, f'{path}/old')\n    os.chdir('/')",
        f"def lock_up(path):\n    {APART}\n    {PRIVATE}\n    {BIND}\n    os.chdir(path)\n"
        "    syscalls.pivot_root('.', '.')\n    syscalls.umount2('.', syscalls.MNT_DETACH)\n    os.chdir('proc')",
        "def lock_up(path):\n    os._exit(0)",
    ],
    "05.2": [
        f"def dress(path):\n    {BIND}\n    mounts.pivot_root_into(path)",
        f"def dress(path):\n    {BIND}\n    mounts.pivot_root_into(path)\n    mounts.proc('/proc')",
        f"def dress(path):\n    {BIND}\n    mounts.bind('/proc', f'{{path}}/proc', recursive=True)\n"
        "    mounts.pivot_root_into(path)",
        f"def dress(path):\n    {BIND}\n    mounts.proc(f'{{path}}/proc')\n    os.chroot(path)\n    os.chdir('/')",
        f"def dress(path):\n    {BIND}\n    mounts.tmpfs(f'{{path}}/proc')\n    mounts.pivot_root_into(path)",
        "def dress(path):\n    mounts.proc(f'{path}/proc')\n    mounts.pivot_root_into(path)",
    ],
    "05.3": [
        "def close_up():\n    mounts.mask('/proc/meminfo')",
        "def close_up():\n    mounts.make_read_only('/proc/sys')",
        "def close_up():\n    mounts.mask('/proc/meminfo')\n    mounts.mask('/proc/sys')",
        "def close_up():\n    mounts.mask('/proc/meminfo')\n    mounts.make_read_only('/proc')",
        "def close_up():\n    mounts.tmpfs('/proc')",
        "def close_up():\n    mounts.mask('/proc/meminfo')\n    mounts.make_read_only('/proc/sys/net')",
        "def close_up():\n    mounts.mask('/proc/meminfo')\n    mounts.bind('/proc/sys', '/proc/sys')",
        "def close_up():\n    print('/proc/meminfo is empty')",
    ],
}
