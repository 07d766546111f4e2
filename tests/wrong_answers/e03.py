"""Answers that somebody might give to the exercises of notebook 03; each must fail."""

LEAP = "for _ in range(64):\n        os.chdir('..')"
LOCK = "held = capabilities.read().permitted\n    chroot = {capabilities.Capability.CAP_SYS_CHROOT}"

WRONG: dict[str, list[str]] = {
    "03.1": [
        f"def my_escape():\n    {LEAP}\n    os.chroot('.')",
        "def my_escape():\n    os.chroot('..')",
        f"def my_escape():\n    os.mkdir('x')\n    os.chroot('x')\n    os.chdir('/')\n    {LEAP}\n    os.chroot('.')",
        f"def my_escape():\n    os.mkdir('door')\n    os.chroot('door')\n    {LEAP}",
        "def my_escape():\n    print('out again: True')",
        "def my_escape():\n    os._exit(0)",
    ],
    "03.2": ["the_power = 'CAP_SYS_ADMIN'", "the_power = 'root'", "the_power = 'ALL'", "the_power = 18"],
    "03.3": [
        "def lock_up(path):\n    pass",
        "def lock_up(path):\n    go_in(path)\n    os.closerange(3, 4096)",
        f"def lock_up(path):\n    {LOCK}\n    go_in(path)\n    capabilities.limit_to(held - chroot)",
        f"def lock_up(path):\n    {LOCK}\n    os.chroot(path)\n    os.closerange(3, 4096)\n"
        "    capabilities.limit_to(held - chroot)",
        f"def lock_up(path):\n    {LOCK}\n    go_in(path)\n    os.closerange(3, 4096)\n"
        "    capabilities.capset(held, held - chroot)",
        f"def lock_up(path):\n    {LOCK}\n    os.closerange(3, 4096)\n    capabilities.limit_to(held - chroot)",
        "def lock_up(path):\n    os._exit(0)",
        "def lock_up(path):\n    os.closerange(3, 4096)\n    go_in(path)\n    capabilities.read()",
    ],
}
