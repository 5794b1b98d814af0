"""Choices of a user, as frozen data: quantization, placement of packed weights, sharding."""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

import torch
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

from surgery.errors import ConfigError

__all__ = [
    "DDP",
    "FSDP1",
    "FSDP2",
    "Placement",
    "Quant",
    "Quant8",
    "QuantType",
    "parse_placement",
]

#: 4-bit data types.
QuantType = Literal["nf4", "fp4"]
Placement = Literal["sharded", "rank0-cpu", "replicated"]
Strategy = Literal["full-shard", "shard-grad-op", "hybrid-shard", "no-shard"]
Units = Literal["auto", "block"]

#: Block sizes that `bitsandbytes.functional.quantize_4bit` accepts.
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STORAGE_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)


def _one_of(what: str, value: object, allowed: tuple[object, ...]) -> None:
    if value in allowed:
        return
    raise ConfigError(f"{what} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def parse_placement(value: str) -> Placement:
    """`value` as a placement; raises `ConfigError` naming the choices."""
    _one_of("placement", value, get_args(Placement))
    return value  # type: ignore[return-value]  # checked on the line above


@dataclass(frozen=True)
class Quant:
    """Quantization of linear weights to 4 bits (QLoRA, https://arxiv.org/abs/2305.14314).

    quant_type: `nf4` (normal float, the paper's) or `fp4`.
    blocksize: elements that share one absmax.
    double_quant: quantize the absmax values too (0.37 bits a parameter saved at blocksize 64).
    quant_storage: dtype of the packed tensor, `(out * in / 2 / itemsize, 1)`. None takes the dtype of the model,
        which is what FSDP1 needs to flatten it together with the rest.
    skip_modules: regular expressions, searched in a module's FQN; what matches stays in 16 or 32 bits. The experts of a
        layer are one module, with all stacks. The output head and modules with tied weights are always skipped, as
        transformers does.
    shard_statistics: shard the absmax values of linear layers with their weights, as those of experts always are,
        instead of keeping all of them on every rank: of 405B parameters 25 GB (6 with double_quant), gathered in each
        forward.
    experts: quantize fused experts too, which transformers leaves in 16 bits; each by itself, so that blocks straddle
        none. False leaves them in 16 bits; `nf4` or `fp4` is for a type other than `quant_type`.
    """

    quant_type: QuantType = "nf4"
    _: KW_ONLY
    blocksize: int = 64
    double_quant: bool = True
    quant_storage: torch.dtype | None = None
    skip_modules: tuple[str, ...] = ()
    shard_statistics: bool = False
    experts: bool | QuantType = True

    def __post_init__(self) -> None:
        _one_of("quant_type", self.quant_type, ("nf4", "fp4"))
        _one_of("blocksize", self.blocksize, BLOCKSIZES)
        _one_of("experts", self.experts, (True, False, "nf4", "fp4"))
        _one_of("quant_storage", self.quant_storage, (None, *STORAGE_DTYPES))
        for pattern in self.skip_modules:
            _compile(pattern)

    def storage_for(self, dtype: torch.dtype) -> torch.dtype:
        """The packed tensor's dtype in a model of `dtype`."""
        return dtype if self.quant_storage is None else self.quant_storage


@dataclass(frozen=True, kw_only=True)
class Quant8:
    """Linear weights in 8 bits of bitsandbytes (LLM.int8, https://arxiv.org/abs/2208.07339), as a checkpoint has them.

    Nothing is quantized to 8 bits: of weights in 16 bits `Quant` makes 4. A checkpoint in 8 bits needs no option.

    threshold: columns of activations with a larger value are multiplied in 16 bits, as `llm_int8_threshold` of
        transformers; 0 for none. None takes that of the checkpoint's config.json.
    quant_storage: dtype of the packed tensor, `(out * in / itemsize, 1)`. None takes the dtype of the model.
    """

    threshold: float | None = None
    quant_storage: torch.dtype | None = None

    def __post_init__(self) -> None:
        _one_of("quant_storage", self.quant_storage, (None, torch.int8, *STORAGE_DTYPES))
        if self.threshold is not None and not 0 <= self.threshold < float("inf"):
            raise ConfigError(f"threshold must be a number of 0 or more; got {self.threshold!r}")

    def storage_for(self, dtype: torch.dtype) -> torch.dtype:
        """The packed tensor's dtype in a model of `dtype`."""
        return dtype if self.quant_storage is None else self.quant_storage


def _check_mesh(mesh: tuple[int, int]) -> None:
    if len(tuple(mesh)) != 2 or min(mesh) < 1:
        raise ConfigError(f"mesh must be (replicate, shard), two positive integers; got {mesh}")


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"skip_modules: {pattern!r} is not a regular expression ({error})") from error


