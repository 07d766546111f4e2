#!/bin/sh
# Buildroot runs this when all packages are installed, and before the tarball is made. $1: the target directory.
set -eu
export LC_ALL=C
target=${1:?"usage: post-build.sh TARGET_DIRECTORY"}

# For machines that boot: start scripts, and what is mounted and configured then.
rm -rf "$target/etc/init.d" "$target/etc/inittab" "$target/etc/fstab" "$target/etc/network"

# For people: manuals; and of Python what teaches, tests, draws, installs or builds.
rm -rf "$target/usr/share/man" "$target/usr/share/doc" "$target/usr/share/info" "$target/usr/share/locale"
for library in "$target"/usr/lib/python3.*; do
    [ -d "$library" ] || continue
    for part in ensurepip idlelib lib2to3 pydoc_data test tkinter turtledemo turtle.pyc turtle.py; do
        rm -rf "${library:?}/$part"
    done
    rm -rf "$library"/config-*
done

# Where a container mounts something.
mkdir -p "$target/dev" "$target/proc" "$target/sys" "$target/tmp" "$target/run"

# The size report: bytes of files by directory, heaviest first. Buildroot keeps its images in BINARIES_DIR.
report=${BINARIES_DIR:-$target/..}/sizes.txt
mkdir -p "$(dirname "$report")"
(cd "$target" && find . -type f -exec du --apparent-size --bytes {} +) |
    awk '{ n = split($2, part, "/"); name = part[2]
           if (n > 3) name = name "/" part[3]
           if (n > 4) name = name "/" part[4]
           bytes[name] += $1; total += $1 }
         END { for (name in bytes) print bytes[name], name; print total, "total" }' |
    sort -k1,1nr -k2 >"$report"
cat "$report"
