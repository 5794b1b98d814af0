"""The ways of training one step, by the base of their names. A process plays one way alone, so patches may stay."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from loading.imports import import_upstream
from loading.world import World
from step.options import Options, Way

__all__ = ["LOADERS", "Case", "Trained", "begin", "import_first"]

DTYPE = torch.bfloat16
LORA_RANK = 16
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

#: Of AdamW, in all ways.
LEARNING_RATE = 1e-3

#: A LoRA matrix that is not zero at first, in the names of PEFT under any wrapper.
LORA_A = re.compile(r"layers\.\d+\.\w+\.\w+\.lora_A")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Input of one way on this rank."""

    options: Options
    way: Way
    world: World

    def has(self, option: str) -> bool:
        """Whether the way has this option."""
        return option in self.way.options

    def lora(self) -> Any:
        """LoRA config with adapters on all linear layers."""
        from peft import LoraConfig

        return LoraConfig(
            r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM"
        )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model with its optimizer. checkpoint: from now on recompute activations of decoder blocks in backward."""

    model: nn.Module
    optimizer: Any
    checkpoint: Callable[[], object]
    backward: Callable[[torch.Tensor], object] = torch.autograd.backward

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Take one step on `ids`; returns this rank's loss before it, without waiting for it."""
        loss: torch.Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        self.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def import_first(way: Way, folder: str) -> None:
    """Import what a way needs; of unsloth before transformers. folder: for what unsloth compiles."""
    if way.base != "unsloth":
        import_upstream()
        return
    os.environ["UNSLOTH_COMPILE_LOCATION"] = folder
    if {"fsdp2", "sharded"} & set(way.options):
        os.environ["UNSLOTH_FSDP2"] = "1"
    import unsloth  # noqa: F401


def load_ours(case: Case) -> Trained:
    """Load like a user of `surgery.qlora`, to train in a loop of their own."""
    import surgery

    options: dict[str, Any] = {}
    if kernels := tuple(option for option in ("fused", "liger") if case.has(option)):
        options["kernels"] = kernels
    model = surgery.qlora(
        case.options.checkpoint,
        lora=case.lora(),
        shard=_sharding(case),
        dtype=DTYPE,
        device=case.world.device,
        **options,
    )
    optimizer = _optimizer(model)  # made first, for what is captured or compiled may refer to gradients
    if case.has("compile"):
        surgery.compile_blocks(model)
    if case.has("graphs"):
        surgery.capture(model)
    offloads = {"offload": True} if case.has("offload") else {}
    return Trained(
        model=model, optimizer=optimizer, checkpoint=lambda: surgery.checkpoint_activations(model, **offloads)
    )


def _sharding(case: Case) -> Any:
    """Sharding among ranks: FSDP2 unless the way says other. kept: gathered weights stay until backward."""
    import surgery

    if case.world.size == 1:
        return None
    if case.has("ddp"):
        return surgery.DDP()
    return surgery.FSDP2(reshard_after_forward=not case.has("kept"))


def load_stock(case: Case) -> Trained:
    """Load by transformers and PEFT, whole on every rank."""
    from loading.stock import adapted, quantized

    _patch_classes(case)
    model: Any = quantized(case.options.checkpoint, device_map={"": case.world.device})
    model = _with_kernels(adapted(model, case.lora()), case)
    trained: nn.Module = _ddp(model, case.world) if case.has("ddp") else model
    return Trained(
        model=trained,
        optimizer=_optimizer(trained),
        checkpoint=partial(model.gradient_checkpointing_enable, gradient_checkpointing_kwargs={"use_reentrant": False}),
    )


