"""Answers that somebody might give to the exercises of notebook 20; each must fail."""

LIBRARIES = '[f"/{p.relative_to(root)}" for p in root.rglob("*.so*") if p.is_file() and not p.is_symlink()]'

WRONG: dict[str, list[str]] = {
    "20.1": [
        f"def orphans(root):\n    return {LIBRARIES}",
        # Those that no file of any kind asks for: a chain is one library longer.
        "def orphans(root):\n"
        "    asked = set()\n"
        "    for path in root.rglob('*'):\n"
        "        facts = elf.read_elf(path) if path.is_file() and not path.is_symlink() else None\n"
        "        asked |= set(facts.needed) if facts else set()\n"
        f"    return [one for one in {LIBRARIES} if one.rpartition('/')[2] not in asked]",
        # The interpreter is in nobody's list of libraries, or is it?
        "def orphans(root):\n"
        "    asked = set()\n"
        "    for path in root.glob('usr/bin/*'):\n"
        "        facts = elf.read_elf(path) if path.is_file() and not path.is_symlink() else None\n"
        "        asked |= set(facts.needed) if facts else set()\n"
        f"    return [one for one in {LIBRARIES} if one.rpartition('/')[2] not in asked]",
        "def orphans(root):\n    return ['/usr/lib/x86_64-linux-gnu/libnss_files.so.2']",
        "def orphans(root):\n    return True",
        "def orphans(root):\n    return ['/bin/sh']",
    ],
    "20.2": [
        "def breaks(root, days):\n    return days",
        "def breaks(root, days):\n    return [day for day in days if status(root, '/bin/sh', '/app/report', day) == 0]",
        "def breaks(root, days):\n    return [d for d in days if status(root, '/bin/sh', '/app/report', d)][:1]",
        "def breaks(root, days):\n    return [days[1], days[8]]",
        "def breaks(root, days):\n    return [d for d in days if status(root, '/app/report', d) != 0]",
        "def breaks(root, days):\n    return True",
    ],
    "20.3": [
        "def diet(root, tests, limit):\n    shutil.rmtree(root / 'data')".replace(
            "shutil", "__import__('shutil')"
        ),
        "def diet(root, tests, limit):\n"
        "    for path in sorted(root.rglob('data/*'), key=lambda path: -path.stat().st_size):\n"
        "        if sum(p.stat().st_size for p in root.rglob('*') if p.is_file() and not p.is_symlink()) > limit:\n"
        "            path.unlink()",
        "def diet(root, tests, limit):\n"
        "    for path in root.rglob('*'):\n"
        "        if path.is_file() and not path.is_symlink():\n"
        "            path.write_bytes(b'')",
        "def diet(root, tests, limit):\n    __import__('shutil').rmtree(root)",
        # Only the first test is looked at.
        "def diet(root, tests, limit):\n"
        "    for path in [p for p in root.rglob('*') if p.is_file() and not p.is_symlink()]:\n"
        "        data, mode = path.read_bytes(), path.stat().st_mode\n"
        "        path.unlink()\n"
        "        try:\n"
        "            ok = status(root, *tests[0]) == 0\n"
        "        except OSError:\n"
        "            ok = False\n"
        "        if not ok:\n"
        "            path.write_bytes(data)\n"
        "            path.chmod(mode)",
    ],
}
