"""The same for somebody who is not root: containers, children and walls, `make run` and `make lab`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import answers, assert_nothing_left, snapshot
from tests.ordinary_user import PYTHON, ROOT, User, copy_package, needs_root, ordinary_user

pytestmark = needs_root

FILES = ("test_container", "test_walls", "test_children", "test_namespaces", "test_users")


@pytest.mark.parametrize("with_range", [True, False], ids=["with a range of ids", "with a single id"])
def test_the_tests_pass_for_an_ordinary_user(with_range: bool) -> None:
    """Without a range in /etc/subuid a container has a single id: what needs more is skipped, in words."""
    before = snapshot()
    with ordinary_user() as user:
        if not with_range:
            everything = "1-4294967294"
            words = ["usermod", "--del-subuids", everything, "--del-subgids", everything, user.name]
            subprocess.run(words, check=True)
        variables = copy_package(user) | {"PYTHONDONTWRITEBYTECODE": "1"}
        lab = user.home / "lab"
        for name in ("labkernel", "tests"):
            shutil.copytree(ROOT / name, lab / name, ignore=shutil.ignore_patterns("__pycache__"))
        (lab / "pytest.ini").write_text("[pytest]\n")
        user.gets(lab)
        chosen = [f"tests/{name}.py" for name in (FILES if with_range else FILES[3:])]
        options = ["-q", "-p", "no:cacheprovider", "--tb=short", "-rs", f"--basetemp={user.home}/tmp"]
        command = [PYTHON, "-m", "pytest", *options, *chosen]
        ended = user.run(*command, cwd=lab, variables=variables, text=True, timeout=600)
    assert ended.returncode == 0, f"as an ordinary user:\n{ended.stdout[-20000:]}\n{ended.stderr[-5000:]}"
    passed = re.search(r"(\d+) passed", ended.stdout)
    assert passed
    assert int(passed[1]) > (300 if with_range else 50)
    assert_nothing_left(before)


# ---------------------------------------------------------------------- from a fresh clone, in a fresh home


@pytest.fixture(scope="module")
def newcomer() -> Iterator[User]:
    """Somebody who has just cloned the project, with the environment set up."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a clone that could be cloned")
    with ordinary_user() as user:
        clone = user.home / "lab"
        # Without hard links: what becomes theirs must not be ours as well.
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, clone], check=True)
        user.gets(clone)
        done = make(user, "setup")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "the environment is ready" in done.stdout
        yield user


def make(user: User, *words: str) -> subprocess.CompletedProcess[str]:
    """Run make in the user's clone."""
    command = ["make", "--no-print-directory", f"PYTHON={PYTHON}", *words]
    done: subprocess.CompletedProcess[str] = user.run(
        *command, cwd=user.home / "lab", variables=shared_cache(user), text=True, timeout=300
    )
    return done


def shared_cache(user: User) -> dict[str, str]:
    """What our own set-up has downloaded, so that a test need not do it again: uv's cache, by hard links."""
    ours = Path(os.environ.get("UV_CACHE_DIR") or Path.home() / ".cache" / "uv")
    theirs = user.home / "uv-cache"
    if ours.is_dir() and ours.stat().st_dev == user.home.stat().st_dev and not theirs.exists():
        theirs.mkdir()
        kinds = [path for kind in ("archive", "wheels", "simple") for path in ours.glob(f"{kind}-v*")]
        subprocess.run(["cp", "--archive", "--link", *kinds, theirs], check=True)
        for directory, _, _ in os.walk(theirs):  # the files stay ours: they are the same ones
            os.chown(directory, user.uid, user.gid)
    return {"UV_CACHE_DIR": str(theirs)}


def test_an_ordinary_user_makes_run(newcomer: User) -> None:
    before = snapshot()
    done = make(newcomer, "NOTEBOOKS=00 03 23", "run")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((newcomer.home / "lab" / "build" / "run.json").read_text())
    outcomes = {row["notebook"][:2]: row["outcome"] for row in rows}
    assert outcomes | {"23": ""} == {"00": "passed", "03": "passed", "23": ""}
    for row in rows:
        assert row["outcome"] == "passed" or (
            row["outcome"] == "skipped" and "What to do" in row["reason"]
        ), row
        page = newcomer.home / "lab" / "build" / "pages" / row["notebook"].replace(".ipynb", ".html")
        assert page.exists() == (row["outcome"] == "passed")
    assert newcomer.processes() == []
    assert_nothing_left(before)


def test_an_ordinary_user_makes_lab(newcomer: User) -> None:
    """JupyterLab answers on this machine, to who has the token, and ends by Ctrl-C."""
    before = snapshot()
    words = ["make", f"PYTHON={PYTHON}", "PORT=0", "ARGS=--no-browser", "lab"]
    with subprocess.Popen(
        newcomer.command(*words), cwd=newcomer.home / "lab", env=newcomer.environment(),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout
            lines = []
            for line in process.stdout:
                lines.append(line)
                if address := re.search(r"http://127\.0\.0\.1:(\d+)/\S+token=\w+", line):
                    break
            else:
                pytest.fail("".join(lines))
            assert "/lab/tree/notebooks/00-start-here.ipynb?token=" in address[0]
            answers(int(address[1]))
            with urllib.request.urlopen(address[0], timeout=20) as answer:
                assert (answer.status, b"jupyter-config-data" in answer.read()) == (200, True)
            without = address[0].split("/lab/")[0] + "/api/contents"
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(without, timeout=20)
        finally:
            os.killpg(process.pid, signal.SIGINT)  # as the terminal sends it: to all in the foreground
            process.stdout.read()  # type: ignore[union-attr]
            process.wait(20)
    assert newcomer.processes() == []
    assert_nothing_left(before)
