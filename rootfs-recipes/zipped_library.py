"""A standard library in one archive, as byte code: Python imports from it as from a directory.

Source: the modules zipimport and py_compile of Python; PEP 273, PEP 552 (what the first bytes of byte code say).
"""

from __future__ import annotations

import os
import pickle
import subprocess
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

# Runs in the Python whose library it is: byte code is good for one version only. A fixed seed, since sets are in the
# order of their hashes; "unchecked hash" files, since those hold no time.
_COMPILE = """
import importlib.util, marshal, pickle, sys, warnings
warnings.simplefilter("ignore")
compiled = {}
for name, source in pickle.load(sys.stdin.buffer).items():
    code = compile(source, f"{sys.argv[1]}/{name}", "exec", dont_inherit=True, optimize=2)
    header = importlib.util.MAGIC_NUMBER + b"\\1\\0\\0\\0" + importlib.util.source_hash(source)
    compiled[name + "c"] = header + marshal.dumps(code)
pickle.dump(compiled, sys.stdout.buffer)
"""


def byte_code(executable: Path, library: Path, files: Iterable[Path], inside: str) -> dict[str, bytes]:
    """The byte code of *files* of a *library*, without docstrings and assertions, {name in the library: content}.

    *inside*: where tracebacks shall say that the files are. Raises subprocess.CalledProcessError.
    """
    sources = {str(file): (library / file).read_bytes() for file in files}
    command = [executable, "-E", "-S", "-B", "-c", _COMPILE, inside]
    done = subprocess.run(
        command, input=pickle.dumps(sources, 4), stdout=subprocess.PIPE, check=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )  # fmt: skip
    compiled: dict[str, bytes] = pickle.loads(done.stdout)
    return compiled


def write_zip(content: Mapping[str, bytes], destination: Path, compression: int) -> None:
    """An archive of *content*, twice the same bits; *compression*: zipfile.ZIP_STORED or ZIP_DEFLATED."""
    with zipfile.ZipFile(destination, "w") as archive:
        for name in sorted(content):
            entry = zipfile.ZipInfo(name)  # of 1980, the first day that a zip archive can express
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, content[name], compression, 9)
