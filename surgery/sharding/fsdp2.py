"""FSDP2 around a quantized model: its groups of modules, and sharding on meta."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import model_surgery_patches as patches
from surgery.comm.ranks import broadcast_from_rank0
from surgery.config import FSDP2
from surgery.errors import ConfigError
from surgery.model.tree import Site, decoder_blocks, ends_of, sites
from surgery.quantizers.base import QuantFormat, kept_parameters, packed_names, quantized_modules
from surgery.quantizers.digest import Place
from surgery.sharding.base import (
    READS_WEIGHTS,
    Devices,
    Part,
    Trained,
    Unit,
    chosen_parameters,
    outermost,
    register,
)
from surgery.sharding.fsdp import Fsdp, shared_parameters
from surgery.sharding.fsdp2_steps import Fsdp2Steps
from surgery.sharding.partition import Partition

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["SHARDS_INTEGERS", "Fsdp2", "check_groups", "shard"]

#: The first torch whose FSDP2 shards parameters of an integer dtype.
SHARDS_INTEGERS = (2, 13)

#: How many blocks a rank has unsharded at most, by its streams: the one that computes, the next one as it was gathered,
#: and that one as parameters. (Read in torch 2.13, `_fsdp_param_group.py`; not measured.)
GATHERED_BLOCKS = 3


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
    """Require one trained dtype in each group, whose gradients FSDP2 reduces as one tensor; the rest is the root's."""
    left = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for group in groups:
        inside = {p: None for module in group if module is not None for p in module.parameters() if p in left}
        _check_uniform({left.pop(parameter): parameter for parameter in inside})
    _check_uniform({name: parameter for parameter, name in left.items()})


def _check_uniform(trained: Mapping[str, nn.Parameter]) -> None:
    first = {parameter.dtype: name for name, parameter in trained.items()}
    if len(first) > 1:
        found = ", ".join(f"{name} is {str(dtype).removeprefix('torch.')}" for dtype, name in first.items())
        raise ConfigError(
            f"FSDP2 trains parameters of one dtype in a decoder block, but {found}: leave out what upstream keeps in "
            "another dtype, such as a router's gate in modules_to_save, or use shard=FSDP1() or one process"
        )


def _check_ties(model: nn.Module, groups: Iterable[Iterable[nn.Module | None]]) -> None:
    numbers = {module: number for number, group in enumerate(groups) for module in group if module is not None}
    for _, (first, *_, last), _ in shared_parameters(model, numbers):
        raise ConfigError(
            f"{first} and {last} are one parameter, but are used in two groups of FSDP2, which cannot gather it for "
            "both: untie them, or build the model without shard"
        )


