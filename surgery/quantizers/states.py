"""What a `quant_state` is made of, as far as a change of it would change the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["settings", "state_of", "tensors"]


def state_of(module: nn.Module) -> Any:
    """The state that forward of a 4-bit `module` uses: its parameter's, or its own where sharding took that away."""
    weight = module._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    return module.quant_state if state is None else state


def tensors(state: Any) -> dict[str, torch.Tensor]:
    """Its tensors by name: `absmax`, `code`, `offset`, and those of the state of its statistics, `state2.absmax`."""
    found: dict[str, torch.Tensor] = {}
    for name, value in vars(state).items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif type(value) is type(state):
            found.update((f"{name}.{inner}", tensor) for inner, tensor in tensors(value).items())
    return found


def settings(state: Any) -> dict[str, str]:
    """Everything else by name, as text: the types, sizes and dtypes that say how to read the tensors."""
    found: dict[str, str] = {}
    for name, value in vars(state).items():
        if type(value) is type(state):
            found.update((f"{name}.{inner}", text) for inner, text in settings(value).items())
        elif not isinstance(value, torch.Tensor):
            found[name] = repr(value)
    return found
