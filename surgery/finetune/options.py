"""Options of a fine-tuning job as frozen data, checked when they are made, before anything is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from surgery.config import FSDP2, Placement, Quant, parse_placement, precision
from surgery.errors import ConfigError
from surgery.finetune.arguments import (
    ActivationCheckpointing,
    LoggerName,
    LoraInit,
    OptimizerName,
    PrecisionName,
    ScheduleName,
)

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["DataOptions", "Job", "LoraOptions", "TrainingOptions", "require_loggers"]


#: More than any run takes of anything, and less than what torch and floats have room for.
MOST = 10**15


def _at_least(name: str, value: float | None, least: float, *, most: float = MOST) -> None:
    if value is None:
        return
    if not value >= least:
        raise ConfigError(f"expected {name} to be {least:g} or more, found {value}")
    if value > most:
        raise ConfigError(f"expected {name} to be {most:g} or less, found more")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Files of JSONL, and how they are cut.

    evaluation: a file to evaluate on; or `evaluation_fraction` of the training samples, above 0 and below 1.
    max_length: tokens a sample; the rest is cut off.
    """

    train: Path
    evaluation: Path | None = None
    evaluation_fraction: float | None = None
    max_length: int = 1024

    def __post_init__(self) -> None:
        _at_least("the maximum length", self.max_length, 2)
        if self.evaluation is not None and self.evaluation_fraction is not None:
            raise ConfigError("expected an evaluation file or an evaluation fraction, found both; give one")
        if self.evaluation_fraction is not None and not 0 < self.evaluation_fraction < 1:
            raise ConfigError(f"expected an evaluation fraction between 0 and 1, found {self.evaluation_fraction}")

    @property
    def has_evaluation(self) -> bool:
        """Whether there is anything to evaluate on."""
        return self.evaluation is not None or self.evaluation_fraction is not None


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The optimizer steps.

    epochs, max_steps: whichever ends first; with `max_steps` alone the data is repeated, with neither it is
        one epoch.
    batch_size: samples a rank puts through the model at once. accumulation: how often, before a step.
    clip: largest gradient norm, None for no clipping.
    evaluate_every: steps between evaluations; None evaluates before and after training only.
    """

    epochs: int | None = None
    max_steps: int | None = None
    batch_size: int = 1
    accumulation: int = 1
    optimizer: OptimizerName = "adamw"
    lr: float = 2e-4
    schedule: ScheduleName = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip: float | None = 1.0
    seed: int = 0
    evaluate_every: int | None = None
    activation_checkpointing: ActivationCheckpointing = "none"
    activation_offload: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "max_steps", "batch_size", "accumulation", "evaluate_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("warmup_steps", "weight_decay"):
            _at_least(name, getattr(self, name), 0)
        _at_least("seed", self.seed, 0, most=2**63)
        if not self.lr > 0:
            raise ConfigError(f"expected a learning rate above 0, found {self.lr}")
        _at_least("the learning rate", self.lr, 0, most=1e30)  # AdamW divides it by less than 1, in float32
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"expected clip to be above 0 (leave it out for no clipping), found {self.clip}")
        _at_least("clip (leave it out for no clipping)", self.clip, 0)
        if self.activation_offload and self.activation_checkpointing == "none":
            raise ConfigError(
                "activation offload needs activation checkpointing (reentrant or non-reentrant): without it the "
                "weights that autograd saves would be copied to the CPU along with the activations"
            )

    @property
    def epochs_to_run(self) -> int | None:
        """The number of epochs, or None to repeat the data until `max_steps`."""
        return 1 if self.epochs is None and self.max_steps is None else self.epochs


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """LoRA adapters (https://arxiv.org/abs/2106.09685), as PEFT knows them.

    target_modules: names of linear modules, or none for every linear module but the output head.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    init: LoraInit = "default"
    dora: bool = False

    def __post_init__(self) -> None:
        _at_least("the LoRA rank", self.r, 1)
        _at_least("lora_alpha", self.alpha, 1)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"expected a LoRA dropout of at least 0 and below 1, found {self.dropout}")

    def config(self) -> LoraConfig:
        """The same as PEFT's configuration."""
        from peft import LoraConfig, TaskType

        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.target_modules) or "all-linear",
            init_lora_weights=True if self.init == "default" else self.init,
            use_dora=self.dora,
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """A fine-tuning job: a checkpoint, data, and everything that decides what comes out.

    model: a folder, or a hub id with its `revision`.
    output: the folder for the adapter and `summary.json`; one that holds an adapter is refused by the job, unless
        `overwrite`.
    shard: options of a sharding, for more than one rank; in one process nothing is. placement: None is the default of
        that sharding; see `surgery.qlora`.
    attest: show that the base model stays what was quantized, see `surgery.attest`; a difference stops the job.
    metrics: a JSONL file, replaced. trace: a folder for what every rank did, see `surgery.trace`.
    timeout: bounds every wait for another rank.
    """

    model: str
    data: DataOptions
    output: Path = Path("adapter")
    revision: str | None = None
    training: TrainingOptions = field(default_factory=TrainingOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    quant: Quant = field(default_factory=Quant)
    precision: PrecisionName = "bf16"
    placement: Placement | None = None
    shard: Any = field(default_factory=FSDP2)
    metrics: Path | None = None
    trace: Path | None = None
    attest: bool = False
    loggers: tuple[LoggerName, ...] = ()
    overwrite: bool = False
    timeout: timedelta = timedelta(minutes=10)

    def __post_init__(self) -> None:
        precision(self.precision)
        if self.placement is not None:
            parse_placement(self.placement)
        require_loggers(self.loggers)
        if self.training.evaluate_every is not None and not self.data.has_evaluation:
            raise ConfigError("evaluating every so many steps needs an evaluation file or an evaluation fraction")


def require_loggers(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a logger that does not exist or is not installed; imports none of them."""
    known = get_args(LoggerName)
    for name in names:
        if name not in known:
            raise ConfigError(f"expected loggers among {', '.join(known)}; found {name!r}")
        if find_spec(name) is None:
            raise ConfigError(f"logging to {name} needs a package that is missing; install it: pip install {name}")
