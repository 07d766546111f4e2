"""Recipes: what they may say, what a build does when it fails, is interrupted or has no room, and what comes out."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import from_packages
import pytest
import system_packages

from labkernel import images, state
from labkernel.image import python as pythons
from labkernel.image import recipes, store
from labkernel.image.pack import pack
from labkernel.image.recipes import BadRecipe, BuildError, NoSuchRecipe, NotHere, Recipe
from tests.helpers import own_home
from tests.ordinary_user import PYTHON, User, copy_package, needs_root, ordinary_user

ROOT = Path(__file__).parent.parent
LABKERNEL = [sys.executable, "-m", "labkernel"]
PATIENCE = 60.0

LINES = {
    "name": '"mine"', "what": '"a test"', "teaches": '"02-tarball"', "size": '"1K"', "proof": '["sh", "-c", "true"]',
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_home(tmp_path_factory) as place:
        (
            place / "images"
        ).unlink()  # that of this run of the tests is shared with others, who count what is in it
        (place / "rootfs").unlink()
        yield place


def write(folder: Path, build: str = "(root / 'file').write_text('content')", **lines: str) -> str:
    """Make a recipe, and return the name under which it can be built."""
    folder.mkdir(exist_ok=True)
    text = "".join(
        f"{key} = {value}\n" for key, value in (LINES | {"name": f'"{folder.name}"'} | lines).items()
    )
    (folder / "recipe.toml").write_text(text)
    body = "".join(f"    {line}\n" for line in build.splitlines())
    (folder / "build.py").write_text(f"def build(root, recipe, tell):\n{body}")
    return str(folder)


# ---------------------------------------------------------------------- what a recipe may say


def test_every_recipe_can_be_read() -> None:
    found = recipes.all_recipes()
    assert "busybox" in [recipe.name for recipe in found]
    assert images.STANDARD not in [recipe.name for recipe in found]
    for recipe in found:
        assert recipes.proof_command(recipe)
        assert recipe.teaches[:2].isdigit()
        assert set(recipe.starts_from) <= {other.name for other in found}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ({"colour": '"blue"'}, "unknown key 'colour'; there are: name, what"),
        ({"size": '"big"'}, "size 'big': give bytes"),
        ({"size": "2"}, "size = 2: give a text"),
        ({"proof": '"sh"'}, "proof = 'sh': give a list of texts"),
        ({"proof": "[1]"}, r"proof = \[1\]: give a list of texts"),
        ({"proof": "[]"}, "proof is missing"),
        ({"what": '""'}, "what is missing"),
        ({"name": '"other"'}, "has to be the folder's, mine"),
        ({"user": '"me"'}, 'give "any" or "root"'),
        ({"same_bits": "false"}, "a sentence that says why"),
        ({"slow": '"yes"'}, "slow = 'yes': give true or false"),
        ({"needs": "["}, "recipe.toml: "),
    ],
)
def test_a_bad_recipe_is_refused_with_the_key(tmp_path: Path, lines: dict[str, str], said: str) -> None:
    write(tmp_path / "mine", **lines)
    with pytest.raises(BadRecipe, match=said):
        recipes.load(tmp_path / "mine")


@pytest.mark.parametrize(
    ("name", "said"), [("python", "built from this machine's Python"), ("a b", "use letters")]
)
def test_names_that_no_recipe_may_have(tmp_path: Path, name: str, said: str) -> None:
    before = store.whole(name)
    with pytest.raises(BadRecipe, match=f"recipe.toml: name '{name}': .*{said}"):
        recipes.build(write(tmp_path / name))
    assert store.whole(name) == before


def test_a_recipe_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoSuchRecipe, match=r"no image 'nothing'; recipes: .*busybox"):
        recipes.build("nothing")
    with pytest.raises(NoSuchRecipe):
        recipes.build(str(tmp_path))
    monkeypatch.setattr(recipes, "FOLDER", tmp_path / "nowhere")
    with pytest.raises(NoSuchRecipe, match="no recipes here"):
        recipes.build("busybox")


# ---------------------------------------------------------------------- building


def test_a_build_is_kept_until_something_changes(tmp_path: Path, home: Path) -> None:
    name = write(tmp_path / "mine")
    image = recipes.build(name)
    assert (image.bytes, image.files) == (7, 1)
    tarball = image.tarball.stat().st_mtime_ns
    assert recipes.build(name) == image == store.whole("mine")
    assert image.tarball.stat().st_mtime_ns == tarball
    assert recipes.build(name, again=True) == image
    assert image.tarball.stat().st_mtime_ns != tarball
    write(tmp_path / "mine", "(root / 'file').write_text('other')")
    assert recipes.build(name).bytes == 5
    image.tarball.write_bytes(b"cut short")
    assert recipes.build(name).tarball.stat().st_size > 20
    assert json.loads((home / "images/mine.json").read_text())["name"] == "mine"


def test_a_build_that_fails_shows_the_end_of_its_log(tmp_path: Path, home: Path) -> None:
    before = store.whole("mine")
    name = write(tmp_path / "mine", "recipe.run('sh', '-c', 'seq 30; echo no such thing >&2; exit 3')")
    with pytest.raises(BuildError) as caught:
        recipes.build(name)
    assert "recipe mine: 'sh -c seq 30" in caught.value.text and "exit status 3" in caught.value.text
    assert caught.value.tail.splitlines()[-2:] == ["30", "no such thing"]
    assert len(caught.value.tail.splitlines()) == recipes.LAST_LINES
    assert store.whole("mine") == before
    assert not (home / "builds/mine/work").exists()


@pytest.mark.parametrize(
    ("build", "said"),
    [
        ("pass", "build.py has left the tree empty"),
        ("raise ValueError('no such animal')", "ValueError: no such animal"),
        ("import subprocess; subprocess.run(['false'], check=True)", "'false' ended with exit status 1"),
        ("recipe.run('sh', '-c', 'kill -TERM $$')", "was killed by SIGTERM"),
        ("recipe.run('no-such-program')", "there is no program no-such-program"),
        ("import os; os.mkfifo(root / 'pipe'); (root / 'x').write_text('x')", "pipe: neither file"),
        ("import os; os._exit(3)", "the build was killed"),
    ],
)
def test_what_fails_is_said(tmp_path: Path, home: Path, build: str, said: str) -> None:
    with pytest.raises(BuildError) as caught:
        recipes.build(write(tmp_path / "bad", build))
    assert caught.value.text.startswith("recipe bad: ") and said in caught.value.text
    assert not (home / "builds/bad/work").exists() and store.whole("bad") is None


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write(tmp_path / "needy", needs='["no-such-package", "another-one"]')
    if shutil.which("dpkg-query"):
        monkeypatch.setattr(recipes, "_offered", lambda name: True)
        with pytest.raises(
            BuildError, match="apt-get install --no-install-recommends no-such-package another"
        ):
            recipes.build(name)
        monkeypatch.setattr(recipes, "_offered", lambda name: name == "another-one")
        with pytest.raises(NotHere, match="made from no-such-package, which this distribution does not have"):
            recipes.build(name)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotHere, match="there is no dpkg here"):
        recipes.build(name)


def test_a_recipe_for_root_is_refused_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(BuildError, match="by root only"):
        recipes.build(write(tmp_path / "mine-alone", user='"root"'))


def test_a_file_of_the_host_that_has_changed_is_taken_again(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("one")
    name = write(tmp_path / "copied", f"(root / 'x').write_bytes(open({str(source)!r}, 'rb').read())\n"
                 f"return [{str(source)!r}]")  # fmt: skip
    assert recipes.build(name) == recipes.build(name)
    source.write_text("other")
    assert recipes.build(name).bytes == 5
    source.unlink()
    with pytest.raises(BuildError, match="FileNotFoundError"):
        recipes.build(name)


def test_an_image_that_starts_from_another(tmp_path: Path) -> None:
    write(
        tmp_path / "base",
        "(root / 'etc').mkdir()\n(root / 'etc/x').write_text('x')\n(root / 'etc/x').chmod(0o4755)",
    )
    build = "(recipe.image('base') / 'etc').rename(root / 'etc')\n(root / 'y').write_text('y')"
    name = write(tmp_path / "upper", build, **{"from": '["base"]'})
    image = recipes.build(name)
    assert (image.bytes, image.files) == (2, 2)
    assert (images.rootfs("upper") / "etc/x").stat().st_mode & 0o7777 == 0o4755
    write(tmp_path / "base", "(root / 'etc').mkdir()\n(root / 'etc/x').write_text('longer')")
    assert recipes.build(name).bytes == 7
    write(tmp_path / "base", **{"from": '["upper"]'})
    with pytest.raises(BadRecipe, match="start from one another"):
        recipes.build(name)


def test_the_ids_are_those_of_the_image(tmp_path: Path) -> None:
    build = "import os\n(root / 'etc').mkdir()\n(root / 'etc/x').write_text('x')\nos.chown(root / 'etc/x', 33, 42)"
    recipes.build(write(tmp_path / "owned", build))
    file = images.rootfs("owned") / "etc/x"
    base = file.parent.stat().st_uid
    assert (file.stat().st_uid - base, file.stat().st_gid - base) == (33, 42)


def test_the_surroundings_are_the_same_for_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    umask = os.umask(0o077)
    try:
        words = "[os.environ['LC_ALL'], os.environ['TZ'], str(os.getpid())]"
        build = f"import os\n(root / 'x').write_text(' '.join({words}))"
        recipes.build(write(tmp_path / "where", build))
    finally:
        os.umask(umask)
    assert (images.rootfs("where") / "x").read_text() == "C.UTF-8 UTC 1"
    assert (images.rootfs("where") / "x").stat().st_mode & 0o777 == 0o644


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    build = "for i in range(3):\n    tell('cook', i, 2)\n(root / 'x').write_text('x')"
    recipes.build(write(tmp_path / "cooked", build), progress=lambda *step: told.append(step))
    assert [step for step in told if step[0] == "cook"][-1] == ("cook", 2, 2)
    assert {what for what, _, _ in told} >= {"build cooked", "cook", "pack"}


def test_who_comes_later_waits_and_builds_nothing(tmp_path: Path) -> None:
    name = write(tmp_path / "slow", "import time\ntime.sleep(1)\n(root / 'x').write_text('x')")
    code = f"from labkernel.image.recipes import build; build({name!r})"
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    until(lambda: (state.home() / "builds/slow/work").exists())
    image = recipes.build(name)
    written = image.tarball.stat().st_mtime_ns
    assert first.wait(PATIENCE) == 0 and image.tarball.stat().st_mtime_ns == written


# ---------------------------------------------------------------------- interrupted, killed, no room


ENDLESS = """
import subprocess
subprocess.Popen(["setsid", "sleep", "47474747"])
(root / "mnt").mkdir()
subprocess.run(["mount", "-t", "tmpfs", "none", str(root / "mnt")], check=True)
(root / "mnt/x").write_text("x")
(recipe.cache / "ready").touch()
recipe.run("sleep", "47474747")
"""


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.02)


def sleepers() -> list[str]:
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [str(place)] if b"47474747" in place.read_bytes().split(b"\0") else []
    return found


@pytest.fixture
def endless(tmp_path: Path, home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A build that has no end, a process that has left its session, and a mount."""
    shutil.rmtree(home / "builds/endless", ignore_errors=True)
    name = write(tmp_path / "endless", ENDLESS)
    with subprocess.Popen([*LABKERNEL, "build", name], cwd=ROOT, stderr=subprocess.PIPE) as process:
        until(lambda: (home / "builds/endless/cache/ready").exists() and len(sleepers()) == 2)
        yield process
        process.kill()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_is_interrupted_leaves_nothing(
    home: Path, endless: subprocess.Popen[bytes], number: int, status: int
) -> None:
    endless.send_signal(number)
    assert endless.wait(PATIENCE) == status
    assert sleepers() == []
    assert sorted(path.name for path in (home / "builds/endless").iterdir()) == ["cache", "log"]
    assert not list((home / "images").glob("*endless*"))


