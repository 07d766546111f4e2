"""vm/provision.sh makes the test VM the lab, for a user who has nothing yet, and without a network."""

from __future__ import annotations

import grp
import json
import os
import pwd
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from tornado.ioloop import IOLoop
from tornado.websocket import websocket_connect

PROJECT = Path(__file__).resolve().parents[2]
USER = "reader"
LAB = Path("/home") / USER / "containers-from-scratch"
SERVER = "http://127.0.0.1:8888"
SLOW = 300.0
"""Seconds for what takes two on a real processor."""


def sh(command: str, **kwargs: Any) -> str:
    """Run a command and return what it says; a failure is the test's."""
    done = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, text=True, **kwargs)
    said = str(done.stdout)
    assert done.returncode == 0, said
    return said


def provision() -> str:
    return sh(
        "vm/provision.sh 2>&1",
        cwd=PROJECT,
        env={**os.environ, "LAB_USER": USER, "LAB_ADDRESS": "0.0.0.0", "WHEELS": "/opt/wheels"},
    )


@pytest.fixture(scope="module")
def said() -> Iterator[str]:
    """A first run, on a machine that lacks a package, the ranges of ids and the delegation."""
    sh(f"useradd --create-home --shell /bin/bash {USER}")
    sh(f"sed -i /^{USER}:/d /etc/subuid /etc/subgid")
    sh("dpkg --purge make 2>&1")
    sh("rm -r /etc/systemd/system/user@.service.d && systemctl daemon-reload")
    text = provision()
    print(text)
    yield text
    sh("systemctl disable --now labkernel-jupyter.service 2>&1")


def answer(path: str, token: str | None) -> tuple[int, str, bytes]:
    """Ask the server: the status, the address in the end, the body."""
    request = urllib.request.Request(SERVER + path)
    if token:
        request.add_header("Authorization", f"token {token}")
    try:
        with urllib.request.urlopen(request, timeout=SLOW) as response:
            return response.status, response.url, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.url or "", error.read()


def token() -> str:
    address = sh(f"runuser -u {USER} labkernel-token").splitlines()[0]
    assert address.startswith(f"{SERVER}/lab?token=")
    return address.partition("=")[2]


def in_a_kernel(code: str) -> str:
    """Run code in a kernel of the service, as a notebook does, and return what it prints."""
    headers = {"Authorization": f"token {token()}"}
    request = urllib.request.Request(f"{SERVER}/api/kernels", data=b"{}", headers=headers)
    with urllib.request.urlopen(request, timeout=SLOW) as response:
        kernel = json.load(response)["id"]
    header = {"msg_id": uuid4().hex, "msg_type": "execute_request", "session": uuid4().hex, "version": "5.3"}
    message = {
        "header": header,
        "parent_header": {},
        "metadata": {},
        "content": {"code": code, "silent": False, "store_history": False, "allow_stdin": False},
        "channel": "shell",
    }

    async def ask() -> str:
        address = f"{SERVER.replace('http', 'ws')}/api/kernels/{kernel}/channels?token={token()}"
        socket = await websocket_connect(address)
        await socket.write_message(json.dumps(message))
        printed = ""
        while answer := await socket.read_message():
            reply = json.loads(answer)
            assert reply["msg_type"] != "error", reply["content"]
            if reply["msg_type"] == "stream":
                printed += reply["content"]["text"]
            if reply["msg_type"] == "execute_reply":
                break
        socket.close()
        return printed

    printed: str = IOLoop(make_current=False).run_sync(ask, timeout=SLOW)
    return printed


def test_says_what_it_installs_and_where_the_lab_is(said: str) -> None:
    assert "=> installing make\n" in said
    assert sh("command -v make").strip() == "/usr/bin/make"
    assert f"notebooks are in {LAB}" in said
    assert f"{SERVER}/lab?token=" in said.splitlines()[-1]


def test_user_has_the_project_the_environment_and_a_root_file_system(said: str) -> None:
    assert (LAB / "notebooks").is_dir() == (PROJECT / "notebooks").is_dir()
    assert (LAB / "vm" / "provision.sh").read_bytes() == (PROJECT / "vm" / "provision.sh").read_bytes()
    assert {path.owner() for path in (LAB, LAB / "Makefile", LAB / ".venv" / "bin" / "labkernel")} == {USER}
    rootfs = Path(f"/home/{USER}/.local/share/labkernel/rootfs")
    assert [path.name.partition("-")[0] for path in rootfs.iterdir()] == ["python"]


