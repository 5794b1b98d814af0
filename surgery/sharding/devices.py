"""Where each rank keeps weights while a model is built, and until FSDP takes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgery.config import Placement

__all__ = ["Devices"]


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Where this rank computes, and where it keeps what it keeps.

    compute_device: where weights are quantized, and where every `quant_state` lives, on every rank.
    data_device: where weights, packed or not, wait; `meta` on a rank that keeps none.
    """

    compute_device: torch.device
    data_device: torch.device

    @classmethod
    def of(cls, placement: Placement, *, rank: int, compute_device: torch.device, cpu_offload: bool = False) -> Devices:
        """`rank0-cpu`: rank 0 keeps all weights on its CPU, the others none. `sharded`, `replicated`: on the device, or
        on the CPU where shards are to wait there.
        """
        if placement == "rank0-cpu":
            return cls(compute_device=compute_device, data_device=torch.device("cpu" if rank == 0 else "meta"))
        on_cpu = placement == "sharded" and cpu_offload
        return cls(compute_device=compute_device, data_device=torch.device("cpu") if on_cpu else compute_device)

    @property
    def keeps_data(self) -> bool:
        """Whether this rank holds weights at all."""
        return self.data_device.type != "meta"
