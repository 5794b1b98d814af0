"""Tiny real models of transformers, and checkpoints of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_config(model_type: str = "llama", **changes: Any) -> Any:
    """The config of a tiny decoder of `model_type`."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **{**TINY, **changes})


def save_tiny(
    directory: Path,
    model_type: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    shard_size: str = "50KB",
    **changes: Any,
) -> Path:
    """A sharded safetensors checkpoint, written by transformers, of a tiny model with random weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(directory, max_shard_size=shard_size)
    return directory


def save_in_8_bits(checkpoint: Path, directory: Path, *, threshold: float = 6.0) -> Path:
    """The model of `checkpoint`, quantized to int8 and saved by transformers and bitsandbytes."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", quantization_config=config)
    model.save_pretrained(directory)
    return directory
