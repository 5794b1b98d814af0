"""Checkpoints that weigh nothing: real headers, and holes where the weights would be."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from checkpoints.experts import ExpertsShape
from checkpoints.llama import LlamaShape
from checkpoints.shards import file_names, split, write_index

__all__ = ["DEEPSEEK_V3", "GLM_4_5", "LLAMA_70B", "LLAMA_405B", "QWEN3_235B", "Shape", "write_hollow"]

Tensors = dict[str, tuple[int, ...]]


class Shape(Protocol):
    """The sizes of a model."""

    def tensors(self) -> Tensors:
        """Checkpoint key -> shape."""

    def config(self, *, dtype: str, special_tokens: Mapping[str, int]) -> dict[str, object]:
        """Content of `config.json`."""


@dataclass(frozen=True, kw_only=True)
class _Glm(ExpertsShape):
    """GLM-4.5, which normalizes queries and keys, as GLM-4.5-Air does not."""

    def _attention(self) -> Tensors:
        return super()._attention() | {f"self_attn.{name}_norm.weight": (self.head_size,) for name in "qk"}

    def _glm4_moe(self) -> dict[str, object]:
        return super()._glm4_moe() | {"use_qk_norm": True, "routed_scaling_factor": 2.5}


@dataclass(frozen=True, kw_only=True)
class _DeepSeek(_Glm):
    """DeepSeek-V3: GLM's kind of experts, and attention by low-rank projections. head_size: of values."""

    q_rank: int
    kv_rank: int
    nope: int
    rope: int

    def _attention(self) -> Tensors:
        return {
            "input_layernorm.weight": (self.hidden,),
            "self_attn.q_a_proj.weight": (self.q_rank, self.hidden),
            "self_attn.q_a_layernorm.weight": (self.q_rank,),
            "self_attn.q_b_proj.weight": (self.heads * (self.nope + self.rope), self.q_rank),
            "self_attn.kv_a_proj_with_mqa.weight": (self.kv_rank + self.rope, self.hidden),
            "self_attn.kv_a_layernorm.weight": (self.kv_rank,),
            "self_attn.kv_b_proj.weight": (self.heads * (self.nope + self.head_size), self.kv_rank),
            "self_attn.o_proj.weight": (self.hidden, self.heads * self.head_size),
            "post_attention_layernorm.weight": (self.hidden,),
        }

    def config(self, *, dtype: str, special_tokens: Mapping[str, int]) -> dict[str, object]:
        own: dict[str, object] = {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "q_lora_rank": self.q_rank,
            "kv_lora_rank": self.kv_rank,
            "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rope,
            "v_head_dim": self.head_size,
            "head_dim": self.rope,
            "n_group": 8,
            "topk_group": 4,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }
        return super().config(dtype=dtype, special_tokens=special_tokens) | own


LLAMA_405B = LlamaShape(layers=126, hidden=16384, intermediate=53248, heads=128, kv_heads=8, vocab=128256)
LLAMA_70B = LlamaShape(layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, vocab=32000)

# Without the layers for multi-token prediction, which transformers does not load; DeepSeek-V3 in 16 bits.
QWEN3_235B = ExpertsShape(
    model="qwen3_moe", layers=94, hidden=4096, intermediate=12288, expert=1536, experts=128, active=8,
    heads=64, kv_heads=4, head_size=128, vocab=151936,
)  # fmt: skip
GLM_4_5 = _Glm(
    model="glm4_moe", layers=92, hidden=5120, intermediate=12288, expert=1536, experts=160, active=8,
    heads=96, kv_heads=8, head_size=128, vocab=151552, dense=3, shared=1,
)  # fmt: skip
DEEPSEEK_V3 = _DeepSeek(
    model="glm4_moe", layers=61, hidden=7168, intermediate=18432, expert=2048, experts=256, active=8,
    heads=128, kv_heads=128, head_size=128, vocab=129280, dense=3, shared=1,
    q_rank=1536, kv_rank=512, nope=128, rope=64,
)  # fmt: skip

ITEMSIZE = 2


def write_hollow(folder: Path, shape: Shape, *, shards: int = 1) -> Path:
    """A bfloat16 checkpoint of `shape` in sparse files, which a file system keeps in some kilobytes."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = shape.tensors()
    sizes = {name: math.prod(dims) * ITEMSIZE for name, dims in shapes.items()}
    runs = split(sizes, shards)
    for file, names in zip(file_names(len(runs)), runs, strict=True):
        _write_sparse(folder / file, {name: shapes[name] for name in names})
    write_index(folder, runs, sum(sizes.values()))
    config = shape.config(dtype="bfloat16", special_tokens={"bos_token_id": 0, "eos_token_id": 1})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _write_sparse(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, object] = {}
    end = 0
    for name, dims in shapes.items():
        start, end = end, end + math.prod(dims) * ITEMSIZE
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + end)
