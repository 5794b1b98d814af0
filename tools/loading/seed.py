"""The low-memory mode of answer.ai's fsdp_qlora: every rank reads and quantizes all, rank 0 keeps it on its CPU.

https://github.com/AnswerDotAI/fsdp_qlora. The others keep shapes on meta, all ranks keep every quant_state, and FSDP1
broadcasts with `sync_module_states=True`. As in the original, a pool of threads takes the tensors file by file;
decoder layers and every trainable leaf become FSDP units.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import CustomPolicy

import patches
import surgery
from loading.case import SEED, Case, Trainee
from loading.loops import adamw, plain_step
from loading.options import cores_per_rank

__all__ = ["load_seed"]

DTYPE = torch.bfloat16

#: Modules that stay in 16 bits.
HEAD = "lm_head"


def load_seed(case: Case) -> Trainee:
    """Load everything on every rank, and let FSDP1 drop what other ranks own."""
    report = case.report
    keeps = torch.device("cpu" if case.world.rank == 0 else "meta")
    with report.phase("skeleton"):
        model = _skeleton(case)
    with report.phase("load+quantize"):
        _load(model, case, keeps)
    with report.phase("adapt"):
        model = _adapted(model, case)
    with report.phase("shard"), _cpu_states_accepted(case):
        model = _wrapped(model, case)
    if case.options.activation_checkpointing:
        surgery.checkpoint_activations(model)
    ids = case.tokens(model.config.vocab_size)
    return Trainee(step=plain_step(model, adamw(model), ids, clip=model.clip_grad_norm_), close=lambda: None)


def _skeleton(case: Case) -> nn.Module:
    """Build the model on meta, with quantized layers that have no quant_state yet, and real buffers."""
    from accelerate import init_empty_weights
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(case.options.checkpoint, trust_remote_code=False)
    with init_empty_weights():
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=DTYPE, trust_remote_code=False)
        for name, linear in list(model.named_modules()):
            if isinstance(linear, nn.Linear) and name != HEAD:
                new = Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=linear.bias is not None,
                    compute_dtype=DTYPE,
                    quant_type="nf4",
                    quant_storage=DTYPE,
                )
                model.set_submodule(name, new)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(case.device)
    return model


def _load(model: nn.Module, case: Case, keeps: torch.device) -> None:
    from safetensors.torch import load_file

    threads = case.options.seed_threads or cores_per_rank(case.world.size)
    place = functools.partial(_quantize_and_place, model, device=case.device, keeps=keeps)
    with ThreadPoolExecutor(threads) as pool:
        for file in sorted(case.options.checkpoint.glob("*.safetensors")):
            list(pool.map(place, load_file(file).items()))
    if case.world.on_cuda:
        torch.cuda.empty_cache()


def _quantize_and_place(
    model: nn.Module, item: tuple[str, torch.Tensor], *, device: torch.device, keeps: torch.device
) -> None:
    from bitsandbytes.nn import Params4bit

    name, value = item
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    old = module._parameters[leaf]
    if not isinstance(old, Params4bit):
        module._parameters[leaf] = nn.Parameter(value.to(device=keeps, dtype=DTYPE), requires_grad=False)
        return
    new: Any = Params4bit(value.to(device=device, dtype=DTYPE), **vars(old))
    new = new.to(device)  # quantizes it
    module.quant_state = new.quant_state
    module.weight = Params4bit(new.data.to(keeps), **vars(new))


def _adapted(model: nn.Module, case: Case) -> nn.Module:
    from peft import get_peft_model

    torch.manual_seed(SEED)
    adapted: nn.Module = get_peft_model(model, case.lora(), autocast_adapter_dtype=False)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPE)
    return adapted


def _wrapped(model: nn.Module, case: Case) -> FullyShardedDataParallel:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    def is_unit(module: nn.Module) -> bool:
        if isinstance(module, LlamaDecoderLayer):
            return True
        weight = getattr(module, "weight", None)
        return weight is not None and weight.requires_grad and not list(module.children())

    def materialize(module: nn.Module) -> None:
        module.to_empty(device=case.device, recurse=False)

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=CustomPolicy(is_unit),
        mixed_precision=MixedPrecision(reduce_dtype=torch.float32),
        use_orig_params=False,
        device_id=case.device,
        sync_module_states=True,
        param_init_fn=materialize if case.world.rank > 0 else None,
    )


@contextmanager
def _cpu_states_accepted(case: Case) -> Iterator[None]:
    """Let FSDP1 broadcast CPU states, which it refuses although gloo can."""
    ids = () if case.world.on_cuda else ("torch.fsdp1-sync-on-cpu",)
    with patches.transaction(*ids, reason="every rank but 0 is on meta"):
        yield
