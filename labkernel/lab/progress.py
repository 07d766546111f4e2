"""A bar for what takes seconds: how far it is, while it runs; afterwards one line that says what was done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from labkernel.image import Progress

LIVE = "application/vnd.jupyter.widget-view+json"
BETWEEN = 0.1
"""Seconds between two movements of the bar: more of them nobody sees."""


@contextmanager
def progress() -> Iterator[Progress]:
    """Yield a function to be told of each step, as the long jobs of `labkernel.image` do: (what, done, total)."""
    import ipywidgets  # type: ignore[import-untyped]
    from IPython.display import display

    bar = ipywidgets.FloatProgress(max=1.0, layout=ipywidgets.Layout(width="400px"))
    words = ipywidgets.Label()
    box = ipywidgets.HBox([bar, words])
    first: dict[str, Any] = {LIVE: box._repr_mimebundle_()[LIVE], "text/plain": "under way …"}
    shown = display(first, raw=True, display_id=True)  # type: ignore[no-untyped-call]
    steps: dict[str, None] = {}
    moved = 0.0

    def tell(what: str, done: int, total: int) -> None:
        nonlocal moved
        steps[what.partition(":")[0]] = None
        if time.monotonic() - moved > BETWEEN or done == total:
            moved = time.monotonic()
            bar.value, words.value = done / max(total, 1), what

    yield tell
    box.close()
    if shown:  # None outside a notebook
        shown.update({"text/plain": f"done: {', '.join(steps)}"}, raw=True)
