"""`tools/bench_step.py`: ways take turns, and what a comparison comes to."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from xml.etree.ElementTree import fromstring

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from bench_step import app
from checkpoints.folder import build
from checkpoints.llama import LlamaShape
from checkpoints.synthetic import SyntheticCheckpoint
from step.found import Found, chart, read, tables, write
from step.options import Way
from step.player import longest_of
from step.ways import begin


def _found(way: str = "ours", *, batch: str | None = "2x32", ranks: int = 1) -> Found:
    return Found(way=way, ranks=ranks, batch=batch, memory_cap=None)


def test_ways_take_turns_and_one_that_fails_does_not_take_others_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = LlamaShape(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2, vocab=512)
    checkpoint = SyntheticCheckpoint(shape=shape)
    with build(tmp_path / "model", checkpoint.recipe()) as folder:
        list(checkpoint.write(folder, processes=1))
    options = ["--device", "cpu", "--checkpoint", str(tmp_path / "model"), "--ways", "unsloth ours"]
    options += ["--batches", "1x16,2x16c", "--steps", "2", "--logs", str(tmp_path / "logs")]
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # of the command, not of the tests
    ran = CliRunner().invoke(app, ["compare", *options, "--json", str(tmp_path / "found.jsonl")])
    assert ran.exit_code == 1, ran.output
    found = {(each.way, each.batch): each for each in read([tmp_path / "found.jsonl"])}
    assert "ended without a word" in str(found.pop(("unsloth", None)).error)
    assert "No module named 'unsloth'" in ran.stderr
    assert list(found) == [("ours", "1x16"), ("ours", "2x16c")]
    for ours in found.values():
        assert [len(turn) for turn in ours.turns] == [2, 2]
        assert ours.losses == sorted(ours.losses, reverse=True)
        assert ours.ready > 0


def test_adapters_begin_alike_in_whatever_wrapper() -> None:
    places = [("layers", str(layer), "mlp", "up_proj", "lora_A", "default") for layer in (1, 1, 10)]
    models = [_nested(("module", "base_model", *places[0])), _nested(places[1]), _nested(places[2])]
    for model in models:
        begin(model)
    first, same, other = (next(model.parameters()) for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.abs().max() <= 64**-0.5


def _nested(names: tuple[str, ...]) -> nn.Module:
    module: nn.Module = nn.Linear(64, 4, bias=False)
    for name in reversed(names):
        module = nn.ModuleDict({name: module})
    return module


def test_steps_are_the_slowest_ranks_losses_their_mean_and_sizes_the_largest() -> None:
    found = _found(ranks=2)
    ranks = [{"seconds": [9.0, 1.0, 1.0, 2.0], "losses": [4.0] * 4, "peak": 5}]
    ranks += [{"seconds": [8.0, 1.0, 3.0, 1.0], "losses": [2.0] * 4, "peak": 7}]
    assert found.add(ranks) is None
    assert found.add([{"seconds": [7.0, 4.0], "losses": [1.0] * 2, "peak": 6}] * 2) is None
    assert found.turns == [[9.0, 1.0, 3.0, 2.0], [7.0, 4.0]]
    assert found.losses == [3.0] * 4 + [1.0] * 2
    assert (found.first, found.step, found.peak) == (9.0, 3.0, 7)
    assert json.loads(found.line())["tokens_per_second"] == round(2 * 32 * 2 / 3.0)


def test_an_error_is_a_row_and_a_label_of_a_bar(tmp_path: Path) -> None:
    good, bad = _found(), _found("stock:liger")
    good.add([{"seconds": [1.0, 0.5], "losses": [3.0, 2.0], "peak": 1 << 30}])
    assert bad.add([{"error": "out of memory"}]) == "out of memory"
    limit = Found(way="ours", ranks=1, batch=None, memory_cap=24.0, longest=65536)
    write(tmp_path / "found.jsonl", [good, bad, limit])
    again = read([tmp_path / "found.jsonl"])
    assert again == [good, bad, limit]
    text = tables(again)
    assert "| stock:liger | out of memory |" in text
    assert "| ours in 24 GiB | 65536 tokens at most |" in text
    texts = [element.text for element in fromstring(chart(again)).iter() if element.tag.endswith("text")]
    assert {"out of memory", "1.00 GiB"} <= set(texts)


@pytest.mark.parametrize("most", [3, 8, 40, 64, 100])
@pytest.mark.parametrize("room", [0, 3, 8, 17, 52, 1000])
def test_the_longest_that_fits_is_found(most: int, room: int) -> None:
    tried = []

    def fits(tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= room

    assert longest_of(fits, start=16, grain=4, most=most) == min(room, most) // 4 * 4
    assert all(tokens <= most for tokens in tried)
    assert len(tried) == len(set(tried))


@pytest.mark.parametrize(
    ("text", "message"), [("hours", "expected a way of ours, stock"), ("stock:fused", "axolotl, liger, ddp")]
)
def test_an_unknown_way_or_option_is_refused_with_those_there_are(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Way.of(text)


def test_a_way_says_how_many_processes_it_has() -> None:
    texts = ["ours:fused,liger", "ours:liger@1", "unsloth:balanced"]
    assert [Way.of(text).processes(2) for text in texts] == [2, 1, 1]
    assert [str(Way.of(text)) for text in texts] == ["ours:fused,liger", "ours:liger", "unsloth:balanced"]
