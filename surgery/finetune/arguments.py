"""Choices and arguments of the command line; free of torch, so that it can show its help at once."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import typer

from surgery.errors import ConfigError
from surgery.telemetry.numbers import whole_number

if TYPE_CHECKING:
    import torch

    from surgery.config import FSDP1, FSDP2

__all__ = [
    "ActivationCheckpointing",
    "FsdpVersion",
    "LoggerName",
    "LoraInit",
    "OptimizerName",
    "PrecisionName",
    "QuantStorageName",
    "QuantType",
    "ScheduleName",
    "StrategyName",
    "panel",
    "parse_list",
    "parse_mesh",
    "parse_shard",
    "parse_storage",
    "parse_targets",
    "parse_timeout",
]

ActivationCheckpointing: TypeAlias = Literal["none", "reentrant", "non-reentrant"]
FsdpVersion: TypeAlias = Literal["1", "2"]
LoggerName: TypeAlias = Literal["tensorboard", "wandb"]
# pissa and olora are refused, with the reason: they need the unquantized weights.
LoraInit: TypeAlias = Literal["default", "gaussian", "orthogonal", "pissa", "olora"]
OptimizerName: TypeAlias = Literal["adamw", "sgd"]
PrecisionName: TypeAlias = Literal["bf16", "fp32", "bf16-autocast", "fp16-autocast"]
# uint8 is what bitsandbytes defaults to; under FSDP1 it is refused, with the reason.
QuantStorageName: TypeAlias = Literal["auto", "bfloat16", "float16", "float32", "uint8"]
QuantType: TypeAlias = Literal["nf4", "fp4"]
ScheduleName: TypeAlias = Literal["cosine", "linear", "constant"]
StrategyName: TypeAlias = Literal["full-shard", "shard-grad-op", "hybrid-shard", "no-shard"]


#: Strategies of FSDP1 -> what to do for each with FSDP2.
OF_FSDP2: dict[StrategyName, str] = {
    "full-shard": "leave it out, since that is what FSDP2 does",
    "shard-grad-op": "use --no-reshard-after-forward",
    "hybrid-shard": "leave it out, since --mesh alone makes FSDP2 hybrid",
    "no-shard": "use --mesh Nx1 on N ranks, where each keeps everything",
}


def panel(title: str) -> Callable[..., Any]:
    """A function of help, names and further arguments of `typer.Option` that makes an option of the panel `title`."""
    return lambda text, *names, **more: typer.Option(*names, help=text, rich_help_panel=title, **more)


def parse_list(value: str) -> tuple[str, ...]:
    """Items of a comma-separated list; empty ones are none."""
    return tuple(filter(None, (item.strip() for item in value.split(","))))


def parse_targets(value: str) -> tuple[str, ...]:
    """Names of modules; none stands for all linear ones."""
    return () if value == "all-linear" else parse_list(value)


def parse_storage(name: QuantStorageName) -> torch.dtype | None:
    """The dtype of that name, or None for `auto`."""
    import torch

    dtype: torch.dtype | None = None if name == "auto" else getattr(torch, name)
    return dtype


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
    fsdp: FsdpVersion,
    *,
    mesh: tuple[int, int] | None = None,
    cpu_offload: bool = False,
    sharding: StrategyName | None = None,
    use_orig_params: bool | None = None,
    reshard_after_forward: bool | None = None,
) -> FSDP1 | FSDP2:
    """The options of a sharding; None was not given. Raises `ConfigError` for what only the other FSDP has."""
    from surgery.config import FSDP1, FSDP2

    if fsdp == "2":
        if sharding is not None:
            raise ConfigError(f"--sharding {sharding} is FSDP1's: with --fsdp 2, {OF_FSDP2[sharding]}; or use --fsdp 1")
        if use_orig_params is not None:
            option = "--use-orig-params" if use_orig_params else "--no-use-orig-params"
            why = "leave it out, since FSDP2 always keeps each parameter"
            raise ConfigError(f"{option} is FSDP1's: with --fsdp 2, {why}; or use --fsdp 1")
        return FSDP2(mesh=mesh, reshard_after_forward=reshard_after_forward is not False, cpu_offload=cpu_offload)
    if reshard_after_forward is not None:
        option = "--reshard-after-forward" if reshard_after_forward else "--no-reshard-after-forward"
        instead = "leave it out" if reshard_after_forward else "use --sharding shard-grad-op"
        raise ConfigError(f"{option} is FSDP2's: with --fsdp 1, {instead}; or use --fsdp 2")
    return FSDP1(
        strategy=sharding or ("full-shard" if mesh is None else "hybrid-shard"),
        mesh=mesh,
        use_orig_params=bool(use_orig_params),
        cpu_offload=cpu_offload,
    )


def parse_timeout(minutes: float) -> timedelta:
    """Minutes as a duration; raises `ConfigError` if there is no such timeout."""
    if not 0 < minutes < 7 * 24 * 60:
        raise ConfigError(f"expected --timeout as minutes, above 0 and below a week, found {minutes:g}")
    return timedelta(minutes=minutes)
