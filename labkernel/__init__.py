"""labkernel: the small support package of "Building your own containers from scratch".

Importing it costs next to nothing: what is needed only sometimes is imported where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labkernel.children import in_child
    from labkernel.container import Container

__version__ = "0.1.0"
__all__ = ["Container", "__version__", "in_child"]

_HOMES = {"Container": "labkernel.container", "in_child": "labkernel.children"}


def __getattr__(name: str) -> Any:
    """Import `Container` and `in_child` when they are first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'labkernel' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
