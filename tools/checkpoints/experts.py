"""Shapes of mixture-of-experts models: configuration, and one tensor per expert, as real checkpoints have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["SHAPES", "ExpertsShape"]

Tensors = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class ExpertsShape:
    """The sizes of a Qwen3-MoE or GLM-4.5-MoE model. Raises `ValueError` for an impossible combination.

    intermediate: of a dense layer; the first `dense` layers are dense. expert: the intermediate size of one expert.
    experts, active: routed experts, and those that a token visits. shared: experts that every token visits.
    """

    model: Literal["qwen3_moe", "glm4_moe"]
    layers: int
    hidden: int
    intermediate: int
    expert: int
    experts: int
    active: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    dense: int = 0
    shared: int = 0
    tie: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("model", "dense", "shared", "tie") and value < 1:
                raise ValueError(f"{name} must be 1 or more; got {value}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads; got {self.heads} and {self.kv_heads}")
        if self.active > self.experts:
            raise ValueError(f"active must be at most experts; got {self.active} of {self.experts}")

    def tensors(self) -> Tensors:
        """Checkpoint key -> shape, in the order of the model: embedding, layers, norm, head."""
        shapes: Tensors = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            parts = self._attention() | (self._mlp(self.intermediate) if layer < self.dense else self._experts())
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tie:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes

    def _attention(self) -> Tensors:
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        shapes: Tensors = {
            "input_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (q, self.hidden),
            "self_attn.k_proj.weight": (kv, self.hidden),
            "self_attn.v_proj.weight": (kv, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, q),
            "post_attention_layernorm.weight": (self.hidden,),
        }
        if self.model == "qwen3_moe":
            return shapes | {f"self_attn.{name}_norm.weight": (self.head_size,) for name in "qk"}
        return shapes | {f"self_attn.{name}_proj.bias": (size,) for name, size in zip("qkv", (q, kv, kv), strict=True)}

    def _mlp(self, intermediate: int, prefix: str = "mlp.") -> Tensors:
        return {
            f"{prefix}gate_proj.weight": (intermediate, self.hidden),
            f"{prefix}up_proj.weight": (intermediate, self.hidden),
            f"{prefix}down_proj.weight": (self.hidden, intermediate),
        }

    def _experts(self) -> Tensors:
        shapes: Tensors = {"mlp.gate.weight": (self.experts, self.hidden)}
        if self.model == "glm4_moe":
            shapes["mlp.gate.e_score_correction_bias"] = (self.experts,)
        for expert in range(self.experts):
            shapes |= self._mlp(self.expert, f"mlp.experts.{expert}.")
        if self.shared:
            shapes |= self._mlp(self.expert * self.shared, "mlp.shared_experts.")
        return shapes

    def config(self, *, dtype: str, special_tokens: Mapping[str, int]) -> dict[str, object]:
        """Content of `config.json` for transformers. special_tokens: `bos_token_id` and the like."""
        own = self._qwen3_moe() if self.model == "qwen3_moe" else self._glm4_moe()
        return {
            **own,
            "model_type": self.model,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "moe_intermediate_size": self.expert,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "num_experts_per_tok": self.active,
            "norm_topk_prob": True,
            "hidden_act": "silu",
            "max_position_embeddings": 40960,
            "tie_word_embeddings": self.tie,
            "dtype": dtype,
            **special_tokens,
        }

    def _qwen3_moe(self) -> dict[str, object]:
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "num_experts": self.experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(range(self.dense)),
            "attention_bias": False,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        }

    def _glm4_moe(self) -> dict[str, object]:
        return {
            "architectures": ["Glm4MoeForCausalLM"],
            "n_routed_experts": self.experts,
            "n_shared_experts": self.shared,
            "first_k_dense_replace": self.dense,
            "num_nextn_predict_layers": 0,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "attention_bias": True,
            "use_qk_norm": False,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 0.5},
        }


_QWEN = ExpertsShape(
    model="qwen3_moe",
    layers=48,
    hidden=2048,
    intermediate=6144,
    expert=768,
    experts=128,
    active=8,
    heads=32,
    kv_heads=4,
    head_size=128,
    vocab=151936,
)

# Without the layer for multi-token prediction, which transformers does not load.
_GLM = ExpertsShape(
    model="glm4_moe",
    layers=46,
    hidden=4096,
    intermediate=10944,
    expert=1408,
    experts=128,
    active=8,
    heads=96,
    kv_heads=8,
    head_size=128,
    vocab=151552,
    dense=1,
    shared=1,
)

_TINY = {
    "layers": 2,
    "hidden": 64,
    "intermediate": 128,
    "expert": 32,
    "experts": 8,
    "active": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 16,
    "vocab": 512,
}

SHAPES: Mapping[str, ExpertsShape] = {
    "qwen3-30b-a3b": _QWEN,
    "glm-4.5-air": _GLM,
    "qwen3-moe-tiny": ExpertsShape(model="qwen3_moe", **_TINY),  # type: ignore[arg-type]  # the sizes are integers
    "glm4-moe-tiny": ExpertsShape(model="glm4_moe", dense=1, shared=1, **_TINY),  # type: ignore[arg-type]
}
