"""Answers that somebody might give to the exercises of notebook 13; each must fail."""

APART = "syscalls.unshare(syscalls.CLONE_NEWTIME)"
OFFSETS = "Path('/proc/self/timens_offsets').write_text"

WRONG: dict[str, list[str]] = {
    "13.1": [
        "def older(program):\n    pass",
        "def older(program):\n    program()",
        f"def older(program):\n    {APART}\n    program()",
        f"def older(program):\n    {APART}\n    lab.in_fork(program)",
        f"def older(program):\n    {APART}\n    {OFFSETS}('boottime 31536000 0\\n')\n    program()",
        f"def older(program):\n    {APART}\n    {OFFSETS}('monotonic 31536000 0\\n')\n    lab.in_fork(program)",
        f"def older(program):\n    {APART}\n    {OFFSETS}('monotonic 31536000 0\\nboottime 31536000 0\\n')\n"
        "    lab.in_fork(program)",
        f"def older(program):\n    {APART}\n    {OFFSETS}('boottime 365 0\\n')\n    lab.in_fork(program)",
        f"def older(program):\n    {APART}\n    {OFFSETS}('realtime 31536000 0\\n')\n    lab.in_fork(program)",
        f"def older(program):\n    {APART}\n    lab.in_fork(program)\n    {OFFSETS}('boottime 31536000 0\\n')",
    ],
    "13.2": [
        "def resume(saved, program):\n    program()",
        f"def resume(saved, program):\n    {APART}\n    lab.in_fork(program)",
        f"def resume(saved, program):\n    {APART}\n    namespaces.set_time_offsets(monotonic=saved)\n"
        "    lab.in_fork(program)",
        f"def resume(saved, program):\n    {APART}\n    now = time.monotonic()\n"
        "    namespaces.set_time_offsets(monotonic=now - saved)\n    lab.in_fork(program)",
        f"def resume(saved, program):\n    {APART}\n    now = time.monotonic()\n"
        "    namespaces.set_time_offsets(boottime=saved - now)\n    lab.in_fork(program)",
        f"def resume(saved, program):\n    {APART}\n    now = time.monotonic()\n"
        f"    {OFFSETS}(f'monotonic {{abs(int(saved - now))}} 0\\n')\n    lab.in_fork(program)",
    ],
    "13.3": [
        "def true_uptime():\n    return boot_clock()",
        "def true_uptime():\n    return float(Path('/proc/uptime').read_text().split()[0])",
        "def true_uptime():\n    return time.monotonic()",
        "def true_uptime():\n    return boot_clock() - 365 * 86400",
        "def true_uptime():\n    return 'a year'",
    ],
}
