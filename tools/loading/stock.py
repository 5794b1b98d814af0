"""The mainstream way: `from_pretrained` of transformers, PEFT, and accelerate's FSDP.

accelerate shards only on an accelerator. Without one, its function for FSDP2 is called directly instead of through the
`Accelerator`, and FSDP1 wraps with the arguments that accelerate would pass; the rest is the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from loading.case import SEED, Case, Trainee
from loading.loops import adamw, plain_step
from loading.world import World

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["accelerator_for", "adapted", "load_stock", "quantized", "sharded"]

DTYPE = torch.bfloat16

#: Makes an optimizer of a model's adapters.
Optimizer = Callable[[nn.Module], torch.optim.Optimizer]


def load_stock(case: Case, *, fsdp: int) -> Trainee:
    """Load like a user of `accelerate launch`, with the quantization that its documentation requires for FSDP."""
    report = case.report
    accelerator = accelerator_for(case.world, fsdp=fsdp, checkpointing=case.options.activation_checkpointing)
    with report.phase("from_pretrained"):
        model = quantized(case.options.checkpoint)
    with report.phase("adapt"):
        torch.manual_seed(SEED)
        model = adapted(model, case.lora())
    with report.phase("shard"):
        model, optimizer = sharded(model, accelerator, adamw)
    ids = case.tokens(model.config.vocab_size)  # type: ignore[union-attr, arg-type]  # a transformers model has one
    if not case.world.on_cuda:
        clip = getattr(model, "clip_grad_norm_", lambda limit: nn.utils.clip_grad_norm_(model.parameters(), limit))
        return Trainee(step=plain_step(model, optimizer, ids, clip=clip), close=_reset)

    def clip_all(limit: float) -> object:
        return accelerator.clip_grad_norm_(model.parameters(), limit)

    return Trainee(step=plain_step(model, optimizer, ids, clip=clip_all, backward=accelerator.backward), close=_reset)


def accelerator_for(world: World, *, fsdp: int, checkpointing: bool) -> Any:
    """An `Accelerator` that shards, to be made before the model; on a CPU, what its functions read of one."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=fsdp,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        reshard_after_forward=True if fsdp == 2 else "FULL_SHARD",
        use_orig_params=True if fsdp == 1 else None,
        cpu_ram_efficient_loading=False,
        activation_checkpointing=checkpointing,
    )
    if world.on_cuda:
        return Accelerator(fsdp_plugin=plugin)
    return SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        parallelism_config=SimpleNamespace(fsdp_dim_names=("fsdp",)),
        torch_device_mesh=init_device_mesh("cpu", (world.size,), mesh_dim_names=("fsdp",)),
        mixed_precision="no",
        is_main_process=world.rank == 0,
    )


def quantized(checkpoint: str | os.PathLike[str], *, storage: torch.dtype = DTYPE, **options: Any) -> nn.Module:
    """Load in nf4 by transformers, in bfloat16. storage: of packed weights. options: for `from_pretrained`."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=options.pop("double_quant", True),
        bnb_4bit_compute_dtype=DTYPE,
        bnb_4bit_quant_storage=storage,
    )
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=quantization, dtype=DTYPE, trust_remote_code=False, **options
    )
    return model


def adapted(model: nn.Module, lora: LoraConfig) -> nn.Module:
    """Add adapters in bfloat16, the dtype of the rest, so that FSDP1 can flatten them together."""
    from peft import get_peft_model

    adapted: nn.Module = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPE)
    return adapted


def sharded(model: nn.Module, accelerator: Any, optimizer: Optimizer) -> tuple[nn.Module, Any]:
    """Shard model and optimizer. FSDP2 replaces an optimizer's parameters; FSDP1 needs the model sharded first."""
    plugin = accelerator.state.fsdp_plugin
    if isinstance(accelerator, SimpleNamespace):
        plugin.set_auto_wrap_policy(model)
        shard = _sharded_on_cpu if plugin.fsdp_version == 2 else _wrapped_on_cpu
        model = shard(model, accelerator)
        return model, optimizer(model)
    if plugin.fsdp_version == 2:
        model, prepared = accelerator.prepare(model, optimizer(model))
        return model, prepared
    wrapped: nn.Module = accelerator.prepare(model)
    return wrapped, accelerator.prepare(optimizer(wrapped))


def _reset() -> None:
    """Reset the state that accelerate keeps in classes and in the environment, before the next way runs."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def _sharded_on_cpu(model: nn.Module, accelerator: Any) -> nn.Module:
    from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model

    if accelerator.state.fsdp_plugin.activation_checkpointing:
        model = fsdp2_apply_ac(accelerator, model)
    sharded: nn.Module = fsdp2_prepare_model(accelerator, model)
    return sharded


def _wrapped_on_cpu(model: nn.Module, accelerator: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    import surgery

    plugin = accelerator.state.fsdp_plugin
    wrapped = FullyShardedDataParallel(
        model,
        sharding_strategy=plugin.reshard_after_forward,
        auto_wrap_policy=plugin.auto_wrap_policy,
        use_orig_params=plugin.use_orig_params,
        device_id=torch.device("cpu"),
    )
    return surgery.checkpoint_activations(wrapped) if plugin.activation_checkpointing else wrapped
