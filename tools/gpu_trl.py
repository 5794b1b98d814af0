"""An ordinary TRL script for two GPUs, which knows nothing of this project, and notes what it sees on the way.

    torchrun --nproc-per-node 2 tools/gpu_trl.py CHECKPOINT --json stock.json
    torchrun --nproc-per-node 2 -m surgery run tools/gpu_trl.py CHECKPOINT --json ours.json
    python tools/gpu_trl.py compare stock.json ours.json

Noted on rank 0: seconds until training begins and until the end, peaks of GPU and host, every loss, by how much saving
makes the host grow, a digest of every packed weight at rest, and how many of its 16-bit words are others as forward
sees them. `--cap` limits each GPU as if it had so many GiB; `--cpu` is for a look on a CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
GIB = 1 << 30


def main() -> None:
    """Train by TRL as the command line says."""
    if sys.argv[1:2] == ["compare"]:
        compare(*map(Path, sys.argv[2:4]))
        return
    options = parse()
    import torch

    if options.cap:
        device = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(options.cap * GIB / total, device)
    found: dict[str, Any] = {"argv": sys.argv[1:]}
    try:
        train(options, found)
    except torch.OutOfMemoryError as error:
        found["error"] = f"out of memory: {error}".splitlines()[0][:300]
    if os.environ.get("RANK", "0") == "0":
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps({name: value for name, value in found.items() if name != "digests"}))
    if "error" in found:
        os._exit(1)  # other ranks may wait for this one


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--json", default="trl.json")
    parser.add_argument("--fsdp", type=int, choices=(1, 2), default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--cap", type=float, default=0, help="GiB of each GPU")
    parser.add_argument("--output", default="build/gpu-trl")
    parser.add_argument("--cpu", action="store_true", help="for a look at it without GPUs")
    parser.add_argument("--words", action="store_true", help="compare packed weights in forward with those at rest")
    return parser.parse_args()


def train(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """The script: configuration, model, data, trainer, as TRL's documentation has them."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    settings = {"version": options.fsdp, "cpu_ram_efficient_loading": True, "state_dict_type": "FULL_STATE_DICT"}
    if options.fsdp == 1:
        settings |= {"use_orig_params": False, "sync_module_states": True}
    arguments = SFTConfig(
        output_dir=options.output,
        per_device_train_batch_size=1,
        max_steps=options.steps,
        learning_rate=1e-4,
        logging_steps=1,
        max_length=options.length,
        bf16=True,
        use_cpu=options.cpu,
        gradient_checkpointing=True,
        save_strategy="no",
        report_to=[],
        fsdp=True,  # type: ignore[arg-type]  # a text before transformers 5
        fsdp_config=settings,
        seed=0,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=quantization, dtype=torch.bfloat16, trust_remote_code=False
    )
    found["bytes_after_load"] = sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)

    class Notes(TrainerCallback):
        def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
            found["ready_s"] = time.perf_counter() - STARTED
            if torch.cuda.is_available():
                found["load_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
            if options.words:
                found["digests"], found["changed"] = {}, 0
                watch(model, found)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found.setdefault("step_ends_s", []).append(time.perf_counter() - STARTED)

    text = " ".join(str(number) for number in range(4 * options.length))
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": [text[start:] for start in range(8)]}),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[Notes()],
    )
    trainer.train()
    found["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if torch.cuda.is_available():
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    before = reset_peak()
    trainer.save_model(options.output)
    found["save_grows_gib"] = (status("VmHWM") - before) / GIB
    found["seconds"] = time.perf_counter() - STARTED


def watch(model: Any, found: dict[str, Any]) -> None:
    """Note a digest of each packed weight at rest, and in the first forward how many words differ from that."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from torch.distributed.tensor import DTensor

    def compare_in_forward(layer: Any, _inputs: Any) -> None:
        rest = resting.pop(layer, None)
        if rest is not None:
            weight = layer.weight.data
            found["changed"] += int((weight.view(torch.int16).reshape(-1) != rest.to(weight.device)).sum())

    resting = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit) and isinstance(layer.weight, DTensor):
            whole = layer.weight.full_tensor().detach().view(torch.int16).reshape(-1).cpu()
            resting[layer] = whole
            found["digests"][plain(name)] = hashlib.sha256(whole.numpy().tobytes()).hexdigest()
            layer.register_forward_pre_hook(compare_in_forward)


def plain(name: str) -> str:
    """The FQN without wrappers."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def status(field: str) -> int:
    """A field of the memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def reset_peak() -> int:
    """Forget the peak of the host's memory; returns what is resident."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # of a container: the peak stays, and so growth below it is not seen
        return status("VmHWM")
    return status("VmRSS")


def compare(one: Path, other: Path) -> None:
    """Print both runs beside each other, and how many packed weights differ."""
    found = [json.loads(path.read_text()) for path in (one, other)]
    for name in sorted({*found[0], *found[1]} - {"digests", "argv"}):
        print(f"{name:20} {found[0].get(name)!s:40} {found[1].get(name)}")
    digests = [each.get("digests", {}) for each in found]
    print("packed weights that differ:", sum(digests[0].get(name) != digests[1].get(name) for name in digests[0]))


if __name__ == "__main__":
    main()
