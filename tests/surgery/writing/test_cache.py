"""The cache of packed weights: read where it is whole, made again where it is not, and never seen in the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

import surgery
from surgery.telemetry.report import Report
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

QUANT = surgery.Quant(skip_modules=(r"layers\.1\.mlp\.up",))


def load(source: Path, cache: Path | None, **options: Any) -> tuple[int, dict[str, bytes], Any]:
    """Bytes read for a model from the cache, all that the model holds, and the configuration of its adapters."""
    report = Report()
    lora = LoraConfig(target_modules=["q_proj"])
    with surgery.qlora(source, quant=QUANT, lora=lora, packed_cache=cache, report=report, **options) as model:
        held = {
            name: tensor.to_local().contiguous().view(torch.uint8).numpy().tobytes()
            if hasattr(tensor, "to_local")
            else tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            for name, tensor in model.state_dict().items()
            if "lora" not in name
        }
        base = model.base_model.model
        config = base.config.to_dict() if hasattr(base, "config") else {}
        return report.bytes_read, held, (model.peft_config["default"].base_model_name_or_path, config)


def on_ranks(source: Path, cache: Path) -> list[int]:
    without, first, second = (load(source, each, shard=surgery.FSDP2()) for each in (None, cache, cache))
    assert without[1] == first[1] == second[1]
    return [without[0], first[0], second[0]]


def test_the_cache_is_read_if_whole_and_made_again_if_not(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", vocab_size=64)
    cache = tmp_path / "cache"
    expected = load(source, None)
    first = load(source, cache)
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    weights = folder / "model.safetensors"
    made = weights.stat().st_ctime_ns
    assert first[1:] == load(source, cache)[1:] == expected[1:]
    assert first[0] < 0.6 * expected[0]
    assert weights.stat().st_ctime_ns == made

    before, content = weights.stat(), weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load(source, cache)[1:] == expected[1:]
    assert weights.read_bytes() == content

    made = weights.stat().st_ctime_ns
    (cache / f"{folder.name}.json").unlink()
    assert load(source, cache)[1:] == expected[1:]
    assert weights.stat().st_ctime_ns != made
    save_tiny(source, vocab_size=64, seed=1)
    assert load(source, cache)[1:] == load(source, None)[1:] != expected[1:]
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2

    for read in run_ranks(on_ranks, 2, source, tmp_path / "cache of ranks"):
        assert read[2] == read[1] < 0.6 * read[0]
