"""Load a mixture of experts in several ways, with LoRA on attention and experts, train it for some steps, and compare.

    PYTHONPATH=. python tools/bench_experts.py --checkpoint /dev/shm/qwen3-30b-a3b --ways ours,split,fold,parametrized
    PYTHONPATH=. python tools/bench_experts.py --checkpoint /dev/shm/glm-4.5-air --ways ours --ranks 2

Ways: `ours` has experts in 4 bits; in `split` they are in 16 bits, with the same split LoRA over `grouped_mm`, by which
a step is measured; `fold` is transformers with bitsandbytes, whose experts are in 16 bits, and PEFT; `parametrized` is
axolotl's way, bitsandbytes' parametrization of each stack. Attention is in nf4 in all of them, adapters and the rest in
bfloat16. Each way has processes of its own; one that fails or runs out of memory is a result, and the next one runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from experts.measure import Found, Options, measure
from experts.ways import LOADERS
from loading.batches import Batch
from loading.launch import environment_of, wait
from loading.tables import table

GIB = 1024**3

LOG_LINES = 40


def main(
    checkpoint: Annotated[Path, typer.Option(help="Folder of a mixture of experts (see make_checkpoint.py).")],
    ways: Annotated[str, typer.Option(help=f"Some of {','.join(LOADERS)}.")] = ",".join(LOADERS),
    ranks: Annotated[int, typer.Option(min=1, help="Processes; only `ours` can have several.")] = 1,
    batches: Annotated[
        str, typer.Option(help="Sequences x tokens; c: with activation checkpointing, which stays.")
    ] = "1x1024c,4x2048c",
    steps: Annotated[int, typer.Option(min=1, help="Of each batch; the first two are not in the median.")] = 8,
    lora_rank: Annotated[int, typer.Option(min=1, help="Of every adapter.")] = 16,
    double_quant: Annotated[bool, typer.Option(help="Quantize the statistics too.")] = True,
    memory_cap: Annotated[float | None, typer.Option(help="GiB that `ours` may take of each GPU.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda" if torch.cuda.is_available() else "cpu",
    limit: Annotated[int, typer.Option(help="Seconds for each way.")] = 240,
    json_file: Annotated[Path | None, typer.Option("--json", help="Add a line a way; tables are of all in it.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Folder for a profile of each way, on the first batch.")] = None,
    one_way: Annotated[str | None, typer.Option(hidden=True, help="Options of one way, for one rank of it.")] = None,
) -> None:
    """Load a mixture of experts in several ways, train it, and compare."""
    if one_way is not None:
        values = json.loads(one_way)
        measure(Options(**{**values, "batches": tuple(values["batches"])}), checkpoint)
        return
    names = ways.split(",")
    if unknown := [way for way in names if way not in LOADERS] or [way for way in names if ranks > 1 and way != "ours"]:
        raise typer.BadParameter(f"expected some of {', '.join(LOADERS)}, `ours` alone on several ranks; got {unknown}")
    for batch in batches.split(","):
        Batch.of(batch)
    if profile is not None:
        profile.mkdir(parents=True, exist_ok=True)
    found = _earlier(json_file)
    for way in names:
        options = Options(
            way=way,
            checkpoint=str(checkpoint.resolve()),
            ranks=ranks,
            device=device,
            batches=tuple(batches.split(",")),
            steps=steps,
            lora_rank=lora_rank,
            double_quant=double_quant,
            memory_cap=memory_cap if way == "ours" else None,
            profile=None if profile is None else str(profile.resolve()),
        )
        found.append(_measured(options, limit))
        line = json.dumps(asdict(found[-1]))
        print(line, flush=True)
        if json_file is not None:
            with json_file.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
    print("\n\n".join([_loading(found), _training(found)]), flush=True)
    if any(each.error not in (None, "out of memory") for each in found[-len(names) :]):
        raise typer.Exit(1)


def _earlier(json_file: Path | None) -> list[Found]:
    if json_file is None or not json_file.exists():
        return []
    return [Found(**json.loads(line)) for line in json_file.read_text(encoding="utf-8").splitlines()]


def _measured(options: Options, limit: int) -> Found:
    """Run one way under torchrun; what it had found before it failed, if it did."""
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(options.ranks)]
    with tempfile.TemporaryDirectory() as folder:
        into, log = Path(folder, "found.json"), Path(folder, "log")
        job = [str(Path(__file__)), "--checkpoint", str(into), "--one-way", json.dumps(asdict(options))]
        with log.open("w", encoding="utf-8") as stream:
            child = subprocess.Popen(
                [*torchrun, *job],
                env=environment_of(options.ranks, options.device),
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
            failure = wait(child, limit)
        found = Found(way=options.way, ranks=options.ranks, memory_cap=options.memory_cap)
        if into.exists():
            found = Found(**json.loads(into.read_text(encoding="utf-8")))
        if failure is not None:
            found.error = found.error or failure
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(lines[-LOG_LINES:]), file=sys.stderr, flush=True)
        return found


def _loading(found: list[Found]) -> str:
    head = ("way", "ready, s", "peak at load, GiB", "held, GiB", "host peak, GiB", "read, GB")
    rows = [
        (
            _label(each),
            each.error or f"{each.ready:.1f}",
            *(f"{size / GIB:.2f}" for size in (each.load_peak, each.held, each.host)),
            f"{each.bytes_read / 1e9:.2f}",
        )
        for each in found
    ]
    return table(head, rows)


def _training(found: list[Found]) -> str:
    head = ("batch", "way", "step, s", "of split", "tokens/s", "peak, GiB", "reserved, GiB", "first loss", "last loss")
    measured = {(batch, _label(each)): step for each in found for batch, step in each.steps.items()}
    rows = []
    for (batch, way), step in sorted(measured.items(), key=lambda item: item[0][0]):
        if "error" in step:
            rows.append((batch, way, step["error"]))
            continue
        base = measured.get((batch, "split"), {}).get("step")
        rows.append(
            (
                batch,
                way,
                f"{step['step']:.3f}",
                f"{step['step'] / base:.2f}" if base else "",
                step["tokens_per_second"],
                *(f"{step[name] / GIB:.2f}" for name in ("peak", "reserved")),
                *(f"{step['losses'][place]:.6f}" for place in (0, -1)),
            )
        )
    return table(head, rows)


def _label(found: Found) -> str:
    cap = f" in {found.memory_cap:g} GiB" if found.memory_cap else ""
    return f"{found.way}{cap}{f' on {found.ranks}' if found.ranks > 1 else ''}"


if __name__ == "__main__":
    typer.run(main)
