"""Answers that somebody might give to the exercises of notebook 17; each must fail."""

SET = "def contain(group):\n    group.set(cgroups.Limits({}))"

WRONG: dict[str, list[str]] = {
    "17.1": [
        "def contain(group):\n    group.add(os.getpid())",
        "def contain(group):\n    lab.group('other').set(cgroups.Limits(pids=20, memory=64 << 20))",
        SET.format("pids=20"),
        SET.format("memory=64 << 20"),
        SET.format("pids=200, memory=64 << 20"),
        SET.format("pids=1, memory=64 << 20"),
        SET.format("pids=19, memory=64 << 20"),
        SET.format("pids=20, memory=64_000_000"),
        SET.format("pids=20, memory=64 << 30"),
        SET.format("pids=20, memory=64"),
        SET.format("pids=20, memory=64 << 20, cpus=0.5"),
        SET.format("pids=20, memory=64 << 20, cpu_weight=50"),
        SET.format("pids=20, memory=64 << 20, memory_high=32 << 20"),
        SET.format("pids=20, memory=64 << 20")
        + "\n    (place(group, 'pids') / 'pids.max').write_text('max')",
    ],
    "17.2": [
        "def picture(group, parts):\n    return [1, 2, 3]",
        "def picture(group, parts):\n    return None",
        "def picture(group, parts):\n    found = []\n    for part in parts:\n        freeze(group)\n        try:\n"
        "            found.append(part())\n        finally:\n            freeze(group, False)\n"
        "        time.sleep(0.02)\n    return found",
        "def picture(group, parts):\n    freeze(group)\n    return [part() for part in parts]",
        "def picture(group, parts):\n    freeze(group)\n    freeze(group, False)\n"
        "    return [part() for part in parts]",
        "def picture(group, parts):\n    first = parts[0]()\n    freeze(group)\n    try:\n"
        "        return [first, *(part() for part in parts[1:])]\n    finally:\n        freeze(group, False)",
        "def picture(group, parts):\n    freeze(group)\n    said = [part() for part in parts]\n"
        "    freeze(group, False)\n    return said",
        "def picture(group, parts):\n    freeze(group)\n    try:\n        return [part() for part in parts][::-1]\n"
        "    finally:\n        freeze(group, False)",
        "def picture(group, parts):\n    freeze(group)\n    try:\n        return sum(part() for part in parts)\n"
        "    finally:\n        freeze(group, False)",
    ],
    "17.3": [
        "def kill_all(pid):\n    pass",
        "def kill_all(pid):\n    os.kill(pid, signal.SIGTERM)",
        "def kill_all(pid):\n    os.killpg(os.getpgid(pid), signal.SIGKILL)",
        "def kill_all(pid):\n    for one in (*children_of(pid), pid):\n        os.kill(one, signal.SIGKILL)",
        "def kill_all(pid):\n    where = cgroups.directory_of(pid, 'freezer') / 'cgroup.procs'\n"
        "    numbers = where.read_text().split()\n    time.sleep(0.5)\n    for one in numbers:\n"
        "        if one in where.read_text().split():\n            os.kill(int(one), signal.SIGKILL)",
        "def kill_all(pid):\n    where = cgroups.directory_of(pid, 'freezer') / 'cgroup.procs'\n"
        "    for one in where.read_text().split():\n        with contextlib.suppress(ProcessLookupError):\n"
        "            os.kill(int(one), signal.SIGKILL)",
        "def kill_all(pid):\n    where = cgroups.directory_of(pid, 'freezer') / 'cgroup.procs'\n"
        "    for one in where.read_text().split():\n        os.kill(int(one), signal.SIGTERM)",
    ],
}
