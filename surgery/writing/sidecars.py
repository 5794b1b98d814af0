"""Files beside the weights of an output: configuration, tokenizer, chat templates, code, model card."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from surgery.adapters.metadata import versions
from surgery.checkpoint import Checkpoint

__all__ = ["changed_config", "sidecars"]

#: Files of a model that are taken along; weights, their index, and states of a training are not.
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".bpe", ".codes", ".py")
_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
_LEFT_OUT = ("config.json", "adapter_config.json", "trainer_state.json", "all_results.json", "train_results.json")

#: Where transformers keeps further templates.
_TEMPLATES = "additional_chat_templates"


def changed_config(
    config: Mapping[str, Any] | None,
    *,
    dtype: torch.dtype | None,
    untied: bool = False,
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A copy of the content of config.json for another output, also in the part of a multimodal model's text.

    dtype: of what is not packed; None leaves what is said of it. untied: whether embedding and head are two tensors
    now. quantization: `quantization_config`; None for none.
    """
    found = copy.deepcopy(dict(config or {}))
    text = found.get("text_config")
    if dtype is not None:
        found.setdefault("dtype")
    for part in (found, text) if isinstance(text, dict) else (found,):
        part.pop("quantization_config", None)
        if dtype is not None:  # both names, of which older releases of transformers write, and read, the second
            part |= {name: str(dtype).removeprefix("torch.") for name in ("dtype", "torch_dtype") if name in part}
        if untied and (part is found or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    return found if quantization is None else {**found, "quantization_config": dict(quantization)}


def sidecars(
    checkpoint: Checkpoint, config: Mapping[str, Any], *, title: str, relation: str, settings: Mapping[str, object]
) -> dict[str, bytes | Path]:
    """Files of an output made of `checkpoint`, as `output` takes them: those of its folder, `config`, and a model card.

    title: of the card. relation: `base_model_relation` of the Hugging Face Hub: `quantized`, `merge`, `finetune`.
    settings: rows of the card's table.
    """
    folder = checkpoint.path
    found: dict[str, bytes | Path] = {path.name: path for path in sorted(folder.iterdir()) if _is_taken(path)}
    found |= {f"{_TEMPLATES}/{path.name}": path for path in sorted((folder / _TEMPLATES).glob("*.jinja"))}
    found["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    found["README.md"] = _card(checkpoint, title, relation, settings).encode()
    return found


def _is_taken(path: Path) -> bool:
    if not path.is_file() or path.name.startswith(".") or path.name.endswith(".index.json"):
        return False
    return path.name not in _LEFT_OUT and (path.suffix in _SUFFIXES or path.name.startswith(_NAMES))


def _card(checkpoint: Checkpoint, title: str, relation: str, settings: Mapping[str, object]) -> str:
    # The hub takes ids alone; a path on this machine is nobody else's business.
    base = [f"base_model: {checkpoint.source}", f"base_model_relation: {relation}"] if checkpoint.revision else []
    rows = {
        "base model": checkpoint.source if checkpoint.revision else checkpoint.path.name,
        "revision": checkpoint.revision,
        **settings,
        **versions(),
    }
    table = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(
        ["---", *base, "library_name: transformers", "---", "", f"# {title}", "", "| | |", "|---|---|", *table, ""]
    )
