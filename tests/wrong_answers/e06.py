"""Answers that somebody might give to the exercises of notebook 06; each must fail."""

ROWS = "for directory, directories, files in os.walk(upper):\n            for name in [*directories, *files]:"
ADD = "tar.add(path, os.path.relpath(path, upper), recursive=False)"
PATH = (
    "path = os.path.join(directory, name)\n"
    "                gone = os.path.join(os.path.relpath(directory, upper), '.wh.' + name)"
)
CHAR = "stat.S_ISCHR(os.lstat(path).st_mode)"

WRONG: dict[str, list[str]] = {
    "06.1": [
        "def stack():\n    mounts.overlay('merged', ['base', 'patch'], 'upper', 'work')",
        "def stack():\n    mounts.overlay('merged', ['base'], 'patch', 'work')",
        "def stack():\n    syscalls.mount('overlay', 'merged', 'overlay', 0, 'lowerdir=patch:base')",
        "def stack():\n    mounts.bind('patch', 'merged')",
        "def stack():\n    shutil.copytree('base', 'merged', dirs_exist_ok=True)\n"
        "    shutil.copytree('patch', 'merged', dirs_exist_ok=True)",
    ],
    "06.2": [
        "def prepare(upper):\n    os.makedirs(f'{upper}/cache')\n    os.mkdir(f'{upper}/etc')\n"
        "    open(f'{upper}/etc/.wh.secret', 'w').close()\n    open(f'{upper}/cache/.wh..wh..opq', 'w').close()",
        "def prepare(upper):\n    os.mkdir(f'{upper}/etc')\n"
        "    os.mknod(f'{upper}/etc/secret', stat.S_IFCHR, os.makedev(0, 0))",
        "def prepare(upper):\n    os.mkdir(f'{upper}/etc')\n"
        "    os.mknod(f'{upper}/etc/secret', stat.S_IFCHR, os.makedev(0, 0))\n"
        "    os.mknod(f'{upper}/cache', stat.S_IFCHR, os.makedev(0, 0))",
        "def prepare(upper):\n    for name in ('etc', 'cache'):\n        os.mkdir(f'{upper}/{name}')\n"
        "        os.setxattr(f'{upper}/{name}', 'user.overlay.opaque', b'y')",
        "def prepare(upper):\n    os.mkdir(f'{upper}/etc')\n    os.mkdir(f'{upper}/cache')\n"
        "    os.mknod(f'{upper}/etc/secret', stat.S_IFCHR, os.makedev(0, 0))",
        "def prepare(upper):\n    os.unlink(f'{upper}/etc/secret')",
    ],
    "06.3": [
        "def my_layer(upper, tarball):\n    with tarfile.open(tarball, 'w') as tar:\n        tar.add(upper, '.')",
        f"def my_layer(upper, tarball):\n    with tarfile.open(tarball, 'w') as tar:\n        {ROWS}\n"
        f"                {PATH}\n                if not {CHAR}:\n                    {ADD}",
        f"def my_layer(upper, tarball):\n    with tarfile.open(tarball, 'w') as tar:\n        {ROWS}\n"
        f"                {PATH}\n                if {CHAR}:\n                    tar.addfile(tarfile.TarInfo(gone))\n"
        f"                else:\n                    {ADD}",
        f"def my_layer(upper, tarball):\n    with tarfile.open(tarball, 'w') as tar:\n        {ROWS}\n"
        f"                {PATH}\n                if {CHAR}:\n"
        f"                    tar.addfile(tarfile.TarInfo('.wh.' + os.path.relpath(path, upper)))\n"
        f"                else:\n                    {ADD}",
        "def my_layer(upper, tarball):\n    merged = os.path.join(os.path.dirname(upper), 'merged')\n"
        "    with tarfile.open(tarball, 'w') as tar:\n        tar.add(merged, '.')",
        "def my_layer(upper, tarball):\n    open(tarball, 'w').close()",
    ],
}