@dataclass(frozen=True, kw_only=True)
class FSDP1:
    """Sharding by `torch.distributed.fsdp.FullyShardedDataParallel`.

    strategy: the sharding strategy, by its name in lower case with dashes.
    mesh: `(replicate, shard)` for hybrid-shard; their product is the world size, and shard is 2 or more.
    use_orig_params: keep each parameter instead of one flat parameter per unit. False (the default) needs less memory
        for QLoRA: adapters become units of their own, and no gradient is allocated for frozen weights.
    units: `auto` makes a unit of every decoder block, and one of each leaf whose dtype or `requires_grad` the block's
        flat parameter could not hold; `block` makes a unit of every decoder block and refuses what does not fit in it.
    mixed_precision: handed to FSDP after a check that it never casts packed weights.
    cpu_offload: parameters and gradients on the CPU between uses (needs an accelerator).
    sync_module_states: broadcast rank 0's values while wrapping. Placement `rank0-cpu` cannot work without it.
    casts_kept: let mixed_precision cast what the model keeps in another dtype than its own, which is refused otherwise.

    Placement `sharded` is for FSDP2: FSDP1 makes its shards itself.
    """

    strategy: Strategy = "full-shard"
    mesh: tuple[int, int] | None = None
    use_orig_params: bool = False
    units: Units = "auto"
    mixed_precision: MixedPrecision | None = None
    cpu_offload: bool = False
    sync_module_states: bool = True
    forward_prefetch: bool = False
    limit_all_gathers: bool = True
    casts_kept: bool = False

    def __post_init__(self) -> None:
        _one_of("strategy", self.strategy, get_args(Strategy))
        _one_of("units", self.units, get_args(Units))
        if self.strategy == "hybrid-shard" and self.mesh is None:
            raise ConfigError("strategy hybrid-shard needs mesh=(replicate, shard), for example mesh=(2, 4) on 8 ranks")
        if self.strategy != "hybrid-shard" and self.mesh is not None:
            raise ConfigError(f"mesh is for strategy hybrid-shard; got mesh={self.mesh} with {self.strategy}")
        if self.mesh is None:
            return
        _check_mesh(self.mesh)
        if self.mesh[1] == 1:
            raise ConfigError(
                f"mesh={self.mesh} has a shard dimension of 1: FSDP1 then neither broadcasts the weights nor reduces "
                "the gradients, and says nothing. Use a shard dimension of 2 or more, or strategy no-shard"
            )


@dataclass(frozen=True, kw_only=True)
class FSDP2:
    """Sharding by `torch.distributed.fsdp.fully_shard`: every parameter along dimension 0, over a device mesh.

    A decoder block and its adapters are one group; the embedding is another, and the last norm with the output head;
    the root takes the rest. Works with every `quant_storage`, since nothing is flattened (uint8 from torch 2.13 on).

    mesh: `(replicate, shard)` for hybrid sharding; their product is the world size. None shards over all ranks.
    reshard_after_forward: free gathered blocks after forward, and gather them again for backward; an integer reshards
        to groups of that many ranks (see `fully_shard`).
    mixed_precision: handed to `fully_shard` after a check that it never casts packed weights.
    cpu_offload: shards wait on the CPU between uses.
    groups: FQNs of modules that are a group each, inner ones first; None is every decoder block.
    casts_kept: let mixed_precision cast what the model keeps in another dtype than its own, which is refused otherwise.
    """

    mesh: tuple[int, int] | None = None
    reshard_after_forward: bool | int = True
    mixed_precision: MixedPrecisionPolicy | None = None
    cpu_offload: bool = False
    groups: tuple[str, ...] | None = None
    casts_kept: bool = False

    def __post_init__(self) -> None:
        if self.mesh is not None:
            _check_mesh(self.mesh)


@dataclass(frozen=True, kw_only=True)
class DDP:
    """Replication by `torch.nn.parallel.DistributedDataParallel`: every rank holds the whole model.

    Gradients of adapters are averaged in the dtype that adapters have.

    find_unused_parameters: for models that do not use every adapter in every step, such as adapted experts.
    gradient_as_bucket_view: keep gradients in the buffers that are exchanged, instead of beside them.
    bucket_cap_mb: MiB of gradients that are exchanged together.
    static_graph: the same adapters are used in every step, in the same order.
    """

    find_unused_parameters: bool = False
    gradient_as_bucket_view: bool = True
    bucket_cap_mb: float = 25
    static_graph: bool = False

    def __post_init__(self) -> None:
        if not self.bucket_cap_mb > 0:
            raise ConfigError(f"bucket_cap_mb must be above 0; got {self.bucket_cap_mb!r}")
