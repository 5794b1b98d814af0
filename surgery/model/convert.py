"""Casting and moving parameters in place, so that what shares memory goes on sharing it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

__all__ = ["convert"]


def convert(
    parameters: Iterable[nn.Parameter], *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> None:
    """Cast or move `parameters` in place. Views of one memory, by which PEFT ties adapters, stay such views."""
    sharing: dict[int, list[nn.Parameter]] = {}
    for parameter in parameters:
        sharing.setdefault(parameter.untyped_storage()._cdata, []).append(parameter)
    for held in sharing.values():
        if len(held) == 1:
            held[0].data = held[0].data.to(device=device, dtype=dtype)
            continue
        elements = held[0].untyped_storage().nbytes() // held[0].element_size()
        memory = held[0].data.as_strided((elements,), (1,), 0).to(device=device, dtype=dtype)
        for parameter in held:
            parameter.data = memory.as_strided(parameter.shape, parameter.stride(), parameter.storage_offset())
