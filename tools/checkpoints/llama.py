"""Shapes of Llama models: configuration and tensors, derived from eight numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["SHAPES", "LlamaShape"]


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """The sizes of a Llama model. Raises `ValueError` for an impossible combination.

    heads, kv_heads: attention heads, and the key/value heads that they share (grouped-query attention).
    tie: the output head is tied to the embedding, and is not in the checkpoint.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tie: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "tie" and value < 1:
                raise ValueError(f"{name} must be 1 or more; got {value}")
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise ValueError(
                f"hidden must be heads times an even head size (rotary embeddings turn pairs); "
                f"got hidden={self.hidden} with heads={self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads; got {self.heads} and {self.kv_heads}")

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Checkpoint key -> shape, in the order of the model: embedding, layers, norm, head."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in self._layer().items()}
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tie:
            shapes["lm_head.weight"] = (self.vocab, self.hidden)
        return shapes

    def _layer(self) -> dict[str, tuple[int, ...]]:
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "input_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (self.hidden, self.hidden),
            "self_attn.k_proj.weight": (kv, self.hidden),
            "self_attn.v_proj.weight": (kv, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, self.hidden),
            "post_attention_layernorm.weight": (self.hidden,),
            "mlp.gate_proj.weight": (self.intermediate, self.hidden),
            "mlp.up_proj.weight": (self.intermediate, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.intermediate),
        }

    def config(self, *, dtype: str, special_tokens: Mapping[str, int]) -> dict[str, object]:
        """Content of `config.json` for transformers. special_tokens: `bos_token_id` and the like."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "hidden_act": "silu",
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": self.tie,
            "dtype": dtype,
            **special_tokens,
        }


# The two largest have the layers of Llama 3 with the 32,000-token vocabulary of Llama 2: 14.5 and 138 GB in 16 bits.
SHAPES: Mapping[str, LlamaShape] = {
    "llama-tiny": LlamaShape(layers=4, hidden=64, intermediate=176, heads=4, kv_heads=2, vocab=512),
    "llama-1gb": LlamaShape(layers=10, hidden=2048, intermediate=5632, heads=32, kv_heads=4, vocab=32000),
    "llama-8b": LlamaShape(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocab=32000),
    "llama-70b": LlamaShape(layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, vocab=32000),
}
