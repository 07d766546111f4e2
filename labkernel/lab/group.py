"""Control groups for a notebook's experiments, which are gone when the child that made them is, however that ends."""

from __future__ import annotations

import os

from labkernel import cleanup
from labkernel.linux import cgroups


def group(name: str) -> cgroups.Cgroup:
    """Make a control group, without limits and with nobody in it, below the lab's own.

    For use inside a child of the lab (`in_child`). When that child ends, the launcher kills who is still in the group
    and removes it, with all groups that were made in it. Raises CgroupUnavailable where no group can be made here, and
    FileExistsError where this child has one of that name.
    """
    return cgroups.parent().create(cleanup.groups_of_child(os.getpgrp()) + name)
