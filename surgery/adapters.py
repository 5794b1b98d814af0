"""Saving the adapter of a model that is sharded, without ever gathering its base weights."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

import patches
from surgery.distributed.exchange import current_ranks
from surgery.distributed.failures import everyone, together
from surgery.errors import AdapterError, ConfigError
from surgery.fqn import clean, join

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["adapter_state", "save_adapter"]

ADAPTER = "default"


@together()
def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapter of `model` to `directory` in PEFT's format; to be called on all ranks alike.

    Only trainable parameters are gathered, one FSDP unit at a time, to rank 0's CPU. Files are written aside and moved
    in place when they are whole and have every key, so that an older adapter there is replaced or left as it was.

    Raises `AdapterError` if a trainable parameter is missing from what PEFT has written, or all of them are zero-sized;
    `PeerError` if another rank has failed.
    """
    ranks = current_ranks()
    state = adapter_state(model)
    with everyone(ranks, device=_device(model)):
        if ranks.rank == 0:
            _write(_peft_model(model), state, Path(directory))


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


def _write(model: PeftModel, state: dict[str, torch.Tensor], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as aside:
        with patches.transaction(
            "peft.adapter-keys-under-wrappers", on=[model], reason=f"saving the adapter to {directory.name}"
        ):
            # The base embeddings are as they were; "auto" would look for their size on the hub.
            model.save_pretrained(aside, state_dict=state, save_embedding_layers=False, selected_adapters=[ADAPTER])
        _check_complete(Path(aside) / "adapter_model.safetensors", state)
        for file in sorted(Path(aside).iterdir(), key=lambda file: file.suffix == ".safetensors"):
            file.replace(directory / file.name)


def _keys(name: str) -> tuple[str, str]:
    """How PEFT may call a trainable parameter in a file: without the adapter's name; a DoRA vector without `weight`."""
    key = name.replace(f".{ADAPTER}", "").replace(".modules_to_save", "")
    return key, key.removesuffix(".weight")


def _check_complete(file: Path, state: dict[str, torch.Tensor]) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as saved:
        sizes = {key: torch.Size(saved.get_slice(key).get_shape()) for key in saved.keys()}  # noqa: SIM118  # no iterator
    missing = [name for name, tensor in state.items() if tensor.shape not in (sizes.get(key) for key in _keys(name))]
    if state and not missing:
        return
    raise AdapterError(
        f"PEFT left out {len(missing)} of {len(state)} trainable parameters"
        f"{': ' + ', '.join(missing[:4]) if missing else ', since there is none'}. Nothing was saved; report it with "
        "the output of `patches check`",
        missing=missing,
    )
