"""The mainstream way: `from_pretrained` of transformers, PEFT, and accelerate's FSDP.

accelerate shards only on an accelerator. Without one, its function for FSDP2 is called directly instead of through the
`Accelerator`, and FSDP1 wraps with the arguments that accelerate would pass; the rest is the same.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from loading.case import SEED, Case, Trainee
from loading.loops import adamw, plain_step

__all__ = ["load_stock"]

DTYPE = torch.bfloat16


def load_stock(case: Case, *, fsdp: int) -> Trainee:
    """Load like a user of `accelerate launch`, with the quantization that its documentation requires for FSDP."""
    report = case.report
    accelerator = _accelerator(case, fsdp) if case.world.on_cuda else None
    with report.phase("from_pretrained"):
        model = _from_pretrained(case)
    with report.phase("adapt"):
        model = _adapted(model, case)
    with report.phase("shard"):
        if accelerator is None:
            model, optimizer = _prepare_on_cpu(model, case, fsdp)
        else:
            model, optimizer = _prepare(accelerator, model, fsdp)
    ids = case.tokens(model.config.vocab_size)  # type: ignore[union-attr, arg-type]  # a transformers model has one
    if accelerator is None:
        clip = getattr(model, "clip_grad_norm_", lambda limit: nn.utils.clip_grad_norm_(model.parameters(), limit))
        return Trainee(step=plain_step(model, optimizer, ids, clip=clip), close=_reset)

    def clip_all(limit: float) -> object:
        return accelerator.clip_grad_norm_(model.parameters(), limit)

    return Trainee(step=plain_step(model, optimizer, ids, clip=clip_all, backward=accelerator.backward), close=_reset)


def _plugin(case: Case, fsdp: int) -> Any:
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=fsdp,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        reshard_after_forward=True if fsdp == 2 else "FULL_SHARD",
        use_orig_params=True if fsdp == 1 else None,
        cpu_ram_efficient_loading=False,
        activation_checkpointing=case.options.activation_checkpointing,
    )


def _accelerator(case: Case, fsdp: int) -> Any:
    from accelerate import Accelerator

    return Accelerator(fsdp_plugin=_plugin(case, fsdp))


def _prepare(accelerator: Any, model: nn.Module, fsdp: int) -> tuple[nn.Module, Any]:
    """Shard model and optimizer. FSDP2 replaces an optimizer's parameters; FSDP1 needs the model sharded first."""
    if fsdp == 2:
        model, optimizer = accelerator.prepare(model, adamw(model))
        return model, optimizer
    wrapped: nn.Module = accelerator.prepare(model)
    return wrapped, accelerator.prepare(adamw(wrapped))


def _reset() -> None:
    """Reset the state that accelerate keeps in classes and in the environment, before the next way runs."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def _from_pretrained(case: Case) -> nn.Module:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPE,
        bnb_4bit_quant_storage=DTYPE,
    )
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        case.options.checkpoint, quantization_config=quantization, dtype=DTYPE, trust_remote_code=False
    )
    return model


def _adapted(model: nn.Module, case: Case) -> nn.Module:
    from peft import get_peft_model

    torch.manual_seed(SEED)
    # Adapters get the dtype of the rest, so that FSDP1 can flatten them together.
    adapted: nn.Module = get_peft_model(model, case.lora(), autocast_adapter_dtype=False)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPE)
    return adapted


def _prepare_on_cpu(model: nn.Module, case: Case, fsdp: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    plugin = _plugin(case, fsdp)
    if fsdp == 2:
        from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model
        from torch.distributed.device_mesh import init_device_mesh

        # The attributes of an Accelerator that these functions read.
        accelerator: Any = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            parallelism_config=SimpleNamespace(fsdp_dim_names=("fsdp",)),
            torch_device_mesh=init_device_mesh("cpu", (case.world.size,), mesh_dim_names=("fsdp",)),
            mixed_precision="no",
            is_main_process=case.world.rank == 0,
        )
        plugin.set_auto_wrap_policy(model)
        model = fsdp2_apply_ac(accelerator, model) if plugin.activation_checkpointing else model
        model = fsdp2_prepare_model(accelerator, model)
        return model, adamw(model)
    model = _wrapped_on_cpu(model, plugin)
    return model, adamw(model)


def _wrapped_on_cpu(model: nn.Module, plugin: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    import surgery

    plugin.set_auto_wrap_policy(model)
    wrapped = FullyShardedDataParallel(
        model,
        sharding_strategy=plugin.reshard_after_forward,
        auto_wrap_policy=plugin.auto_wrap_policy,
        use_orig_params=plugin.use_orig_params,
        device_id=torch.device("cpu"),
    )
    return surgery.checkpoint_activations(wrapped) if plugin.activation_checkpointing else wrapped
