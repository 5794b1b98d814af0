"""The commands `surgery finetune` and `surgery dpo`. Nothing heavy is imported before they run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

import typer

from surgery.errors import ConfigError

__all__ = ["SETTINGS", "dpo", "finetune"]

#: Settings of the command line: every word is left to TRL's parser.
SETTINGS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}

_FINETUNE = """\
Usage: surgery finetune MODEL --data DATA [OPTIONS]

Fine-tune MODEL with QLoRA: 4-bit weights, LoRA adapters, TRL's SFTTrainer,
sharded by FSDP under torchrun. No rank ever holds the whole model.

Examples:

  One process, ten steps, to see that it works:

    surgery finetune ./model --data train.jsonl --max-steps 10

  Two ranks, the base model sharded, evaluated on 5 % every 50 steps:

    torchrun --nproc-per-node 2 -m surgery finetune meta-llama/Llama-3.1-8B \\
      --data train.jsonl --eval-fraction 0.05 --eval-strategy steps \\
      --eval-steps 50 --output ./adapter

  The same from a file, going on from the newest checkpoint:

    torchrun --nproc-per-node 2 -m surgery finetune --config run.yaml \\
      --resume-from-checkpoint

  where run.yaml has the names of options, such as

    model_name_or_path: meta-llama/Llama-3.1-8B
    data: [train.jsonl, {path: org/name, split: train_sft}]
    learning_rate: 1e-4

  From an adapter that was trained before, on other data:

    surgery finetune ./model --adapter ./adapter --data more.jsonl \\
      --output ./adapter-2

Data has the columns "messages" (and "tools"), "prompt" and "completion", or
"text". Completions and assistant turns are learnt; prompts are only read.

Exit codes: 0 done, 2 refused (the message says what to change), 130
interrupted, 143 terminated, 1 anything else."""

_DPO = """\
Usage: surgery dpo MODEL --data DATA [OPTIONS]

Teach MODEL what is preferred, with QLoRA: 4-bit weights, LoRA adapters, TRL's
DPOTrainer, sharded by FSDP under torchrun. The reference is the same base model
without its adapters, or with the one of --adapter as it was saved, so that no
base model is held twice.

Example:

    torchrun --nproc-per-node 2 -m surgery dpo ./model --data pairs.jsonl \\
      --beta 0.1 --output ./adapter

Data has the columns "prompt", "chosen" and "rejected", or the last two.

Exit codes: 0 done, 2 refused (the message says what to change), 130
interrupted, 143 terminated, 1 anything else."""


def finetune(context: typer.Context) -> None:
    """Fine-tune MODEL with QLoRA, by TRL's SFTTrainer."""
    _run(context.args, _FINETUNE, preferences=False)


def dpo(context: typer.Context) -> None:
    """Teach MODEL what is preferred, by TRL's DPOTrainer."""
    _run(context.args, _DPO, preferences=True)


def _run(words: Sequence[str], examples: str, *, preferences: bool) -> None:
    # A CPU kernel that inference could download; said by every rank.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # One library's notices to another, of names that will change.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\b")
        _parse_and_run(words, examples, preferences=preferences)


def _parse_and_run(words: Sequence[str], examples: str, *, preferences: bool) -> None:
    try:
        from surgery.finetune.job import plan_alone, run
        from surgery.finetune.parser import parse, show_help
    except ModuleNotFoundError as error:
        if error.name not in ("trl", "datasets"):
            raise
        raise ConfigError(
            f"this command trains with TRL, and {error.name} is not installed: pip install 'model-surgery[train]'"
        ) from error
    if not words or {"--help", "-h"} & set(words):
        typer.echo(show_help(examples, preferences=preferences))
        return
    request = parse(words, preferences=preferences)
    if request.options.plan != "only":
        run(request)
        return
    from surgery.planning.table import show

    made, memory = plan_alone(request)
    show(made, request.name, memory)
