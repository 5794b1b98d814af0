"""FSDP2 around a 4-bit model: which modules make a group, and sharding it while it is on meta."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from surgery.config import FSDP2
from surgery.errors import ConfigError
from surgery.model.fqn import join
from surgery.model.tree import Site, ends_of

__all__ = ["check_groups", "make_mesh", "replicas_of", "shard", "share_among_replicas"]


def make_mesh(config: FSDP2, *, device: torch.device) -> DeviceMesh:
    """The mesh of `config`: `(shard,)`, or `(replicate, shard)`; to be called on all ranks alike."""
    if config.mesh is None:
        return init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, config.mesh, mesh_dim_names=("replicate", "shard"))


def replicas_of(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """The group of the ranks that keep the same shards as this one; None in a mesh of one dimension."""
    return mesh.get_group("replicate") if mesh.ndim > 1 else None


def shard(model: nn.Module, blocks: Sequence[Site], config: FSDP2, mesh: DeviceMesh) -> None:
    """Shard `model` in place; what is on meta stays there, as the shard of a meta tensor.

    Groups, as accelerate makes them: every block; the embedding; the last norm with the output head, which is used
    at the end of forward and at the start of backward, and so not freed between; and the root with the rest. A tied
    embedding goes with the head, since one parameter cannot be in two groups.
    """
    options: dict[str, Any] = {"mesh": mesh}
    if config.mixed_precision is not None:
        options["mp_policy"] = config.mixed_precision
    if config.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    embedding, tail = check_groups(model, blocks)
    for site in blocks:
        fully_shard(site.module, reshard_after_forward=config.reshard_after_forward, **options)
    if embedding is not None:
        fully_shard(embedding, reshard_after_forward=config.reshard_after_forward, **options)
    if tail:
        fully_shard(list(tail), reshard_after_forward=False, **options)
    fully_shard(model, **options)


def check_groups(model: nn.Module, blocks: Sequence[Site]) -> tuple[nn.Module | None, tuple[nn.Module, ...]]:
    """The groups beside the `blocks`: `(embedding, tail)`.

    Raises `ConfigError` if two would share a parameter, or one would train parameters of several dtypes.
    """
    embedding, tail = ends_of(model, blocks)
    groups = [*((site.module,) for site in blocks), (embedding,), tail]
    _check_ties(model, groups)
    _check_dtypes(model, groups)
    return embedding, tail


def _check_dtypes(model: nn.Module, groups: Sequence[tuple[nn.Module | None, ...]]) -> None:
    """FSDP2 reduces the gradients of a group as one tensor; what is in none of `groups` is in the root's."""
    left = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for group in groups:
        inside = {p for module in group if module is not None for p in module.parameters()}
        _check_uniform({name: parameter for name, parameter in left.items() if parameter in inside})
        left = {name: parameter for name, parameter in left.items() if parameter not in inside}
    _check_uniform(left)


def _check_uniform(trained: Mapping[str, nn.Parameter]) -> None:
    first = {parameter.dtype: name for name, parameter in trained.items()}
    if len(first) > 1:
        found = ", ".join(f"{name} is {str(dtype).removeprefix('torch.')}" for dtype, name in first.items())
        raise ConfigError(
            f"FSDP2 trains parameters of one dtype in a decoder block, but {found}: leave out what upstream keeps in "
            "another dtype, such as a router's gate in modules_to_save, or use shard=FSDP1() or one process"
        )


def _check_ties(model: nn.Module, groups: Iterable[Iterable[nn.Module | None]]) -> None:
    """A parameter shared by two groups would be sharded twice; what is in none of `groups` is in the root's."""
    numbers = {module: number for number, group in enumerate(groups) for module in group if module is not None}
    first: dict[nn.Parameter, tuple[str, int | None]] = {}
    stack: list[tuple[str, nn.Module, int | None]] = [("", model, None)]
    while stack:
        prefix, module, outer = stack.pop()
        group = numbers.get(module, outer)
        for name, parameter in module.named_parameters(recurse=False):
            fqn, other = first.setdefault(parameter, (join(prefix, name), group))
            if other != group:
                raise ConfigError(
                    f"{fqn} and {join(prefix, name)} are one parameter, but are used in two groups of FSDP2, which "
                    "cannot gather it for both: untie them, or build the model without shard"
                )
        stack.extend((join(prefix, name), child, group) for name, child in module.named_children())


def share_among_replicas(parameters: Iterable[nn.Parameter], mesh: DeviceMesh, *, device: torch.device) -> None:
    """Give every replica the first one's values of sharded `parameters`, in place; collective."""
    group = replicas_of(mesh)
    if group is None:
        return
    for parameter in parameters:
        assert isinstance(parameter, DTensor)
        local = parameter.to_local().detach()
        sent = local.to(device)
        dist.broadcast(sent, group=group, group_src=0)
        local.copy_(sent)
