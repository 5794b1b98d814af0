"""Options that cannot be, refused when they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

import surgery.config
from surgery.errors import ConfigError
from surgery.finetune import arguments
from surgery.finetune.options import DataOptions, Job, LoraOptions, TrainingOptions

DATA = DataOptions(train=Path("train.jsonl"))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (DataOptions, {"max_length": 1}, "maximum length to be 2 or more, found 1"),
        (DataOptions, {"evaluation_fraction": 1.0}, "between 0 and 1, found 1.0"),
        (DataOptions, {"evaluation_fraction": 0.0}, "between 0 and 1, found 0.0"),
        (DataOptions, {"evaluation": Path("e"), "evaluation_fraction": 0.1}, "found both"),
        (TrainingOptions, {"epochs": 0}, "epochs to be 1 or more, found 0"),
        (TrainingOptions, {"max_steps": 0}, "max_steps to be 1 or more"),
        (TrainingOptions, {"batch_size": 0}, "batch_size to be 1 or more"),
        (TrainingOptions, {"accumulation": -1}, "accumulation to be 1 or more"),
        (TrainingOptions, {"evaluate_every": 0}, "evaluate_every to be 1 or more"),
        (TrainingOptions, {"warmup_steps": -1}, "warmup_steps to be 0 or more"),
        (TrainingOptions, {"weight_decay": float("nan")}, "weight_decay to be 0 or more, found nan"),
        (TrainingOptions, {"weight_decay": 1e39}, "weight_decay to be 1e\\+15 or less"),
        (TrainingOptions, {"lr": 1e39}, "learning rate to be 1e\\+30 or less"),
        (TrainingOptions, {"lr": float("inf")}, "learning rate to be 1e\\+30 or less"),
        (TrainingOptions, {"lr": float("nan")}, "learning rate above 0, found nan"),
        (TrainingOptions, {"lr": 0.0}, "learning rate above 0, found 0.0"),
        (TrainingOptions, {"clip": 1e300}, "clip .* to be 1e\\+15 or less"),
        (TrainingOptions, {"warmup_steps": 10**16}, "warmup_steps to be 1e\\+15 or less"),
        (LoraOptions, {"alpha": 10**39}, "lora_alpha to be 1e\\+15 or less"),
        (LoraOptions, {"dropout": float("nan")}, "dropout of at least 0 and below 1, found nan"),
        (TrainingOptions, {"seed": -1}, "seed to be 0 or more"),
        (TrainingOptions, {"clip": 0.0}, "clip to be above 0"),
        (TrainingOptions, {"activation_offload": True}, "needs activation checkpointing"),
        (LoraOptions, {"r": 0}, "LoRA rank to be 1 or more"),
        (LoraOptions, {"alpha": 0}, "lora_alpha to be 1 or more"),
        (LoraOptions, {"dropout": 1.0}, "dropout of at least 0 and below 1, found 1.0"),
        (Job, {"precision": "int8"}, "precision must be one of"),
        (Job, {"placement": "disk"}, "placement must be one of"),
        (Job, {"loggers": ("mlflow",)}, "among tensorboard, wandb"),
        (Job, {"training": TrainingOptions(evaluate_every=1)}, "needs an evaluation file"),
    ],
)
def test_refused(make: Any, options: dict[str, Any], message: str) -> None:
    needed: dict[Any, dict[str, Any]] = {DataOptions: {"train": Path("t")}, Job: {"model": "m", "data": DATA}}
    with pytest.raises(ConfigError, match=message):
        make(**needed.get(make, {}), **options)


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"), [(None, None, 1), (3, None, 3), (None, 7, None), (3, 7, 3)]
)
def test_epochs_to_run(epochs: int | None, max_steps: int | None, expected: int | None) -> None:
    assert TrainingOptions(epochs=epochs, max_steps=max_steps).epochs_to_run == expected


def test_lora_as_peft_knows_it() -> None:
    config = LoraOptions(r=4, alpha=8, dropout=0.1, target_modules=("q_proj",), init="gaussian").config()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.1)
    assert config.target_modules == {"q_proj"}
    assert config.init_lora_weights == "gaussian"
    assert LoraOptions().config().target_modules == "all-linear"


def test_choices_are_those_of_the_configuration() -> None:
    assert set(get_args(arguments.PrecisionName)) == set(surgery.config.PRECISIONS)
    assert get_args(arguments.StrategyName) == get_args(surgery.config.Strategy)