def load_accelerate(case: Case) -> Trained:
    """Load like a user of `accelerate launch` with FSDP2."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from loading.stock import accelerator_for, adapted, quantized, sharded

    _patch_classes(case)
    accelerator = accelerator_for(case.world, fsdp=2, checkpointing=False)
    model = quantized(case.options.checkpoint)
    model = _with_kernels(adapted(model, case.lora()), case)
    model, optimizer = sharded(model, accelerator, _optimizer)
    return Trained(
        model=model,
        optimizer=optimizer,
        # As accelerate does before it shards the same modules: they stay inside the checkpoint.
        checkpoint=lambda: apply_activation_checkpointing(
            model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer)
        ),
        backward=getattr(accelerator, "backward", torch.autograd.backward),
    )


def load_unsloth(case: Case) -> Trained:
    """Load by unsloth: on one GPU, whole on every rank with DDP or its own FSDP2, or spread over GPUs by layers."""
    from unsloth import FastLanguageModel

    spread = {"device_map": "balanced"} if case.has("balanced") else {}
    model, _ = FastLanguageModel.from_pretrained(
        case.options.checkpoint,
        load_in_4bit=True,
        dtype=DTYPE,
        max_seq_length=case.options.tokens,
        **spread,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        lora_dropout=0,
        bias="none",
        target_modules=LINEARS,
        use_gradient_checkpointing="unsloth",
    )
    FastLanguageModel.for_training(model, use_gradient_checkpointing=False)
    trained = model
    if case.has("fsdp2") or case.has("sharded"):
        from unsloth.models.fsdp2_native import FSDP2Config, shard_model

        # Where they fit it leaves frozen weights whole on every rank, by itself; `sharded` shards them.
        trained = shard_model(model, FSDP2Config(fit_layout=case.has("fsdp2")))
    elif case.has("ddp"):
        trained = _ddp(model, case.world)
    return Trained(
        model=trained,
        optimizer=_optimizer(trained),
        checkpoint=partial(FastLanguageModel.for_training, model, use_gradient_checkpointing="unsloth"),
    )


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over the adapters, which get the values that all ways begin with."""
    from loading.loops import adamw

    begin(model)
    return adamw(model, lr=LEARNING_RATE, fused=next(model.parameters()).is_cuda or None)


@torch.no_grad()
def begin(model: nn.Module) -> None:
    """Write the values of adapters that all ways begin with: those of A follow from its place and shape, B is zero."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, parameter in model.named_parameters():
        if not (place := LORA_A.search(name)):
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(place.group().encode()))
        bound = parameter.shape[1] ** -0.5
        values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        values = values.to(DTYPE).to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            values = distribute_tensor(values, mesh, placements, src_data_rank=None)
        parameter.copy_(values)


def _patch_classes(case: Case) -> None:
    """Apply what replaces methods of transformers' classes, for good, before there is a model."""
    if case.has("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    if case.has("axolotl"):
        from axolotl.monkeypatch.fsdp2_qlora import apply_init_sharded_param_patch, apply_init_unsharded_param_patch
        from axolotl.monkeypatch.lora_kernels import patch_self_attn_lora

        patch_self_attn_lora(_axolotl(case))
        if case.world.size > 1:
            apply_init_sharded_param_patch()
            apply_init_unsharded_param_patch()


def _with_kernels(model: nn.Module, case: Case) -> nn.Module:
    """Apply axolotl's LoRA kernels to a model with adapters, if the way has them."""
    if not case.has("axolotl"):
        return model
    from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches

    patched: nn.Module = apply_lora_kernel_patches(model, _axolotl(case))
    return patched


def _axolotl(case: Case) -> Any:
    from axolotl.utils.dict import DictDefault

    switches = dict.fromkeys(("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel"), True)
    return DictDefault({"base_model": case.options.checkpoint, **switches})


def _ddp(model: nn.Module, world: World) -> nn.Module:
    devices = [world.device] if world.on_cuda else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


LOADERS: Mapping[str, Callable[[Case], Trained]] = {
    "ours": load_ours,
    "stock": load_stock,
    "accelerate": load_accelerate,
    "unsloth": load_unsloth,
}
