"""Saving the adapter of a model that is sharded, without ever gathering its base weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

import patches
from surgery.adapter_folder import AdapterFolder, hold
from surgery.base_model import base_folder, config_to_save
from surgery.distributed.exchange import current_ranks
from surgery.distributed.failures import everyone, together
from surgery.errors import AdapterError, ConfigError
from surgery.fqn import clean, join
from surgery.model_card import render_card
from surgery.tokenizer_files import read_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["adapter_state", "save_adapter"]

ADAPTER = "default"


@together()
def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    training: Mapping[str, Mapping[str, object]] | None = None,
) -> None:
    """Write the adapter of `model` to `directory` in PEFT's format; to be called on all ranks alike.

    Beside it are a model card and the tokenizer of the base model, where that is on rank 0's disk. Only trainable
    parameters are gathered, one FSDP unit at a time, to rank 0's CPU.

    The adapter that is there is replaced by a whole one, or left as it was, whatever happens on the way: see
    `surgery.adapter_folder`. To try the place and to keep it from others before the model is loaded, call this in a
    block of `surgery.reserve`.

    Args:
        model: what `surgery.qlora` has built.
        directory: made if it is not there; links are followed.
        training: what the model card says of the training: rows by title of a section.

    Raises:
        ConfigError: the folder cannot be written, or another process has it; before anything is gathered.
        AdapterError: a trainable parameter is missing from what PEFT saves, all of them are zero-sized, a value is not
            finite, or writing fails.
        PeerError: another rank has failed.
    """
    ranks = current_ranks()
    with ExitStack() as stack:
        with everyone(ranks, device=_device(model)):
            folder = stack.enter_context(hold(directory)) if ranks.rank == 0 else None
        state = adapter_state(model)
        with everyone(ranks, device=_device(model)):
            if folder is not None:
                _write(_peft_model(model), state, folder, training or {})


@together()
def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole trainable parameters by plain FQN, on rank 0's CPU; empty on the others. Call it on all ranks alike."""
    state: dict[str, torch.Tensor] = {}
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if groups:
        return _gathered_state(model, groups)
    units = [(name, unit) for name, unit in model.named_modules() if isinstance(unit, FullyShardedDataParallel)]
    if not units:
        return {clean(n): p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}
    on_rank0 = torch.distributed.get_rank() == 0
    for prefix, unit in units:
        if not any(p.requires_grad for _, p in _own_parameters(unit)):
            continue
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
            if on_rank0:
                state.update(
                    (clean(join(prefix, name)), p.detach().cpu().clone())
                    for name, p in _own_parameters(unit)
                    if p.requires_grad
                )
    return state


def _gathered_state(model: nn.Module, groups: Iterable[FSDPModule]) -> dict[str, torch.Tensor]:
    """The same under FSDP2: one parameter at a time is whole on the device."""
    for group in groups:
        group.reshard()  # a forward without a backward, in evaluation, may have left it whole
    state: dict[str, torch.Tensor] = {}
    on_rank0 = torch.distributed.get_rank() == 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        whole = _whole(parameter.detach())
        if on_rank0:
            state[clean(name)] = whole.cpu().clone()
    return state


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


def _peft_model(model: nn.Module) -> PeftModel:
    from peft import PeftModel

    found = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    if found is None:
        raise ConfigError(f"{type(model).__name__} has no adapter to save: it was built with lora=None")
    return found


def _device(model: nn.Module) -> torch.device:
    return next(parameter.device for parameter in model.parameters())


def _write(
    model: PeftModel,
    state: dict[str, torch.Tensor],
    folder: AdapterFolder,
    training: Mapping[str, Mapping[str, object]],
) -> None:
    from peft import get_peft_model_state_dict

    reason = f"saving the adapter to {folder.path.name}"
    with patches.transaction("peft.adapter-keys-under-wrappers", on=[model], reason=reason):
        # The base embeddings are as they were; "auto" would look for their size on the hub.
        saved = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False, adapter_name=ADAPTER)
    _check_complete({name: tensor.shape for name, tensor in saved.items()}, state)
    config = config_to_save(model, ADAPTER)
    base = base_folder(config)
    folder.save(
        saved, config, card=render_card(config, training), tokenizer=read_tokenizer(base) if base is not None else {}
    )


def _keys(name: str) -> tuple[str, str]:
    """How PEFT may call a trainable parameter in a file: without the adapter's name; a DoRA vector without `weight`."""
    key = name.replace(f".{ADAPTER}", "").replace(".modules_to_save", "")
    return key, key.removesuffix(".weight")


def _check_complete(sizes: dict[str, torch.Size], state: dict[str, torch.Tensor]) -> None:
    missing = [name for name, tensor in state.items() if tensor.shape not in (sizes.get(key) for key in _keys(name))]
    if state and not missing:
        return
    raise AdapterError(
        f"PEFT left out {len(missing)} of {len(state)} trainable parameters"
        f"{': ' + ', '.join(missing[:4]) if missing else ', since there is none'}. Nothing was saved; report it with "
        "the output of `patches check`",
        missing=missing,
    )
