"""Models that are bound, changed, and filled, on one rank or several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import surgery

IDS = torch.arange(24).view(2, 12)

SHARDS: dict[str, Any] = {
    "FSDP1": surgery.FSDP1(use_orig_params=True),
    "FSDP2": surgery.FSDP2(),
    "DDP": surgery.DDP(),
    "replicated FSDP2": surgery.FSDP2(),
}


def on_meta(checkpoint: Path) -> Any:
    """The model that transformers describes, built on meta by nobody of ours."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def emptied(checkpoint: Path) -> Any:
    """The same, by accelerate: real buffers, in the dtype of the model, parameters initialized already."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint), dtype=torch.bfloat16)


def replaced(checkpoint: Path) -> Any:
    """The same, its linear layers replaced by transformers already."""
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    with torch.device("meta"):
        return replace_with_bnb_linear(on_meta(checkpoint), ["lm_head"], config)


def lora(**options: Any) -> LoraConfig:
    """Adapters with values that show in the first forward."""
    return LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)


def bind(checkpoint: Path, **options: Any) -> surgery.Bound:
    """Bound, and silent."""
    return surgery.bind(on_meta(checkpoint), checkpoint, report=surgery.Report(), **options)


def logits(model: nn.Module) -> torch.Tensor:
    """Of `IDS`."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits.float()
    return found


def bound_and_adapted(checkpoint: Path, shards: list[str]) -> dict[str, tuple[torch.Tensor, int, float]]:
    """By sharding: logits of a bound model that PEFT has adapted, attested layers, and the loss after a step."""
    found = {}
    for name in shards:
        torch.manual_seed(0)
        bound = bind(checkpoint)
        model = get_peft_model(bound.model, lora(), autocast_adapter_dtype=False)
        placement = "replicated" if name.startswith("replicated") else None
        with bound.fill(model, shard=SHARDS[name], placement=placement) as filled:
            first = logits(filled)
            filled(input_ids=IDS, labels=IDS).loss.backward()
            torch.optim.SGD([p for p in filled.parameters() if p.requires_grad], lr=0.1).step()
            with torch.no_grad():
                loss = filled(input_ids=IDS, labels=IDS).loss.item()
            found[name] = first, len(surgery.attest(filled).layers), loss
    return found
