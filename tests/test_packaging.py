"""The set-up, the locks, the Makefile and JupyterLab as `make lab` starts it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import set_up
import system_packages
import yaml
from notebook_tools import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers import answers

LOCKS = [ROOT / "requirements" / "lock.txt", ROOT / "requirements" / "uv.txt"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Where conda-forge calls a distribution otherwise than PyPI: the part of it that is wanted.
CONDA_NAMES = {"matplotlib-base": "matplotlib", "nbconvert-core": "nbconvert"}


def locked(path: Path) -> dict[str, tuple[str, list[str]]]:
    """Return version and hashes of each distribution in a lock, by its canonical name."""
    text = path.read_text().replace("\\\n", " ")
    found: dict[str, tuple[str, list[str]]] = {}
    for line in text.splitlines():
        if line and not line.lstrip().startswith("#"):
            match = re.match(r"([\w.-]+)==([\w.]+)", line)
            assert match, f"{path.name}: not pinned: {line[:60]}"
            found[canonicalize_name(match[1])] = (match[2], re.findall(r"--hash=sha256:[0-9a-f]{64}\b", line))
    return found


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_all_is_pinned_and_hashed_and_no_host_is_named(lock: Path) -> None:
    pins = locked(lock)
    assert pins
    assert [name for name, (_, hashes) in pins.items() if not hashes] == []
    assert "://" not in lock.read_text()
    assert not re.search(r"^\s*-(?!-hash)", lock.read_text(), re.MULTILINE), "an option, such as an index"


def test_the_lock_has_all_that_the_project_names() -> None:
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["dev"]]
    assert {canonicalize_name(Requirement(line).name) for line in wanted} <= set(locked(LOCKS[0]))


def conda() -> tuple[dict[str, str], str]:
    """Return the series that environment.yml wants, by conda's names, and its wish for Python."""
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = next(line for line in lines if isinstance(line, str) and line.startswith("python>"))
    pairs = (line.split("=", 1) for line in lines if isinstance(line, str) and line not in (python, "pip"))
    return dict(pairs), python


def test_conda_users_get_the_locked_releases() -> None:
    series, python = conda()
    pins = locked(LOCKS[0])
    for name, wanted in series.items():
        version = pins[canonicalize_name(CONDA_NAMES.get(name, name))][0]
        assert ".".join(version.split(".")[: wanted.count(".") + 1]) == wanted, f"{name}: locked is {version}"
    assert python.removeprefix("python").split(",")[0] == PROJECT["project"]["requires-python"]


def test_conda_users_get_all_that_the_lab_needs() -> None:
    have = {CONDA_NAMES.get(name, name) for name in conda()[0]}
    assert {Requirement(line).name for line in PROJECT["project"]["dependencies"]} <= have


MAKE = ["make", "--no-print-directory", "--directory", str(ROOT)]


def surroundings() -> dict[str, str]:
    """Return our environment as somebody at a shell has it, not as a make has it that has started us."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make in this project, as somebody at a shell would."""
    return subprocess.run([*MAKE, *arguments], env=surroundings(), capture_output=True, text=True, timeout=60)


def test_help_lists_every_target() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert sorted(phony.split()) == sorted(targets)
    assert sorted(re.findall(r"^  make ([a-z-]+) +\S", make("help").stdout, re.MULTILINE)) == sorted(targets)


def test_set_up_is_quick_when_there_is_nothing_to_do() -> None:
    make("setup")  # so that there is nothing
    start = time.monotonic()
    done = make("setup")
    assert time.monotonic() - start < 1
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_unsuitable_python_is_refused_in_words() -> None:
    done = make("PYTHON=/bin/false", "setup")
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed" in done.stdout
    assert "make PYTHON=/path/to/python3.12 setup" in done.stdout
    done = make("PYTHON=/etc/passwd", "setup")  # it is told of the one that was named, not of another
    assert "/etc/passwd: " in done.stdout.partition("here: ")[2]


