"""Compare `surgery merge` with PEFT's `merge_and_unload` and `save_pretrained`: seconds, and peak anonymous memory.

    python tools/make_checkpoint.py synthetic build/llama-4gb --shape llama-8b --layers 18 --hidden 3072 \
        --intermediate 8192 --heads 24 --vocab 32000
    python tools/bench_merge.py build/llama-4gb build/merged

Each way is a process of its own; what is counted begins when everything is imported. Both outputs are compared.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from surgery.telemetry.measurements import Sampler, anonymous_memory

RANK = 16


def make_adapter(base: Path, folder: Path) -> None:
    """Save a LoRA adapter of all linear modules with random values."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        described = AutoConfig.from_pretrained(base, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(described, trust_remote_code=False)
        config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=32, target_modules="all-linear")
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(0)
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    folder.mkdir(parents=True)
    save_file(
        {name: torch.randn(tensor.shape, generator=generator) * 0.01 for name, tensor in state.items()},
        folder / "adapter_model.safetensors",
    )
    config.base_model_name_or_path = str(base)
    config.save_pretrained(str(folder))


def by_peft(base: Path, adapter: Path, out: Path) -> None:
    """Merge as PEFT's documentation does."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, trust_remote_code=False)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


def by_surgery(base: Path, adapter: Path, out: Path) -> None:
    """Merge as `surgery merge` does."""
    from surgery.writing.merge import merge

    merge(base, adapter, out)


WAYS: dict[str, Callable[[Path, Path, Path], None]] = {"peft": by_peft, "surgery": by_surgery}


def measured(way: str, base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Seconds, of the clock and of the processor, and the highest anonymous memory above what imports take."""
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import surgery.writing.merge  # noqa: F401

    before = peak = anonymous_memory()

    def look() -> None:
        nonlocal peak
        peak = max(peak, anonymous_memory())

    began, cpu = time.perf_counter(), time.process_time()
    with Sampler(0.005).calling(look):
        WAYS[way](base, adapter, out)
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "CPU seconds": round(time.process_time() - cpu, 2),
        "peak MiB": (peak - before) >> 20,
    }


def main(base: Path, out: Path, *ways: str) -> None:
    """Print a line for each of `ways`, and whether the tensors are equal."""
    adapter = out / "adapter"
    if not adapter.exists():
        make_adapter(base, adapter)
    context = multiprocessing.get_context("spawn")
    for way in ways or ("peft", "surgery", "peft", "surgery"):
        shutil.rmtree(out / way, ignore_errors=True)
        with context.Pool(1) as pool:
            found = pool.apply(measured, (way, base, adapter, out / way))
        print(f"{way:8}", json.dumps(found), flush=True)
    print("equal:", equal(out / "peft", out / "surgery"))


def equal(one: Path, other: Path) -> bool:
    """Whether two checkpoints have the same tensors."""
    from surgery.checkpoint import Checkpoint

    left, right = Checkpoint.open(one), Checkpoint.open(other)
    with left.reader() as reading, right.reader() as too:
        return set(left.names()) == set(right.names()) and all(
            torch.equal(reading.read(name), too.read(name)) for name in left.names()
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
