"""The recipes of Buildroot, as far as they can be tried without an hour and the internet.

Not tried here: that Buildroot 2025.02.18 takes the defconfigs (the build itself looks, and stops), and what it builds.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

from labkernel import images, state
from labkernel.image import kconfig, recipes
from labkernel.image.recipes import BuildError, NotHere
from labkernel.image.weigh import weigh
from tests.helpers import own_home

FOLDER = recipes.FOLDER / "buildroot-python"
TREE = FOLDER / "external"
DEFCONFIGS = sorted((TREE / "configs").iterdir())
RULES = kconfig.read_rules(FOLDER / "symbols.toml")
BASE, MUSL, NO_SHELL = (f"labkernel_python{variant}_defconfig" for variant in ("", "_musl", "_noshell"))

every_defconfig = pytest.mark.parametrize("path", DEFCONFIGS, ids=lambda path: path.name)


def wanted(name: str) -> kconfig.Config:
    return kconfig.read_config((TREE / "configs" / name).read_text())


def settled(name: str) -> kconfig.Config:
    return kconfig.settle(RULES, wanted(name))


@pytest.fixture(scope="module")
def shared() -> ModuleType:
    """What the three recipes share."""
    found = importlib.util.spec_from_file_location("from_buildroot", recipes.FOLDER / "from_buildroot.py")
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------- the tree


def test_the_tree_has_the_form_that_buildroot_wants() -> None:
    lines = dict(line.split(": ", 1) for line in (TREE / "external.desc").read_text().splitlines())
    assert re.fullmatch("[A-Za-z0-9_]+", lines["name"])
    assert set(lines) == {"name", "desc"}
    for name in ("Config.in", "external.mk"):
        assert all(line.startswith("#") for line in (TREE / name).read_text().splitlines())
    assert [path.name for path in DEFCONFIGS] == [BASE, MUSL, NO_SHELL]


@every_defconfig
def test_what_a_defconfig_points_to_is_there(path: Path) -> None:
    for name in re.findall(r"\$\(BR2_EXTERNAL_LABKERNEL_PATH\)/([\w./-]+)", path.read_text()):
        assert (TREE / name).is_file()
        assert os.access(TREE / name, os.X_OK) == name.endswith(".sh")
    assert path.read_text().count("$(") == path.read_text().count("$(BR2_EXTERNAL_LABKERNEL_PATH)/board/")


def test_each_recipe_builds_a_defconfig_of_its_own() -> None:
    mine = [recipe for recipe in recipes.all_recipes() if recipe.name.startswith("buildroot-python")]
    found = [
        re.search(r'^DEFCONFIG = "(\w+)"$', (recipe.folder / "build.py").read_text(), re.MULTILINE)
        for recipe in mine
    ]
    assert sorted(one[1] for one in found if one) == [path.name for path in DEFCONFIGS]
    for recipe in mine:
        assert recipe.slow and recipe.by_hand.endswith(f"labkernel build {recipe.name}")
        assert recipe.needs == mine[0].needs and recipe.same_bits is not True


def test_the_release_is_pinned(shared: ModuleType) -> None:
    release = shared.release()
    assert release["url"].endswith(f"/buildroot-{release['version']}.tar.xz")
    assert re.fullmatch("[0-9a-f]{64}", release["sha256"]) and re.fullmatch("[0-9A-F]{40}", release["key"])


# ---------------------------------------------------------------------- the defconfigs


def test_the_facts_about_symbols_fit_together() -> None:
    named = {name for one in RULES.symbols.values() for name in one.selects}
    for expression in [*(one.depends for one in RULES.symbols.values()), *RULES.needs.values()]:
        named |= set(re.findall(r"BR2_\w+", expression))
    assert named <= set(RULES.symbols)
    assert {one.choice for one in RULES.symbols.values()} - {""} == set(RULES.choices) == set(RULES.needs)


@every_defconfig
def test_every_symbol_is_known_and_no_line_is_lost(path: Path) -> None:
    lines = wanted(path.name)
    assert set(lines) <= set(RULES.symbols)
    assert kconfig.lost(lines, settled(path.name)) == []


@every_defconfig
def test_no_line_says_what_is_so_anyway(path: Path) -> None:
    lines = wanted(path.name)
    assert kconfig.minimal(RULES, lines) == lines
    places = [list(RULES.symbols).index(name) for name in lines]
    assert places == sorted(places), "as `make savedefconfig` writes them: in the order of the menu"


def test_the_variants_differ_where_they_are_meant_to() -> None:
    base, musl, no_shell = (
        set((TREE / "configs" / n).read_text().splitlines()) for n in (BASE, MUSL, NO_SHELL)
    )
    assert base ^ musl == {"BR2_TOOLCHAIN_BUILDROOT_GLIBC=y", "BR2_TOOLCHAIN_BUILDROOT_MUSL=y"}
    assert no_shell - base == {"# BR2_PACKAGE_BUSYBOX is not set", "BR2_SYSTEM_BIN_SH_NONE=y"}
    assert {line.partition("=")[0] for line in base - no_shell} == {
        "BR2_PACKAGE_BUSYBOX_CONFIG_FRAGMENT_FILES"
    }
    assert settled(BASE)["BR2_PACKAGE_BUSYBOX"] == settled(BASE)["BR2_SYSTEM_BIN_SH_BUSYBOX"] == "y"
    assert "BR2_PACKAGE_DASH" not in settled(NO_SHELL)


@every_defconfig
def test_nothing_boots_and_nobody_logs_in(path: Path) -> None:
    config = settled(path.name)
    off = (
        "LINUX_KERNEL",
        "INIT_BUSYBOX",
        "TARGET_GENERIC_GETTY",
        "TARGET_ENABLE_ROOT_LOGIN",
        "TARGET_ROOTFS_EXT2",
    )
    assert {config[f"BR2_{name}"] for name in off} == {"n"}
    on = ("INIT_NONE", "TARGET_ROOTFS_TAR", "TARGET_ROOTFS_TAR_NONE", "PACKAGE_PYTHON3_UNICODEDATA")
    assert {config[f"BR2_{name}"] for name in on} == {"y"}
    assert config["BR2_ENABLE_LOCALE_WHITELIST"] == '"C"'


def as_kconfig() -> str:
    """The facts of symbols.toml in Kconfig's own language."""
    lines, done = ['mainmenu "Buildroot"'], set()

    def one(symbol: kconfig.Symbol) -> None:
        lines.extend(
            [f"config {symbol.name}", f"\t{symbol.kind}" + (f' "{symbol.prompt}"' if symbol.prompt else "")]
        )
        lines.extend(f"\tdefault {value}" for value in symbol.default)
        lines.extend([f"\tdepends on {symbol.depends}"] if symbol.depends else [])
        lines.extend(f"\tselect {name}" for name in symbol.selects)

    for symbol in RULES.symbols.values():
        if not symbol.choice:
            one(symbol)
        elif symbol.choice not in done:
            done.add(symbol.choice)
            lines.extend(["choice", f'\tprompt "{symbol.choice}"'])
            lines.extend(f"\tdefault {value}" for value in RULES.choices[symbol.choice])
            lines.extend([f"\tdepends on {needs}"] if (needs := RULES.needs[symbol.choice]) else [])
            for other in RULES.symbols.values():
                if other.choice == symbol.choice:
                    one(other)
            lines.append("endchoice")
    return "\n".join(lines) + "\n"