class Fsdp2(Fsdp):
    """The strategy of `surgery.FSDP2`: every parameter is divided along dimension 0, on meta or once it is filled."""

    label = "FSDP2"
    placements = ("sharded", "replicated")
    records_steps = True
    options: FSDP2 | None
    resident_patches = ("fsdp-resident", "fsdp2-resident")

    def __init__(self, options: Any, **setting: Any) -> None:
        super().__init__(options, **setting)
        self.shards_on_meta = self.placement == "sharded"
        self.keeps_gathered = options is not None and options.reshard_after_forward is False
        self.mesh: DeviceMesh | None = None

    def check(self) -> None:
        """Refuse placement rank0-cpu, which waits for a broadcast that FSDP2 does not make."""
        if self.placement == "rank0-cpu":
            raise ConfigError(
                "placement rank0-cpu waits for FSDP1 to broadcast rank 0's weights, which FSDP2 does not do: use "
                "placement='sharded', where no rank holds more than its shard, or shard=FSDP1()"
            )
        super().check()

    def check_format(self, quant: QuantFormat, *, adapted: bool) -> None:
        """Refuse integers that this torch cannot shard, and casts."""
        is_integer = not quant.storage.is_floating_point
        if is_integer and Version(torch.__version__).release < SHARDS_INTEGERS:
            raise ConfigError(
                f"quant_storage={quant.storage} cannot be sharded by FSDP2 of torch {torch.__version__}, which makes "
                f"parameters that require gradients of it: use torch {'.'.join(map(str, SHARDS_INTEGERS))} or later, "
                f"or quant_storage={quant.dtype} (the same bytes under another name)"
            )
        super().check_format(quant, adapted=adapted)

    def check_added(self, lora: LoraConfig) -> None:
        """Refuse adapters that read weights, or copy modules, while they are made."""
        found = [name for name in (*READS_WEIGHTS, "modules_to_save") if getattr(lora, name, None)]
        if found:
            raise ConfigError(
                f"{found[0]} is made from weights, of which each rank has a part once FSDP2 has sharded the model: "
                "begin with it (surgery.qlora with lora= or adapter=)"
            )

    def check_model(self, model: nn.Module, quant: QuantFormat) -> frozenset[str]:
        """No FQNs: everything is sharded. Refuses to cast what upstream keeps in another dtype."""
        kept = kept_parameters(model, quant.dtype).items()
        self._check_kept(model, [name for name, parameter in kept if parameter.is_meta], quant.dtype)
        return frozenset()

    def check_adapted(self, adapted: nn.Module, blocks: Sequence[Site], unsharded: set[nn.Parameter]) -> None:
        """Refuse views, ties between groups, and groups that train several dtypes."""
        super().check_adapted(adapted, blocks, unsharded)
        check_groups(adapted, blocks)

    @cached_property
    def partition(self) -> Partition:
        """The partition: each rank reads and keeps its shard, or each keeps everything."""
        return Partition(grid=self.at_rest) if self.shards_on_meta else super().partition

    def devices(self, rank: int) -> Devices:
        """The devices of `rank`: weights wait on its own, or as shards on the CPU if they are offloaded."""
        found = super().devices(rank)
        on_cpu = self.shards_on_meta and self.cpu_offload
        return Devices(compute=found.compute, data=torch.device("cpu")) if on_cpu else found

    def adapter_rows(self, rank: int, rows: int) -> range:
        """The rows of its shard, if the model is sharded by then."""
        return self.partition.rows_of(rank, rows) if self.shards_on_meta else super().adapter_rows(rank, rows)

    def adapter_device(self, rank: int) -> torch.device:
        """The device that weights wait on, if the model is sharded by then."""
        return self.devices(rank).data if self.shards_on_meta else super().adapter_device(rank)

    def meet(self) -> None:
        """Make the mesh: `(fsdp,)`, or `(replicate, fsdp)`.

        By the name "fsdp" PEFT knows that a module computes with the whole weight, and gives adapters its whole shape.
        """
        shape, names = self.mesh_shape or (self.world_size,), ("replicate", "fsdp")
        self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names[-len(shape) :])

    @property
    def _met(self) -> DeviceMesh:
        assert self.mesh is not None, "meet() comes first"
        return self.mesh

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The ranks in this rank's column of the mesh."""
        return self._met.get_group("replicate") if self._met.ndim > 1 else None

    def shard_on_meta(self, model: nn.Module, quant: QuantFormat) -> nn.Module:
        """`model` itself, sharded in place: what is on meta stays there, the rest is this rank's shard of it."""
        _make_plain(model)
        assert self.options is not None
        groups = self.options.groups
        blocks = decoder_blocks(model) if groups is None else [s for s in sites(model) if s.fqn in groups]
        with patches.transaction("torch.fsdp2-alike-parameters", reason="a model of many alike blocks is sharded"):
            shard(model, sorted(blocks, key=lambda site: -site.fqn.count(".")), self.options, self._met)
        return model

    def finish(self, model: nn.Module, quant: QuantFormat) -> nn.Module:
        """`model` itself, with rank 0's adapters, or the first replica's shards of them."""
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.shards_on_meta:
            self._share_among_replicas(trainable)
            return model
        if self.world_size > 1:
            broadcast_from_rank0(trainable, device=self.device)
        return self.shard_on_meta(model, quant)

    def _share_among_replicas(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every replica the first one's values of sharded `parameters`, in place."""
        group = self.replicas
        for parameter in parameters if group is not None else ():
            assert isinstance(parameter, DTensor)
            local = parameter.to_local().detach()
            sent = local.to(self.device)
            dist.broadcast(sent, group=group, group_src=0)
            local.copy_(sent)

    @classmethod
    def made(cls, model: nn.Module) -> bool:
        """Whether `model` is, or has in it, an `FSDPModule`."""
        return outermost(model, FSDPModule) is not None

    def shards(self, model: nn.Module, places: Iterable[Place]) -> dict[Place, Part]:
        """The local parts, once what is still gathered is freed; FSDP2 gathers it again when it needs it."""
        self.settle(model)
        return super().shards(model, places)

    def settle(self, model: nn.Module) -> None:
        """Shard every group again."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def steps(self, model: nn.Module) -> Fsdp2Steps:
        """Those of FSDP2's groups."""
        return Fsdp2Steps(model)

    def trainable_state(self, model: nn.Module, also: frozenset[str] = frozenset()) -> dict[str, torch.Tensor]:
        """Gather the parameters, one at a time whole on the device."""
        self.settle(model)  # a forward without a backward, in evaluation, may have left it whole
        chosen = chosen_parameters(model, also)
        state: dict[nn.Parameter, torch.Tensor] = {}
        on_rank0 = dist.get_rank() == 0
        for parameter in dict.fromkeys(chosen.values()):
            whole = _whole(parameter.detach())
            state[parameter] = whole.cpu().clone() if on_rank0 else whole.new_empty(0)
        return {name: state[parameter] for name, parameter in chosen.items()} if on_rank0 else {}

    def trained(self, model: nn.Module) -> list[Trained]:
        """The local parts, once what is still gathered is freed."""
        self.settle(model)
        return super().trained(model)

    def _at_end(self, units: Sequence[Unit]) -> int:
        """The last norm and the head, as they were gathered and as parameters, and what the root has.

        Nothing follows that would free the buffer.
        """
        return sum((2 if unit.kind == "tail" else 1) * unit.whole for unit in units if unit.kind in ("tail", "root"))

    def _in_block(self, blocks: Sequence[int], units: Sequence[Unit]) -> int:
        """Copies of the largest block, and what the root has."""
        return sum(blocks[:1]) * GATHERED_BLOCKS + sum(unit.whole for unit in units if unit.kind == "root")

    def finishing_peaks(self, units: Sequence[Unit], *, unsharded: int, rank: int) -> Iterable[tuple[int, int]]:
        """One moment, with everything whole: parameters are sharded one after the other, and freed."""
        return () if self.shards_on_meta else ((0, sum(unit.weights for unit in units)),)


def _make_plain(model: nn.Module) -> None:
    """Give quantized layers on meta plain parameters, which FSDP2 makes of theirs anyway: for each operation on one of
    its own class bitsandbytes goes through Python.
    """
    places = [(layer, name) for layer in quantized_modules(model) for name in packed_names(layer)]
    for layer, name in places:
        weight = layer._parameters[name]
        if weight is not None and weight.is_meta and type(weight) is not nn.Parameter:
            plain = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            layer._parameters[name] = nn.Parameter(plain, requires_grad=False)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    # Shards that wait on the CPU meet on the device of the mesh, whose backend all process groups have.
    moved: Any = tensor.to(tensor.device_mesh.device_type)
    whole: torch.Tensor = moved.full_tensor()
    return whole


register(FSDP2, Fsdp2)
