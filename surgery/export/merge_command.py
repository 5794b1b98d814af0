"""The command `surgery merge`: adapters merged into a checkpoint. Nothing heavy is imported before it runs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from surgery.telemetry.numbers import parse_size

__all__ = ["EPILOG", "merge"]

EPILOG = """
Examples

An adapter merged into the model that it was trained on, in 16 bits:

  surgery merge meta-llama/Llama-3.1-8B ./adapter ./merged

Trained on packed weights, merged into the 16-bit ones that those were made of, and packed again:

  surgery merge meta-llama/Llama-3.1-8B ./adapter ./merged --dtype nf4

Half of one adapter, and the whole of another:

  surgery merge ./model ./style ./facts ./merged --weight 0.5 --weight 1

On 4 processes of one host, which share the tensors:

  torchrun --nproc-per-node 4 -m surgery merge ./model ./adapter ./merged

The values are those of PEFT's merge_and_unload. A few MiB are in memory at a time; what no adapter changes is copied.
The output is there whole or not at all, and has the names of the base's tensors. Stopped, the same command goes on.

Exit codes: 0 merged; 2 refused (the message says what to change).
"""

_of_result = partial(typer.Option, rich_help_panel="Result")


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A folder with a safetensors checkpoint, or a hub id.")],
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER", help="Folders, or hub ids, of LoRA adapters, in this order.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that is not there yet.")],
    *,
    weight: Annotated[
        list[float] | None,
        typer.Option(help="Of each adapter, in their order; repeated.", show_default="1 for all", metavar="NUMBER"),
    ] = None,
    model_revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a hub id.", show_default="what the adapter was trained on"),
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32", "nf4", "fp4"] | None,
        _of_result(help="Of the result; nf4 and fp4 pack linear weights.", show_default="as BASE, unpacked"),
    ] = None,
    use_bnb_nested_quant: Annotated[
        bool, _of_result(help="With nf4 or fp4, quantize the block statistics too.")
    ] = True,
    max_shard_size: Annotated[str, _of_result(help="Most bytes of a file, such as 5GB.")] = "5GB",
    overwrite: Annotated[bool, _of_result(help="Replace the checkpoint in OUT, with all that is in it.")] = False,
) -> None:
    """Merge LoRA adapters into a checkpoint, piece by piece, into one that loads without PEFT."""
    size = parse_size(max_shard_size)

    import torch

    from surgery.comm.environment import launched_world_size
    from surgery.config import Quant
    from surgery.export.merge import DTYPES
    from surgery.export.merge import merge as merge_adapters

    packs = dtype in ("nf4", "fp4")
    quant = Quant(dtype, double_quant=use_bnb_nested_quant) if packs else None  # type: ignore[arg-type]
    is_launched = (launched_world_size() or 1) > 1
    if is_launched:
        torch.distributed.init_process_group("gloo")
    try:
        merge_adapters(
            base,
            adapters,
            out,
            weights=weight or (),
            dtype=DTYPES.get(dtype or ""),
            quant=quant,
            revision=model_revision,
            overwrite=overwrite,
            max_shard_bytes=size,
            device=torch.device("cpu"),
        )
    finally:
        if is_launched:
            torch.distributed.destroy_process_group()
