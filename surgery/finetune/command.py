"""The command `surgery finetune`: options in, a `Job` out. Nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from surgery.finetune.arguments import parse_list, parse_mesh, parse_shard, parse_storage, parse_targets, parse_timeout
from surgery.finetune.choices import (
    ActivationCheckpointing,
    FsdpVersion,
    LoggerName,
    LoraInit,
    OptimizerName,
    PrecisionName,
    QuantStorageName,
    QuantType,
    ScheduleName,
    StrategyName,
)

__all__ = ["EPILOG", "finetune"]

# A blank line ends a paragraph; \b keeps the lines of one as they are.
EPILOG = """
[bold]Examples[/bold]

One process, ten steps, to see that it works:

  surgery finetune ./model --data train.jsonl --max-steps 10

Two ranks, the base model sharded, evaluated on 5 % of the data every 50 steps:

  torchrun --nproc-per-node 2 -m surgery finetune meta-llama/Llama-3.1-8B --data train.jsonl --eval-fraction
  0.05 --eval-every 50 --activation-checkpointing non-reentrant --output ./adapter

[bold]Data[/bold] is JSONL, one object a line: {"text"}, {"prompt", "completion"} or {"messages": [{"role",
"content"}]}, the last with "tools" if you like. Completions and assistant turns are learnt; prompts and other turns are
only read. Other keys are refused.

