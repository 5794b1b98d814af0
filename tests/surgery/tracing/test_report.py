"""Measurements of a report: known allocations, overlapping phases, bytes counted by many threads."""

from __future__ import annotations

import io
import re
import sys
import threading
import time

import pytest
import torch

from surgery.telemetry.measurements import anonymous_memory
from surgery.telemetry.report import Report
from tests.surgery.tracing.made import look, pages

SIZE = 64 * 2**20

#: The allocator's and the interpreter's own comings and goings.
SLACK = 8 * 2**20


def allocate() -> torch.Tensor:
    return pages(SIZE)


def test_an_allocation_is_in_its_phase_and_in_the_samples_of_its_time() -> None:
    report = Report()
    with report.recording() as history:
        with report.phase("before") as before:
            look(history)
        with report.phase("holding") as holding:
            held = allocate()
            allocated = report.seconds
            look(history)
        del held
        with report.phase("after") as after:
            look(history)

    assert SIZE <= holding.host_peak - holding.host_before < SIZE + SLACK
    assert before.host_peak - before.host_before < SLACK
    during = [sample.host for sample in history.samples if allocated < sample.seconds < holding.start + holding.seconds]
    later = [sample.host for sample in history.samples if sample.seconds > after.start]
    assert min(during) >= holding.host_before + SIZE - SLACK
    assert max(later) <= holding.host_before + SLACK


def test_samples_cover_the_time_between_phases_too() -> None:
    report = Report()
    with report.recording() as history:
        began = report.seconds
        held = allocate()
        look(history, 5)
        del held
        ended = report.seconds
    assert history.samples[0].seconds <= began + 1e-4
    assert history.samples[-1].seconds >= ended - 1e-4
    assert max(sample.host for sample in history.samples) >= history.samples[0].host + SIZE - SLACK
    assert report.phases == []


def test_nothing_is_recorded_unasked() -> None:
    report = Report()
    with report.phase("one"):
        time.sleep(0.02)  # for what must not happen
    assert report.history.samples == []


def test_phases_of_two_threads_have_the_memory_and_the_bytes_of_both() -> None:
    report = Report()
    started, counted = threading.Event(), threading.Event()

    def load() -> None:
        with report.phase("load"):
            report.count_bytes(5)
            started.set()
            assert counted.wait(250)

    thread = threading.Thread(target=load)
    thread.start()
    assert started.wait(250)
    with report.recording() as history, report.phase("adapt"):
        report.count_bytes(7)
        held = allocate()
        look(history)
    del held
    counted.set()
    thread.join()
    report.count_bytes(11)

    adapt, loading = report.phases
    assert (adapt.name, loading.name) == ("adapt", "load")
    assert loading.start <= adapt.start
    assert loading.start + loading.seconds >= adapt.start + adapt.seconds
    assert loading.bytes_read == 12
    assert adapt.bytes_read == 7
    assert report.bytes_read == 23
    assert loading.host_peak >= loading.host_before + SIZE - SLACK


