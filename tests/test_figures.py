"""Figures of recordings and of images: what is drawn is what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from labkernel.image.weigh import Weight
from labkernel.lab import figures
from labkernel.linux import capabilities
from labkernel.linux.network import Interface
from labkernel.monitor import Recording, Sample

MIB = 1 << 20


def recording() -> Recording:
    """Two seconds, in which a quota is halved, memory is full, and a fork is refused."""
    samples = [
        Sample(
            number / 10,
            cpu_usec=number * 50_000,
            cpu_throttled_usec=max(0, number - 10) * 1000,
            memory_bytes=number * 4 * MIB,
            memory_anon_bytes=number * 3 * MIB,
            memory_file_bytes=number * MIB,
            memory_peak_bytes=number * 4 * MIB,
            memory_limit_bytes=64 * MIB,
            oom_kills=int(number > 15),
            pids=2 + number // 2,
            pids_limit=10,
            pids_max_events=int(number > 12),
            cpus_limit=0.5 if number < 10 else 0.25,
            net_sent_bytes=number * MIB,
        )
        for number in range(20)
    ]
    return Recording("box", samples)


def labels(figure: Figure, panel: int) -> list[str]:
    legend = figure.axes[panel].get_legend()
    assert legend
    return [text.get_text() for text in legend.get_texts()]


def points(line: Any) -> set[tuple[float, float]]:
    return set(zip(line.get_xdata(), line.get_ydata(), strict=True))


def heights(line: Any) -> list[float]:
    return list(line.get_ydata())


def test_the_lines_are_the_measured_numbers() -> None:
    figure = figures.recording_figure(recording())
    cpu, memory, pids = figure.axes[:3]
    assert heights(cpu.lines[0])[-1] == pytest.approx(0.5)
    assert heights(memory.lines[0]) == [number * 4 for number in range(20)]
    assert heights(pids.lines[0]) == [2 + number // 2 for number in range(20)]
    assert figure.axes[0].get_title() == "box"


@pytest.mark.parametrize(
    ("cpus", "named"),
    [
        ([0.5], "quota 0.5 cores"),
        ([0.5, 0.25, 0.5], "quota 0.5 → … → 0.5 cores"),
        ([0.5, None], "quota 0.5 → none"),
        ([1 / 3, 0.3333, 0.25], "quota 0.33 → 0.25 cores"),
        ([None], "no quota"),
    ],
)
def test_a_limit_is_named_with_what_it_was_and_what_it_is(cpus: list[float | None], named: str) -> None:
    changing = recording()
    changing.samples = [
        replace(one, cpus_limit=cpus[min(number // 4, len(cpus) - 1)])
        for number, one in enumerate(changing.samples)
    ]
    assert named in labels(figures.recording_figure(changing), 0)


def test_limits_kills_refusals_and_waiting_are_named_and_drawn() -> None:
    figure = figures.recording_figure(recording())
    assert "quota 0.5 → 0.25 cores" in labels(figure, 0)
    assert "throttled" in labels(figure, 0)
    assert {"limit 64 MiB", "OOM kill (1)"} <= set(labels(figure, 1))
    assert {"limit 10", "fork refused (1)"} <= set(labels(figure, 2))
    quota = next(line for line in figure.axes[0].lines if "quota" in str(line.get_label()))
    assert heights(quota) == [0.5] * 10 + [0.25] * 10


def test_on_a_slow_machine_matplotlib_says_nothing_in_the_cell(caplog: pytest.LogCaptureFixture) -> None:
    """Its font manager warns, from a thread, when it takes longer than five seconds to list the fonts."""
    from matplotlib import font_manager

    font_manager._log.warning("Matplotlib is building the font cache; this may take a moment.")  # type: ignore[attr-defined]
    assert not caplog.records


def test_the_memory_alone_is_drawn_and_told() -> None:
    (axes,) = figures.memory_figure(recording()).axes
    named = [text.get_text() for text in axes.get_legend().get_texts()]  # type: ignore[union-attr]
    assert named == ["anonymous", "page cache", "all", "limit 64 MiB", "OOM kill (1)"]
    assert heights(axes.lines[0]) == [number * 4 for number in range(20)]
    words = figures.describe_memory(recording())
    for part in ("(limit: 64)", "all of it up to 76", "page cache up to 19", "tmpfs up to 0", "OOM kills: 1"):
        assert part in words
    assert figures.describe_memory(Recording("box")) == "box: nothing recorded yet."
    figures.as_png(figures.memory_figure(Recording()))


def test_a_figure_is_drawn_until_what_it_shows_is_over_and_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Handle:
        def update(self, output: dict[str, str], raw: bool, metadata: dict[str, dict[str, str]]) -> None:
            assert output["text/plain"] == "[figure: memory]"
            shown.append(metadata["image/png"]["alt"])

    def display(output: dict[str, str], *, display_id: bool, **more: Any) -> Handle:
        assert display_id
        handle = Handle()
        handle.update(output, **more)
        return handle

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(figures, "FPS", 1000)
    goes_on = iter([True, True, False])
    drawn = iter("abc")
    figures.show_while(lambda: next(goes_on), lambda: (Figure(), next(drawn)), "memory")
    assert shown == ["a", "b", "c"]


def test_a_limit_far_above_or_missing_is_told_and_does_not_flatten_the_rest() -> None:
    far = Recording(
        "", [Sample(n / 10, memory_bytes=MIB, memory_limit_bytes=512 * MIB, pids=2) for n in range(3)]
    )
    figure = figures.recording_figure(far)
    assert "limit 512 MiB: far above" in labels(figure, 1)
    assert figure.axes[1].get_ylim()[1] < 2
    assert "no limit" in labels(figure, 2)


def test_side_by_side_a_limit_is_drawn_where_the_common_scale_has_room_for_it() -> None:
    idle = Recording(
        "idle",
        [
            Sample(n / 10, memory_bytes=MIB, memory_limit_bytes=128 * MIB, pids=1, pids_limit=500)
            for n in range(20)
        ],
    )
    alone, beside = figures.recording_figure(idle), figures.recording_figure(recording(), idle)
    assert "limit 128 MiB: far above" in labels(alone, 1)
    assert "limit 128 MiB" in labels(beside, 3)
    assert "limit 500: far above" in labels(beside, 5)


def test_no_two_things_differ_by_colour_alone() -> None:
    figure = figures.recording_figure(recording())
    for axes in figure.axes:
        styles = [(str(line._dash_pattern), line.get_linewidth(), line.get_marker()) for line in axes.lines]  # type: ignore[attr-defined]
        named = [
            style
            for style, line in zip(styles, axes.lines, strict=True)
            if not str(line.get_label()).startswith("_")
        ]
        assert len(set(named)) == len(named)
        hatches = [area.get_hatch() for area in axes.collections]
        assert len(set(hatches)) == len(hatches)


def test_several_recordings_stand_side_by_side_on_one_scale() -> None:
    figure = figures.recording_figure(recording(), Recording("other", recording().samples[:5]))
    assert len(figure.axes) == 10
    assert figure.axes[2].get_ylim() == figure.axes[3].get_ylim()


@pytest.mark.parametrize("samples", [[], [Sample()]])
def test_a_recording_of_nothing_can_be_drawn(samples: list[Sample]) -> None:
    figures.as_png(figures.recording_figure(Recording("", samples)))


def test_the_words_say_what_the_figure_shows() -> None:
    words = figures.describe(recording())
    for part in (
        "box over 1.9 s",
        "limit: 0.5, then 0.25",
        "memory up to 76 MiB (limit: 64)",
        "OOM kills: 1",
        "refused: 1",
    ):
        assert part in words
    assert figures.describe(Recording("box")) == "box: nothing recorded yet."


@pytest.mark.parametrize("suffix", ["pdf", "svg", "png"])
def test_twice_the_same_file_without_a_date(tmp_path: Path, suffix: str) -> None:
    contents = []
    for name in ("one", "two"):
        figures.save(figures.recording_figure(recording()), tmp_path / f"{name}.{suffix}", "in words")
        contents.append((tmp_path / f"{name}.{suffix}").read_bytes())
    assert contents[0] == contents[1]
    assert b"CreationDate" not in contents[0]
    assert b"in words" in contents[0]


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is saved as"):
        figures.save(Figure(), tmp_path / "figure.bmp")


def test_a_treemap_fills_its_rectangle_and_each_part_has_its_share() -> None:
    sizes = {"a": 60.0, "b": 25.0, "c": 10.0, "d": 5.0, "nothing": 0.0}
    placed = figures.squarify(sizes, 16, 10)
    assert set(placed) == {"a", "b", "c", "d"}
    for name, (x, y, width, height) in placed.items():
        assert width * height == pytest.approx(160 * sizes[name] / 100)
        assert 0 <= x <= x + width <= 16 + 1e-9
        assert 0 <= y <= y + height <= 10 + 1e-9
    boxes = list(placed.values())
    for number, (x, y, width, height) in enumerate(boxes):
        for u, v, w, h in boxes[number + 1 :]:
            assert x + width <= u + 1e-9 or u + w <= x + 1e-9 or y + height <= v + 1e-9 or v + h <= y + 1e-9
    assert figures.squarify({}, 16, 10) == {}


def test_what_is_heavy_has_a_name_in_the_treemap() -> None:
    weights = [
        Weight("/usr/lib/x/heavy.so", 90 * MIB),
        Weight("/usr/lib/x/y/z", MIB // 2),
        Weight("/etc/hosts", 10),
    ]
    figure = figures.weight_figure(weights, "an image")
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert "heavy.so\n90.0" in texts
    assert any(text.startswith("/usr/lib/x  90.5 MiB") for text in texts)
    assert "90.5 MiB in" in figures.describe_weights(weights)


def test_a_grid_shows_each_word_and_marks_those_that_differ() -> None:
    rows = {"one": ["a", "b"], "other": ["a", "a"]}
    (axes,) = figures.grid_figure(["uts", "net"], rows, "a").axes
    words = [(text.get_text(), text.get_fontweight()) for text in axes.texts]
    assert words == [("a", "normal"), ("b", "bold"), ("a", "normal"), ("a", "normal")]
    assert [patch.get_hatch() or "" for patch in axes.patches] == ["", "//", "", ""]
    assert figures.describe_grid(["uts", "net"], rows) == "A table. one: uts a, net b. other: uts a, net a."


def interface(
    name: str, address: str = "", *, kind: str = "veth", up: bool = True, bridge: str = ""
) -> Interface:
    addresses = (address, "fe80::1/64") if address else ()
    return Interface(1, name, kind, up, "", 1500, bridge or None, addresses, 0, 0, 0, 0, None)


def test_a_network_is_drawn_with_its_cables_and_what_is_off_is_dotted_and_named() -> None:
    networks = {
        "web": [interface("lo", "127.0.0.1/8"), interface("eth0", "10.0.0.2/24")],
        "db": [interface("eth0", "10.0.0.3/24")],
        "router": [
            interface("br0", "10.0.0.1/24", kind="bridge"),
            interface("to-web", bridge="br0"),
            interface("to-db", bridge="br0", up=False),
            interface("up", "192.0.2.1/24"),
        ],
        "outside": [interface("eth0", "192.0.2.2/24")],
    }
    cables = [
        (("web", "eth0"), ("router", "to-web")),
        (("db", "eth0"), ("router", "to-db")),
        (("router", "up"), ("outside", "eth0")),
    ]
    axes = figures.network_figure(networks, cables, "a title").axes[0]
    words = [text.get_text() for text in axes.texts]
    assert {"web", "db", "router", "outside", "eth0\n10.0.0.2/24", "to-db (off)", "up\n192.0.2.1/24"} <= set(
        words
    )
    assert "br0   10.0.0.1/24" in words
    drawn = [line.get_linestyle() for line in axes.lines if line.get_linewidth() == 2]
    assert drawn == ["-", ":", "-"]
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert heights["web"] < heights["router"] < heights["outside"]
    told = figures.describe_network(networks, cables)
    assert "router has the bridge br0 (10.0.0.1/24) with the ports to-web, to-db" in told
    assert "a cable from eth0 of db (10.0.0.3/24) to to-db of router (off)" in told
    assert "fe80" not in told + "".join(words)


def test_pressure_has_a_panel_where_the_kernel_counts_it() -> None:
    without = Recording("", [Sample(0.0), Sample(1.0, pids=1)])
    waited = Recording("", [Sample(0.0), Sample(1.0, pids=1, pressure_cpu=40.0)])
    labels = [[axes.get_ylabel() for axes in figures.recording_figure(one).axes] for one in (without, waited)]
    assert [("pressure (%)" in some) for some in labels] == [False, True]
    assert "pressure on the CPU up to 40 %" in figures.describe(waited)


def test_the_squares_of_the_grid_are_the_capabilities_that_are_held() -> None:
    none: frozenset[int] = frozenset()
    one = capabilities.CapabilitySets(frozenset({3}), none, none, capabilities.ALL, none)
    two = capabilities.CapabilitySets(none, none, frozenset({40}), none, none)
    axes = figures.capabilities_figure({"one": one, "two": two}).axes[0]
    held, lacking = (points(line) for line in axes.lines)
    assert held == {(0, 3), (8, 40), *((3, number) for number in capabilities.ALL)}
    assert len(held | lacking) == len(held) + len(lacking) == 2 * 5 * 41
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [*figures.SETS] * 2
    assert axes.get_yticklabels()[40].get_text() == "CHECKPOINT_RESTORE 40"
    words = figures.describe_capabilities({"one": one, "two": two})
    assert "one: permitted CAP_FOWNER; effective none; inheritable none; bounding 41; ambient none." in words
