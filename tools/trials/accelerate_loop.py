"""A loop of accelerate and PEFT as in their documentation: load in 4 bits, adapt, prepare, train, save.

    torchrun --nproc-per-node 2 tools/trials/accelerate_loop.py MODEL OUT [--storage uint8] [--kbit] [--mesh 2 1] ...

It knows nothing of this project.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin, set_seed
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main() -> None:
    """Train a few steps on random tokens."""
    options = _parse()
    set_seed(0)
    model = _load(options) if options.model_first else None
    accelerator = _accelerator(options)
    model = model or _load(options)
    if options.kbit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    model.train()
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=options.lr, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    if options.resume:
        accelerator.load_state(options.resume)
    for step in range(options.begin, options.begin + options.steps):
        seed = 100 * step + accelerator.process_index
        ids = torch.randint(4, options.vocabulary, (2, 32), generator=torch.Generator().manual_seed(seed))
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if options.save_state and step == options.begin + 2:
            accelerator.save_state(f"{options.out}/state")
    state = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        f"{options.out}/adapter", state_dict=state, is_main_process=accelerator.is_main_process
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--strategy", choices=("fsdp2", "ddp"), default="fsdp2")
    parser.add_argument("--storage", choices=("bfloat16", "uint8", "float32"), default="bfloat16")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--state-dict", choices=("FULL_STATE_DICT", "SHARDED_STATE_DICT"), default="FULL_STATE_DICT")
    parser.add_argument("--kbit", action="store_true", help="call prepare_model_for_kbit_training")
    parser.add_argument("--model-first", action="store_true", help="load the model before there is an Accelerator")
    parser.add_argument("--mesh", type=int, nargs=2, help="ranks that replicate, ranks that shard")
    parser.add_argument("--accumulate", type=int, default=1, help="batches to a step")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--vocabulary", type=int, default=96)
    parser.add_argument("--begin", type=int, default=0, help="number of the first step, which its batch follows from")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--save-state", action="store_true", help="save the accelerator's state after three steps")
    parser.add_argument("--resume", help="a folder of such a state")
    return parser.parse_args()


def _accelerator(options: argparse.Namespace) -> Accelerator:
    if options.strategy == "ddp":
        return Accelerator(
            cpu=True, mixed_precision=options.mixed_precision, gradient_accumulation_steps=options.accumulate
        )
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=True,
        state_dict_type=options.state_dict,
    )
    mesh = ParallelismConfig(dp_replicate_size=options.mesh[0], dp_shard_size=options.mesh[1]) if options.mesh else None
    return Accelerator(
        cpu=True,
        fsdp_plugin=plugin,
        parallelism_config=mesh,
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.accumulate,
    )


def _load(options: argparse.Namespace) -> torch.nn.Module:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=getattr(torch, options.storage),
    )
    return AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=quantization, dtype=torch.bfloat16, trust_remote_code=False
    )


if __name__ == "__main__":
    main()
