"""The command `surgery finetune`: options in, a `Job` out. Nothing heavy is imported before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from surgery.finetune.arguments import (
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
    panel,
    parse_list,
    parse_mesh,
    parse_shard,
    parse_storage,
    parse_targets,
    parse_timeout,
)

__all__ = ["EPILOG", "finetune"]

# A blank line ends a paragraph; \b keeps the lines of one as they are.
EPILOG = """
Examples

One process, ten steps, to see that it works:

  surgery finetune ./model --data train.jsonl --max-steps 10

Two ranks, the base model sharded, evaluated on 5 % of the data every 50 steps:

  torchrun --nproc-per-node 2 -m surgery finetune meta-llama/Llama-3.1-8B --data train.jsonl --eval-fraction
  0.05 --eval-every 50 --activation-checkpointing non-reentrant --output ./adapter

Data is JSONL, one object a line: {"text"}, {"prompt", "completion"} or {"messages": [{"role",
"content"}]}, the last with "tools" if you like. Completions and assistant turns are learnt; prompts and other turns are
only read. Other keys are refused.

Exit codes: 0 done, 2 refused (the message says what to change), 130 interrupted, 143 terminated, 1
anything else.
"""


_data = panel("Data")
_training = panel("Training")
_adapter = panel("Adapter")
_quantization = panel("Quantization and precision")
_sharding = panel("Sharding and memory")
_output = panel("Output")


def finetune(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder with a safetensors checkpoint, or a hub id.", show_default=False
        ),
    ],
    *,
    data: Annotated[Path, _data("Training data: a JSONL file.", show_default=False)],
    revision: Annotated[str | None, _data("Branch, tag or commit of a hub id.")] = None,
    eval_data: Annotated[Path | None, _data("A JSONL file to evaluate on.")] = None,
    eval_fraction: Annotated[
        float | None, _data("Evaluate on this fraction of --data, which is then not trained on.")
    ] = None,
    max_length: Annotated[int, _data("Tokens a sample; the rest is cut off, and said.")] = 1024,
    output: Annotated[Path, _output("Folder for the adapter (PEFT format), tokenizer and summary.json.")] = Path(
        "adapter"
    ),
    overwrite: Annotated[
        bool, _output("Replace an adapter that is there, or files of its names.", "--overwrite")
    ] = False,
    metrics: Annotated[
        Path | None, _output("Write one JSON object a step: step, loss, lr, grad_norm, tokens_per_s.")
    ] = None,
    trace: Annotated[
        Path | None,
        _output(
            "Write what every rank did to this folder: trace.html shows memory over time, phases, bytes read.",
            metavar="DIR",
        ),
    ] = None,
    attest: Annotated[
        bool,
        _output(
            "Check that the base model stays, bit for bit, what was quantized; stop where it does not.", "--attest"
        ),
    ] = False,
    log: Annotated[str, _output("Comma-separated: tensorboard, wandb.", show_default="none")] = "",
    max_steps: Annotated[int | None, _training("Stop after so many steps; repeats the data if no --epochs.")] = None,
    epochs: Annotated[
        int | None, _training("How often to go through the data.", show_default="1 if no --max-steps")
    ] = None,
    batch_size: Annotated[int, _training("Samples a rank puts through the model at once.")] = 1,
    grad_accumulation: Annotated[int, _training("Batches a rank adds up before a step.")] = 1,
    lr: Annotated[float, _training("Highest learning rate.")] = 2e-4,
    schedule: Annotated[ScheduleName, _training("How the learning rate falls after the warmup.")] = "cosine",
    warmup_steps: Annotated[int, _training("Steps until the highest learning rate.")] = 0,
    optimizer: Annotated[OptimizerName, _training("The optimizer.")] = "adamw",
    weight_decay: Annotated[float, _training("Of the adapter's weights.")] = 0.0,
    clip: Annotated[float, _training("Largest norm of the gradients; 0 does not clip.")] = 1.0,
    seed: Annotated[int, _training("Of the adapter's start, dropout, and the order of samples.")] = 0,
    eval_every: Annotated[int | None, _training("Steps between evaluations; always before and after training.")] = None,
    lora_r: Annotated[int, _adapter("Rank of the adapters.")] = 16,
    lora_alpha: Annotated[int, _adapter("Adapters are scaled by alpha / r.")] = 32,
    lora_dropout: Annotated[float, _adapter("Before the adapters.")] = 0.0,
    target_modules: Annotated[
        str, _adapter("Comma-separated names of linear modules, such as q_proj,v_proj; or all-linear.")
    ] = "all-linear",
    lora_init: Annotated[
        LoraInit, _adapter("How adapters start. pissa and olora need 16-bit weights and are refused.")
    ] = "default",
    dora: Annotated[
        bool,
        _adapter(
            "Weight-decomposed adapters; several ranks need --no-low-memory (FSDP1: and --use-orig-params).", "--dora"
        ),
    ] = False,
    precision: Annotated[PrecisionName, _quantization("Dtype of what is not quantized, and how it computes.")] = "bf16",
    quant_type: Annotated[QuantType, _quantization("The 4-bit data type.")] = "nf4",
    double_quant: Annotated[bool, _quantization("Quantize the block statistics too.")] = True,
    blocksize: Annotated[int, _quantization("Weights that share one statistic.")] = 64,
    quant_storage: Annotated[
        QuantStorageName, _quantization("Dtype that packs the 4-bit weights; auto fits the precision.")
    ] = "auto",
    fsdp: Annotated[FsdpVersion, _sharding("Which FSDP shards the model on several ranks.")] = "2",
    low_memory: Annotated[
        bool, _sharding("Load on each rank its shard alone (FSDP1: all on rank 0's CPU); else all on every device.")
    ] = True,
    mesh: Annotated[
        str | None, _sharding("REPLICATExSHARD, such as 2x4 on 8 ranks: shard over 4, twice.", metavar="RxS")
    ] = None,
    reshard_after_forward: Annotated[
        bool | None, _sharding("FSDP2: gather a block again for backward, or keep it.")
    ] = None,
    sharding: Annotated[StrategyName | None, _sharding("FSDP1: its strategy.", show_default="full-shard")] = None,
    use_orig_params: Annotated[bool | None, _sharding("FSDP1: keep each parameter, or make flat ones.")] = None,
    activation_checkpointing: Annotated[
        ActivationCheckpointing, _sharding("Recompute activations in backward.")
    ] = "none",
    activation_offload: Annotated[
        bool, _sharding("Keep checkpointed activations on the CPU.", "--activation-offload")
    ] = False,
    cpu_offload: Annotated[bool, _sharding("Keep parameters on the CPU between uses.", "--cpu-offload")] = False,
    timeout: Annotated[float, _sharding("Minutes to wait for another rank.")] = 10.0,
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
