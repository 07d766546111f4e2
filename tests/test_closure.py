"""The closure: real programs of this machine, started in a root that holds nothing but their closure."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from labkernel.image import elf
from labkernel.image import python as pythons
from labkernel.image.closure import Closure, ClosureError, closure
from labkernel.image.pack import pack
from labkernel.image.unpack import unpack

EVERYTHING = """
import asyncio, bz2, ctypes, curses, decimal, encodings.idna, hashlib, http.server, json, lzma, readline
import socket, sqlite3, ssl, sys, sysconfig, unicodedata, uuid, zlib
assert json.loads(json.dumps({"a": [1, None]})) == {"a": [1, None]}
assert ssl.create_default_context().check_hostname
assert sqlite3.connect(":memory:").execute("select 6 * 7").fetchone() == (42,)
assert ctypes.CDLL(None).getpid() == __import__("os").getpid()
assert hashlib.sha256(b"").hexdigest().startswith("e3b0c442")
assert asyncio.run(asyncio.sleep(0, "slept")) == "slept"
for codec in (zlib, bz2, lzma):
    assert codec.decompress(codec.compress(b"x" * 1000)) == b"x" * 1000
assert uuid.uuid4().version == 4
assert "bücher.example".encode("idna") == b"xn--bcher-kva.example"
assert socket.getfqdn()
assert str(decimal.Decimal("0.1") * 3) == "0.3"
assert sys.prefix == sys.exec_prefix == sysconfig.get_config_var("prefix") == "/usr", sys.prefix
assert not any("site-packages" in path for path in sys.path), sys.path
print(*sys.version_info[:2])
"""


CHROOT = shutil.which("chroot", path="/usr/sbin:/usr/bin:/sbin:/bin") or "chroot"
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def in_root(root: Path, *command: str) -> list[str]:
    """*command* with *root* as its root directory: for root, and for an ordinary user by a user namespace."""
    if os.geteuid() == 0:
        return [CHROOT, str(root), *command]
    if subprocess.run(["unshare", "-Ur", "true"], capture_output=True).returncode:
        pytest.skip("chroot needs root or user namespaces, and this machine gives its users none")
    return ["unshare", "-Ur", CHROOT, str(root), *command]


def run(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    return subprocess.run(
        in_root(root, *command), capture_output=True, text=True, env=environment, timeout=30
    )


def unpacked(content: Closure, where: Path) -> Path:
    pack(content, where / "image.tar", compression="none")
    unpack(where / "image.tar", where / "root")
    return where / "root"


@pytest.fixture(scope="module", params=["running", "/usr/bin/python3"])
def python(request: pytest.FixtureRequest) -> Path:
    if request.param == "running":
        return pythons.running()
    if not Path(request.param).exists():
        pytest.skip(f"this machine has no {request.param}")
    return Path(request.param)


@pytest.fixture(scope="module")
def content(python: Path) -> Closure:
    return closure([python, "sh", "ls", "cat"])


@pytest.fixture(scope="module")
def root(content: Closure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(content, tmp_path_factory.mktemp("python"))


@pytest.fixture
def cc(tmp_path: Path) -> Callable[..., Path]:
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("this test compiles a program, and this machine has no C compiler")

    def compile_(name: str, source: str, *options: str) -> Path:
        output = tmp_path / name
        output.parent.mkdir(parents=True, exist_ok=True)
        arguments = [compiler, "-x", "c", "-", "-o", str(output), *options]
        subprocess.run(arguments, input=source, text=True, check=True)
        return output

    return compile_


def test_python_runs_in_nothing_but_its_closure(root: Path, python: Path) -> None:
    done = run(root, "python3", "-c", EVERYTHING)
    asked = subprocess.run(
        [python, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr, done.returncode) == (asked.stdout, "", 0)


def test_the_interpreter_is_where_everybody_looks(root: Path) -> None:
    for name in ("/usr/bin/python3", "/bin/python3", "/usr/bin/python"):
        assert run(root, name, "-c", "import sys; print(sys.prefix)").stdout == "/usr\n"


def test_python_serves_a_file_from_inside(root: Path) -> None:
    command = ("python3", "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", "/etc")
    server = subprocess.Popen(in_root(root, *command), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert server.stdout
        port = server.stdout.readline().split(" port ")[1].split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/passwd", timeout=10) as answer:
            assert answer.read() == (root / "etc/passwd").read_bytes()
    finally:
        server.terminate()
        server.wait()
        if server.stdout:
            server.stdout.close()


def test_every_module_has_byte_code_that_is_used(root: Path) -> None:
    # With the times of an image the host's own byte code would be stale, and every start would compile anew.
    verbose = run(root, "python3", "-v", "-c", "import json, asyncio, http.server").stderr
    loaded = re.findall(r"^# code object from '?(.+?)'?$", verbose, re.MULTILINE)
    assert len(loaded) > 50
    assert [path for path in loaded if not path.endswith(".pyc")] == []


def test_what_a_root_file_system_needs_is_there(root: Path) -> None:
    assert run(root, "sh", "-c", "cat /etc/hostname; cd /root && ls -A").stdout == "localhost\n"
    assert (root / "tmp").stat().st_mode & 0o7777 == 0o1777
    assert all((root / name).is_dir() for name in ("proc", "sys", "dev", "run", "home", "var/tmp"))
    assert (root / "lib64").readlink() == Path("usr/lib64")


def test_nothing_is_missing_by_our_own_account(root: Path) -> None:
    for program in ("/usr/bin/python3", "/bin/sh", "/bin/ls"):
        assert elf.missing(program, root) == []


def test_the_image_tells_nothing_of_the_home_it_came_from(content: Closure) -> None:
    prefix = pythons.running().parent.parent
    if str(prefix) == "/usr":
        pytest.skip("the running Python is the distribution's: it has no home to tell of")
    home = os.fsencode(prefix)
    for entry in content:
        assert str(prefix) not in entry.path + entry.target
        if not entry.source:
            assert home not in entry.content, entry.path
        elif entry.source.suffix in (".py", ".json", ".txt"):
            assert home not in entry.source.read_bytes(), entry.path


def test_trimmed_of_tests_and_windows(content: Closure) -> None:
    left = {part for entry in content for part in entry.path.split("/")}
    assert not left & {"test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "site-packages"}
    assert not any("libtk" in name or "_tkinter" in name for name in left)


def test_byte_code_is_the_same_bits_each_time(python: Path, content: Closure) -> None:
    home = pythons.find(python)
    assert home
    sources = {entry.path: entry.source for entry in content if entry.path.endswith(".py") and entry.source}
    again = pythons.compiled(home, {path: file.read_bytes() for path, file in sources.items() if file})
    differing = [path for path, code in again.items() if code != content[path].content]
    assert len(again) > 400 and not differing


def test_python3_means_the_python_that_runs() -> None:
    assert pythons.find(pythons.running()) == pythons.find(Path(sys.executable))
    assert not (pythons.running().parent.parent / "pyvenv.cfg").exists()


@pytest.mark.parametrize("copies", [[], ["--copies"]], ids=["links", "copies"])
def test_a_virtual_environment_leads_to_its_base(tmp_path: Path, copies: list[str]) -> None:
    base = pythons.running()
    subprocess.run([base, "-m", "venv", "--without-pip", *copies, tmp_path / "venv"], check=True)
    found = pythons.find(tmp_path / "venv/bin/python")
    assert found and found == pythons.find(base)


def test_no_python_is_made_of_other_programs(tmp_path: Path) -> None:
    assert pythons.find(Path("/bin/sh")) is None
    (tmp_path / "python3-config").touch()
    assert pythons.find(tmp_path / "python3-config") is None


@pytest.mark.parametrize("name", ["sh", "ls", "ps", "mount", "python3"])
def test_finds_the_libraries_that_the_loader_loads(name: str) -> None:
    program = str(pythons.running()) if name == "python3" else shutil.which(name)
    if not program:
        pytest.skip(f"this machine has no {name}")
    real = str(Path(program).resolve())
    said = subprocess.run(["ldd", real], capture_output=True, text=True, check=True, env={}).stdout
    loaded = {word for line in said.splitlines() for word in line.split() if word.startswith("/")}
    ours = {library.path for library in elf.Loader().load(real)[1:]}
    assert ours == {str(Path(path).resolve()) for path in loaded}


def test_reads_the_cache_of_the_loader() -> None:
    ldconfig = shutil.which("ldconfig", path="/usr/sbin:/sbin")
    if not ldconfig or not Path("/etc/ld.so.cache").exists():
        pytest.skip("this machine's C library has no ld.so.cache")
    said = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=True, env={}).stdout
    lines = [line.strip() for line in said.splitlines()[1:] if "=>" in line and "hwcap" not in line]
    assert {(line.split()[0], line.split("=> ")[1]) for line in lines} == {
        (name, path) for name, paths in elf.ld_so_cache().items() for path in paths
    }


def test_libraries_for_certain_processors_are_passed_over(tmp_path: Path) -> None:
    strings = b"libx.so.1\0/v3/libx.so.1\0/usr/libx.so.1\0"
    header = struct.pack("=20sII20x", b"glibc-ld.so.cache1.1", 2, len(strings))
    at = len(header) + 2 * 24
    for_v3 = struct.pack("=iIIIQ", 0x303, at, at + 10, 0, 1 << 62)
    for_all = struct.pack("=iIIIQ", 0x303, at, at + 24, 0, 0)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/ld.so.cache").write_bytes(header + for_v3 + for_all + strings)
    assert elf.ld_so_cache(tmp_path) == {"libx.so.1": ("/usr/libx.so.1",)}


def test_resolves_links_as_inside_the_root(tmp_path: Path) -> None:
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "lib").symlink_to("/usr/lib")
    (tmp_path / "usr/lib/a").symlink_to("../../../../etc/b")
    (tmp_path / "usr/lib/c").symlink_to("/etc/c")
    (tmp_path / "loop").symlink_to("loop")
    assert elf.resolve("/lib/x", tmp_path) == "/usr/lib/x"
    assert elf.resolve("/lib/a", tmp_path) == "/etc/b"
    assert elf.resolve("/lib/c", tmp_path) == "/etc/c"
    with pytest.raises(OSError, match="symbolic links to follow"):
        elf.resolve("/loop", tmp_path)


def test_a_missing_interpreter_is_explained(tmp_path: Path) -> None:
    root = unpacked(closure(["sh"]), tmp_path)
    assert run(root, "/bin/sh", "-c", "echo up").stdout == "up\n"
    interpreter = elf.read_elf(root / "bin/sh")
    assert interpreter and interpreter.interpreter
    (root / elf.resolve(interpreter.interpreter, root)[1:]).unlink()
    done = run(root, "/bin/sh", "-c", "echo up")
    assert done.returncode == 127 and "No such file or directory" in done.stderr
    (lack,) = [lack for lack in elf.missing("/bin/sh", root) if lack.kind == "interpreter"]
    assert lack.name == interpreter.interpreter and "No such file or directory" in str(lack)


def test_a_missing_library_is_explained(tmp_path: Path) -> None:
    root = unpacked(closure(["sh"]), tmp_path)
    library = next(root.glob("usr/lib/**/libc.so.6"))
    library.unlink()
    assert "libc.so.6" in run(root, "/bin/sh", "-c", "echo up").stderr
    assert [(lack.name, lack.kind) for lack in elf.missing("/bin/sh", root)] == [("libc.so.6", "library")]
    with pytest.raises(FileNotFoundError):
        elf.missing("/bin/nothing", root)


def test_a_script_brings_its_interpreter(tmp_path: Path) -> None:
    script = tmp_path / "hello"
    script.write_text("#!/usr/bin/env sh\necho hello from $0\n")
    script.chmod(0o755)
    root = unpacked(closure([script]), tmp_path)
    assert run(root, "hello").stdout == "hello from /usr/bin/hello\n"


GREET = "extern void greet(void); int main(void) { greet(); return 0; }"
LIBRARY = '#include <stdio.h>\nvoid greet(void) { puts("hello"); }'


@pytest.mark.parametrize("style", ["$ORIGIN/../lib", "absolute"])
@pytest.mark.parametrize("tag", ["--enable-new-dtags", "--disable-new-dtags"], ids=["RUNPATH", "RPATH"])
def test_a_library_in_a_home_of_its_own(
    tmp_path: Path, cc: Callable[..., Path], style: str, tag: str
) -> None:
    library = cc("home/lib/libgreet.so", LIBRARY, "-shared", "-fPIC")
    path = str(library.parent) if style == "absolute" else style
    program = cc("home/bin/greet", GREET, f"-L{library.parent}", "-lgreet", f"-Wl,-rpath,{path},{tag}")
    content = closure([program])
    assert not [entry.path for entry in content if "home/" in entry.path]
    root = unpacked(content, tmp_path)
    if style != "absolute":
        assert "/usr/lib/libgreet.so" in content  # as far from the program as it was
    assert elf.missing("/usr/bin/greet", root) == []
    done = run(root, "greet")
    assert (done.stdout, done.stderr) == ("hello\n", "")


def test_what_the_host_lacks_is_named(cc: Callable[..., Path]) -> None:
    library = cc("lib/libgreet.so", LIBRARY, "-shared", "-fPIC")
    program = cc("greet", GREET, f"-L{library.parent}", "-lgreet")
    with pytest.raises(ClosureError, match=r"greet needs the shared library libgreet\.so"):
        closure([program])


def test_a_static_program_needs_nothing(tmp_path: Path, cc: Callable[..., Path]) -> None:
    program = cc("alone", '#include <stdio.h>\nint main(void) { puts("alone"); return 0; }', "-static")
    content = closure([program])
    assert [entry.path for entry in content if ".so" in entry.path] == []
    assert run(unpacked(content, tmp_path), "alone").stdout == "alone\n"


def test_the_environment_has_no_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = [(entry.path, entry.source) for entry in closure(["sh"])]
    libc = next(entry.source for entry in closure(["sh"]) if entry.path.endswith("libc.so.6"))
    assert libc
    shutil.copy(libc, tmp_path / "libc.so.6")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert [(entry.path, entry.source) for entry in closure(["sh"])] == before


def test_two_things_in_one_place_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tool").write_text(f"#!/bin/sh\necho {name}\n")
        (tmp_path / name / "tool").chmod(0o755)
    with pytest.raises(ClosureError, match="/usr/bin/tool: two different things"):
        closure([tmp_path / "one/tool", tmp_path / "two/tool"])


def test_one_program_under_many_names_is_there_once(tmp_path: Path) -> None:
    sh = Path(shutil.which("sh") or "").resolve()
    shutil.copy(sh, tmp_path / "one")
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    content = closure([tmp_path / "one", tmp_path / "two"])
    assert (content["/usr/bin/one"].kind, content["/usr/bin/two"].target) == ("file", "one")
    assert run(unpacked(content, tmp_path), "two", "-c", "echo $0").stdout == "two\n"


def test_no_program_comes_with_special_rights() -> None:
    programs = [name for name in ("mount", "su", "sh") if shutil.which(name)]
    modes = {entry.mode for entry in closure(programs) if entry.kind == "file"}
    assert modes <= {0o644, 0o755}


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-tool"):
        closure(["no-such-tool"])
