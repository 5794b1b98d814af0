"""The command `surgery plan`: a table of what every rank would need. Nothing heavy is imported before it runs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from surgery.planning.arguments import (
    FsdpVersion,
    OptimizerName,
    PrecisionName,
    QuantStorageName,
    QuantType,
    parse_lora,
    parse_mesh,
    parse_shard,
    parse_storage,
)

if TYPE_CHECKING:
    from surgery.planning.plan import MemoryPlan

__all__ = ["EPILOG", "plan", "show"]

DOES_NOT_FIT = 1

#: Columns of text that a table may take.
WIDEST = 400

EPILOG = """
Examples

Does a 70B model fit two GPUs of 24 GiB? If not, what would make it fit?

  surgery plan meta-llama/Llama-3.1-70B --world 2 --gpu-memory 24GiB

With activations recomputed in backward, as the answer may be:

  surgery plan meta-llama/Llama-3.1-70B --world 2 --gpu-memory 24GiB --activation-checkpointing

FSDP1 in its low-memory mode, and what rank 0's host must have for it:

  surgery plan ./model --world 8 --fsdp 1 --placement rank0-cpu

Of a hub id only the headers of the files are fetched; no weight is downloaded or read. Sizes are above what a process
holds before it loads; the driver, cuBLAS and NCCL take their part of --gpu-memory too, and that is counted.

Exit codes: 0 it fits, or no --gpu-memory was given; 1 it does not fit; 2 refused (the message says what
to change).
"""

_of_training = partial(typer.Option, rich_help_panel="Training")
_of_adapter = partial(typer.Option, rich_help_panel="Adapter")
_of_precision = partial(typer.Option, rich_help_panel="Quantization and precision")
_of_ranks = partial(typer.Option, rich_help_panel="Ranks and sharding")


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder with a safetensors checkpoint, or a hub id.", show_default=False
        ),
    ],
    *,
    world: Annotated[int, _of_ranks(help="Number of ranks.")] = 1,
    gpu_memory: Annotated[str | None, _of_ranks(help="Of each GPU, such as 24GiB: says whether it fits.")] = None,
    fsdp: Annotated[FsdpVersion, _of_ranks(help="Which FSDP, on several ranks.")] = "2",
    placement: Annotated[
        str | None,
        _of_ranks(
            help="Where weights wait to be sharded: sharded, rank0-cpu or replicated.",
            show_default="sharded; rank0-cpu with --fsdp 1",
        ),
    ] = None,
    mesh: Annotated[str | None, _of_ranks(help="REPLICATExSHARD, for hybrid sharding.", metavar="RxS")] = None,
    cpu_offload: Annotated[bool, _of_ranks("--cpu-offload", help="Keep shards on the CPU between uses.")] = False,
    device: Annotated[Literal["cuda", "cpu"], _of_ranks(help="What ranks compute on.")] = "cuda",
    seq: Annotated[int, _of_training(help="Tokens a sample.")] = 1024,
    batch: Annotated[int, _of_training(help="Samples a rank puts through the model at once.")] = 1,
    optimizer: Annotated[OptimizerName, _of_training(help="The optimizer.")] = "adamw",
    activation_checkpointing: Annotated[
        bool, _of_training("--activation-checkpointing", help="Recompute activations in backward.")
    ] = False,
    lora_r: Annotated[int, _of_adapter(help="Rank of the adapters.")] = 16,
    target_modules: Annotated[
        str, _of_adapter(help="Comma-separated names of linear modules, such as q_proj,v_proj; or all-linear.")
    ] = "all-linear",
    precision: Annotated[
        PrecisionName, _of_precision(help="Dtype of what is not quantized, and how it computes.")
    ] = "bf16",
    quant_type: Annotated[QuantType, _of_precision(help="The 4-bit data type.")] = "nf4",
    blocksize: Annotated[int, _of_precision(help="Weights that share one statistic.")] = 64,
    double_quant: Annotated[bool, _of_precision(help="Quantize the block statistics too.")] = True,
    quant_storage: Annotated[
        QuantStorageName, _of_precision(help="Dtype that packs the 4-bit weights; auto fits the precision.")
    ] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Plan the memory of fine-tuning MODEL: what every rank would read, hold and peak at, before anything is loaded."""
    import torch

    from surgery.checkpoint.peek import peek
    from surgery.config import Quant
    from surgery.config import precision as policy_of
    from surgery.passes.prepare import prepare
    from surgery.passes.setting import Setting
    from surgery.planning.inventory import take_inventory
    from surgery.planning.plan import make_plan
    from surgery.planning.training import Training
    from surgery.telemetry.numbers import parse_size

    memory = parse_size(gpu_memory) if gpu_memory is not None else None
    policy = policy_of(precision)
    setting = Setting(
        world_size=world,
        placement=placement,
        shard=_sharding(fsdp, world=world, mesh=mesh, cpu_offload=cpu_offload),
        quant=Quant(
            quant_type, blocksize=blocksize, double_quant=double_quant, quant_storage=parse_storage(quant_storage)
        ),
        lora=parse_lora(lora_r, target_modules),
        dtype=policy.dtype,
        compute_dtype=policy.compute_dtype,
        device=torch.device(device),
    )
    training = Training(batch=batch, seq=seq, optimizer=optimizer, checkpointing=activation_checkpointing)
    inventory = take_inventory(prepare(peek(model, revision=revision), setting))
    show(make_plan(inventory, setting, training), model, memory, as_json=as_json)


def _sharding(fsdp: FsdpVersion, *, world: int, mesh: str | None, cpu_offload: bool) -> Any:
    """The sharding of several ranks; None for one, which is not sharded."""
    from surgery.errors import ConfigError

    if world > 1:
        return parse_shard(fsdp, mesh=parse_mesh(mesh), cpu_offload=cpu_offload)
    if mesh is not None or cpu_offload:
        raise ConfigError(
            "expected --world of 2 or more with --mesh or --cpu-offload, found 1: one rank is not sharded"
        )
    return None


def show(made: MemoryPlan, model: str, memory: int | None, *, as_json: bool = False) -> None:
    """Print the plan and the verdict; exit 1 if it does not fit."""
    import json

    from rich.console import Console
    from rich.measure import Measurement

    from surgery.planning.table import headline, notes, render
    from surgery.planning.verdict import as_dict, fits_gpu, say

    if as_json:
        typer.echo(json.dumps({"model": model, **made.as_dict(), **as_dict(made, memory)}, indent=1))
    else:
        console, table = Console(highlight=False, soft_wrap=True), render(made)
        # Wider than the terminal rather than cut off: every figure counts.
        needed = Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum
        console.width = max(console.width, needed)
        console.print(headline(made, model), markup=False)
        console.print(table)
        for line in (*notes(made), *say(made, memory)):
            console.print(line, markup=False)
    if memory is not None and not fits_gpu(made, memory):
        raise typer.Exit(DOES_NOT_FIT)
