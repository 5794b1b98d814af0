"""`--cuda-graphs`: what it makes of TRL's options, and when it captures which module."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from surgery import ConfigError
from surgery.finetune import callbacks, job
from surgery.finetune.parser import parse


def chosen(monkeypatch: pytest.MonkeyPatch, *options: str, ranks: int = 2) -> dict[str, Any]:
    monkeypatch.setattr(job, "_on_cpu", lambda _request: False)
    monkeypatch.setattr(job, "_world_size", lambda: ranks)
    return job._for_graphs(parse(["org/name", "--data", "a.jsonl", "--cuda-graphs", *options]))


def test_batches_come_in_few_shapes_and_each_reduces_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    found = chosen(monkeypatch)
    assert found["pad_to_multiple_of"] == 64
    assert found["accelerator_config"] == {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    given = '{"split_batches": true, "gradient_accumulation_kwargs": {"sync_each_batch": false}}'
    found = chosen(monkeypatch, "--pad-to-multiple-of", "16", "--accelerator-config", given)
    assert found["pad_to_multiple_of"] in (16, "16")
    assert found["accelerator_config"]["gradient_accumulation_kwargs"] == {"sync_each_batch": False}
    assert found["accelerator_config"]["split_batches"]
    assert "accelerator_config" not in chosen(monkeypatch, ranks=1)
    with pytest.raises(ConfigError, match="found --fsdp 1"):
        chosen(monkeypatch, "--fsdp", "1")
    monkeypatch.setattr("trl.__version__", "1.15.2")
    with pytest.raises(ConfigError, match=r"needs trl 1\.16, found 1\.15\.2"):
        chosen(monkeypatch)


def test_the_module_that_is_called_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[nn.Module] = []
    monkeypatch.setattr(callbacks, "capture", captured.append)
    monkeypatch.setattr(callbacks, "tally", lambda _model: "3 calls replayed" if captured else "")
    said: list[str] = []
    monkeypatch.setattr(callbacks, "say", lambda _console, text: said.append(text))
    trainer, console = SimpleNamespace(model=nn.Linear(1, 1), model_wrapped=nn.Linear(1, 1)), object()
    capturing = callbacks.Capturing(trainer, console)  # type: ignore[arg-type]  # not written to
    capturing.on_train_begin()
    capturing.on_train_begin()
    capturing.on_train_end()
    assert captured == [trainer.model_wrapped]
    assert said == ["CUDA graphs: 3 calls replayed"]
