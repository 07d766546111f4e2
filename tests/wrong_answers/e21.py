"""Answers that somebody might give to the exercises of notebook 21; each must fail."""

FRAGMENT = [
    "BR2_TOOLCHAIN_BUILDROOT_MUSL=y", "# BR2_TOOLCHAIN_BUILDROOT_GLIBC is not set",
    "# BR2_PACKAGE_PYTHON3_SQLITE is not set", "BR2_PACKAGE_PYTHON3_XZ=y", "BR2_TARGET_ROOTFS_TAR_ZSTD=y",
]  # fmt: skip


def _fragment(*lines: str) -> str:
    text = "\n".join(lines)
    return f"thrifty = {text!r}"


READ = "def demands(root):\n    found = []\n    for path in root.rglob('*'):\n"

WRONG: dict[str, list[str]] = {
    "21.1": [
        "thrifty = None",
        "thrifty = {'BR2_TOOLCHAIN_BUILDROOT_MUSL': 'y'}",
        _fragment(FRAGMENT[0], *FRAGMENT[2:]),  # glibc's line of the defconfig is lost
        _fragment(*FRAGMENT[:2], *FRAGMENT[3:]),
        _fragment(*FRAGMENT[:2], "BR2_PACKAGE_PYTHON3_SQLITE is not set", *FRAGMENT[3:]),
        _fragment(*FRAGMENT[:3], *FRAGMENT[4:]),
        _fragment(*FRAGMENT[:3], "BR2_PACKAGE_XZ=y", FRAGMENT[4]),
        _fragment(*FRAGMENT[:4], "BR2_TARGET_ROOTFS_TAR_GZIP=y"),
        _fragment(*FRAGMENT, "BR2_PACKAGE_PYTHON3_CURSES=y"),
        _fragment(*FRAGMENT, "BR2_STATIC_LIBS=y"),
        _fragment(*FRAGMENT, "BR2_PACKAGE_PYTHON3_LZMA=y"),
        _fragment(*FRAGMENT[:3], "BR2_PACKAGE_PYTHON3_XZ=yes", FRAGMENT[4]),
        _fragment(*FRAGMENT[:3], "BR2_PACKAGE_PYTHON3_XZ=y  # reads .xz", FRAGMENT[4]),
        _fragment(*FRAGMENT[:2], "#BR2_PACKAGE_PYTHON3_SQLITE is not set", *FRAGMENT[3:]),
    ],
    "21.2": [
        "def predict(have, more):\n    return None",
        "def predict(have, more):\n    return 0",
        "def predict(have, more):\n    return True",
        "def predict(have, more):\n    return sum(one.bytes for one in weigh(closure([more])))",
        "def predict(have, more):\n    return sum(one.bytes for one in weigh(closure([*have, more])))",
        "def predict(have, more):\n    return 0 if more in have else os.path.getsize(os.path.realpath(more))",
        # What came with libc is not paid twice, but every other library is.
        "def predict(have, more):\n    if more in have:\n        return 0\n"
        "    return sum(one.bytes for one in weigh(closure([more])) if not any(\n"
        "        part in one.path for part in ('/ld-', '/libc.')))",
        "def predict(have, more):\n    there = {one.path for one in weigh(closure(have))}\n"
        "    return sum(1 for one in weigh(closure([*have, more])) if one.path not in there)",
    ],
    "21.3": [
        "def demands(root):\n    return None",
        "def demands(root):\n    return (99, 9, 9)",
        "def demands(root):\n    return max((oldest_kernel(root / 'usr/bin' / 'without') or (0, 0, 0)), (3, 2, 0))",
        f"{READ}        if path.is_file():\n            found.append(oldest_kernel(path) or (0, 0, 0))\n"
        "    return max(found)",
        f"{READ}        if path.is_file() and path.read_bytes()[:4] == b'\\x7fELF':\n"
        "            found.append(oldest_kernel(path) or (0, 0, 0))\n    return min(found)",
        f"{READ}        if path.is_file() and path.read_bytes()[:4] == b'\\x7fELF':\n"
        "            found.append(oldest_kernel(path) or (0, 0, 0))\n"
        "    return max(found, key=lambda one: '.'.join(map(str, one)))",
        f"{READ}        if path.is_file() and path.read_bytes()[:4] == b'\\x7fELF':\n"
        "            found.append(oldest_kernel(path))\n    return max(found)",
        *(
            f"{READ.replace(walk, other)}        if path.is_file() and not path.is_symlink()"
            f" and path.read_bytes()[:4] == b'\\x7fELF'{more}:\n"
            f"            found.append(oldest_kernel(path) or (0, 0, 0))\n    return max(found{key})"
            for walk, other, more, key in (
                ("root.rglob('*')", "(root / 'usr/bin').iterdir()", "", ""),
                ("root.rglob('*')", "root.glob('*/*/*')", "", ""),
                ("", "", " and os.access(path, os.X_OK)", ""),
                ("", "", "", ", key=lambda one: one[:2]"),
            )
        ),
    ],
}
