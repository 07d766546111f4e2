"""Answers that somebody might give to the exercises of notebook 00; each must fail."""

WRONG: dict[str, list[str]] = {
    "00.1": [
        "def will_run(findings, needs):\n    return list(needs)",
        "def will_run(findings, needs):\n    return ['00-start-here', '03-chroot']",
        "def will_run(findings, needs):\n"
        "    return [n for n, wanted in needs.items() if any(f.ok for f in findings if f.name in wanted)]",
        "def will_run(findings, needs):\n    print('00-start-here')",
    ],
    "00.2": [
        "def wander():\n    return '/'",
        "def wander():\n    os.chdir('/tmp')",
        "def wander():\n    in_child(os.chdir, '/')",
    ],
}
