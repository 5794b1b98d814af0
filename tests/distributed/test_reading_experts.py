"""Ranks that share fused experts read their own parts of them, and none ever has a whole stack."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.checkpoint import Checkpoint
from surgery.config import FSDP2
from surgery.telemetry.report import anonymous_memory
from tests.distributed.loads import Job, Loaded, Setup
from tests.distributed.loads import load as load_watched
from tests.distributed.planned import BYTES, MMAP_THRESHOLD
from tests.helpers.damage import edit_tensors
from tests.helpers.experts import packed_stack
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed

MIB = 1 << 20
SHARDED = Setup(placement="sharded", shard=FSDP2())
#: One layer, whose stacks are of 48 and 24 MiB in 16 bits.
LARGE: dict[str, Any] = {
    "num_hidden_layers": 1,
    "num_local_experts": 48,
    "hidden_size": 512,
    "intermediate_size": 512,
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one rank has read of experts that are stored transposed; and what it took to load large ones, in bytes."""

    turned: Loaded
    peak: int
    read: int


def turned_model() -> nn.Module:
    """A tiny Qwen3-VL-MoE, whose experts the hub has transposed."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = {
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))


def load_both(turned: Path, large: Path) -> Found:
    """Load both on this rank, as all ranks have to."""
    loaded = load_watched(Job(folder=turned, dtype=torch.bfloat16, build=turned_model), SHARDED)
    # glibc keeps freed pieces below a threshold that it raises by itself.
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, BYTES)
    gc.collect()
    report, before = surgery.Report(), anonymous_memory()
    model = surgery.qlora(large, placement="sharded", shard=FSDP2(), report=report, device=torch.device("cpu"))
    surgery.release(model)
    peak = max(phase.host_peak for phase in report.phases) - before
    return Found(turned=loaded, peak=peak, read=report.bytes_read)


def test_each_rank_reads_its_experts_and_has_no_whole_stack(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = turned_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "turned")  # type: ignore[operator]
    stacks = {name: value.detach() for name, value in model.named_parameters() if ".experts." in name}
    edit_tensors(tmp_path / "turned", lambda tensors: tensors.update({n: tensors[n].mT.contiguous() for n in stacks}))
    large = save_tiny(tmp_path / "large", "mixtral", shard_size="1GB", **LARGE)
    ranks: list[Found] = run_ranks(load_both, 3, tmp_path / "turned", large)

    index = Checkpoint.open(tmp_path / "turned").index
    for name, values in stacks.items():
        _, packed, _ = packed_stack(values, quant_type="nf4", blocksize=64, double_quant=True)
        for found in ranks:
            assert torch.equal(found.turned.plain[name].reshape(-1).view(torch.uint8), packed)
            assert found.turned.bytes_read.get(name, 0) <= index[name].nbytes * 2 // 3
        # A matrix of which two ranks have a part is read by both.
        total = sum(found.turned.bytes_read.get(name, 0) for found in ranks)
        assert index[name].nbytes <= total <= index[name].nbytes * 5 // 3

    total = Checkpoint.open(large).index.total_bytes
    read = sum(found.read for found in ranks)
    assert total <= read <= total * 1.001
    plan = surgery.plan(large, world_size=3, device="cpu", training=None, placement="sharded", shard=FSDP2())
    assert not plan.read_once_per_node
    # Ranks that are alike are planned once, to within a block a tensor.
    assert [found.read for found in ranks] == pytest.approx([plan.of_rank(n).bytes_read for n in range(3)], abs=1024)
    # Less than the smaller of the two stacks.
    assert all(0 < found.peak < 24 * MIB for found in ranks)
