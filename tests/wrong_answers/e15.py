"""Answers that somebody might give to the exercises of notebook 15; each must fail."""

READ = (
    "def give(group, cores):\n    if group.version == 2:\n"
    "        period = int((place(group) / 'cpu.max').read_text().split()[1])\n    else:\n"
    "        period = int((place(group) / 'cpu.cfs_period_us').read_text())\n"
)

WRONG: dict[str, list[str]] = {
    "15.1": [
        "give = None",
        "def give(group, cores):\n    return cores",
        "def give(group, cores):\n    group.set(cgroups.Limits(cpus=cores))",  # the period becomes 0.1 s
        "def give(group, cores):\n    set_quota(group, round(cores * 100_000))",
        "def give(group, cores):\n    set_quota(group, 15_000, 50_000)",
        "def give(group, cores):\n    set_quota(group, cores)",
        "def give(group, cores):\n    group.set(cgroups.Limits(cpu_weight=round(cores * 100)))",
        READ + "    set_quota(group, period, period)",
        READ + "    set_quota(group, round(period / cores), period)",
        READ + "    set_quota(lab.group('another'), round(cores * period), period)",
    ],
    "15.2": [
        "divide = 'by weights'",
        "def divide(groups, first):\n    return [1, 2, 5]",
        "def divide(groups, first):\n    for group in groups:\n        group.set(cgroups.Limits(cpu_weight=first))",
        "def divide(groups, first):\n    for group, times in zip(groups, (1, 2, 5)):\n"
        "        group.set(cgroups.Limits(cpu_weight=100 * times))",
        "def divide(groups, first):\n    for group, times in zip(groups[1:], (2, 5)):\n"
        "        group.set(cgroups.Limits(cpu_weight=100 * times))",
        "def divide(groups, first):\n    for group, times in zip(groups, (1, 5, 2)):\n"
        "        group.set(cgroups.Limits(cpu_weight=first * times))",
        "def divide(groups, first):\n    for group, times in zip(groups, (1, 3, 8)):\n"
        "        group.set(cgroups.Limits(cpu_weight=first * times))",
        "def divide(groups, first):\n    for group, times in zip(groups, (1, 2, 5)):\n"
        "        group.set(cgroups.Limits(cpus=times / 8))",
    ],
    "15.3": [
        "def throttled_now(groups):\n    return None",
        "def throttled_now(groups):\n    return set(groups)",
        "def throttled_now(groups):\n    return {'ant', 'bee'}",
        "def throttled_now(groups):\n"
        "    return {name for name, group in groups.items() if counters(group)['nr_throttled'] > 0}",
        "def throttled_now(groups):\n"
        "    return {name for name, group in groups.items() if counters(group)['nr_periods'] > 0}",
        "def throttled_now(groups):\n"
        "    return {max(groups, key=lambda name: counters(groups[name])['throttled_usec'])}",
        "def throttled_now(groups):\n    before = {name: used(group) for name, group in groups.items()}\n"
        "    time.sleep(0.5)\n    return {name for name, group in groups.items() if used(group) > before[name]}",
        "def throttled_now(groups):\n"
        "    before = {name: counters(group)['nr_periods'] for name, group in groups.items()}\n    time.sleep(0.5)\n"
        "    return {name for name, group in groups.items() if counters(group)['nr_periods'] > before[name]}",
    ],
}
