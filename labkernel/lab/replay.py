"""A recording played again, without its container: on another day, or on another machine.

Replay(*board.recordings)
Replay(Recording.from_csv("worker-recording.csv"))
"""

from __future__ import annotations

import html
from bisect import bisect_right
from typing import Any

from labkernel.lab import figures
from labkernel.lab.sparklines import picture
from labkernel.monitor import Recording

FPS = 10
"""Frames a second, at the speed at which it happened."""
TEXT = f"[replay: {figures.CAPTION}]"


class Replay:
    """The dashboard's picture of recordings, with a play button and a slider for the time, instead of a container.

    Shown by being the value of a cell. Where no kernel is attached, the figure of the whole stands in its place.
    Raises ValueError where nothing has been recorded.
    """

    def __init__(self, *recordings: Recording) -> None:
        import ipywidgets  # type: ignore[import-untyped]

        self.recordings = [recording for recording in recordings if recording.samples]
        if not self.recordings:
            raise ValueError("there is no sample in what is to be replayed")
        frames = int(max(one.samples[-1].seconds for one in self.recordings) * FPS) + 1
        self.plots = [ipywidgets.HTML(layout=ipywidgets.Layout(flex="1 1 420px")) for _ in self.recordings]
        self.play = ipywidgets.Play(max=frames, interval=1000 // FPS)
        self.frame = ipywidgets.IntSlider(
            max=frames, readout=False, description="time", layout=ipywidgets.Layout(flex="1 1 auto")
        )
        self.clock = ipywidgets.HTML()
        self.link = ipywidgets.jslink((self.play, "value"), (self.frame, "value"))
        self.frame.observe(lambda change: self.seek(change["new"] / FPS), names="value")
        controls = ipywidgets.HBox([self.play, self.frame, self.clock])
        plots = ipywidgets.HBox(self.plots, layout=ipywidgets.Layout(flex_flow="row wrap", grid_gap="16px"))
        self.widget = ipywidgets.VBox([controls, plots])
        self.seek(0.0)

    def seek(self, seconds: float) -> None:
        """Show what was to be seen at this moment."""
        self.clock.value = f"{seconds:.1f} s"
        for plot, recording in zip(self.plots, self.recordings, strict=True):
            seen = bisect_right(recording.samples, seconds, key=lambda sample: sample.seconds)
            title = f"<b>{html.escape(recording.name)}</b>"
            plot.value = title + picture(Recording(recording.name, recording.samples[:seen]))

    def _ipython_display_(self) -> None:
        from IPython.display import display

        live = "application/vnd.jupyter.widget-view+json"
        bundle: dict[str, Any] = figures.as_output(figures.recording_figure(*self.recordings))
        bundle |= {live: self.widget._repr_mimebundle_()[live], "text/plain": TEXT}
        alt = {"image/png": {"alt": figures.describe(*self.recordings)}}
        display(bundle, raw=True, metadata=alt)  # type: ignore[no-untyped-call]
