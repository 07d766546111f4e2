"""Answers that somebody might give to the exercises of notebook 23; each must fail."""

from typing import Any

WRONG: dict[str, list[str]] = {
    "23.1": [
        "mine = 'a container with 48 MiB'",
        "mine = Container(rootfs, ['sleep', '60'], memory='48M', cpus=0.25, pids_limit=8)",
        "mine = Container(rootfs, ['sleep', '60'], memory='480M', cpus=0.25, pids_limit=8).start()",
        "mine = Container(rootfs, ['sleep', '60'], memory='48M', cpus=0.25, pids_limit=8, seccomp='unconfined')\n"
        "mine.start()",
    ],
    "23.2": [
        "def two_servers(first, second):\n    return [None, None]",
        "def two_servers(first, second):\n"
        "    return [Container(rootfs, ['sleep', '60'], network='host').start() for _ in range(2)]",
        "def two_servers(first, second):\n    serve = ['python3', '-m', 'http.server', '8000', '-d', '/root']\n"
        "    return [Container(rootfs, serve, publish=[f'{port}:8000']).start() for port in (first, second)]",
    ],
    "23.3": [
        "budget = {'memory': '512M', 'pids_limit': 100}",
        "budget = {'memory': '8M', 'pids_limit': 7}",
        "budget = {'memory': '56M'}",
        "budget = {'memory': '80M', 'pids_limit': 7}",
    ],
}

GIVEN: dict[str, Any] = {"rootfs": "python"}
"""What the notebook makes at length before its exercises, and a test takes ready-made."""
