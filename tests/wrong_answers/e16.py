"""Answers that somebody might give to the exercises of notebook 16; each must fail."""

OPEN = "def total(path):\n    with path.open() as lines:\n        return "

COUNTED = "box.stats().oom_kills"

HALVE = (
    "def smallest(program):\n    dies, lives = 2 * MIB, 128 * MIB\n    while lives > 1.1 * dies:\n"
    "        middle = (dies + lives) // 2\n        if run_under(middle, program)[0] == 0:\n"
    "            lives = middle\n        else:\n            dies = middle\n    return "
)

WRONG: dict[str, list[str]] = {
    "16.1": [
        "def total(path):\n    return None",
        "def total(path):\n    return 0",
        "def total(path):\n    return sum(map(int, path.read_text().split()))",
        f"{OPEN}sum(map(int, lines.readlines()))",
        f"{OPEN}sum([int(line) for line in lines])",
        f"{OPEN}sum(int(line) for line in lines) - 1",
        f"{OPEN}sum(1 for line in lines)",
        "def total(path):\n    os._exit(0)",
        "def total(path):\n    raise MemoryError",
        "def total(path):\n    lab.group('large').add(os.getpid())\n    return sum(map(int, path.read_text().split()))",
    ],
    "16.2": [
        "def why(status, box):\n    return None",
        "def why(status, box):\n    return 'out of memory'",
        "def why(status, box):\n    return 'killed' if os.WIFSIGNALED(status) else 'ended'",
        f"def why(status, box):\n    return 'out of memory' if {COUNTED} else 'killed'",
        f"def why(status, box):\n    if {COUNTED}:\n        return 'out of memory'\n"
        "    return 'killed' if os.WIFSIGNALED(status) else 'ended'",
        "def why(status, box):\n    if not os.WIFSIGNALED(status):\n        return 'ended'\n"
        f"    return 'out of memory' if {COUNTED} else 'killed'",
        "def why(status, box):\n    if not os.WIFSIGNALED(status):\n        return 'ended'\n"
        "    return 'out of memory' if box.stats().memory_peak_bytes > 30 * MIB else 'killed'",
        f"def why(status, box):\n    if os.waitstatus_to_exitcode(status) == 137:\n        return 'killed'\n"
        f"    if not os.WIFSIGNALED(status):\n        return 'ended'\n"
        f"    return 'out of memory' if {COUNTED} else 'killed'",
    ],
    "16.3": [
        "def smallest(program):\n    return 16",
        "def smallest(program):\n    return None",
        "def smallest(program):\n    return 64 * MIB",
        "def smallest(program):\n    return 14 * MIB",
        "def smallest(program):\n    return run_under(128 * MIB, program)[1].memory_peak_bytes",
        "def smallest(program):\n    return run_under(16 * MIB, program)[1].memory_peak_bytes",
        f"{HALVE}dies // 2",
        f"{HALVE}lives * 2",
    ],
}