def kconfig_itself(place: Path, defconfig: str) -> tuple[kconfig.Config, str]:
    """The .config that Kconfig makes of a defconfig, and the shortest defconfig for that."""
    if not shutil.which("kconfig-conf"):
        pytest.skip("kconfig-conf is not here (package kconfig-frontends-nox)")
    (place / "Kconfig").write_text(as_kconfig())
    (place / "wanted").write_text(defconfig)
    for option in ("--defconfig=wanted", "--savedefconfig=saved"):
        command = ["kconfig-conf", option, "Kconfig"]
        environment = {**os.environ, "CONFIG_": "", "KCONFIG_CONFIG": ".config"}
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    return kconfig.read_config((place / ".config").read_text()), (place / "saved").read_text()


@every_defconfig
def test_kconfig_itself_comes_to_the_same(path: Path, tmp_path: Path) -> None:
    config, saved = kconfig_itself(tmp_path, path.read_text())
    assert config == settled(path.name)
    assert saved == path.read_text()


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["BR2_PACKAGE_PYTHON3=y"],
        ["BR2_TOOLCHAIN_BUILDROOT_WCHAR=y", "BR2_PACKAGE_PYTHON3=y", "BR2_PACKAGE_PYTHON3_READLINE=y"],
        ["BR2_TOOLCHAIN_BUILDROOT_MUSL=y", "BR2_STATIC_LIBS=y", "BR2_PACKAGE_PYTHON3=y"],
        ["BR2_TOOLCHAIN_BUILDROOT_GLIBC=y", "BR2_STATIC_LIBS=y"],
        ["# BR2_PACKAGE_BUSYBOX is not set"],
        ["# BR2_PACKAGE_BUSYBOX is not set", "BR2_INIT_NONE=y"],
        ["BR2_INIT_NONE=y", "# BR2_PACKAGE_BUSYBOX is not set", "BR2_SYSTEM_BIN_SH_NONE=y"],
        ["BR2_INIT_SYSV=y", "BR2_SYSTEM_BIN_SH_DASH=y"],
        ["BR2_TARGET_GENERIC_GETTY_PORT=\"ttyS0\"", "# BR2_ENABLE_LOCALE_PURGE is not set"],
        ["BR2_PACKAGE_OPENSSL=y", "BR2_PACKAGE_LIBRESSL=y", "BR2_TARGET_ROOTFS_TAR_ZSTD=y"],
        ["BR2_ROOTFS_SKELETON_CUSTOM=y", "# BR2_TARGET_ROOTFS_TAR is not set"],
    ],
)  # fmt: skip
def test_so_it_does_for_others(lines: list[str], tmp_path: Path) -> None:
    text = "\n".join(lines) + "\n"
    config, saved = kconfig_itself(tmp_path, text)
    asked = kconfig.read_config(text)
    assert kconfig.settle(RULES, asked) == config
    assert kconfig.settle(RULES, kconfig.read_config(saved)) == config
    if not kconfig.lost(asked, config):
        assert kconfig.minimal(RULES, asked) == kconfig.read_config(saved)


