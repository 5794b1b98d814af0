"""Saving the adapter of a model that is sharded, without ever gathering its base weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import nn

from surgery.adapters.base_model import base_folder, config_to_save
from surgery.adapters.card import render_card
from surgery.adapters.folder import AdapterFolder, hold
from surgery.adapters.keys import active_adapter, by_peft_key, find_peft_model
from surgery.adapters.place import refuse_base
from surgery.adapters.tokenizer import read_tokenizer
from surgery.comm.failures import everyone, together
from surgery.comm.ranks import current_ranks
from surgery.sharding.base import strategy_of

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["adapter_state", "peft_state", "save_adapter"]


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
    `surgery.adapters.folder`. To try the place and to keep it from others before the model is loaded, call this in a
    block of `surgery.reserve`.

    Args:
        model: what `surgery.qlora` has built.
        directory: made if it is not there; links are followed.
        training: what the model card says of the training: rows by title of a section.

    Raises:
        ConfigError: the folder cannot be written, another process has it, or it is that of a whole model.
        AdapterError: a trainable parameter is missing from what PEFT saves, all of them are zero-sized, a value is not
            finite, or writing fails.
        PeerError: another rank has failed.
    """
    ranks = current_ranks()
    with ExitStack() as stack:
        with everyone(ranks, device=_device(model)):
            folder = stack.enter_context(hold(directory)) if ranks.rank == 0 else None
        state = peft_state(model)
        with everyone(ranks, device=_device(model)):
            if folder is not None:
                _write(find_peft_model(model)[1], state, folder, training or {})


@together()
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


@together()
def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole trainable parameters by plain FQN, on rank 0's CPU; empty on the others. Call it on all ranks alike.

    One that is tied has each of its names.
    """
    return strategy_of(model).trainable_state(model)


def _device(model: nn.Module) -> torch.device:
    return next(parameter.device for parameter in model.parameters())


def _write(
    model: PeftModel,
    state: dict[str, torch.Tensor],
    folder: AdapterFolder,
    training: Mapping[str, Mapping[str, object]],
) -> None:
    config = config_to_save(model, active_adapter(model))
    base = base_folder(config)
    if base is not None:
        refuse_base(folder.path, base)
    folder.save(
        state, config, card=render_card(config, training), tokenizer=read_tokenizer(base) if base is not None else {}
    )
