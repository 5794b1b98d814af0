"""The page: it has every rank, phase and figure, it loads nothing, and no name can break out of it."""

from __future__ import annotations

import re
from dataclasses import asdict, replace

import pytest

from surgery.telemetry.measurements import MemorySample, Phase, Prediction
from surgery.tracing.page import render
from surgery.tracing.record import RankTrace
from tests.surgery.tracing.made import MIB, Page, trace_of

PHASE_FIGURES = ("start", "seconds", "bytes_read", "host_before", "host_peak")


def page_of(*traces: RankTrace) -> Page:
    return Page(render(traces))


def assert_self_contained(page: Page) -> None:
    assert {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object", "base", "image"} == set()
    for tag, attributes in page.elements:
        assert not {name for name in attributes if name.startswith("on")}, f"{tag} runs code"
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
    style = "".join(page.texts["style"])
    assert not re.search(r"url\(|@import", style)
    policies = [meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


@pytest.mark.parametrize("world_size", [1, 4, 5, 64])
def test_every_rank_and_every_figure(world_size: int) -> None:
    traces = [trace_of(rank, world_size) for rank in range(world_size)]
    page = page_of(*traces)
    assert_self_contained(page)
    assert [details["id"] for details in page.of("details")] == [f"rank-{rank}" for rank in range(world_size)]
    assert all(("open" in details) == (world_size <= 4) for details in page.of("details"))
    assert len(page.of("svg")) == world_size
    (ranks,) = page.rows("of-ranks")
    assert [row[0] for row in ranks] == [str(rank) for rank in range(world_size)]
    for table, trace in zip(page.rows("of-phases"), traces, strict=True):
        assert [row[0] for row in table] == ["load", "adapt", "train"]
        for row, phase in zip(table, trace.phases, strict=True):
            figures = asdict(phase)
            assert [cell for number, cell in enumerate(row) if number not in (0, 4)] == [
                str(figures[name]) for name in PHASE_FIGURES
            ]


def test_rates_and_ratios() -> None:
    page = page_of(trace_of())
    assert page.rows("of-phases")[0][0][4] == "2.00 MB/s"
    fast = replace(trace_of().phases[0], bytes_read=5_000_000_000)
    assert page_of(trace_of(phases=(fast,))).rows("of-phases")[0][0][4] == "2.50 GB/s"
    both = tuple(replace(phase, bytes_read=6_000_000) for phase in trace_of().phases[:2])  # 2 s and 0.5 s, overlapping
    assert page_of(trace_of(phases=both, bytes_read=6_000_000)).rows("of-ranks")[0][0][4] == "3.00 MB/s"
    (predictions,) = page.rows("of-predictions")
    assert predictions == [["load", "host", str(50 * MIB), str(70 * MIB), "1.40"]]


def test_device_memory_is_shown_where_there_is_a_device() -> None:
    assert "device peak" not in page_of(trace_of()).texts["th"]
    phase = Phase(name="load", seconds=1.0, device_peak=7 * MIB)
    page = page_of(
        trace_of(
            phases=(phase,),
            samples=(MemorySample(0.0, MIB, 5 * MIB, 9 * MIB),),
            predictions={"load": Prediction(device=8 * MIB, device_before=MIB)},
        )
    )
    assert page.rows("of-phases")[0][0][-1] == str(7 * MIB)
    assert page.rows("of-predictions")[0] == [["load", "device", str(8 * MIB), str(6 * MIB), "0.75"]]
    assert {path["class"] for path in page.of("path")} == {"line host", "line device", "thin device"}


def outline(page: Page) -> list[tuple[float, float]]:
    """The corners of the one line of host memory, in pixels."""
    (path,) = (path["d"] for path in page.of("path") if path["class"] == "line host")
    x, y, corners = 0.0, 0.0, []
    for command, first, second in re.findall(r"([MHV])([-\d.]+)(?: ([-\d.]+))?", path):
        x, y = (float(first), float(second or y)) if command != "V" else (x, float(first))
        corners.append((x, y))
    return corners


def test_the_line_is_where_the_samples_are() -> None:
    page = page_of(trace_of())
    corners = outline(page)
    left, right = corners[0][0], corners[-1][0]
    middle = [x for x, _ in corners if left < x < right]
    assert [round((x - left) / (right - left) * 3, 2) for x in dict.fromkeys(middle)] == pytest.approx(
        [1.0, 2.0, 2.5], abs=0.01
    )
    heights = list(dict.fromkeys(y for _, y in corners))  # of 80, 150, 120, 200 MiB; down is more
    scale = (heights[0] - heights[3]) / 120
    assert [heights[0] - height for height in heights] == pytest.approx(
        [0, 70 * scale, 40 * scale, 120 * scale], abs=0.2
    )
    (dashed,) = (line for line in page.of("line") if "class" not in line)
    assert float(dashed["y1"]) == pytest.approx(heights[0] - 50 * scale, abs=0.2)
    assert float(dashed["x1"]) == pytest.approx(left, abs=0.5)
    assert float(dashed["x2"]) == pytest.approx(left + (right - left) * 2 / 3, abs=0.5)


def test_of_samples_on_one_pixel_the_highest_is_drawn() -> None:
    samples = tuple(MemorySample(second / 10_000, MIB * (900 if second == 7777 else 100)) for second in range(30_000))
    corners = outline(page_of(trace_of(samples=samples)))
    assert len(corners) < 2000
    highest = min(corners, key=lambda corner: corner[1])
    assert highest[0] == pytest.approx(68 + 0.7777 / 3 * 878, abs=1)


def test_phases_that_overlap_are_in_lanes() -> None:
    bars = [(bar["x"], bar["y"]) for bar in page_of(trace_of()).of("rect") if bar["class"] == "bar"]
    load, adapt, train = (y for _, y in bars)
    assert load == train != adapt
    titles = page_of(trace_of()).texts["title"]
    assert "adapt: 500 ms" in titles


def test_ranks_begin_where_their_clocks_say() -> None:
    page = page_of(trace_of(0, 2), trace_of(1, 2))  # the second begins a second later, and ends after four
    bars = [float(bar["x"]) for bar in page.of("rect") if bar["class"] == "bar"]
    assert bars[3] - bars[0] == pytest.approx((960 - 68 - 14) / 4, abs=1)


NASTY = "</title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\0\ud800"


def test_names_cannot_break_out() -> None:
    phase = Phase(name=NASTY, group=NASTY, seconds=3.0, host_peak=MIB)
    trace = trace_of(
        device=NASTY,
        error=NASTY,
        phases=(phase,),
        predictions={NASTY: Prediction(host=MIB, host_before=0)},
        read_once_per_node={NASTY: 2},
    )
    page = page_of(trace)
    assert_self_contained(page)
    assert page.rows("of-phases")[0][0][0].startswith("</title><script>")


def test_nothing_measured_is_a_page_too() -> None:
    empty = trace_of(phases=(), samples=(), predictions={}, seconds=0.0, bytes_read=0)
    page = page_of(empty)
    assert_self_contained(page)
    assert page.rows("of-phases") == [[]]


def test_what_is_read_once_per_node_is_named_once() -> None:
    failed_early, other = trace_of(0, 2), trace_of(1, 2, read_once_per_node={"h.*.c_attn.weight": 12})
    said = [text for text in page_of(failed_early, other).texts["p"] if "read once per node" in text]
    assert len(said) == 1
    assert said[0].endswith("h.*.c_attn.weight (12).")
    assert "read once per node" not in render([trace_of()])


def test_what_went_wrong_is_said_above_all() -> None:
    text = render([trace_of(1, 12, error="OutOfMemoryError")])
    assert "Rank 1 ended with OutOfMemoryError." in text
    assert "No file yet of 11 ranks: 0, 2, 3, 4, 5, 6, 7, 8, ..." in text