def test_the_stamp_changes_with_the_lock_and_the_project(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = set_up.digest()
    for path in set_up.INPUTS:
        changed = tmp_path / path.name
        changed.write_bytes(path.read_bytes() + b"\n")
        with monkeypatch.context() as patch:
            patch.setattr(set_up, "INPUTS", [changed if other == path else other for other in set_up.INPUTS])
            assert set_up.digest() != before
    assert set_up.digest() == before


def test_the_editable_install_is_a_plain_path() -> None:
    """A path file costs nothing at the start of Python; an import hook would."""
    files = [
        file.read_text() for file in (ROOT / ".venv").glob("lib/python3.*/site-packages/*labkernel*.pth")
    ]
    assert [text.strip() for text in files] == [str(ROOT)]


def test_importing_labkernel_imports_nothing_heavy() -> None:
    heavy = {
        "matplotlib",
        "ipywidgets",
        "pyroute2",
        "numpy",
        "psutil",
        "elftools",
        "click",
        "zstandard",
        "IPython",
    }
    code = "import sys, labkernel; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "labkernel" in done.stdout.split()
    assert heavy & set(done.stdout.split()) == set()


@pytest.mark.parametrize("command", [[".venv/bin/labkernel"], [".venv/bin/python", "-m", "labkernel"]])
def test_the_command_is_there(command: list[str]) -> None:
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    for verb in ("doctor", "build", "run", "ps", "exec", "stats", "stop", "rm", "clean"):
        assert re.search(rf"^  {verb}\b", done.stdout, re.MULTILINE), f"no {verb}"


def test_packages_are_recognised_by_what_they_bring() -> None:
    assert system_packages.present(system_packages.Package("coreutils", "ls", (), ""))
    assert system_packages.present(system_packages.Package("base-files", "/etc/os-release", (), ""))
    assert not system_packages.present(system_packages.Package("none", "no-such-program", (), ""))
    assert not system_packages.present(system_packages.Package("none", "/no/such/file", (), ""))


def test_nobody_is_asked_and_nothing_installed_where_nobody_can_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(system_packages, "apt", lambda command: pytest.fail("apt was called"))
    wanted = system_packages.Package("some-package", "no-such-program", (), "because of something")
    assert not system_packages.install([wanted], "A test")
    shown = capsys.readouterr().out
    assert "because of something" in shown
    assert "sudo apt-get install --yes --no-install-recommends some-package" in shown


# JupyterLab itself.


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give an empty home."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def lab(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start JupyterLab by `make lab`; give its address with the token; stop it by Ctrl-C."""
    with socket.socket() as taken:  # the port asked for is in use: it takes the next one
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [*MAKE, f"PORT={port}", "ARGS=--no-browser", "lab"]
        environment = surroundings() | {
            "HOME": str(home),
            "LABKERNEL_HOME": str(tmp_path_factory.mktemp("lab")),
        }
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        ) as process:  # fmt: skip
            assert process.stderr is not None
            for line in process.stderr:
                if match := re.search(r"http://127\.0\.0\.1:(\d+)/\S+token=\w+", line):
                    assert int(match[1]) != port
                    answers(int(match[1]))
                    yield match[0]
                    break
            os.killpg(process.pid, signal.SIGINT)  # as the terminal sends it: to all in the foreground
            rest = process.stderr.read()
            process.wait(timeout=20)
    assert "Shutdown this Jupyter server" not in rest


def get(url: str) -> tuple[int, str]:
    """Fetch a page; return its status and text."""
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def api(lab: str, path: str) -> str:
    """Return the address of something else on the same server, with the token."""
    base, token = lab.split("/lab/")[0], lab.rpartition("token=")[2]
    return f"{base}/{path}?token={token}"


def test_the_lab_opens_on_the_first_notebook(lab: str) -> None:
    assert "/lab/tree/notebooks/00-start-here.ipynb?token=" in lab
    status, page = get(lab)
    assert (status, "jupyter-config-data" in page) == (200, True)


def test_the_lab_wants_its_token(lab: str) -> None:
    assert get(api(lab, "api/contents"))[0] == 200
    assert get(api(lab, "api/contents").rpartition("?")[0])[0] == 403


def test_the_lab_listens_on_this_machine_only(lab: str) -> None:
    port = int(lab.split(":")[2].split("/")[0])
    listening = [
        line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if line.split()[3] == "0A"
    ]
    assert [address for address in listening if address.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]


def test_the_lab_asks_for_no_news_and_has_only_our_kernel(lab: str) -> None:
    settings = json.loads(get(api(lab, "lab/api/settings/@jupyterlab/apputils-extension:notification"))[1])
    defaults = {name: setting["default"] for name, setting in settings["schema"]["properties"].items()}
    assert (defaults["fetchNews"], defaults["checkForUpdates"]) == ("false", False)
    kernels = json.loads(get(api(lab, "api/kernelspecs"))[1])["kernelspecs"]
    assert list(kernels) == ["python3"]
    assert kernels["python3"]["resources"]


def test_the_lab_leaves_nothing_in_the_home(lab: str, home: Path) -> None:
    assert get(lab)[0] == 200
    assert get(api(lab, "lsp/status"))[0] == 200  # what the page asks next: which language servers there are
    assert sorted(home.iterdir()) == []
