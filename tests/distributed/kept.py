"""Training of models that upstream keeps in part in float32, on a rank and by upstream alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from surgery.config import FSDP2
from tests.distributed.exactness import Case, loss_of

__all__ = ["KEPT", "MODELS", "Seen", "losses_of_stock", "on_a_rank"]

STEPS = 3
ROUTED: dict[str, Any] = {
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

#: What upstream keeps: a router's gate; a gate and a parameter of a module in it; one that a block's own attention
#: holds; a part of a module; one of a module whose others are in bfloat16; the output head, which FSDP1 shards.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gate": ("glm4_moe", ROUTED),
    "bias": (
        "ernie4_5_moe",
        {**ROUTED, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    ),
    "sinks": ("flint", {**ROUTED, "num_experts": 4}),
    "mixed": (
        "olmo_hybrid",
        {
            "num_key_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "head": (
        "hy_v4",
        {
            **ROUTED,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "index_head_dim": 16,
            "index_n_heads": 2,
        },
    ),
}

KEPT = [
    *(Case(name=f"{model}-fsdp1", model=model) for model in MODELS),
    *(Case(name=f"{model}-fsdp2", model=model, kind=FSDP2) for model in MODELS),
    Case(name="gate-orig-params", model="gate", shard={"use_orig_params": True}),
    Case(name="gate-block-units", model="gate", shard={"use_orig_params": True, "units": "block"}),
    Case(name="bias-replicated", model="bias", placement="replicated"),
    Case(name="bias-no-shard", model="bias", shard={"strategy": "no-shard"}),
    Case(name="mixed-orig-params", model="mixed", shard={"use_orig_params": True}),
    Case(name="bias-fsdp2-replicated", model="bias", kind=FSDP2, placement="replicated"),
    Case(name="mixed-fsdp2-cpu-offload", model="mixed", kind=FSDP2, shard={"cpu_offload": True}),
]


def lora() -> Any:
    """Adapters of attention, by a name that every model has."""
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj"], init_lora_weights=False)


def losses_of_stock(checkpoint: Path) -> list[float]:
    """Of transformers, bitsandbytes and PEFT in one process, by step."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, dtype=torch.bfloat16)
    torch.manual_seed(0)
    adapted = get_peft_model(model.train(), lora(), autocast_adapter_dtype=False)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return train(adapted)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """On one rank: losses by name of the case; what a cast of such parameters was refused with, after so many bytes."""

    losses: dict[str, list[float]]
    refusal: str
    bytes_read: int


def on_a_rank(checkpoints: dict[str, Path]) -> Seen:
    """All cases, and one that cannot work."""
    import surgery

    report, cast = surgery.Report(), FSDP2(mixed_precision=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    try:
        surgery.qlora(checkpoints["gate"], lora=lora(), shard=cast, report=report)
    except surgery.ConfigError as error:
        return Seen(losses=train_kept(checkpoints), refusal=str(error), bytes_read=report.bytes_read)
    raise AssertionError("nothing was refused")


def train_kept(checkpoints: dict[str, Path]) -> dict[str, list[float]]:
    """Losses of all cases on this rank, by name."""
    import surgery

    found = {}
    for case in KEPT:
        torch.manual_seed(0)
        with surgery.qlora(
            checkpoints[case.model],
            quant=surgery.Quant(experts=False),  # as upstream has them
            lora=lora(),
            placement=case.placement,
            shard=case.kind(**case.shard),
            report=surgery.Report(),
        ) as model:
            found[case.name] = train(model)
    return found


def train(model: nn.Module) -> list[float]:
    """Losses of steps of SGD, of the same batch on every rank, so that their mean has the bits of each."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model, ids)
        loss.backward()  # type: ignore[no-untyped-call]  # no annotation upstream
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
