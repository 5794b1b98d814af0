"""The two models to compare: from upstream alone, and from this project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgery
from families.exceptions import EXCLUDED

__all__ = ["adapted", "in_low_memory", "lora", "ours", "reloaded", "stock"]


def lora(family: str) -> Any:
    """LoRA on those of PEFT's default targets that it can adapt; B is random too, so that A has gradients at once."""
    from peft import LoraConfig

    return LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        exclude_modules=EXCLUDED.get(family),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )


def stock(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The 4-bit model loaded by `from_pretrained`."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=dtype, device_map={"": "cpu"}, trust_remote_code=False
    )
    model.config.use_cache = False
    return keep_packing(model.train())


def adapted(model: Any, family: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Add adapters to `model` by PEFT, in `dtype`."""
    from peft import get_peft_model

    torch.manual_seed(0)
    return _trained_in(get_peft_model(model, lora(family), autocast_adapter_dtype=False), dtype)


def reloaded(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Load the adapter saved in `folder` onto `model` by PEFT alone, in `dtype`."""
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(model, folder, is_trainable=True, autocast_adapter_dtype=False)
    return _trained_in(wrapped, dtype)


def _trained_in(model: Any, dtype: torch.dtype) -> Any:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model.train()


def ours(
    folder: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard: surgery.FSDP2 | None = None,
) -> Any:
    """This project's model on this rank, as a context manager that releases it."""
    torch.manual_seed(0)
    return surgery.qlora(
        folder,
        quant=surgery.Quant("nf4", experts=False),  # as stock has them
        lora=lora(family),
        shard=shard,
        dtype=dtype,
        device=torch.device("cpu"),
        report=surgery.Report(),
    )


def in_low_memory(folder: Path, family: str, *, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model that stock's own calls give in `surgery.low_memory()`, filled; a context manager that releases it."""
    with surgery.low_memory():
        model = adapted(stock(folder, dtype), family, dtype)
    if not any(parameter.is_meta for parameter in model.parameters()):
        raise surgery.ConfigError("loaded as without surgery.low_memory()")
    return surgery.fill(model, device=torch.device("cpu"))


def keep_packing(model: nn.Module) -> nn.Module:
    """Keep bitsandbytes from repacking the weights of `model` in evaluation on CPUs with AVX512-BF16."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model
