"""Where each rank keeps weights while a model is built, and until FSDP takes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery.config import Placement

__all__ = ["Residence"]


@dataclass(frozen=True, kw_only=True)
class Residence:
    """What this rank keeps, and where.

    compute_device: where weights are quantized, and where every `quant_state` lives, on every rank.
    data_device: where weights, packed or not, wait; `meta` on a rank that keeps none.
    """

    compute_device: torch.device
    data_device: torch.device

    @classmethod
    def of(cls, placement: Placement, *, rank: int, compute_device: torch.device) -> Residence:
        """`rank0-cpu`: rank 0 keeps all weights on its CPU, the others none. `replicated`: every rank keeps all."""
        if placement == "replicated":
            return cls(compute_device=compute_device, data_device=compute_device)
        return cls(compute_device=compute_device, data_device=torch.device("cpu" if rank == 0 else "meta"))

    @property
    def keeps_data(self) -> bool:
        """Whether this rank holds weights at all."""
        return self.data_device.type != "meta"
