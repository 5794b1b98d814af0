"""The names that a user chooses among; free of torch, so that the command line can show them at once."""

from __future__ import annotations

from typing import Literal, TypeAlias

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
