"""Choices and arguments of the command line; free of torch, so that it can show its help at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from surgery.errors import ConfigError
from surgery.telemetry.numbers import whole_number

if TYPE_CHECKING:
    from peft import LoraConfig

    from surgery.config import FSDP1, FSDP2

__all__ = [
    "EXPERTS_HELP",
    "OFFLOADING_HELP",
    "Experts",
    "QuantType",
    "offloads_shards",
    "parse_list",
    "parse_lora",
    "parse_mesh",
    "parse_shard",
    "require_recordable",
]

QuantType: TypeAlias = Literal["nf4", "fp4"]

#: The form of fused experts where other weights are in 4 bits.
Experts: TypeAlias = Literal["4bit", "16bit"]
EXPERTS_HELP = "Whether fused experts of a 4-bit model are in 4 bits too, or left in 16."

OFFLOADING_HELP = (
    "For long sequences: have the inputs of blocks, all that is kept of recomputed ones, wait for backward in pinned "
    "memory of the CPU; copies are made while blocks compute."
)


def parse_list(value: str) -> tuple[str, ...]:
    """Items of a comma-separated list; empty ones are none."""
    return tuple(filter(None, (item.strip() for item in value.split(","))))


def parse_mesh(value: str | None) -> tuple[int, int] | None:
    """`2x4` as `(2, 4)`; raises `ConfigError` for anything else."""
    if value is None:
        return None
    replicate, separator, shard = value.lower().partition("x")
    replicas, shards = whole_number(replicate), whole_number(shard)
    if not separator or replicas is None or shards is None:
        raise ConfigError(f"expected --mesh as REPLICATExSHARD, such as 2x4, found {value!r:.80}")
    return replicas, shards


def parse_shard(
    fsdp: Literal["1", "2"], *, mesh: tuple[int, int] | None = None, cpu_offload: bool = False
) -> FSDP1 | FSDP2:
    """The options of a sharding; FSDP1 with a mesh is hybrid."""
    from surgery.config import FSDP1, FSDP2

    if fsdp == "2":
        return FSDP2(mesh=mesh, cpu_offload=cpu_offload)
    return FSDP1(strategy="full-shard" if mesh is None else "hybrid-shard", mesh=mesh, cpu_offload=cpu_offload)


def offloads_shards(fsdp_config: Mapping[str, Any]) -> bool:
    """Whether settings of FSDP, as transformers takes them, have shards wait on the CPU."""
    return str(fsdp_config.get("cpu_offload", fsdp_config.get("fsdp_cpu_offload", False))).lower() == "true"


def require_recordable(*, on_cpu: bool, fsdp: str) -> None:
    """Refuse CUDA graphs of steps on a CPU, and of FSDP1's. fsdp: which one shards; `none` also for one rank."""
    if on_cpu:
        raise ConfigError("--cuda-graphs needs a GPU: leave it out on a CPU")
    if fsdp == "1":
        raise ConfigError("expected --fsdp 2 or none with --cuda-graphs, found --fsdp 1")


def parse_lora(r: int, targets: str, parameters: str = "") -> LoraConfig:
    """Adapters of rank `r` on comma-separated modules, or on `all-linear`, and on comma-separated parameters."""
    from peft import LoraConfig, TaskType

    if r < 1:
        raise ConfigError(f"expected the LoRA rank to be 1 or more, found {r}")
    names = list(parse_list(targets))
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=r,
        target_modules="all-linear" if targets == "all-linear" else names,
        target_parameters=list(parse_list(parameters)) if parameters else None,
    )
