"""Images: what goes into a container's root, packed into a tarball, weighed, unpacked again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]
"""Told of every step of a long job: what is being done, how much of it is done, of how much."""
