"""Answers that somebody might give to the exercises of notebook 11; each must fail."""

import os

from labkernel.linux import users

RANGE = os.geteuid() == 0 or users.subid_range() is not None
"""Whether there are several ids; with a single one, and setgroups denied above, some mistakes make no difference."""

WRONG: dict[str, list[str]] = {
    "11.1": [
        "def become_both(uid_inside, gid_inside):\n    become(gid_inside)",
        "def become_both(uid_inside, gid_inside):\n    syscalls.unshare(syscalls.CLONE_NEWUSER)",
        "def become_both(uid_inside, gid_inside):\n    syscalls.unshare(syscalls.CLONE_NEWUSER)\n"
        "    Path('/proc/self/setgroups').write_text('deny')\n"
        "    Path('/proc/self/uid_map').write_text('1234 0 1')\n"
        "    Path('/proc/self/gid_map').write_text('77 0 1')",
        "def become_both(uid_inside, gid_inside):\n    os.setresgid(gid_inside, gid_inside, gid_inside)\n"
        "    os.setresuid(uid_inside, uid_inside, uid_inside)",
        "def become_both(uid_inside, gid_inside):\n    print(f'uid {uid_inside}, gid {gid_inside}')",
    ],
    "11.2": [
        "def give(pid, path, count):\n    Path(f'/proc/{pid}/uid_map').write_text(f'0 {os.stat(path).st_uid} {count}')",
        "def give(pid, path, count):\n    os.chown(path, 0, 0)",
        "def give(pid, path, count):\n    users.write_maps(pid, (users.IdMap(1, os.stat(path).st_uid, count),))",
        "def give(pid, path, count):\n    os._exit(0)",
    ],
    "11.3": [
        "def fix_the_name():\n    socket.sethostname('fixed')\n    become(0)",
        "def fix_the_name():\n    syscalls.unshare(syscalls.CLONE_NEWUTS)\n    become(0)",
        "def fix_the_name():\n    syscalls.unshare(syscalls.CLONE_NEWUTS)\n    socket.sethostname('fixed')\n"
        "    syscalls.unshare(syscalls.CLONE_NEWUSER)",
        "def fix_the_name():\n    syscalls.unshare(syscalls.CLONE_NEWUTS)\n    socket.sethostname('fixed')",
        "def fix_the_name():\n    become(0)\n    syscalls.unshare(syscalls.CLONE_NEWUTS)\n"
        "    socket.sethostname('fixed')\n    capabilities.limit_to(())",
        "def fix_the_name():\n    syscalls.unshare(syscalls.CLONE_NEWUTS)\n    socket.sethostname('fixed')\n"
        "    become(4711)",
    ],
}
if RANGE:
    WRONG["11.1"] += [
        "def become_both(uid_inside, gid_inside):\n    syscalls.unshare(syscalls.CLONE_NEWUSER)\n"
        "    Path('/proc/self/uid_map').write_text(f'{uid_inside} 0 1')\n"
        "    Path('/proc/self/gid_map').write_text(f'{gid_inside} 0 1')",
    ]
    WRONG["11.2"] += [
        "def give(pid, path, count):\n    users.write_maps(pid, (users.IdMap(os.stat(path).st_uid, 0, count),))",
        "def give(pid, path, count):\n    users.write_maps(pid, (users.IdMap(0, os.stat(path).st_uid, count),))",
        "def give(pid, path, count):\n    users.write_maps(pid, (users.IdMap(0, 0, 65536),))",
        "def give(pid, path, count):\n    file = os.stat(path)\n"
        "    Path(f'/proc/{pid}/uid_map').write_text(f'0 {file.st_uid} 1')\n"
        "    Path(f'/proc/{pid}/gid_map').write_text(f'0 {file.st_gid} 1')",
    ]