def test_what_is_killed_is_removed_by_clean(home: Path, endless: subprocess.Popen[bytes]) -> None:
    endless.kill()
    endless.wait()
    until(lambda: sleepers() == [])
    assert (home / "builds/endless/work").exists()
    said = subprocess.run(
        [*LABKERNEL, "clean"], cwd=ROOT, capture_output=True, timeout=PATIENCE
    ).stdout.decode()
    assert not (home / "builds/endless/work").exists(), said


def test_clean_leaves_alone_what_is_being_built(home: Path, endless: subprocess.Popen[bytes]) -> None:
    subprocess.run([*LABKERNEL, "clean"], cwd=ROOT, capture_output=True, timeout=PATIENCE)
    assert (home / "builds/endless/work/root/mnt").exists()


def test_an_interrupt_in_a_notebook_leaves_nothing(tmp_path: Path, home: Path) -> None:
    shutil.rmtree(home / "builds/endless", ignore_errors=True)
    name = write(tmp_path / "endless", ENDLESS)

    def interrupt() -> None:
        until(lambda: len(sleepers()) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        recipes.build(name)
    assert sleepers() == [] and not (home / "builds/endless/work").exists()


@needs_root
@pytest.mark.parametrize("program", ["recipe.run('dd', 'if=/dev/zero', f'of={root}/x', 'bs=1M', 'count=64')",
                                     "(root / 'x').write_bytes(bytes(64 << 20))",
                                     "import os\n(root / 'x').write_bytes(os.urandom(10 << 20))"],
                         ids=["program", "python", "pack"])  # fmt: skip
def test_a_full_disk_is_said(tmp_path: Path, program: str) -> None:
    name = write(tmp_path / "big", program)
    place = tmp_path / "small"
    place.mkdir()
    script = (
        'mount -t tmpfs -o size=16m none "$0" && LABKERNEL_HOME=$0/home "$@"; status=$?; '
        'find "$0" -path "*/work*" -o -name "*big.tar*"; exit $status'
    )
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(place), *LABKERNEL]
    done = subprocess.run(
        [*command, "build", name], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 125 and done.stdout == ""
    assert "no space left on the disk of" in done.stderr
    assert "LABKERNEL_HOME to a directory on another disk" in done.stderr


# ---------------------------------------------------------------------- proofs, lists, the command line


def lab(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LABKERNEL, *words], cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_a_proof_that_fails_is_said(tmp_path: Path) -> None:
    base = find_or_skip("busybox")
    build = "for path in recipe.image('busybox').iterdir():\n    path.rename(root / path.name)"
    shutil.copytree(base.folder, tmp_path / "busybox")
    proof = '["sh", "-c", "echo it cannot be >&2; exit 3"]'
    name = write(tmp_path / "unproved", build, **{"from": '["busybox"]', "proof": proof})
    done = lab("build", name)
    assert done.returncode == 125 and done.stdout == ""
    assert "image unproved: its proof ended with exit status 3: it cannot be" in done.stderr
    write(tmp_path / "unproved", build, **{"from": '["busybox"]', "proof": '["sh", "-c", "@nothing.sh"]'})
    assert "proof: there is no nothing.sh" in lab("build", name).stderr
    (tmp_path / "nothing.sh").write_text("echo proved")
    assert lab("build", name).returncode == 0


def test_an_image_that_is_not_there() -> None:
    with pytest.raises(images.NoSuchImage, match=r"no image 'nothing'; there is: python"):
        images.rootfs("nothing")
    with pytest.raises(images.NoSuchImage, match="labkernel build debian-full makes it"):
        images.rootfs("debian-full")


def test_a_longer_name_is_another_image(tmp_path: Path) -> None:
    recipes.build(write(tmp_path / "a-b", "(root / 'x').write_text('longer')"))
    other = images.rootfs("a-b")
    for content in ("one", "two"):
        recipes.build(write(tmp_path / "a", f"(root / 'x').write_text({content!r})"))
        assert (images.rootfs("a") / "x").read_text() == content
    assert other.is_dir() and images.rootfs("a-b") == other
    assert len(list(other.parent.glob("a-*"))) == 2


def test_the_command_line_builds_lists_and_runs() -> None:
    find_or_skip("busybox")
    built = json.loads(lab("build", "busybox", "--json").stdout)
    assert built["name"] == "busybox" and os.path.isdir(f"{built['rootfs']}/bin")
    rows = {row["name"]: row for row in json.loads(lab("images", "--json").stdout)}
    assert set(rows["busybox"]) == {"name", "bytes", "gzip_bytes", "zstd_bytes", "files", "digest"}
    assert rows["busybox"]["digest"] == built["digest"]
    table = lab("images").stdout
    assert built["digest"][:19] in table and "not built: " in table
    done = lab("run", "--rm", "busybox", "sh", "-c", "ls /bin/busybox && ! ls /usr")
    assert (done.returncode, done.stdout) == (0, "/bin/busybox\n"), done.stderr


def test_all_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from labkernel import cli

    write(tmp_path / "a1", "recipe.run('sh', '-c', 'echo the reason; exit 1')")
    write(tmp_path / "a2", proof='["true"]', by_hand='"it takes a year"')
    write(tmp_path / "a3", "raise ValueError('again')")
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    with pytest.raises(SystemExit) as ended:
        cli.main(["build", "--all"])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    said = capsys.readouterr().err
    assert ended.value.code == 125
    assert "    the reason\n" in said and "labkernel: recipe a1: " in said
    assert "a2: left out: it takes a year" in said and "labkernel: recipe a3: ValueError: again" in said


def test_the_size_by_gzip_is_what_gzip_makes_of_it(tmp_path: Path) -> None:
    recipes.build(write(tmp_path / "gz", "(root / 'x').write_bytes(bytes(range(256)) * 4096)"))
    (row,) = [image for image in store.stored() if image.name == "gz"]
    pack(images.rootfs("gz"), tmp_path / "gz.tar.gz", compression="gzip")
    assert abs((tmp_path / "gz.tar.gz").stat().st_size - (row.gzip_bytes or 0)) < 200
    store.note("gz", gzip_bytes=None)  # as of an image that was built by an earlier version
    assert [image for image in store.stored() if image.name == "gz"] == [row]


def test_the_packages_of_all_recipes_can_be_installed_together() -> None:
    needed = {name for recipe in recipes.all_recipes() if not recipe.by_hand for name in recipe.needs}
    assert {package.name for package in system_packages.table() if "recipes" in package.groups} == needed
    assert not system_packages.present(system_packages.Package("no-such-package", "", (), ""))


# ---------------------------------------------------------------------- the recipes themselves


def find_or_skip(name: str) -> Recipe:
    """The recipe, where the packages that it needs are here."""
    recipe = recipes.find(name)
    try:
        recipes._installed(recipe)
    except BuildError as error:
        pytest.skip(str(error))
    return recipe


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of apt's sources on a machine with the distribution "bookworm"."""
    (tmp_path / "apt/sources.list.d").mkdir(parents=True)
    (tmp_path / "apt/sources.list").write_text("deb http://host.example/debian bookworm main\n")
    (tmp_path / "os-release").write_text("VERSION_CODENAME=bookworm\n")
    monkeypatch.setattr(from_packages, "APT", tmp_path / "apt")
    monkeypatch.setattr(from_packages, "OS_RELEASE", tmp_path / "os-release")
    return tmp_path / "apt"


def test_the_sources_of_others_are_left_out(apt: Path, tmp_path: Path) -> None:
    ours, suite = "/usr/share/keyrings/debian-archive-keyring.gpg", "bookworm main\n"
    (apt / "sources.list").write_text(
        f"deb http://plain.example {suite}deb [arch=amd64 signed-by={ours}] http://signed.example {suite}"
        f"deb [signed-by=/etc/apt/keyrings/them.gpg] http://line.them.example {suite}"
    )
    paragraphs = {
        "distribution": f"Signed-By: {ours}", "unsigned": "Enabled: yes", "off": "Enabled: no",
        "disabled": f"enabled: False\nSigned-By: {ours}", "paragraph.them": "Signed-By: /etc/apt/keyrings/them.asc",
        "key.them": "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBF",
    }  # fmt: skip
    (apt / "sources.list.d/some.sources").write_text(
        "\n\n".join(
            f"Types: deb\nURIs: http://{host}.example\nSuites: bookworm\nComponents: main\n{line}"
            for host, line in paragraphs.items()
        )
    )
    written = "".join(path.read_text() for path in from_packages.host_sources("bookworm", tmp_path))
    assert re.findall(r"http://(\S+)\.example", written) == ["plain", "signed", "distribution", "unsigned"]


MMDEBSTRAP = """#!/bin/sh
for word; do
    case $word in --setup-hook=*) sh -ec "${word#*=}" hook "$ROOT"; touch "$ROOT/var/cache/apt/archives/new.deb" ;;
                  --customize-hook=*) cp -r "$ROOT/var/cache/apt/archives" "$SEEN"; sh -ec "${word#*=}" hook "$ROOT" ;;
    esac
done
"""


def test_a_blank_in_the_path_of_the_home(apt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of mmdebstrap only this is done: it gives its hooks to a shell, with the root directory."""
    root, cache = tmp_path / "root", tmp_path / "my home/cache"
    (root / "etc").mkdir(parents=True)
    (cache / "archives").mkdir(parents=True)
    (cache / "archives/old.deb").touch()
    stranger = tmp_path / "my"
    stranger.write_text("of a stranger")
    (tmp_path / "bin").mkdir()
    for name, script in (("mmdebstrap", MMDEBSTRAP), ("apt-get", "#!/bin/sh\n")):
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("ROOT", str(root))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    (tmp_path / "work").mkdir()
    recipe = replace(recipes.find("busybox"), work=tmp_path / "work", cache=cache)
    from_packages.install(root, recipe, lambda *step: None, variant="minbase", packages=["hello"])
    assert stranger.read_text() == "of a stranger"
    assert sorted(os.listdir(tmp_path / "seen")) == ["new.deb", "old.deb"]
    assert sorted(os.listdir(cache / "archives")) == ["new.deb", "old.deb"]


FAST = [recipe.name for recipe in recipes.all_recipes() if not recipe.slow and not recipe.by_hand]


@pytest.mark.parametrize("name", FAST)
def test_a_recipe_keeps_its_promises(name: str) -> None:
    recipe = find_or_skip(name)
    image = recipes.build(name)
    images.prove(name)
    assert 0.6 * recipe.size < image.bytes < 1.25 * recipe.size
    if recipe.same_bits is True:
        assert recipes.build(name, again=True).digest == image.digest


def test_the_closure_of_another_python(tmp_path: Path) -> None:
    """Of the Python that is running, whichever it is: for that the folder is copied, and one line changed."""
    shutil.copytree(
        recipes.FOLDER / "python-closure", tmp_path / "mine", ignore=shutil.ignore_patterns("__pyc*")
    )
    for name, before, after in (
        ("build.py", 'PYTHON = "/usr/bin/python3"', f'PYTHON = "{pythons.running()}"'),
        ("recipe.toml", 'name = "python-closure"', 'name = "mine"'),
    ):
        text = (tmp_path / "mine" / name).read_text()
        assert before in text
        (tmp_path / "mine" / name).write_text(text.replace(before, after))
    image = recipes.build(str(tmp_path / "mine"))
    images.prove(str(tmp_path / "mine"))
    assert recipes.build(str(tmp_path / "mine"), again=True).digest == image.digest
    assert not list(images.rootfs("mine").rglob("*.py"))


@pytest.fixture(scope="module")
def student(home: Path) -> Iterator[tuple[User, dict[str, str]]]:
    """Somebody without rights, with copies of the package and the recipes."""
    with ordinary_user() as user:
        variables = copy_package(user)
        shutil.copytree(ROOT / "rootfs-recipes", user.home / "packages/rootfs-recipes")
        user.gets(user.home / "packages")
        yield user, variables
        user.run(PYTHON, "-m", "labkernel", "clean", "--all", variables=variables)


@needs_root
@pytest.mark.parametrize("name", ["busybox", "python-zip"])
def test_root_and_an_ordinary_user_get_the_same_bits(student: tuple[User, dict[str, str]], name: str) -> None:
    find_or_skip(name)
    user, variables = student
    done = user.run(PYTHON, "-m", "labkernel", "build", name, "--json", variables=variables, timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["digest"] == recipes.build(name).digest


OWNED = """
import os
for name, owner in (("mail", 8), ("nobody", 65534)):
    (root / name).write_text(name)
    os.chown(root / name, owner, owner)
    (root / name).chmod(0o4750)
"""


@needs_root
def test_owners_and_rights_of_a_rootless_build_are_those_of_roots(
    tmp_path: Path, student: tuple[User, dict[str, str]]
) -> None:
    user, variables = student
    digest = recipes.build(write(tmp_path / "owners", OWNED)).digest
    shutil.copytree(tmp_path / "owners", user.home / "owners")
    code = (
        "from labkernel import images; from labkernel.image import recipes; "
        "print(recipes.build('./owners').digest); place = images.rootfs('owners'); "
        "status = (place / 'mail').stat(); "
        "print(oct(place.parent.stat().st_mode & 0o777), status.st_uid, status.st_mode)"
    )
    done = user.run(PYTHON, "-c", code, variables=variables)
    assert done.returncode == 0, done.stderr.decode()
    same, closed, owner, mode = done.stdout.decode().split()
    assert same == digest
    # Who is not the user shall not come near a set-user-ID program that is the user's outside.
    assert closed == "0o700" and int(owner) > 65536 and int(mode) & 0o7777 == 0o4750
