"""Exceptions for single families that the rules of `shrink` do not cover, as data."""

from __future__ import annotations

from typing import Any, Final

__all__ = ["CHANGES", "EXCLUDED", "IMPOSSIBLE", "LEFT_ALONE"]

_QSA: Final = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_DOTS3: Final = {
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
    "num_hidden_layers": 3,
    "head_dim": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 64,
    "swa_kv_lora_rank": 64,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_ZAMBA: Final = {
    "num_hidden_layers": 5,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"],
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
}

#: Attributes to set, by family: those without a default, or that must fit another one.
CHANGES: Final[dict[str, dict[str, Any]]] = {
    "bamba": {"mamba_n_heads": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "q_lora_rank": None},
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": _DOTS3,
    "emu3": {"vocabulary_map": {"<image>": 250}, "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1]}},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "granitemoehybrid": {"mamba_n_heads": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 32},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"mamba_num_heads": 8},
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [4, 4], "num_buckets": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "mamba_headdim": 32, "num_query_groups": 4},
}

#: Families that are not a language model by themselves -> reason.
IMPOSSIBLE: Final[dict[str, str]] = {
    "gemma4_assistant": "drafts for another model, whose hidden states and cache it needs",
    "gemma4_unified_assistant": "drafts for another model, whose hidden states and cache it needs",
    "musicgen": "`AutoModelForCausalLM` hands its class the config of the whole model, which it cannot use",
    "musicgen_melody": "`AutoModelForCausalLM` hands its class the config of the whole model, which it cannot use",
}

_MAMBA: Final = ["out_proj", "conv1d"]

#: Modules selected by "all-linear" that PEFT cannot adapt: it refuses them, or their forward fails.
EXCLUDED: Final[dict[str, list[str]]] = {
    "deepseek_v4": ["o_a_proj"],
    "falcon_h1": _MAMBA,
    "falcon_mamba": _MAMBA,
    "mamba": _MAMBA,
    "mamba2": _MAMBA,
    "nemotron_h": _MAMBA,
    "llama4": ["router"],
    "llama4_text": ["router"],
    "phimoe": ["router"],
}

#: Stored tensors that keep the values set by their class: family -> (end of their names, reason).
LEFT_ALONE: Final[dict[str, tuple[str, str]]] = {
    "zaya": (
        "balancing_biases",
        "all but the last of `balancing_biases`: transformers sets it to -1 after loading, here it is the checkpoint's",
    ),
}