def test_user_has_ranges_of_ids_that_are_nobody_elses(said: str) -> None:
    for name in ("/etc/subuid", "/etc/subgid"):
        ranges = {}
        for line in Path(name).read_text().splitlines():
            owner, first, count = line.split(":")
            ranges[owner] = range(int(first), int(first) + int(count))
        assert len(ranges.pop(USER)) == 65536
        assert "student" in ranges
    mine = sh(f"grep ^{USER}: /etc/subuid").split(":")
    student = sh("grep ^student: /etc/subuid").split(":")
    assert int(mine[1]) >= int(student[1]) + int(student[2])


def test_server_answers_with_the_token_and_only_with_it(said: str) -> None:
    assert answer("/api/contents", token())[0] == 200
    assert answer("/api/contents", None)[0] == 403
    assert answer("/api/contents", "a" * 48)[0] == 403
    status, url, _ = answer("/lab", None)
    assert status == 200 and "/login?next=" in url
    assert b"<title>JupyterLab</title>" in answer("/lab", token())[2]


def test_server_is_the_users_and_shows_the_project(said: str) -> None:
    pid = sh("systemctl show --property MainPID --value labkernel-jupyter.service").strip()
    assert Path(f"/proc/{pid}").stat().st_uid == pwd.getpwnam(USER).pw_uid
    names = {entry["name"] for entry in json.loads(answer("/api/contents", token())[2])["content"]}
    assert {"Makefile", "labkernel", "vm"} <= names


def test_token_is_for_its_user_alone(said: str) -> None:
    file = Path("/etc/labkernel/token")
    assert file.stat().st_mode & 0o777 == 0o640
    assert (file.owner(), file.group()) == ("root", grp.getgrgid(pwd.getpwnam(USER).pw_gid).gr_name)
    assert sh(f"runuser -u {USER} labkernel-token 9000").startswith(
        f"http://127.0.0.1:9000/lab?token={token()}\n"
    )
    others = subprocess.run(["runuser", "-u", "student", "labkernel-token"], capture_output=True, text=True)
    assert others.returncode != 0 and others.stdout == ""
    # Nor is it on a command line, which everybody can read.
    assert token() not in sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")


def test_kernel_of_the_service_gets_a_group_with_all_controllers(said: str) -> None:
    printed = in_a_kernel(
        "import subprocess\n"
        "print(subprocess.run(['systemd-run', '--user', '--scope', '--quiet', '-p', 'Delegate=yes', 'sh', '-c',\n"
        "    'cat /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup)/cgroup.controllers'],\n"
        "    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout)"
    )
    assert set(printed.split()) == {"cpu", "cpuset", "io", "memory", "pids"}


def test_kernel_of_the_service_can_make_user_namespaces(said: str) -> None:
    code = (
        "import subprocess; print(subprocess.run(['unshare', '-Ur', 'id', '-u'], capture_output=True).stdout)"
    )
    assert in_a_kernel(code).strip() == r"b'0\n'"


def test_second_run_changes_nothing(said: str) -> None:
    mine = Path(LAB) / "notes.txt"
    mine.write_text("my own")
    before = state()
    again = provision()
    assert state() == before
    assert mine.read_text() == "my own"
    assert not any(
        word in again for word in ("writing", "installing", "copying", "giving", "letting", "making")
    )
    assert again.splitlines()[-1] == said.splitlines()[-1]


def state() -> dict[str, object]:
    """What a second run could have changed: settings and programs, packages, the service's process."""
    files = [
        file for top in ("/etc", "/usr/local", "/var/lib/systemd/linger") for file in Path(top).rglob("*")
    ]
    return {
        "files": {str(file): file.lstat().st_ctime_ns for file in files},
        "packages": sh("dpkg-query --show"),
        "environment": (LAB / ".venv" / "stamp.json").stat().st_mtime_ns,
        "service": sh("systemctl show --property MainPID,NRestarts labkernel-jupyter.service"),
    }
