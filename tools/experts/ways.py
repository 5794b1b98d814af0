"""The ways of loading a mixture of experts with LoRA on its attention and its experts, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import surgery
from loading.stock import adapted, quantized
from surgery.telemetry.report import Report

__all__ = ["LOADERS", "Case"]

DTYPE = torch.bfloat16
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Input of every way: what to load, in nf4, and where. ranks: more than one are sharded by FSDP2."""

    checkpoint: Path
    device: torch.device
    ranks: int
    lora_rank: int
    double_quant: bool
    report: Report

    def lora(self, parameters: list[str]) -> Any:
        """LoRA config with adapters on the attention and on `parameters`."""
        from peft import LoraConfig

        rank = self.lora_rank
        return LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=ATTENTION,
            target_parameters=parameters,
            task_type="CAUSAL_LM",
        )


def load_ours(case: Case, *, experts: bool = True) -> nn.Module:
    """Load like a user of `surgery.qlora`. experts: False leaves them in 16 bits."""
    sharding = surgery.FSDP2(mixed_precision=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    return surgery.qlora(
        case.checkpoint,
        quant=surgery.Quant("nf4", double_quant=case.double_quant, experts=experts),
        lora=case.lora(EXPERTS),
        shard=sharding if case.ranks > 1 else None,
        dtype=DTYPE,
        device=case.device,
        report=case.report,
    )


def load_split(case: Case) -> nn.Module:
    """Load experts in 16 bits, and run them by `grouped_mm` with split LoRA: what the 4-bit ones are measured by."""
    from peft.tuners.lora.layer import ParamWrapper

    from surgery.quantizers.grouped import SplitLora, experts_forward

    def forward(wrapper: Any, hidden: torch.Tensor, *args: Any, lora: tuple[Any, ...] = ()) -> Any:
        (name,) = wrapper.active_adapters
        own = SplitLora(
            parameter=wrapper.parameter_name,
            a=wrapper.lora_A[name].weight,
            b=wrapper.lora_B[name].weight,
            scaling=wrapper.scaling[name],
            dropout=None,
        )
        inner = wrapper.base_layer
        if isinstance(inner, ParamWrapper):
            return inner(hidden, *args, lora=(*lora, own))
        return experts_forward(inner, hidden, *args, lora=(*lora, own))

    model = load_ours(case, experts=False)
    _replace(ParamWrapper, "forward", forward)
    return model


def load_fold(case: Case) -> nn.Module:
    """Load by transformers, whose bitsandbytes configuration leaves experts in 16 bits; PEFT folds the adapters in."""
    return _adapted(_from_pretrained(case), case, EXPERTS)


def load_parametrized(case: Case) -> nn.Module:
    """Load as axolotl's `quantize_moe_experts`: bitsandbytes parametrizes experts when transformers sets them."""
    import transformers.core_model_loading as loading
    import transformers.modeling_utils as modeling
    from bitsandbytes.nn.parametrize import replace_parameter_4bit
    from peft.tuners.lora.layer import ParamWrapper

    stock = loading.set_param_for_module

    def set_and_quantize(model: Any, name: str, value: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        stock(model, name, value, *args, **kwargs)
        path, _, parameter = name.rpartition(".")
        if value.ndim < 3 or "expert" not in path:
            return
        replace_parameter_4bit(
            model.get_submodule(path), parameter, compress_statistics=case.double_quant, quant_type="nf4", blocksize=64
        )
        if value.is_cuda:
            value.data = torch.empty(0, device="cpu")  # the caller still has it
            torch.cuda.empty_cache()

    _replace(loading, "set_param_for_module", set_and_quantize)
    # It would allocate the experts in 16 bits.
    _replace(modeling, "caching_allocator_warmup", lambda *_args, **_kwargs: None)
    _replace(ParamWrapper, "_remove_parametrizations", _remove_last_parametrization)
    model = _from_pretrained(case)
    found = [
        f"{path}.{parameter}"
        for path, module in model.named_modules()
        for parameter in getattr(module, "parametrizations", ())
    ]
    if not found:
        raise RuntimeError("transformers set no expert through set_param_for_module: the seam has moved")
    return _adapted(model, case, found)


def _replace(owner: Any, name: str, value: Any) -> None:
    """Replace an attribute for good: this process runs no other way."""
    if not hasattr(owner, name):
        raise RuntimeError(f"{owner.__name__} has no {name}: the seam has moved")
    setattr(owner, name, value)


def _remove_last_parametrization(wrapper: Any) -> None:
    """Take off the adapter that PEFT has put on for a forward. PEFT 0.21 leaves it where there is another one below."""
    base, name = wrapper.get_base_layer(), wrapper.parameter_name
    if len(base.parametrizations[name]) == 1:
        nn.utils.parametrize.remove_parametrizations(base, name, leave_parametrized=False)
    else:
        del base.parametrizations[name][-1]


def _from_pretrained(case: Case) -> nn.Module:
    from transformers.utils import logging

    logging.disable_progress_bar()
    return quantized(case.checkpoint, storage=torch.uint8, double_quant=case.double_quant, device_map={"": case.device})


def _adapted(model: nn.Module, case: Case, parameters: list[str]) -> nn.Module:
    """Add adapters, in 16 bits as in all ways, to a model that is not trained itself."""
    model.requires_grad_(False)
    return adapted(model, case.lora(parameters))


#: Way -> the function that loads. Only the first can run on several ranks.
LOADERS: Mapping[str, Callable[[Case], nn.Module]] = {
    "ours": load_ours,
    "split": load_split,
    "fold": load_fold,
    "parametrized": load_parametrized,
}
