"""Answers that somebody might give to the exercises of notebook 07; each must fail."""

PAIR = "lab.waiting(lambda: own_name('pair'))"

WRONG: dict[str, list[str]] = {
    "07.1": [
        f"def three():\n    return [{PAIR}, {PAIR}, lab.waiting()]",
        "def three():\n    own_name('pair')\n    return [lab.waiting(), lab.waiting(), lab.waiting()]",
        f"def three():\n    one = {PAIR}\n    go = lambda: enter(f'/proc/{{one}}/ns/uts')\n"
        "    return [one, lab.waiting(go), lab.waiting(go)]",
        f"def three():\n    one = {PAIR}\n    return [one, one, lab.waiting()]",
        "def three():\n    one = lab.waiting(lambda: own_name('box'))\n"
        "    return [one, lab.waiting(lambda: enter(f'/proc/{one}/ns/uts')), lab.waiting()]",
        "def three():\n    socket.sethostname('pair')\n    return [lab.waiting(), lab.waiting(), lab.waiting()]",
        f"def three():\n    one = {PAIR}\n    other = lab.waiting(lambda: enter(f'/proc/{{one}}/ns/uts'))\n"
        "    third = lab.waiting()\n    for pid in (one, other, third):\n        os.kill(pid, signal.SIGKILL)\n"
        "        os.waitpid(pid, 0)\n    return [one, other, third]",
        "def three():\n    return [1, 2, 3]",
        "def three():\n    os._exit(0)",
    ],
    "07.2": [
        "def keep_room(file):\n    pass",
        "def keep_room(file):\n    process = lab.waiting(lambda: own_name('room'))\n"
        "    mounts.bind(f'/proc/{process}/ns/uts', file)",
        "def keep_room(file):\n    process = lab.waiting(lambda: own_name('kept'))\n"
        "    mounts.bind(f'/proc/{process}/ns/uts', file)\n    os.kill(process, signal.SIGKILL)\n"
        "    os.waitpid(process, 0)",
        "def keep_room(file):\n    process = lab.waiting(lambda: own_name('room'))\n"
        "    mounts.bind(f'/proc/{process}/ns/net', file)\n    os.kill(process, signal.SIGKILL)\n"
        "    os.waitpid(process, 0)",
        "def keep_room(file):\n    process = lab.waiting(lambda: own_name('room'))\n"
        "    os.open(f'/proc/{process}/ns/uts', os.O_RDONLY)\n    os.kill(process, signal.SIGKILL)\n"
        "    os.waitpid(process, 0)",
        "def keep_room(file):\n    Path(file).write_text('room')",
    ],
    "07.3": [
        "def company(pid, kind):\n    return sorted(int(name) for name in os.listdir('/proc') if name.isdigit())",
        "def company(pid, kind):\n    number = os.stat(f'/proc/{pid}/ns/uts').st_ino\n"
        "    return my_lsns()['uts', number]",
        "def company(pid, kind):\n    number = os.stat(f'/proc/self/ns/{kind}').st_ino\n"
        "    return my_lsns()[kind, number]",
        "def company(pid, kind):\n    number = os.stat(f'/proc/{pid}/ns/{kind}').st_ino\n"
        "    return [other for other in my_lsns()[kind, number] if other != pid]",
        "def company(pid, kind):\n    number = os.stat(f'/proc/{pid}/ns/{kind}').st_ino\n"
        "    return my_lsns()[kind, number][::-1] + [0]",
        "def company(pid, kind):\n    print(my_lsns())",
    ],
}