[bold]Exit codes[/bold]: 0 done, 2 refused (the message says what to change), 130 interrupted, 143 terminated, 1
anything else.
"""

_DATA = "Data"
_TRAINING = "Training"
_ADAPTER = "Adapter"
_QUANTIZATION = "Quantization and precision"
_SHARDING = "Sharding and memory"
_OUTPUT = "Output"


def finetune(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder with a safetensors checkpoint, or a hub id.", show_default=False
        ),
    ],
    *,
    data: Annotated[Path, typer.Option(help="Training data: a JSONL file.", rich_help_panel=_DATA, show_default=False)],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id.", rich_help_panel=_DATA)
    ] = None,
    eval_data: Annotated[Path | None, typer.Option(help="A JSONL file to evaluate on.", rich_help_panel=_DATA)] = None,
    eval_fraction: Annotated[
        float | None,
        typer.Option(help="Evaluate on this fraction of --data, which is then not trained on.", rich_help_panel=_DATA),
    ] = None,
    max_length: Annotated[
        int, typer.Option(help="Tokens a sample; the rest is cut off, and said.", rich_help_panel=_DATA)
    ] = 1024,
    output: Annotated[
        Path,
        typer.Option(help="Folder for the adapter (PEFT format), tokenizer and summary.json.", rich_help_panel=_OUTPUT),
    ] = Path("adapter"),
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an adapter that is there, or files of its names.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    metrics: Annotated[
        Path | None,
        typer.Option(
            help="Write one JSON object a step: step, loss, lr, grad_norm, tokens_per_s.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write what every rank did to this folder: trace.html shows memory over time, phases, bytes read.",
            metavar="DIR",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    attest: Annotated[
        bool,
        typer.Option(
            "--attest",
            help="Check that the base model stays, bit for bit, what was quantized; stop where it does not.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    log: Annotated[
        str,
        typer.Option(help="Comma-separated: tensorboard, wandb.", rich_help_panel=_OUTPUT, show_default="none"),
    ] = "",
    max_steps: Annotated[
        int | None,
        typer.Option(help="Stop after so many steps; repeats the data if no --epochs.", rich_help_panel=_TRAINING),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="How often to go through the data.",
            rich_help_panel=_TRAINING,
            show_default="1 if no --max-steps",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Samples a rank puts through the model at once.", rich_help_panel=_TRAINING)
    ] = 1,
    grad_accumulation: Annotated[
        int, typer.Option(help="Batches a rank adds up before a step.", rich_help_panel=_TRAINING)
    ] = 1,
    lr: Annotated[float, typer.Option(help="Highest learning rate.", rich_help_panel=_TRAINING)] = 2e-4,
    schedule: Annotated[
        ScheduleName,
        typer.Option(help="How the learning rate falls after the warmup.", rich_help_panel=_TRAINING),
    ] = "cosine",
    warmup_steps: Annotated[
        int, typer.Option(help="Steps until the highest learning rate.", rich_help_panel=_TRAINING)
    ] = 0,
    optimizer: Annotated[OptimizerName, typer.Option(help="The optimizer.", rich_help_panel=_TRAINING)] = "adamw",
    weight_decay: Annotated[float, typer.Option(help="Of the adapter's weights.", rich_help_panel=_TRAINING)] = 0.0,
    clip: Annotated[
        float, typer.Option(help="Largest norm of the gradients; 0 does not clip.", rich_help_panel=_TRAINING)
    ] = 1.0,
    seed: Annotated[
        int,
        typer.Option(help="Of the adapter's start, dropout, and the order of samples.", rich_help_panel=_TRAINING),
    ] = 0,
    eval_every: Annotated[
        int | None,
        typer.Option(help="Steps between evaluations; always before and after training.", rich_help_panel=_TRAINING),
    ] = None,
    lora_r: Annotated[int, typer.Option(help="Rank of the adapters.", rich_help_panel=_ADAPTER)] = 16,
    lora_alpha: Annotated[int, typer.Option(help="Adapters are scaled by alpha / r.", rich_help_panel=_ADAPTER)] = 32,
    lora_dropout: Annotated[float, typer.Option(help="Before the adapters.", rich_help_panel=_ADAPTER)] = 0.0,
    target_modules: Annotated[
        str,
        typer.Option(
            help="Comma-separated names of linear modules, such as q_proj,v_proj; or all-linear.",
            rich_help_panel=_ADAPTER,
        ),
    ] = "all-linear",
    lora_init: Annotated[
        LoraInit,
        typer.Option(
            help="How adapters start. pissa and olora need 16-bit weights and are refused.",
            rich_help_panel=_ADAPTER,
        ),
    ] = "default",
    dora: Annotated[
        bool,
        typer.Option(
            "--dora",
            help="Weight-decomposed adapters; several ranks need --no-low-memory (FSDP1: and --use-orig-params).",
            rich_help_panel=_ADAPTER,
        ),
    ] = False,
    precision: Annotated[
        PrecisionName,
        typer.Option(help="Dtype of what is not quantized, and how it computes.", rich_help_panel=_QUANTIZATION),
    ] = "bf16",
    quant_type: Annotated[QuantType, typer.Option(help="The 4-bit data type.", rich_help_panel=_QUANTIZATION)] = "nf4",
    double_quant: Annotated[
        bool, typer.Option(help="Quantize the block statistics too.", rich_help_panel=_QUANTIZATION)
    ] = True,
    blocksize: Annotated[
        int, typer.Option(help="Weights that share one statistic.", rich_help_panel=_QUANTIZATION)
    ] = 64,
    quant_storage: Annotated[
        QuantStorageName,
        typer.Option(
            help="Dtype that packs the 4-bit weights; auto fits the precision.", rich_help_panel=_QUANTIZATION
        ),
    ] = "auto",
    fsdp: Annotated[
        FsdpVersion,
        typer.Option(help="Which FSDP shards the model on several ranks.", rich_help_panel=_SHARDING),
    ] = "2",
    low_memory: Annotated[
        bool,
        typer.Option(
            help="Load on each rank its shard alone (FSDP1: all on rank 0's CPU); else all on every device.",
            rich_help_panel=_SHARDING,
        ),
    ] = True,
    mesh: Annotated[
        str | None,
        typer.Option(
            help="REPLICATExSHARD, such as 2x4 on 8 ranks: shard over 4, twice.",
            rich_help_panel=_SHARDING,
            metavar="RxS",
        ),
    ] = None,
    reshard_after_forward: Annotated[
        bool | None,
        typer.Option(help="FSDP2: gather a block again for backward, or keep it.", rich_help_panel=_SHARDING),
    ] = None,
    sharding: Annotated[
        StrategyName | None,
        typer.Option(help="FSDP1: its strategy.", rich_help_panel=_SHARDING, show_default="full-shard"),
    ] = None,
    use_orig_params: Annotated[
        bool | None,
        typer.Option(help="FSDP1: keep each parameter, or make flat ones.", rich_help_panel=_SHARDING),
    ] = None,
    activation_checkpointing: Annotated[
        ActivationCheckpointing,
        typer.Option(help="Recompute activations in backward.", rich_help_panel=_SHARDING),
    ] = "none",
    activation_offload: Annotated[
        bool,
        typer.Option(
            "--activation-offload",
            help="Keep checkpointed activations on the CPU.",
            rich_help_panel=_SHARDING,
        ),
    ] = False,
    cpu_offload: Annotated[
        bool,
        typer.Option("--cpu-offload", help="Keep parameters on the CPU between uses.", rich_help_panel=_SHARDING),
    ] = False,
    timeout: Annotated[float, typer.Option(help="Minutes to wait for another rank.", rich_help_panel=_SHARDING)] = 10.0,
) -> None:
    """Fine-tune MODEL with QLoRA: 4-bit weights, LoRA adapters, sharded by FSDP under torchrun."""
    from surgery.config import Quant
    from surgery.finetune.job import run
    from surgery.finetune.options import DataOptions, Job, LoraOptions, TrainingOptions
    from surgery.sharding.base import strategy_for

    shard = parse_shard(
        fsdp,
        mesh=parse_mesh(mesh),
        cpu_offload=cpu_offload,
        sharding=sharding,
        use_orig_params=use_orig_params,
        reshard_after_forward=reshard_after_forward,
    )
    job = Job(
        model=model,
        revision=revision,
        data=DataOptions(train=data, evaluation=eval_data, evaluation_fraction=eval_fraction, max_length=max_length),
        training=TrainingOptions(
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            accumulation=grad_accumulation,
            optimizer=optimizer,
            lr=lr,
            schedule=schedule,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            clip=clip or None,
            seed=seed,
            evaluate_every=eval_every,
            activation_checkpointing=activation_checkpointing,
            activation_offload=activation_offload,
        ),
        lora=LoraOptions(
            r=lora_r,
            alpha=lora_alpha,
            dropout=lora_dropout,
            target_modules=parse_targets(target_modules),
            init=lora_init,
            dora=dora,
        ),
        quant=Quant(
            quant_type,
            blocksize=blocksize,
            double_quant=double_quant,
            quant_storage=parse_storage(quant_storage),
        ),
        precision=precision,
        placement=None if low_memory else strategy_for(shard).placements[-1],
        shard=shard,
        output=output,
        overwrite=overwrite,
        metrics=metrics,
        trace=trace,
        attest=attest,
        loggers=cast("tuple[LoggerName, ...]", parse_list(log)),  # the job checks the names
        timeout=parse_timeout(timeout),
    )
    run(job)
