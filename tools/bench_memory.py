"""Measure host memory while loading a checkpoint on several CPU ranks, against the bound and stock loading.

    python tools/bench_memory.py --markdown build/memory.md --json build/memory.json
    python tools/bench_memory.py --checkpoint build/llama-8b --ranks 4 --no-stock

Memory means anonymous memory above that of imports. Without `--checkpoint` a Llama of 1.1 GB in two large layers is
made. Exits with 1 if a rank exceeds the bound. With placement rank0-cpu the bound is the largest layer in 16 bits, all
`quant_state` and 64 MiB, plus the packed model on rank 0; with placement sharded it is this rank's part of the largest
layer and of the packed model, all `quant_state` and 64 MiB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from checkpoints.folder import build, is_complete
from checkpoints.llama import LlamaShape
from checkpoints.synthetic import SyntheticCheckpoint
from memory.measure import OURS, Measured
from memory.tables import bounds_table, phases_table, ways_table

#: Few large layers: the larger a layer is compared with the 64 MiB, the stricter the bound.
SHAPE = LlamaShape(layers=2, hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocab=32000, tie=True)

ROOT = Path(__file__).resolve().parent.parent
RANK = Path(__file__).with_name("bench_memory_rank.py")


def main(
    checkpoint: Annotated[Path | None, typer.Option(help="A Llama in 16 bits; default: made in build/.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 2,
    stock: Annotated[bool, typer.Option(help="Measure transformers' own loading too.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables that are printed.")] = None,
) -> None:
    """Measure host memory while loading a checkpoint on several CPU ranks."""
    source = checkpoint or _synthetic(ROOT / "build" / "llama-two-large-layers")
    ways = [*OURS, "stock"] if stock else OURS
    found = {way: _run(way, source, ranks) for way in ways}
    text = "\n\n".join(_tables(found))
    print(text)
    if markdown is not None:
        markdown.write_text(text + "\n", encoding="utf-8")
    if json_file is not None:
        values = {way: [measured.as_dict() for measured in by_rank] for way, by_rank in found.items()}
        json_file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if not all(_is_within(measured) for way in OURS for measured in found[way]):
        raise typer.Exit(1)


def _synthetic(folder: Path) -> Path:
    checkpoint = SyntheticCheckpoint(shape=SHAPE)
    if not is_complete(folder, checkpoint.recipe()):
        with build(folder, checkpoint.recipe()) as draft:
            list(checkpoint.write(draft, processes=1))
    return folder


def _run(way: str, checkpoint: Path, ranks: int) -> list[Measured]:
    """Load in one way on all ranks, as real processes; returns the measurement of each."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    with tempfile.TemporaryDirectory() as output:
        job = [str(RANK), way, str(checkpoint), output]
        subprocess.run([*torchrun, "--nproc-per-node", str(ranks), *job], env=environment, check=True)
        files = [Path(output, f"{way}-{rank}.json") for rank in range(ranks)]
        return [Measured.from_dict(json.loads(file.read_text(encoding="utf-8"))) for file in files]


def _tables(found: dict[str, list[Measured]]) -> list[str]:
    ours = {way: found[way] for way in OURS}
    tables = [bounds_table(ours), phases_table(ours)]
    return [*tables, ways_table(ours, found["stock"])] if "stock" in found else tables


def _is_within(measured: Measured) -> bool:
    assert measured.sizes is not None
    return measured.peak <= measured.sizes.bound


if __name__ == "__main__":
    typer.run(main)
