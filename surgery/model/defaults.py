"""Persistent buffers that a checkpoint does not hold, with the values that transformers gives them."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn

from surgery.model.fqn import split

__all__ = ["fill_buffers"]


def fill_buffers(model: nn.Module, names: Iterable[str], *, device: torch.device) -> tuple[str, ...]:
    """Give the buffers of `names` the values that `model` initializes them with, on `device`; returns which have one.

    Parameters are left out, and so are buffers whose initial value is random, or of which the model says nothing.
    """
    done = []
    for name in names:
        path, leaf = split(name)
        owner = model.get_submodule(path)
        value = _initial(model, path, leaf) if leaf in owner._buffers else None
        if value is not None:
            owner._buffers[leaf] = value.to(device)
            done.append(name)
    return tuple(done)


def _initial(model: nn.Module, path: str, leaf: str) -> torch.Tensor | None:
    """What initialization makes of the buffer, whatever was there before: None if that depends on it, or on chance."""
    from transformers import PreTrainedModel

    steps = path.split(".") if path else []
    above = [model.get_submodule(".".join(steps[:length])) for length in range(len(steps) + 1)]
    initializer = next((module for module in reversed(above) if isinstance(module, PreTrainedModel)), None)
    if initializer is None:
        return None
    found: list[torch.Tensor] = []
    for trial in (0, 1):
        twin = copy.deepcopy(above[-1])
        twin._buffers[leaf] = torch.full_like(twin.get_buffer(leaf), trial, device="cpu")
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(trial)
            initializer._init_weights(twin)
        found.append(twin.get_buffer(leaf))
    return found[0] if torch.equal(*found) else None
