"""The dashboard: containers watched live, their limits on sliders.

    board = Dashboard(container)                 all that can be watched and moved
    board = Dashboard(container, only="cpu")     one limit alone, and closer: also "memory", "pids"
    board

It draws with what every front end of Jupyter has: a picture of lines as SVG text, made new some times a second. Where
no kernel is attached, on a page or on paper, the figure of the whole recording stands in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import os
import shlex
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from labkernel import monitor, spec
from labkernel.container import Container
from labkernel.lab import figures
from labkernel.lab.calm import in_words
from labkernel.lab.sparklines import picture
from labkernel.linux.cgroups import CgroupUnavailable
from labkernel.monitor import Monitor, Recording

FPS = 10.0
"""Frames and samples a second; twice as many where one limit alone is shown."""
TEXT = f"[dashboard: {figures.CAPTION}]"
"""The same in every run, with the widget and with the figure: what is compared of a stored notebook."""
EXEC_WITHIN = 20.0
"""Seconds after which a program started by the exec button is killed."""


class Dashboard:
    """Live plots over one or several containers, with sliders and buttons; shown by being the value of a cell.

    A container that has not been started gets a start button. The dashboard stops by itself when its containers have
    ended, when its cell is run again, or when another dashboard shows one of its containers. Then the figure of what
    it has recorded stands in its place; `recordings` has the numbers.
    """

    _shown: ClassVar[weakref.WeakSet[Dashboard]] = weakref.WeakSet()

    def __init__(self, *containers: Container, only: str | None = None) -> None:
        import ipywidgets  # type: ignore[import-untyped]

        self.only = only
        self.fps = 2 * FPS if only else FPS
        self.text = f"[dashboard: {figures.CAPTIONS[only]}]" if only else TEXT
        self.views = [View(container, only) for container in containers]
        self.widget = ipywidgets.HBox(
            [view.widget for view in self.views],
            layout=ipywidgets.Layout(flex_flow="row wrap", grid_gap="16px"),
        )
        self.cpu_seconds = 0.0
        """CPU time that the drawing has taken."""
        self._cell = _cell_id()
        self._loop = _running_loop()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._display: Any = None
        for other in list(Dashboard._shown):
            if other._replaced_by(self):
                other.stop()
        Dashboard._shown.add(self)

    @property
    def recordings(self) -> list[Recording]:
        """What has been recorded of each container until now."""
        return [view.recording for view in self.views]

    def stop(self) -> None:
        """End watching and drawing, and show the figure in place of the widget; the containers go on."""
        self._stopping.set()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None
        Dashboard._shown.discard(self)
        for view in self.views:
            view.close()
        if self._display:
            drawn = figures.recording_figure(*self.recordings, only=self.only)
            figure = figures.as_output(drawn) | {"text/plain": self.text}
            alt = figures.describe(*self.recordings, only=self.only)
            self._display.update(figure, raw=True, metadata={"image/png": {"alt": alt}})
            self._display = None

    def _ipython_display_(self) -> None:
        """Show it, and start drawing."""
        from IPython.display import display

        live = "application/vnd.jupyter.widget-view+json"
        bundle = {live: self.widget._repr_mimebundle_()[live], "text/plain": self.text}
        self._display = display(bundle, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        if self._thread is None and not self._stopping.is_set():
            self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        """Draw some frames a second, until the last container has ended or somebody says stop."""
        while not self._stopping.wait(1 / self.fps):
            for view in self.views:
                view.draw()
            self.cpu_seconds = time.thread_time()
            if all(view.over for view in self.views):
                self._finish()
                return

    def _finish(self) -> None:
        """Stop for good, in the notebook's main thread; outside a notebook that is left to whoever made this.

        A cell may be waiting for the container at this very moment. Then its answer is not ours to take: the main
        thread gets to us when the cell is through.
        """
        if self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.stop)

    def _replaced_by(self, new: Dashboard) -> bool:
        names = {view.container.name for view in self.views} & {view.container.name for view in new.views}
        return bool(names) or (self._cell is not None and self._cell == new._cell)


class View:
    """One container of a dashboard: its picture, its processes, its sliders and buttons; or one limit of it."""

    def __init__(self, container: Container, only: str | None = None) -> None:
        import ipywidgets

        self.container = container
        self.only = only
        self.monitor: Monitor | None = None
        self.over = False
        self._processes_drawn = 0.0
        wide = ipywidgets.Layout(width="auto")
        self.title = ipywidgets.HTML()
        self.plot = ipywidgets.HTML(layout=wide)
        self.processes = ipywidgets.HTML(layout=wide)
        self.said = ipywidgets.HTML(layout=wide)
        self.answer = ipywidgets.HTML(layout=wide)
        limits = container.limits
        whole = spec.machine_memory() >> 20
        memory = (limits.memory or 0) >> 20
        pids = limits.pids or spec.pid_max()
        style = {"description_width": "96px"}
        slider = {"continuous_update": False, "style": style, "layout": wide}
        self.memory = ipywidgets.IntSlider(
            memory or whole,
            spec.MEMORY_MIN >> 20,
            min(whole, 4 * memory or whole),
            description="memory (MiB)",
            **slider,
        )
        self.cpus = ipywidgets.FloatSlider(
            limits.cpus or _cores(), min=0.05, max=_cores(), step=0.05, description="cpus", **slider
        )
        self.pids = ipywidgets.IntSlider(pids, 2, min(4 * pids, spec.pid_max()), description="pids", **slider)
        button = ipywidgets.Layout(width="auto", flex="0 0 auto")
        self.start_button = ipywidgets.Button(description="start", layout=button)
        self.pause_button = ipywidgets.ToggleButton(description="pause", layout=button)
        self.stop_button = ipywidgets.Button(description="stop", layout=button)
        self.save_button = ipywidgets.Button(
            description="save",
            tooltip="what has been recorded, as a CSV file beside the notebook",
            layout=button,
        )
        self.command = ipywidgets.Text(
            "ps",
            placeholder="a program and its arguments",
            layout=ipywidgets.Layout(flex="1 1 auto", width="auto"),
        )
        self.exec_button = ipywidgets.Button(description="exec", layout=button)
        self.memory.observe(self._moved("memory", lambda size: f"{size}M"), names="value")
        self.cpus.observe(self._moved("cpus", lambda cores: cores), names="value")
        self.pids.observe(self._moved("pids_limit", lambda count: count), names="value")
        self.start_button.on_click(lambda _: self._try(self._start))
        self.pause_button.observe(lambda change: self._try(self._pause, change["new"]), names="value")
        self.stop_button.on_click(lambda _: self._try(self._stop))
        self.save_button.on_click(lambda _: self._try(self._save))
        self.exec_button.on_click(lambda _: self._try(self._exec))
        sliders = {"memory": self.memory, "cpu": self.cpus, "pids": self.pids}
        buttons = ipywidgets.HBox([self.start_button, self.pause_button, self.stop_button, self.save_button])
        run = ipywidgets.HBox([self.command, self.exec_button])
        parts = [
            self.title,
            self.plot,
            *sliders.values(),
            self.said,
            buttons,
            self.processes,
            run,
            self.answer,
        ]
        if only:
            parts = [self.title, self.plot, sliders[only], self.said]
        self.widget = ipywidgets.VBox(parts, layout=ipywidgets.Layout(flex="1 1 420px", max_width="560px"))
        if container.pid is not None:
            self._watch()
        self._enable()

    @property
    def recording(self) -> Recording:
        """What has been recorded of this container."""
        return self.monitor.recording if self.monitor else Recording(monitor.title(self.container))

    def draw(self) -> None:
        """Make the next frame."""
        recording = self.recording
        self.plot.value = picture(recording, self.only)
        now = time.monotonic()
        if (
            self.monitor
            and not self.only
            and (self.monitor.ended.is_set() or now - self._processes_drawn > 0.5)
        ):
            self._processes_drawn = now
            self.processes.value = two_views(self.container)
        if self.monitor and self.monitor.ended.is_set() and not self.over:
            self.over = True
            self._enable()

    def close(self) -> None:
        """Stop watching; the picture stays as it is."""
        if self.monitor:
            self.monitor.stop()
            self.plot.value = picture(self.recording, self.only)
        self.over = True
        self._enable()

    def _watch(self) -> None:
        try:
            self.monitor = Monitor(self.container, hz=2 * FPS if self.only else FPS).start()
        except RuntimeError as error:  # it has ended already
            self.over = True
            self._say(str(error))

    def _enable(self) -> None:
        """Only what can be done now can be clicked."""
        running = self.monitor is not None and not self.over
        limited = running and _has_cgroup(self.container)
        for control in (self.memory, self.cpus, self.pids, self.pause_button):
            control.disabled = not limited
        for control in (self.stop_button, self.exec_button, self.command):
            control.disabled = not running
        self.start_button.disabled = self.monitor is not None or self.over
        self.save_button.disabled = self.monitor is None
        state = "has ended" if self.over else "runs" if running else "is not started"
        self.title.value = f"<b>{html.escape(monitor.title(self.container))}</b> {state}"
        if running and not limited:
            self._say("no control group on this machine: nothing to slide")

    def _moved(self, option: str, value: Callable[[Any], Any]) -> Callable[[Any], None]:
        """What a slider does when it has been moved: write the limit, and say what was written."""

        def move(change: Any) -> None:
            self._try(self._set, option, value(change["new"]))

        return move

    def _set(self, option: str, value: Any) -> None:
        written = self.container.set_limits(**{option: value})
        files = ", ".join(f"{path.rpartition('/')[2]} ← {text}" for path, text in written)
        self._say(f"written: {files}")

    def _start(self) -> None:
        self.container.start()
        self._watch()
        self._enable()

    def _pause(self, pause: bool) -> None:
        if pause:
            self.container.pause()
        else:
            self.container.unpause()
        self.pause_button.description = "go on" if pause else "pause"
        self._say("all its processes stand still" if pause else "")

    def _stop(self) -> None:
        """SIGTERM, and SIGKILL for who does not listen; whoever waits for the container is told by the launcher."""
        self.pause_button.value = False  # a process that stands still cannot end either
        self.container.signal(signal.SIGTERM)
        if self.monitor and not self.monitor.ended.wait(2.0):
            self.container.signal(signal.SIGKILL)

    def _save(self) -> None:
        """What has been recorded until now, for `Recording.from_csv`, `Replay` and every other program."""
        recording = self.recording
        path = f"{recording.name}-recording.csv"
        recording.to_csv(path)
        self._say(f"saved: {path}, {len(recording.samples)} samples")

    def _exec(self) -> None:
        ended = self.container.exec(shlex.split(self.command.value), timeout=EXEC_WITHIN)
        text = (ended.stdout + ended.stderr).decode(errors="replace")
        words = f"$ {self.command.value}\n{text}" + (f"[{ended.returncode}]" if ended.returncode else "")
        self.answer.value = f'<pre role="status" style="line-height:1.2">{html.escape(words)}</pre>'

    def _try(self, action: Callable[..., None], *arguments: Any) -> None:
        """Do what was clicked; what cannot be done is said below the sliders, not lost in a log."""
        try:
            action(*arguments)
        except (OSError, ValueError, RuntimeError, LookupError) as error:
            self._say(f"not done: {in_words(error)}")

    def _say(self, words: str) -> None:
        self.said.value = f'<div role="status" style="line-height:1.3">{html.escape(words)}</div>'


def _cores() -> int:
    return os.cpu_count() or 1


def _has_cgroup(container: Container) -> bool:
    try:
        return bool(container.cgroup)
    except CgroupUnavailable:
        return False


def _cell_id() -> str | None:
    """The id of the cell that runs now, where the front end tells it."""
    with contextlib.suppress(ImportError, AttributeError):
        from IPython.core.getipython import get_ipython

        cell: str | None = get_ipython().get_parent()["metadata"].get("cellId")  # type: ignore[union-attr]
        return cell
    return None


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop of the notebook's main thread."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


# ---------------------------------------------------------------------- both views of a container's processes


def two_views(container: Container) -> str:
    """The container's processes as the host sees them, and each with the pid that it has inside; as HTML."""
    rows = []
    for pid in _pids(container):
        status = monitor.status(pid)
        if status:
            inside = status.get("NSpid", "?").split()[-1]
            size = int(status.get("VmRSS", "0 kB").split()[0]) / 1024
            state = status["State"].partition(" ")[2].strip("()")
            rows.append((str(pid), inside, status["Name"], f"{size:.1f} MiB", state))
    more = [("", "", f"and {len(rows) - 8} more", "", "")] if len(rows) > 8 else []
    body = "".join(_row(row, "td") for row in (*rows[:8], *more))
    head = _row(("pid on the host", "pid inside", "program", "memory", ""), "th")
    return f'<table style="width:100%;line-height:1.3"><thead>{head}</thead><tbody>{body}</tbody></table>'


def _row(cells: Iterable[str], tag: str) -> str:
    texts = "".join(
        f'<{tag} style="text-align:left;padding:0 8px 0 0">{html.escape(cell)}</{tag}>' for cell in cells
    )
    return f"<tr>{texts}</tr>"


def _pids(container: Container) -> list[int]:
    if container.pid is None:
        return []
    return sorted(container.cgroup.pids()) if _has_cgroup(container) else monitor.descendants(container.pid)
