"""Saving the adapter of a model that is sharded, without ever gathering its base weights."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from surgery.adapter_keys import active_adapter, by_peft_key, find_peft_model
from surgery.distributed.exchange import current_ranks, everyone
from surgery.fqn import clean, join

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["adapter_state", "peft_state", "save_adapter"]


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapter of `model` to `directory` in PEFT's format; to be called on all ranks alike.

    Only trainable parameters are gathered, one FSDP unit at a time, to rank 0's CPU. Files are written aside and moved
    in place when they are whole and have every key, so that an older adapter there is replaced or left as it was.

    Raises `AdapterError` if a trainable parameter is missing from what PEFT has written, or all of them are zero-sized.
    """
    ranks = current_ranks()
    state = peft_state(model)
    with everyone(ranks, device=_device(model)):
        if ranks.rank == 0:
            _write(find_peft_model(model)[1], state, Path(directory))


def peft_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that belongs into the file of the active adapter, by PEFT's keys, on rank 0's CPU; empty on the others.

    Whole trainable parameters, and buffers of the copies of `modules_to_save`. Call it on all ranks alike; they raise
    `AdapterError` together if something would be left out.
    """
    ranks = current_ranks()
    state = adapter_state(model)
    with everyone(ranks, device=_device(model)):
        return _by_peft_key(model, state) if ranks.rank == 0 else {}


def _by_peft_key(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix, adapted = find_peft_model(model)
    start = f"{prefix}." if prefix else ""
    found = by_peft_key(adapted, {name.removeprefix(start): tensor for name, tensor in state.items()})
    return {key: tensor.cpu() for key, tensor in found.items()}


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole trainable parameters by plain FQN, on rank 0's CPU; empty on the others. Call it on all ranks alike.

    One that is tied has each of its names.
    """
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if groups:
        return _gathered_state(model, groups)
    units = [(name, unit) for name, unit in model.named_modules() if isinstance(unit, FullyShardedDataParallel)]
    if not units:
        named = model.named_parameters(remove_duplicate=False)
        return _tied({clean(name): p for name, p in named if p.requires_grad})
    state: dict[str, torch.Tensor] = {}
    on_rank0 = torch.distributed.get_rank() == 0
    for prefix, unit in units:
        if not any(p.requires_grad for _, p in _own_parameters(unit)):
            continue
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
            if on_rank0:
                found = [(clean(join(prefix, name)), p) for name, p in _own_parameters(unit) if p.requires_grad]
                state |= _tied(dict(found))
    return state


def _tied(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Copies on the CPU; names of one parameter have one tensor."""
    moved = {parameter: parameter.detach().cpu().clone() for parameter in set(parameters.values())}
    return {name: moved[parameter] for name, parameter in parameters.items()}


def _gathered_state(model: nn.Module, groups: Iterable[FSDPModule]) -> dict[str, torch.Tensor]:
    """The same under FSDP2: one parameter at a time is whole on the device."""
    for group in groups:
        group.reshard()  # a forward without a backward, in evaluation, may have left it whole
    state: dict[nn.Parameter, torch.Tensor] = {}
    on_rank0 = torch.distributed.get_rank() == 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            whole = _whole(parameter.detach())
            state[parameter] = whole.cpu().clone() if on_rank0 else whole.new_empty(0)
    if not on_rank0:
        return {}
    named = model.named_parameters(remove_duplicate=False)
    return {clean(name): state[parameter] for name, parameter in named if parameter in state}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    # Shards that wait on the CPU meet on the device of the mesh, whose backend all process groups have.
    moved: Any = tensor.to(tensor.device_mesh.device_type)
    whole: torch.Tensor = moved.full_tensor()
    return whole


def _own_parameters(unit: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters below `unit` that no other unit inside of it holds."""
    yield from ((join(prefix, name), p) for name, p in unit._parameters.items() if p is not None)
    for name, child in unit.named_children():
        if not isinstance(child, FullyShardedDataParallel):
            yield from _own_parameters(child, join(prefix, name))


def _device(model: nn.Module) -> torch.device:
    return next(parameter.device for parameter in model.parameters())


def _write(model: PeftModel, state: dict[str, torch.Tensor], directory: Path) -> None:
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as aside:
        tensors = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
        save_file(tensors, Path(aside) / "adapter_model.safetensors", metadata={"format": "pt"})
        model.create_or_update_model_card(aside)
        config: Any = copy.copy(model.peft_config[active_adapter(model)])
        config.inference_mode = True
        base: Any = model.get_base_model()
        names = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        config.save_pretrained(aside, auto_mapping_dict=names if config.task_type is None else None)
        for file in sorted(Path(aside).iterdir(), key=lambda file: file.suffix == ".safetensors"):
            file.replace(directory / file.name)
