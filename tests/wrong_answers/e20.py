"""Answers that somebody might give to the exercises of notebook 20; each must fail."""

LIBRARIES = '[f"/{p.relative_to(root)}" for p in root.rglob("*.so*") if p.is_file() and not p.is_symlink()]'

WRONG: dict[str, list[str]] = {
    "20.1": [
        f"def unneeded(root):\n    return {LIBRARIES}",
        # Those that no file of any kind asks for: a chain is one library longer.
        "def unneeded(root):\n"
        "    asked = set()\n"
        "    for path in root.rglob('*'):\n"
        "        facts = elf.read_elf(path) if path.is_file() and not path.is_symlink() else None\n"
        "        asked |= set(facts.needed) if facts else set()\n"
        f"    return [one for one in {LIBRARIES} if one.rpartition('/')[2] not in asked]",
        # The interpreter is in nobody's list of libraries, or is it?
        "def unneeded(root):\n"
        "    asked = set()\n"
        "    for path in root.glob('usr/bin/*'):\n"
        "        facts = elf.read_elf(path) if path.is_file() and not path.is_symlink() else None\n"
        "        asked |= set(facts.needed) if facts else set()\n"
        f"    return [one for one in {LIBRARIES} if one.rpartition('/')[2] not in asked]",
        "def unneeded(root):\n    return ['/usr/lib/x86_64-linux-gnu/libnss_files.so.2']",
        # What the programs need directly is kept, and what that needs is not.
        "def unneeded(root):\n"
        "    asked = set()\n"
        "    for path in [*root.glob('usr/bin/*'), *root.glob('usr/sbin/*')]:\n"
        "        facts = elf.read_elf(path) if path.is_file() and not path.is_symlink() else None\n"
        "        if facts and facts.interpreter:\n"
        "            asked |= {elf.resolve(facts.interpreter, root).rpartition('/')[2], *facts.needed}\n"
        f"    return [one for one in {LIBRARIES} if one.rpartition('/')[2] not in asked]",
        # Programs are in /usr/bin, are they not?
        "def unneeded(root):\n"
        "    needed = set()\n"
        "    for path in root.glob('usr/bin/*'):\n"
        "        if path.is_file() and not path.is_symlink() and elf.read_elf(path):\n"
        "            needed |= {one.path for one in elf.Loader(root).load(f'/{path.relative_to(root)}')}\n"
        f"    return [one for one in {LIBRARIES} if one not in needed]",
        "def unneeded(root):\n"
        f"    found = {LIBRARIES}\n"
        "    for one in found:\n"
        "        (root / one[1:]).unlink()\n"
        "    return found",
        "def unneeded(root):\n    return True",
        "def unneeded(root):\n    return ['/bin/sh']",
    ],
    "20.2": [
        "def breaks(root, days):\n    return days",
        "def breaks(root, days):\n    return [day for day in days if status(root, '/bin/sh', '/app/report', day) == 0]",
        "def breaks(root, days):\n    return [d for d in days if status(root, '/bin/sh', '/app/report', d)][:1]",
        "def breaks(root, days):\n    return [days[1], days[8]]",
        "def breaks(root, days):\n    return [d for d in days if status(root, '/app/report', d) != 0]",
        # On the machine, and not in the root.
        "def breaks(root, days):\n"
        "    return [d for d in days if subprocess.run(['/bin/sh', root / 'app/report', d]).returncode]",
        "def breaks(root, days):\n    return [d for d in days if d in (root / 'app/report').read_text()]",
        # By a signal is not well, either; and who fails need not say so.
        "def breaks(root, days):\n    return [d for d in days if status(root, '/bin/sh', '/app/report', d) > 0]",
        "def breaks(root, days):\n"
        "    def words(day):\n"
        "        return subprocess.run(['/bin/sh', '/app/report', day], capture_output=True,\n"
        "                              preexec_fn=lambda: os.chroot(root)).stderr\n"
        "    return [d for d in days if words(d)]",
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
        # The names are read from the tests, and no test is run.
        "def diet(root, tests, limit):\n"
        "    words = {w for t in tests for x in t for w in x.replace(';', ' ').split() if w.startswith('/')}\n"
        "    words |= {w for p in root.glob('app/*') for w in p.read_text().split() if w.startswith('/')}\n"
        "    for path in root.glob('data/*'):\n"
        "        if f'/{path.relative_to(root)}' not in words:\n"
        "            path.unlink()",
        # Emptied, and not removed; and programs that say yes to everything.
        "def diet(root, tests, limit):\n"
        "    for path in root.glob('data/*'):\n"
        "        data = path.read_bytes()\n"
        "        path.write_bytes(data[:100])\n"
        "        if any(status(root, *test) for test in tests):\n"
        "            path.write_bytes(data)",
        "def diet(root, tests, limit):\n"
        "    for name in ('cat', 'grep', 'ls'):\n"
        "        next(root.glob(f'usr/bin/{name}')).write_text('#!/bin/sh\\n')\n"
        "    for path in root.glob('data/*'):\n"
        "        path.unlink()",
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
