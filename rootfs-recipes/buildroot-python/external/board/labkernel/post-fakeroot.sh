#!/bin/sh
# Buildroot runs this when owners and modes are those of the tarball, and before it is packed. $1: the target directory.
# Its busybox is set-user-ID root, for su, passwd and ping: we have no su and no passwd, and want no such program.
set -eu
find "${1:?"usage: post-fakeroot.sh TARGET_DIRECTORY"}" -type f -perm /6000 -exec chmod u-s,g-s {} +