def test_what_is_lost_is_told() -> None:
    asked = kconfig.read_config(
        'BR2_PACKAGE_PYTHON3=y\nBR2_NO_SUCH=y\n# BR2_STRIP_strip is not set\nBR2_A="x"\n'
    )
    assert kconfig.lost(asked, kconfig.settle(RULES, asked)) == [
        "BR2_PACKAGE_PYTHON3=y",
        "BR2_NO_SUCH=y",
        'BR2_A="x"',
    ]


@pytest.mark.parametrize("line", ["BR2_A", "BR2 A=y", "=y"])
def test_what_is_no_line_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="no line of a defconfig"):
        kconfig.read_config(f"# fine\n\n{line}\n")


@pytest.mark.parametrize("expression", ["BR2_A =", "__import__('os')", "BR2_A BR2_B ("])
def test_what_is_no_expression_is_refused(expression: str) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        kconfig.holds(expression, {"BR2_A": "y"})


def test_the_headers_are_older_than_kernels_that_people_run() -> None:
    for path in DEFCONFIGS:
        (series,) = re.findall(r"^BR2_KERNEL_HEADERS_(\d+)_(\d+)=y$", path.read_text(), re.MULTILINE)
        assert tuple(map(int, series)) <= (5, 10)
    running = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
    assert running >= (5, 10), "labkernel itself wants no older one"


# ---------------------------------------------------------------------- the scripts


def test_the_script_after_the_build_trims_and_weighs(tmp_path: Path) -> None:
    target = tmp_path / "target"
    goes = [
        "etc/init.d/S01",
        "usr/share/man/x",
        "usr/lib/python3.12/idlelib/x.pyc",
        "usr/lib/python3.12/turtle.pyc",
    ]
    stays = ["etc/passwd", "usr/bin/python3", "usr/lib/libc.so.6", "usr/lib/python3.12/json/decoder.pyc"]
    for number, name in enumerate([*goes, *stays]):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(b"x" * (100 + number))
    script = TREE / "board/labkernel/post-build.sh"
    for _ in range(2):  # Buildroot runs it again when something has been built again
        subprocess.run(
            [script, target], env={**os.environ, "BINARIES_DIR": str(tmp_path / "images")}, check=True
        )
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    assert files == sorted(stays)
    assert all((target / name).is_dir() for name in images.MOUNT_POINTS)
    report = dict(line.split()[::-1] for line in (tmp_path / "images/sizes.txt").read_text().splitlines())
    assert int(report["total"]) == sum(weight.bytes for weight in weigh(target))
    assert report["usr/lib/python3.12"] == "107" and report["etc"] == "104"


def test_the_script_in_fakeroot_leaves_no_setuid_program(tmp_path: Path) -> None:
    for name, mode in (("busybox", 0o4755), ("other", 0o2755), ("plain", 0o644)):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
    subprocess.run([TREE / "board/labkernel/post-fakeroot.sh", tmp_path], check=True)
    modes = [(tmp_path / name).stat().st_mode & 0o7777 for name in ("busybox", "other", "plain")]
    assert modes == [0o755, 0o755, 0o644]


