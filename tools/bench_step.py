"""Take training steps in several ways on the same GPUs, in turns, and compare.

    PYTHONPATH=. python tools/bench_step.py compare --checkpoint build/llama-8b --ways ours,ours:liger,stock:liger
    PYTHONPATH=. python tools/bench_step.py report build/one.jsonl build/two.jsonl --svg docs/images/step.svg

Ways, with options after a colon, and the number of processes after an @ where it is not --ranks: `ours` (fused, liger,
compile, graphs, offload; on several ranks FSDP2, with kept gathered until backward, or with ddp whole), `stock` (plain
transformers and PEFT; axolotl's LoRA kernels, liger, ddp), `accelerate` (its FSDP2; axolotl, liger), `unsloth` (ddp;
fsdp2 or, with frozen weights sharded too, sharded; balanced spreads layers over GPUs). They are separated by blanks.

All have the same 4-bit weights, adapters and tokens. Each way has processes of its own, which load once and then play
in turns; a way that fails or runs out of memory is a result, and the others go on.
"""

from __future__ import annotations

import json
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import torch
import typer

from loading.batches import Batch
from step.found import Found, chart, read, tables, write
from step.options import Options, Way
from step.stage import Plan, perform

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Markdown = Annotated[Path | None, typer.Option(help="Write the tables that are printed.")]
Svg = Annotated[Path | None, typer.Option(help="Write a plot.")]


@app.command()
def compare(
    checkpoint: Annotated[Path, typer.Option(help="Folder of a Llama in 16 bits (see make_checkpoint.py).")],
    ways: Annotated[str, typer.Option(help="Ways, separated by blanks.")],
    ranks: Annotated[int, typer.Option(min=1, help="Processes of a way, one a GPU.")] = 1,
    batches: Annotated[
        str, typer.Option(help="Sequences x tokens; c: with activation checkpointing, which stays.")
    ] = "1x1024,4x2048c",
    steps: Annotated[int, typer.Option(min=1, help="Of a turn.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each way on each batch.")] = 2,
    longest: Annotated[int | None, typer.Option(help="Find the longest sequence up to this, too.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda" if torch.cuda.is_available() else "cpu",
    memory_cap: Annotated[float | None, typer.Option(help="GiB that torch may take of each GPU.")] = None,
    turn_limit: Annotated[float, typer.Option(help="Seconds for loading, and for a turn.")] = 150,
    limit: Annotated[float, typer.Option(help="Seconds after which no other turn begins.")] = 540,
    logs: Annotated[Path, typer.Option(help="Folder for what the processes print.")] = Path("build/bench_step"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write a line for each way and batch.")] = None,
    markdown: Markdown = None,
    svg: Svg = None,
) -> None:
    """Measure."""
    plan = Plan(
        checkpoint=checkpoint,
        ways=tuple(ways.split()),
        ranks=ranks,
        batches=tuple(batches.split(",")),
        steps=steps,
        repeats=repeats,
        longest=longest,
        device=device,
        memory_cap=memory_cap,
        turn_limit=turn_limit,
        limit=limit,
        logs=logs,
    )
    for name in plan.ways:
        Way.of(name)
    for batch in plan.batches:
        Batch.of(batch)

    def save(found: list[Found]) -> None:
        if json_file is not None:
            write(json_file, found)

    found = perform(plan, save)
    _report(found, markdown=markdown, svg=svg)
    if any(each.error not in (None, "out of memory") for each in found):
        raise typer.Exit(1)


@app.command()
def report(files: list[Path], markdown: Markdown = None, svg: Svg = None) -> None:
    """Make tables and a plot of what has been measured."""
    _report(read(files), markdown=markdown, svg=svg)


def _report(found: list[Found], *, markdown: Path | None, svg: Path | None) -> None:
    text = tables(found)
    print(text, flush=True)
    if markdown is not None:
        markdown.write_text(text + "\n", encoding="utf-8")
    if svg is not None:
        svg.write_text(chart(found) + "\n", encoding="utf-8")


@app.command(hidden=True)
def play(descriptor: int, options: str) -> None:
    """Play one way on one rank, as told through a connection."""
    from step.player import play as play_way

    play_way(Connection(descriptor), Options(**json.loads(options)))


if __name__ == "__main__":
    app()
