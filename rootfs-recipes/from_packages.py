"""What the recipes from the distribution's packages share: mmdebstrap, and the traces of this machine and this day.

mmdebstrap asks apt which packages are needed, unpacks them, and lets dpkg configure them in a chroot. The packages
come from where this machine's apt has them from: no mirror is named here.
Source: man 1 mmdebstrap; what makes a result differ from run to run: its section SOURCE_DATE_EPOCH.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from meanwhile import meanwhile

from labkernel.image import Progress
from labkernel.image.recipes import BuildError, Recipe

OS_RELEASE = Path("/etc/os-release")
APT = Path("/etc/apt")
NO = "no|false|without|off|disable|0"  # as apt reads it
MERGED_USR = Path("/usr/share/mmdebstrap/hooks/maybe-merged-usr")

# Of this machine, of this run, or of no use without the packages' index: mmdebstrap copies or leaves them.
TRACES = (
    "etc/.pwd.lock", "etc/apt/sources.list", "etc/apt/sources.list.d/*", "etc/resolv.conf", "etc/*-",
    "var/cache/apt/*", "var/cache/debconf/*-old", "var/cache/ldconfig/*", "var/lib/apt/lists/*", "var/lib/dpkg/*-old",
    "var/log/*", "run/*", "tmp/*", "dev/*",
    # Byte code of what runs while packages are installed: written by the import or by the installation, whichever is
    # first, and not the same.
    "usr/share/python3/**/__pycache__", "usr/lib/python3/dist-packages/_distutils_hack/__pycache__",
)  # fmt: skip


def install(
    root: Path,
    recipe: Recipe,
    tell: Progress,
    *,
    variant: str,
    packages: Iterable[str],
    with_recommended: Sequence[str] = (),
    excludes: Sequence[str] = (),
    includes: Sequence[str] = (),
) -> list[Path]:
    """Fill *root* with a distribution like this machine's; returns the files that say which.

    *variant*: mmdebstrap's name for the packages that are there in any case. *with_recommended*: packages that come
    last, with what they recommend. *excludes*, *includes*: patterns of paths that dpkg does not unpack, and that it
    does all the same. Raises BuildError.
    """
    sources = host_sources(codename(), recipe.work)
    cache = recipe.cache / "archives"
    cache.mkdir(exist_ok=True)
    paths = [f"path-exclude={pattern}" for pattern in excludes] + [f"path-include={one}" for one in includes]
    # What was downloaded once is not downloaded again; what apt would not download any more is not kept.
    archives = '"$1"/var/cache/apt/archives'
    kept = shlex.quote(str(cache))  # LABKERNEL_HOME may have a blank in it
    bring = f"mkdir -p {archives}; cp {kept}/*.deb {archives}/ || true"
    more = (
        'APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get -qq --yes -o APT::Install-Recommends=true '
        f'-o DPkg::Chroot-Directory="$1" install {" ".join(with_recommended)}'
    )
    keep = f'APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get -qq autoclean; rm -f {kept}/*; cp {archives}/*.deb {kept}/'
    with meanwhile(lambda: _tell_installed(root, tell), 0.5):
        recipe.run(
            "mmdebstrap", "--mode=root", "--format=directory", f"--variant={variant}",
            "--include=" + ",".join(packages),
            '--aptopt=APT::Install-Recommends "false"', '--aptopt=Acquire::Languages "none"',
            *(f"--dpkgopt={path}" for path in paths),
            # /bin is a link to /usr/bin from the start: else a package that makes it one brings the whole of perl.
            f"--hook-dir={MERGED_USR}", "--skip=essential/unlink", f"--setup-hook={bring}",
            *([f"--customize-hook={more}"] if with_recommended else []), f"--customize-hook={keep}",
            "", root, *sources,
        )  # fmt: skip
    tell("tidy up", 0, 1)
    for pattern in TRACES:
        for path in root.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (root / "etc/hostname").write_text("localhost\n")
    (root / "etc/hosts").write_text("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
    return [OS_RELEASE, Path(__file__)]


def _tell_installed(root: Path, tell: Progress) -> None:
    """Tell how many of the packages that were downloaded dpkg has configured, by its own log."""
    packages = len(list(root.glob("var/cache/apt/archives/*.deb")))
    with contextlib.suppress(OSError):
        log = (root / "var/log/dpkg.log").read_text(errors="replace")
        tell("install packages", log.count(" status installed "), packages)


def codename() -> str:
    """This machine's distribution, by the name that its sources have: "bookworm". Raises BuildError."""
    found = re.search(r'^VERSION_CODENAME="?([a-z]+)', OS_RELEASE.read_text(), re.MULTILINE)
    if not found:
        raise BuildError(f"{OS_RELEASE} does not say VERSION_CODENAME: this is no Debian or Ubuntu")
    return found[1]


def host_sources(codename: str, work: Path) -> list[Path]:
    """The sources of the distribution itself among those of apt, others' left out, in files of both formats.

    Source: man 5 sources.list: one line each, or paragraphs.
    """
    lines, paragraphs = [], []
    for file in (APT / "sources.list", *sorted((APT / "sources.list.d").glob("*"))):
        if file.suffix == ".list" and file.is_file():
            found = file.read_text().splitlines()
            lines += [line for line in found if _is_of(codename, line) and _is_the_distributions(line)]
        elif file.suffix == ".sources":
            found = re.split(r"\n\s*\n", file.read_text())
            paragraphs += [
                one.strip()
                for one in found
                if re.search(rf"^Suites:.*\b{codename}\b", one, re.MULTILINE)
                and not re.search(rf"^Enabled:\s*({NO})\s*$", one, re.MULTILINE | re.IGNORECASE)
                and _is_the_distributions(one)
            ]
    if not lines and not paragraphs:
        raise BuildError(f"none of apt's sources in {APT} has the suite {codename}")
    written = []
    for name, content in (("host.list", "\n".join(lines)), ("host.sources", "\n\n".join(paragraphs))):
        if content:
            (work / name).write_text(content + "\n")
            written.append(work / name)
    return written


def _is_the_distributions(source: str) -> bool:
    """Whether a source is signed by no other's key: third parties name their suites after the distribution, too."""
    signed_by = re.search(r"signed-by\s*[=:]\s*([^\]\n]*)", source, re.IGNORECASE)
    return not signed_by or bool(re.search(r"/(debian|ubuntu)-archive-", signed_by[1]))


def _is_of(codename: str, line: str) -> bool:
    return bool(re.match(rf"deb\s+(\[[^]]*\]\s+)?\S+\s+{codename}(-\S+)?\s", line))
