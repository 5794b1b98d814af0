"""The setting of a model: how it is stored, sharded and adapted, on how many ranks of which kind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from surgery.adapters.options import check_adapter
from surgery.adapters.saved import SavedAdapter
from surgery.checkpoint import Checkpoint
from surgery.errors import ConfigError
from surgery.quantizers.base import QuantFormat, formats_for
from surgery.sharding.base import ShardStrategy, strategy_for

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["Setting"]

#: More ranks, samples or tokens than there will be; a plan looks at ranks one by one.
MOST = 1 << 20


def at_least_one(**values: int) -> None:
    """Raise `ConfigError` for a value below 1, or above what can be planned."""
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"expected {name} to be 1 or more, found {value}")
        if value > MOST:
            raise ConfigError(f"expected {name} to be {MOST:,} or less, found more")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Every choice that a model is built by. Raises `ConfigError` for what cannot work together.

    quant, shard: options that a format and a strategy are registered for; None for none. lora: the adapters, or None.
    adapter: what their values are read from; None draws them. placement: where weights wait until the model is
    complete; None is the strategy's default. dtype: of what is not quantized. compute_dtype: in which quantized linear
    layers multiply. device: that ranks compute on, this rank's where there is a job. world_size: number of ranks.
    kernels: names of those that it runs once it is complete.
    """

    quant: Any
    shard: Any
    lora: LoraConfig | None
    placement: str | None
    dtype: torch.dtype
    compute_dtype: torch.dtype
    device: torch.device
    world_size: int = 1
    adapter: SavedAdapter | None = None
    kernels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least_one(world_size=self.world_size)
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(f"dtype must be float32, bfloat16 or float16; got {self.dtype}")
        self.strategy.check()
        self.strategy.check_format(self.format, adapted=self.lora is not None)
        if self.lora is not None:
            check_adapter(self.lora)
            self.strategy.check_adapters(self.lora)

    def reading(self, checkpoint: Checkpoint) -> Setting:
        """The setting for weights that `checkpoint` may have packed, of whose kind the format is then.

        Before `strategy` has met the others. Raises `ConfigError` for a format that cannot hold them.
        """
        packing = checkpoint.packing
        if packing is None and not self.format.quantizes:
            raise ConfigError(
                f"quant: {type(self.quant).__name__} is for checkpoints whose weights are packed already, and "
                f"{checkpoint.source} has them in 16 or 32 bits: use surgery.Quant(), or None"
            )
        quant = self.quant if packing is None else self.format.options_for(packing)
        return self if quant == self.quant else replace(self, quant=quant)

    @cached_property
    def formats(self) -> tuple[QuantFormat, ...]:
        """The formats of its weights, each of modules of another kind."""
        return formats_for(self.quant, dtype=self.dtype, compute_dtype=self.compute_dtype)

    @property
    def format(self) -> QuantFormat:
        """The first format, that of linear layers."""
        return self.formats[0]

    @cached_property
    def strategy(self) -> ShardStrategy:
        """The strategy by which ranks share it."""
        return strategy_for(self.shard, world_size=self.world_size, device=self.device, placement=self.placement)

    @property
    def on_cpu(self) -> bool:
        """Whether ranks compute on the CPU, so that all memory is the host's."""
        return self.device.type == "cpu"