def test_the_fragment_for_busybox_only_switches_off() -> None:
    lines = (TREE / "board/labkernel/busybox.fragment").read_text().splitlines()
    assert all(re.fullmatch(r"# CONFIG_[A-Z]+ is not set", line) for line in lines[1:])


# ---------------------------------------------------------------------- fetched and checked


class Quiet(SimpleHTTPRequestHandler):
    """Says nothing."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A directory that a real server of this machine serves, and its address."""
    place = tmp_path / "served"
    place.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(place))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield place, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_release_is_fetched_once_and_checked_each_time(
    shared: ModuleType, served: tuple[Path, str], tmp_path: Path
) -> None:
    place, address = served
    (place / "br.tar.xz").write_bytes(b"x" * 1_000_000)
    pinned = {"url": f"{address}/br.tar.xz", "sha256": hashlib.sha256(b"x" * 1_000_000).hexdigest()}
    told: list[tuple[str, int, int]] = []
    got = shared.fetch(pinned, tmp_path, lambda *step: told.append(step))
    assert got.read_bytes() == b"x" * 1_000_000 and told[-1] == ("download br.tar.xz", 1_000_000, 1_000_000)
    (place / "br.tar.xz").unlink()
    assert shared.fetch(pinned, tmp_path, print) == got
    got.write_bytes(b"y")
    with pytest.raises(BuildError, match="not the file that is pinned"):
        shared.fetch(pinned, tmp_path, print)
    with pytest.raises(BuildError, match=r"404.*this takes the internet, or the file in"):
        shared.fetch(pinned, tmp_path, print)
    with pytest.raises(BuildError, match="refused"):
        shared.fetch({**pinned, "url": "http://127.0.0.1:1/br.tar.xz"}, tmp_path, print)
    assert list(tmp_path.glob("br*")) == []


def gpg(home: Path, *words: str) -> str:
    return subprocess.run(
        ["gpg", "--homedir", home, "--batch", "--pinentry-mode", "loopback", "--passphrase", "", *words],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, str]]:
    """A message like Buildroot's, the keyring to check it with, and the fingerprint of its key."""
    if not shutil.which("gpg"):
        pytest.skip("gpg is not here (package gnupg)")
    place = tmp_path_factory.mktemp("gpg")
    place.chmod(0o700)
    gpg(place, "--quick-generate-key", "Release <release@example.org>", "ed25519", "sign", "never")
    (place / "keyring").write_bytes(b"")
    gpg(place, "--yes", "--output", str(place / "keyring"), "--export")
    found = re.search(r"^fpr:+(\w+):", gpg(place, "--with-colons", "--fingerprint"), re.MULTILINE)
    assert found
    text = f"br.tar.xz released today\n\nSHA1: {'1' * 40}  br.tar.xz\nSHA256: {'a' * 64}  br.tar.xz\n"
    (place / "text").write_text(text)
    gpg(place, "--yes", "--output", str(place / "br.tar.xz.sign"), "--clearsign", str(place / "text"))
    yield place / "br.tar.xz.sign", place / "keyring", found[1]
    subprocess.run(["gpgconf", "--homedir", place, "--kill", "all"], capture_output=True)


def test_a_signed_digest_is_believed(shared: ModuleType, signed: tuple[Path, Path, str]) -> None:
    message, keyring, key = signed
    assert shared.signed_digest(message, key, "br.tar.xz", keyring) == "a" * 64


def test_nothing_else_is(shared: ModuleType, signed: tuple[Path, Path, str], tmp_path: Path) -> None:
    message, keyring, key = signed
    with pytest.raises(BuildError, match="is not signed with the key"):
        shared.signed_digest(message, key[::-1], "br.tar.xz", keyring)
    with pytest.raises(BuildError, match="names 0 digests of other"):
        shared.signed_digest(message, key, "other", keyring)
    changed = tmp_path / "changed"
    changed.write_text(message.read_text().replace("a" * 64, "b" * 64))
    with pytest.raises(BuildError, match="is not signed with the key"):
        shared.signed_digest(changed, key, "br.tar.xz", keyring)
    # Nor what stands before the signed text, in the same file.
    changed.write_text(f"SHA256: {'b' * 64}  br.tar.xz\n\n{message.read_text()}")
    assert shared.signed_digest(changed, key, "br.tar.xz", keyring) == "a" * 64
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(BuildError, match="is not signed with the key"):
        shared.signed_digest(message, key, "br.tar.xz", tmp_path / "empty")


