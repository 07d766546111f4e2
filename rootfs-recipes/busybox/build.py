"""One static program under many names: busybox looks at the name by which it was called."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from labkernel.image import Progress
from labkernel.image.recipes import Recipe

# A root file system is usable by the kernel and the lab when these are there: places to mount at, and to write to.
DIRECTORIES = ("bin", "dev", "etc", "proc", "root", "run", "sys", "tmp")

# Programs that ask who they are, and how others are called, read these.
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1\tlocalhost\n::1\tlocalhost\n",
}


def build(root: Path, recipe: Recipe, tell: Progress) -> None:
    """Copy the program, and link every name it answers to."""
    for name in DIRECTORIES:
        (root / name).mkdir()
    (root / "tmp").chmod(0o1777)
    (root / "root").chmod(0o700)
    for name, content in FILES.items():
        (root / name).write_text(content)
    program = root / "bin/busybox"
    shutil.copyfile("/bin/busybox", program)
    program.chmod(0o755)
    names = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        if name != "busybox":
            (root / "bin" / name).symlink_to("busybox")
