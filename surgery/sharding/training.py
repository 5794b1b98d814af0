"""What a training loop must know about how its model is sharded, behind one small protocol.

The loop never asks which sharding it has; a new one is a new class here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor

__all__ = ["Fsdp1", "Fsdp2", "Sharding", "Unsharded", "sharding_of"]


#: What torch.nn.utils adds to the norm that it divides by.
CLIP_EPSILON = 1e-6


class Sharding(Protocol):
    """How gradients of one model are exchanged, clipped and scaled."""

    @property
    def averaged_over(self) -> int:
        """The number of ranks that gradients are averaged over."""
        ...

    def micro_step(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; gradients are exchanged in the last only."""
        ...

    def clip(self, max_norm: float | None) -> torch.Tensor:
        """Clip the gradients of the whole model to `max_norm` (None: measure); return their norm before."""
        ...

    def grad_scaler(self, *, enabled: bool) -> torch.amp.GradScaler:
        """A loss scaler that sees an overflow on any rank; one that does nothing unless `enabled`."""
        ...

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks, in place."""
        ...


class Unsharded:
    """A model in one process."""

    averaged_over = 1

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._device = device

    def micro_step(self, *, is_last: bool) -> AbstractContextManager[None]:  # noqa: ARG002  # of the protocol
        """Nothing is exchanged, so nothing is held back."""
        return nullcontext()

    def clip(self, max_norm: float | None) -> torch.Tensor:
        """By the norm of this process's gradients, which are all there are."""
        trainable = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        return nn.utils.clip_grad_norm_(trainable, _limit(max_norm))

    def grad_scaler(self, *, enabled: bool) -> torch.amp.GradScaler:
        """The scaler for one process."""
        return torch.amp.GradScaler(self._device.type, enabled=enabled)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The value itself: there is one rank."""
        return value


class Fsdp1:
    """A model whose outermost `FullyShardedDataParallel` is `root`."""

    def __init__(self, root: FullyShardedDataParallel, device: torch.device) -> None:
        self._root = root
        self._device = device

    @property
    def averaged_over(self) -> int:
        """All ranks. Hybrid sharding reduces within a node, then over nodes, and averages over both."""
        return dist.get_world_size()

    @contextmanager
    def micro_step(self, *, is_last: bool) -> Iterator[None]:
        """With `no_sync` in all but the last."""
        with nullcontext() if is_last else self._root.no_sync():
            yield

    def clip(self, max_norm: float | None) -> torch.Tensor:
        """By FSDP, which knows the other ranks' shards; torch.nn.utils would see this rank's alone."""
        return self._root.clip_grad_norm_(_limit(max_norm))

    def grad_scaler(self, *, enabled: bool) -> torch.amp.GradScaler:
        """The scaler that exchanges what it has found."""
        return _ScalarFlags(self._device.type, enabled=enabled)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Over all ranks."""
        dist.all_reduce(value)
        return value


class _ScalarFlags(ShardedGradScaler):
    """Its flags of an overflow are vectors of one element, but a fused optimizer takes scalars (torch 2.13)."""

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Unscale the gradients of `optimizer`, and see whether one on any rank is not finite."""
        if not self.is_enabled():
            return
        super().unscale_(optimizer)
        flags: dict[torch.device, torch.Tensor] = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        flags.update((device, flag.reshape(())) for device, flag in flags.items())


class Fsdp2:
    """A model that `fully_shard` was applied to, `root` last."""

    def __init__(self, root: FSDPModule, model: nn.Module, device: torch.device) -> None:
        self._root = root
        self._model = model
        self._device = device
        mesh = next(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
        self._shards = mesh.get_group(mesh.ndim - 1)  # replicas have the same gradients

    @property
    def averaged_over(self) -> int:
        """All ranks, in a mesh of two dimensions too."""
        return dist.get_world_size()

    @contextmanager
    def micro_step(self, *, is_last: bool) -> Iterator[None]:
        """Gradients add up on each rank, whole, and are exchanged in the last backward."""
        self._root.set_requires_gradient_sync(is_last)
        yield

    def clip(self, max_norm: float | None) -> torch.Tensor:
        """By the norm over all shards, in float32, on this rank's own parts of them: torch.nn.utils would ask of each
        gradient, in each of its operations, how it is sharded (13 ms a step for the adapters of an 8B model).
        """
        gradients = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients]
        squares = torch.stack(torch._foreach_norm(local, 2, dtype=torch.float32)).square().sum()
        squares = squares.to(self._device)  # where the group speaks; shards may wait on the CPU
        dist.all_reduce(squares, group=self._shards)
        norm = squares.sqrt()
        torch._foreach_mul_(local, (_limit(max_norm) / (norm + CLIP_EPSILON)).clamp(max=1.0).to(local[0].device))
        return norm

    def grad_scaler(self, *, enabled: bool) -> torch.amp.GradScaler:
        """The plain scaler: what it finds in a sharded gradient it finds on all ranks."""
        return torch.amp.GradScaler(self._device.type, enabled=enabled)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Over all ranks."""
        dist.all_reduce(value)
        return value


def sharding_of(model: nn.Module, device: torch.device) -> Sharding:
    """How `model` is sharded, as found in its modules."""
    fully_sharded = next((module for module in model.modules() if isinstance(module, FSDPModule)), None)
    if fully_sharded is not None:
        return Fsdp2(fully_sharded, model, device)
    root = next((module for module in model.modules() if isinstance(module, FullyShardedDataParallel)), None)
    return Unsharded(model, device) if root is None else Fsdp1(root, device)


def _limit(max_norm: float | None) -> float:
    return math.inf if max_norm is None else max_norm
