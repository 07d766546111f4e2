"""Answers that somebody might give to the exercises of notebook 08; each must fail."""

ALONE = "(lambda: syscalls.unshare(syscalls.CLONE_NEWUTS | syscalls.CLONE_NEWNET))"

WRONG: dict[str, list[str]] = {
    "08.1": [
        f"def partners():\n    return [lab.waiting({ALONE}, own_list), lab.waiting({ALONE}, own_list)]",
        f"def partners():\n    return [lab.waiting({ALONE}), lab.waiting({ALONE})]",
        "def partners():\n    own_list()\n    return [lab.waiting(), lab.waiting()]",
        f"def partners():\n    one = lab.waiting({ALONE}, own_list)\n"
        "    return [one, lab.waiting(lambda: namespaces.enter(one, ['ipc', 'uts', 'net']))]",
        f"def partners():\n    one = lab.waiting({ALONE}, own_list)\n"
        "    return [one, lab.waiting(lambda: namespaces.enter(one, ['ipc']),"
        " lambda: syscalls.unshare(syscalls.CLONE_NEWUTS))]",
        f"def partners():\n    {ALONE}()\n    own_list()\n    return [lab.waiting({ALONE}), lab.waiting()]",
        f"def partners():\n    one = lab.waiting({ALONE}, own_list)\n    return [one, one]",
        "def partners():\n    os._exit(0)",
    ],
    "08.2": [
        "def tidy():\n    for thing in ipc.objects():\n        ipc.shm_remove(thing.identity)",
        "def tidy():\n    for thing in ipc.objects():\n        if thing.kind == 'shm':\n"
        "            ipc.shm_remove(thing.identity)",
        "def tidy():\n    for thing in ipc.objects():\n        if thing.kind == 'shm' and thing.attached:\n"
        "            ipc.shm_remove(thing.identity)",
        "def tidy():\n    for thing in ipc.objects():\n        if thing.kind == 'shm' and not thing.attached:\n"
        "            ipc.shm_remove(thing.identity)\n            break",
        "def tidy():\n    own_list()",
        "def tidy():\n    os._exit(0)",
    ],
    "08.3": [
        "def deliver(pid, text):\n    queue = ipc.mq_open('/mailbox')\n    namespaces.enter(pid, ['ipc'])\n"
        "    ipc.mq_send(queue, text)",
        "def deliver(pid, text):\n    namespaces.enter(pid, ['ipc'])\n    ipc.mq_send(ipc.mq_open('/mailbox'), '')",
        "def deliver(pid, text):\n    namespaces.enter(pid, ['ipc'])\n"
        "    ipc.mq_send(ipc.mq_open('/letters', os.O_CREAT | os.O_RDWR), text)",
        "def deliver(pid, text):\n    own_list()\n"
        "    ipc.mq_send(ipc.mq_open('/mailbox', os.O_CREAT | os.O_RDWR), text)",
        "def deliver(pid, text):\n    lab.in_fork(namespaces.enter, pid, ['ipc'])\n"
        "    ipc.mq_send(ipc.mq_open('/mailbox'), text)",
        "def deliver(pid, text):\n    print(text)",
    ],
}
