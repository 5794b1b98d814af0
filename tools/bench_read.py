"""Read a checkpoint in several ways, in turn, and compare: our reader, and fastsafetensors if it is installed.

    pip install --no-deps fastsafetensors
    PYTHONPATH=. python tools/bench_read.py build/llama-1gb

`streamed` works like loading: ranges pass through a few buffers that are reused. `kept` ends with every tensor in
memory of its own, like fastsafetensors. A first turn, which fills the page cache, is not counted.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from surgery.checkpoint import Index, Prefetch, Reader, Request, Segment
from surgery.passes.loading import CHUNK_ELEMENTS

OTHER = "fastsafetensors"


def main(
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder with safetensors files.")],
    turns: Annotated[int, typer.Option(min=1, help="How often each way is measured.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="That read at once.")] = min(8, os.cpu_count() or 1),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the seconds of every turn.")] = None,
) -> None:
    """Print the seconds of each way as a table."""
    index = Index.open(checkpoint)
    ways: dict[str, Callable[[], int]] = {
        "streamed": partial(_stream, index, threads),
        "kept": partial(_keep, index, threads),
    }
    if importlib.util.find_spec(OTHER) is not None:
        ways[OTHER] = partial(_fastsafetensors, checkpoint, threads)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in track(range(turns + 1), description="turns", console=Console(stderr=True), transient=True):
        for way, read in ways.items():
            start = time.perf_counter()
            found = read()
            if turn:
                seconds[way].append(round(time.perf_counter() - start, 3))
            if found != index.total_bytes:
                raise typer.BadParameter(f"{way} read {found} bytes of {index.total_bytes}")
    Console().print(_table(seconds, index.total_bytes, threads))
    if json_file is not None:
        json_file.write_text(json.dumps({"threads": threads, "bytes": index.total_bytes, "seconds": seconds}, indent=2))


def _table(seconds: dict[str, list[float]], size: int, threads: int) -> Table:
    table = Table("way", "seconds", "of turns", "GB/s", "relative", title=f"{size / 1e9:.2f} GB, {threads} threads")
    least = min(map(statistics.median, seconds.values()))
    for way, found in seconds.items():
        median = statistics.median(found)
        spread = f"{min(found):.2f} to {max(found):.2f}"
        table.add_row(way, f"{median:.2f}", spread, f"{size / median / 1e9:.1f}", f"{median / least:.1f}")
    return table


def _stream(index: Index, threads: int) -> int:
    wholes = [Segment(entry=entry) for entry in index.values() if entry.numel]
    requests = [Request(segments=(whole,), start=0, stop=whole.stop) for whole in wholes]
    count = 0
    with (
        Reader(index) as reader,
        Prefetch(
            reader, requests, chunk_elements=CHUNK_ELEMENTS["cpu"], buffers=threads + 2, threads=threads
        ) as prefetch,
        contextlib.suppress(IndexError),  # after the last chunk
    ):
        while True:
            chunk = prefetch.next()
            count += chunk.data.nbytes
            chunk.release()
    return count


def _keep(index: Index, threads: int) -> int:
    with Reader(index) as reader, ThreadPoolExecutor(threads) as pool:
        return sum(tensor.nbytes for tensor in list(pool.map(reader.read, index.values())))


def _fastsafetensors(checkpoint: Path, threads: int) -> int:
    other: Any = importlib.import_module(OTHER)
    loader = other.SafeTensorsFileLoader(other.SingleGroup(), torch.device("cpu"), nogds=True, max_threads=threads)
    try:
        loader.add_filenames({0: [str(file) for file in sorted(checkpoint.glob("*.safetensors"))]})
        buffer = loader.copy_files_to_device()
        try:
            return sum(buffer.get_tensor(key).nbytes for key in list(buffer.key_to_rank_lidx))
        finally:
            buffer.close()
    finally:
        loader.close()


if __name__ == "__main__":
    typer.run(main)
