"""Make a model's config tiny, by the names of its attributes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from families.exceptions import CHANGES

__all__ = ["VOCAB", "tiny_config"]

#: Vocabulary size of every tiny model; ids of special tokens are made to fit.
VOCAB: Final = 256

#: Maximum number of layers: enough to include every kind of layer.
MOST_LAYERS: Final = 4

#: (pattern of the whole attribute name, maximum); the first match counts. Widths are multiples of 64, so that rows
#: are whole blocks of the quantizer; four heads of 16 make a hidden size of 64.
RULES: Final[tuple[tuple[str, int], ...]] = (
    (r"(.*_)?vocab(_size)?(_per_layer_input|_size_base|_base)?|num_centroids|codebook_size", VOCAB),
    (r"max_(position_embeddings|seq_len|(source|target)_positions)|n_positions|n_ctx|context_length", 128),
    (r"(moe|expert|shared)_.*(intermediate|hidden)_size", 64),
    (r"(.*_)?intermediate_size(_mlp)?|(.*_)?ffn_(dim|hidden_size)|dim_ff|d_?ff|d_inner|mlp_dim|feed_forward_size", 128),
    (r"attention_head_size|(.*_)?head_dim|dim_head|d_head|d_kv|kv_channels|mamba_(d_head|headdim)", 16),
    (r"(.*_)?hidden_size(_global|_per_layer_input)?|d_model|n_embd|emb_dim|embedding_dim|(.*_)?embedding_size", 64),
    (r"(.*_)?embed_dim|word_embed_proj_dim|lru_width|mamba_d_ssm|projector_.*_dim|vision_output_dim", 64),
    (r"linear_num_key_heads|(.*_)?(key_value|kv)_heads|kv_n_heads|index_n_heads|num_query_groups", 2),
    (r"(.*_)?attention_heads|n_heads?|num_heads|linear_num(_value)?_heads|(mamba_|n_mamba_)(n_|num_)?heads", 4),
    (r"(.*_)?(routed_|local_)?experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_(k|top_?k)", 2),
    (r"rotary_dim", 8),
    (r"n_group|topk_group|num_expert_group|n_groups|mamba_n_?groups", 1),
    (r"(q|kv|o)_lora_rank|hc_lowrank|laurel_rank|adapter_rank|loop_gate_rank|(mamba_dt|time_step)_rank", 64),
    (r"(mamba_d_|ssm_)?state(_size)?", 16),
    (r"first_k_dense_replace|num_dense_layers|num_nextn_predict_layers", 1),
    (r"(.*_)?sliding_window(_size)?|(attention_)?window_size|local_attention(_window_len)?|attention_chunk_size", 8),
)

#: Values for attributes that default to None, where the code of some families requires one.
DEFAULTS: Final = {"head_dim": 16, "num_key_value_heads": 4}

#: Attributes with the number of layers of a part.
LAYERS: Final = re.compile(r"((num_)?(hidden|encoder|decoder)_)?(n_|num_)?layers?|(num_)?(n_)?(blocks|depth)")


def tiny_config(family: str) -> Any:
    """The config of `family`, a `model_type` of transformers: few layers of every kind, small, nothing random."""
    from transformers import AutoConfig

    changes = CHANGES.get(family, {})
    try:
        default = AutoConfig.for_model(family)
    except ValueError:  # some classes refuse their own defaults
        default = AutoConfig.for_model(family, **changes)
    config = AutoConfig.for_model(family, **merged(shrunk(default), changes))
    for part in parts_of(config):
        part.use_cache = False
    return config


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `changes` into `values`, recursively for nested dictionaries."""
    both = {name: merged(values[name], new) for name, new in changes.items() if _nested(values.get(name), new)}
    return {**values, **changes, **both}


def _nested(old: Any, new: Any) -> bool:
    return isinstance(old, dict) and isinstance(new, dict)


def parts_of(config: Any) -> Iterator[Any]:
    """`config` and the configs nested in it."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from parts_of(part)


def shrunk(config: Any) -> dict[str, Any]:
    """The changes that make a default config tiny, by attribute, including nested configs."""
    values = {name: value for name, value in config.to_dict().items() if name not in config.sub_configs}
    changes = {name: new for name, value in values.items() if (new := _smaller(name, value)) != value}
    changes.update(_layers(values))
    changes.update(_match_heads(values, changes))
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            changes[name] = shrunk(part)
    return changes


def _smaller(name: str, value: Any) -> Any:
    if isinstance(value, bool):
        return value or name == "is_decoder"
    if isinstance(value, int):
        return _smaller_number(name, value)
    if isinstance(value, float):
        return 0.0 if re.search("drop|jitter", name) else value
    if isinstance(value, dict) and name.endswith("_config"):  # a part without a config class
        return {key: _smaller(key, inner) for key, inner in value.items()}
    return DEFAULTS.get(name) if value is None else value


def _smaller_number(name: str, value: int) -> int:
    if re.fullmatch(r".*_(token_id|token_index|token_idx|index)", name):
        return value if value < VOCAB else VOCAB - 1 - len(name) % 16
    small = next((small for pattern, small in RULES if re.fullmatch(pattern, name)), value)
    return min(value, small)


def _match_heads(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Set as many key/value heads as query heads, if they were equal before."""
    heads = values.get("num_attention_heads")
    same = isinstance(heads, int) and values.get("num_key_value_heads") == heads
    return {"num_key_value_heads": changes.get("num_attention_heads", heads)} if same else {}


def _layers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce the layers to the first of each kind, at least two, and shorten lists with an entry per layer to match."""
    counts = {name: value for name, value in values.items() if isinstance(value, int) and LAYERS.fullmatch(name)}
    if not counts:
        return {}
    total = max(counts.values())
    lists = {n: v for n, v in values.items() if isinstance(v, (list, tuple)) and len(v) == total and total > 1}
    kinds: dict[str, int] = {}
    for layer in range(total):
        kinds.setdefault(str([found[layer] for found in lists.values()]), layer)
    chosen = sorted(kinds.values())[:MOST_LAYERS]
    chosen += [layer for layer in range(total) if layer not in chosen][: max(0, 2 - len(chosen))]
    chosen.sort()
    fewer = {name: min(value, len(chosen)) for name, value in counts.items()}
    return {**fewer, **{name: type(found)(found[layer] for layer in chosen) for name, found in lists.items()}}