def test_bytes_of_many_threads_all_count() -> None:
    report = Report()
    with report.phase("load") as phase:
        threads = [threading.Thread(target=lambda: [report.count_bytes(3) for _ in range(2000)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert report.bytes_read == phase.bytes_read == 8 * 2000 * 3


def fail_in_a_phase(report: Report) -> None:
    with report.phase("load"):
        report.count_bytes(1)
        raise ZeroDivisionError


def test_a_phase_that_raises_is_kept_and_ended() -> None:
    report = Report()
    with pytest.raises(ZeroDivisionError):
        fail_in_a_phase(report)
    report.count_bytes(1)
    assert report.as_dict()["load"]["bytes_read"] == 1
    assert "surgery-memory" not in {thread.name for thread in threading.enumerate()}


def test_a_prediction_counts_from_what_is_held_when_it_is_made() -> None:
    report = Report()
    held = allocate()
    before = anonymous_memory()
    report.predict("load", host=100, device=200)
    del held
    prediction = report.predictions["load"]
    assert (prediction.host, prediction.device, prediction.device_before) == (100, 200, 0)
    assert abs(prediction.host_before - before) < SLACK


@pytest.mark.parametrize("show_progress", [True, False])
def test_what_is_read_once_per_node_is_kept_by_name_and_said(
    capsys: pytest.CaptureFixture[str], *, show_progress: bool
) -> None:
    report = Report(show_progress=show_progress)
    report.note("read_once_per_node", ["h.0.c_attn.weight", "h.1.c_attn.weight"])
    assert report.read_once_per_node == {"h.*.c_attn.weight": 2}
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("read once per node, by one rank for the others: h.*.c_attn.weight (2).\n") == show_progress


def test_where_nothing_is_read_once_per_node_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(show_progress=True)
    report.note("read_once_per_node", [])
    assert report.read_once_per_node == {}
    assert capsys.readouterr() == ("", "")


def test_as_dict_has_every_figure_of_every_phase() -> None:
    report = Report()
    with report.phase("one"):
        time.sleep(0.01)
    with report.phase("two", group="train"):
        report.count_bytes(9)
    figures = report.as_dict()
    assert list(figures) == ["one", "two"]
    assert set(figures["two"]) == {"start", "seconds", "bytes_read", "host_before", "host_peak", "device_peak"}
    assert figures["two"]["start"] >= figures["one"]["start"] + 0.01
    assert figures["two"]["bytes_read"] == 9
    assert [phase.group for phase in report.phases] == ["load", "train"]
    with report.phase("one"):
        report.count_bytes(5)
    again = report.as_dict()["one"]
    assert again["start"] == figures["one"]["start"]
    assert (again["bytes_read"], again["seconds"] >= figures["one"]["seconds"]) == (5, True)


def test_one_thread_samples_for_all_phases_and_ends_with_the_last() -> None:
    def samplers() -> int:
        return sum(thread.name == "surgery-memory" for thread in threading.enumerate())

    report = Report()
    with report.recording() as history:
        with report.phase("outer"), report.phase("inner"):
            assert samplers() == 1
        look(history)  # it goes on for those that are left
    assert samplers() == 0
    with report.recording() as history, report.phase("later") as later:
        held = allocate()
        look(history)
        del held
    assert later.host_peak >= later.host_before + SIZE - SLACK, "and begins again"
    assert samplers() == 0


MODULES = ("embed", "layers.0.q", "layers.0.up", "layers.1.q", "layers.1.up", "norm")
ITEMS = (MODULES[:2], MODULES[2:3], MODULES[3:])


class Terminal(io.StringIO):
    """A stream that is drawn on."""

    def isatty(self) -> bool:
        return True


def test_layers_are_counted_and_a_log_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(show_progress=True)
    assert list(report.track(ITEMS, names=lambda item: item)) == list(ITEMS)
    err = capsys.readouterr().err
    assert re.fullmatch(r"Loaded 2 layers: 0 B read by this rank in \d+\.\d s\n", err)
    assert list(report.track(["a", "b"], names=lambda item: [item])) == ["a", "b"]
    assert "Loaded 2 layers" in capsys.readouterr().err, "modules, where none has a number"


def test_lines_of_a_long_load_are_apart(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.telemetry.report.LINE_PERIOD", 0.0)
    list(Report(show_progress=True).track(ITEMS, names=lambda item: item))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines[:-1]] == [f"Loading: {count} of 2 layers" for count in (0, 1, 2)]


def test_a_bar_fits_the_terminal_and_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "80")
    report = Report(show_progress=True)
    for _ in report.track(ITEMS, names=lambda item: item):
        time.sleep(0.15)  # tqdm draws ten times a second
    drawn = screen.getvalue().split("\r")
    assert any("/2" in frame and "layers" in frame for frame in drawn)
    assert max(map(len, drawn[:-1])) <= 80
    assert drawn[-1].startswith("Loaded 2 layers"), drawn