# ---------------------------------------------------------------------- the whole way, with a stand-in for Buildroot

MAKEFILE = r"""
defconfig: ; mkdir -p $(O) && grep -v DROPPED $(BR2_DEFCONFIG) > $(O)/.config
show-build-order: ; @echo host-gcc python3
all:
	mkdir -p $(O)/images $(O)/target/bin $(O)/build/python3
	printf '#!/bin/sh\n' > $(O)/target/bin/busybox; chmod 4755 $(O)/target/bin/busybox
	BINARIES_DIR=$(O)/images $(BR2_EXTERNAL)/board/labkernel/post-build.sh $(O)/target
	$(BR2_EXTERNAL)/board/labkernel/post-fakeroot.sh $(O)/target
	echo "$$MAKEFLAGS $$CC $$BR2_DL_DIR" >> $(O)/target/environment
	touch $(O)/build/python3/.stamp_installed
	tar --owner=0 --group=0 -C $(O)/target -cf $(O)/images/rootfs.tar .
legal-info: ; mkdir -p $(O)/legal-info && echo python3,PSF > $(O)/legal-info/manifest.csv
.PHONY: all
.DEFAULT_GOAL := all
"""


@pytest.fixture
def stand_in(
    served: tuple[Path, str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The recipe in a copy, with a release of our own: a Makefile that does what ours asks of Buildroot's."""
    place, address = served
    (tmp_path / "Makefile").write_text(MAKEFILE)
    with tarfile.open(place / "buildroot-1.tar.xz", "w:xz") as tar:
        tar.add(tmp_path / "Makefile", "buildroot-1/Makefile")
    shutil.copytree(
        recipes.FOLDER, tmp_path / "r", ignore=shutil.ignore_patterns("__pyc*", "debian*", "python*")
    )
    folder = tmp_path / "r/buildroot-python"
    digest = hashlib.sha256((place / "buildroot-1.tar.xz").read_bytes()).hexdigest()
    (folder / "release.toml").write_text(
        f'version = "1"\nurl = "{address}/buildroot-1.tar.xz"\nsha256 = "{digest}"\nkey = ""\n'
    )
    text = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(re.sub(r"needs = \[.*?\]\n", "", text, flags=re.DOTALL))
    with own_home(tmp_path_factory):
        yield folder


def test_the_recipe_goes_the_whole_way(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "mine")
    monkeypatch.setenv("MAKEFLAGS", "-k")
    told: list[tuple[str, int, int]] = []
    image = recipes.build(str(stand_in), progress=lambda *step: told.append(step))
    assert {"unpack Buildroot", "collect licences"} <= {what for what, _, _ in told}
    root = images.rootfs("buildroot-python")
    assert (root / "bin/busybox").stat().st_mode & 0o7777 == 0o755
    assert "mine" not in (root / "environment").read_text() and "-k" not in (root / "environment").read_text()
    cache = state.home() / "builds/buildroot-python/cache"
    assert sorted(path.name for path in cache.iterdir()) == ["buildroot-1.tar.xz", "licences.csv"]
    assert (cache / "licences.csv").read_text() == "python3,PSF\n"
    assert recipes.build(str(stand_in)) == image
    assert recipes.build(str(stand_in), again=True).digest == image.digest


def test_a_line_that_buildroot_drops_stops_the_build(stand_in: Path) -> None:
    defconfig = stand_in / "external/configs" / BASE
    defconfig.write_text(defconfig.read_text() + "BR2_DROPPED=y\n")
    with pytest.raises(BuildError, match="does not take what we ask for: BR2_DROPPED=y"):
        recipes.build(str(stand_in))


def test_the_machine_decides(shared: ModuleType) -> None:
    text = (TREE / "configs" / BASE).read_text()
    assert shared.for_machine(text, "x86_64") == text
    for_arm = kconfig.read_config(shared.for_machine(text, "aarch64"))
    assert kconfig.lost(for_arm, kconfig.settle(RULES, for_arm)) == []
    assert set(for_arm) ^ set(wanted(BASE)) == {"BR2_aarch64", "BR2_x86_64"}
    with pytest.raises(NotHere, match="this machine is m68k"):
        shared.for_machine(text, "m68k")


def test_the_script_says_how_it_is_used() -> None:
    done = subprocess.run(
        [sys.executable, recipes.FOLDER / "from_buildroot.py"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "VERSION [KEYRING]" in done.stderr
