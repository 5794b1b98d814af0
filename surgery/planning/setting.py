"""What a plan is made for, as frozen data: ranks, placement, sharding, precision; and how the model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from surgery.adapters.options import check_adapter
from surgery.config import FSDP1, FSDP2, Placement, Quant
from surgery.errors import ConfigError
from surgery.sharding import guards
from surgery.sharding.partition import Grid, Partition

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["Setting", "Training"]

#: GPUs of one machine, where nobody says how many there are.
RANKS_PER_NODE = 8


#: More ranks, samples or tokens than there will be; a plan looks at ranks one by one.
MOST = 1 << 20


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"expected {name} to be 1 or more, found {value}")
        if value > MOST:
            raise ConfigError(f"expected {name} to be {MOST:,} or less, found more")


@dataclass(frozen=True, kw_only=True)
class Training:
    """What decides the memory of a training step.

    batch, seq: samples that a rank puts through the model at once, and tokens of each.
    optimizer: AdamW keeps two states an element, in the dtype of the parameter; SGD (without momentum) none.
    checkpointing: whether activations of decoder blocks are recomputed in backward.
    """

    batch: int = 1
    seq: int = 1024
    optimizer: Literal["adamw", "sgd"] = "adamw"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        _at_least_one(batch=self.batch, seq=self.seq)

    @property
    def tokens(self) -> int:
        """Tokens that a rank puts through the model at once."""
        return self.batch * self.seq


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a model is loaded and sharded, on which kind of device. Refuses what `surgery.qlora` refuses.

    world_size: number of ranks. ranks_per_node: of one machine; what cannot be read by ranges is read once on each.
    shard: None leaves the model whole. dtype: of what is not quantized; compute_dtype: in which 4-bit layers multiply.
    lora: the adapters, None for none.
    """

    world_size: int
    placement: Placement
    shard: FSDP1 | FSDP2 | None
    quant: Quant
    lora: LoraConfig | None
    dtype: torch.dtype
    compute_dtype: torch.dtype
    device: torch.device
    ranks_per_node: int = RANKS_PER_NODE

    def __post_init__(self) -> None:
        _at_least_one(world_size=self.world_size, ranks_per_node=self.ranks_per_node)
        guards.check_sharding(self.shard, self.placement, self.world_size, self.device)
        guards.check_precision(self.quant, self.shard, self.dtype)
        guards.check_units(self.quant, self.lora, self.shard, self.dtype)
        check_adapter(self.lora, self.placement, self.shard, self.world_size)
        if self.shard is None and self.placement == "rank0-cpu" and self.world_size > 1:
            raise ConfigError("placement rank0-cpu needs shard=FSDP1() on several ranks; or use placement='replicated'")
        mesh = self.mesh
        if mesh is not None and mesh[0] * mesh[1] != self.world_size:
            raise ConfigError(
                f"mesh={mesh} needs {mesh[0] * mesh[1]} ranks (replicate x shard), but there are {self.world_size}"
            )

    @property
    def mesh(self) -> tuple[int, int] | None:
        """`(replicate, shard)`, where there is one."""
        return None if self.shard is None else self.shard.mesh

    @property
    def on_cpu(self) -> bool:
        """Whether ranks compute on the CPU, so that all memory is the host's."""
        return self.device.type == "cpu"

    @property
    def cpu_offload(self) -> bool:
        """Whether shards wait on the CPU between uses."""
        return self.shard is not None and self.shard.cpu_offload

    @property
    def keeps_data(self) -> bool:
        """Whether what is loaded stays on the device, and is not taken to rank 0's CPU."""
        return self.placement != "rank0-cpu" or self.shard is None

    @property
    def loading(self) -> Partition:
        """Who reads and who keeps what while the model is loaded."""
        placement: Placement = self.placement if self.shard is not None else "replicated"
        mesh = self.mesh if isinstance(self.shard, FSDP2) else None
        return Partition.of(placement, world_size=self.world_size, mesh=mesh)

    @property
    def sharding(self) -> Grid:
        """Over how many ranks parameters are divided once the model is sharded."""
        if self.shard is None or (isinstance(self.shard, FSDP1) and self.shard.strategy == "no-shard"):
            return Grid(replicas=self.world_size)
        replicas, shards = self.shard.mesh or (1, self.world_size)
        return Grid(replicas=replicas, shards=shards)

    @property
    def gathers_all(self) -> bool:
        """Whether a step has the whole model unsharded at once: gathered blocks are not freed after forward."""
        if isinstance(self.shard, FSDP2):
            return self.shard.reshard_after_forward is False
        return isinstance(self.shard, FSDP1) and self.shard.strategy == "shard-grad-op"
