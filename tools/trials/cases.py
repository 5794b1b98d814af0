"""The runs that docs/drop-in-trials.md has: scripts, their arguments, and a checkpoint folder with a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Final

__all__ = ["CASES", "SHARDED", "Case", "sft_arguments", "trl_script"]

_HERE: Final = Path(__file__).parent

#: FSDP2 as the TRL script takes it: a YAML file beside this one.
SHARDED: Final = ("--config", str(_HERE / "fsdp2.yaml"))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pair of runs. `{out}` in an argument stands for the folder to write into."""

    script: str
    """"trl" for TRL's own sft.py, "loop" for the loop of accelerate beside this file."""
    arguments: tuple[str, ...] = ()
    ranks: int = 2
    differs: bool = False
    """Whether losses are expected to differ: stock computes something else."""

    def command(self, model: Path, data: Path) -> tuple[Path, list[str]]:
        """Return the script and all of its arguments."""
        if self.script == "loop":
            return _HERE / "accelerate_loop.py", [str(model), "{out}", *self.arguments]
        return trl_script(), [*sft_arguments(model, data), *self.arguments]


def trl_script() -> Path:
    """Find the script that TRL publishes."""
    return Path(str(distribution("trl").locate_file("trl/scripts/sft.py")))


def sft_arguments(model: Path, data: Path, *, steps: int = 5) -> list[str]:
    """Arguments of TRL's script for a few short steps of QLoRA on a CPU; a checkpoint after the third."""
    return (
        f"--model_name_or_path {model} --dataset_name {data} --output_dir {{out}} --max_steps {steps} --save_steps 3 "
        "--load_in_4bit --use_bnb_nested_quant --use_peft --lora_target_modules all-linear --lora_r 8 --lora_dropout 0 "
        "--dtype bfloat16 --bf16 False --use_cpu --dataloader_pin_memory False --max_length 64 "
        "--per_device_train_batch_size 2 --per_device_eval_batch_size 2 --learning_rate 1e-3 "
        "--lr_scheduler_type constant --seed 0 --logging_steps 1 --report_to none --disable_tqdm True"
    ).split()


_BF16 = (*SHARDED, "--bnb_4bit_quant_storage", "bfloat16")
_EVALUATED = ("--eval_strategy", "steps", "--eval_steps", "2")

CASES: Final = {
    "trl, storage bfloat16": Case(script="trl", arguments=_BF16),
    "trl, storage uint8": Case(script="trl", arguments=SHARDED),
    "trl, storage float32, model in float32": Case(
        script="trl", arguments=(*SHARDED, "--bnb_4bit_quant_storage", "float32", "--dtype", "float32")
    ),
    "trl, --bf16": Case(script="trl", arguments=(*_BF16, "--bf16", "True")),
    "trl, accumulating two batches": Case(script="trl", arguments=(*_BF16, "--gradient_accumulation_steps", "2")),
    "trl, no activation checkpointing": Case(script="trl", arguments=(*_BF16, "--gradient_checkpointing", "False")),
    "trl, evaluating at every second step": Case(script="trl", arguments=(*_BF16, *_EVALUATED), differs=True),
    "trl, NEFTune": Case(script="trl", arguments=(*_BF16, "--neftune_noise_alpha", "5")),
    "trl, rsLoRA on q_proj and v_proj": Case(
        script="trl", arguments=(*_BF16, "--use_rslora", "True", "--lora_target_modules", "q_proj", "v_proj")
    ),
    "trl, trained embedding": Case(script="trl", arguments=(*_BF16, "--lora_modules_to_save", "embed_tokens")),
    "trl, trained head": Case(script="trl", arguments=(*_BF16, "--lora_modules_to_save", "lm_head"), differs=True),
    "trl, 16 bits": Case(script="trl", arguments=(*SHARDED, "--load_in_4bit", "False")),
    "trl, 16 bits, all trained": Case(
        script="trl", arguments=(*SHARDED, "--load_in_4bit", "False", "--use_peft", "False")
    ),
    "trl, 16 bits, all trained, --bf16": Case(
        script="trl", arguments=(*SHARDED, "--load_in_4bit", "False", "--use_peft", "False", "--bf16", "True")
    ),
    "trl, DDP": Case(script="trl"),
    "trl, one process": Case(script="trl", ranks=1),
    "loop, storage bfloat16": Case(script="loop", arguments=("--save-state",)),
    "loop, storage uint8": Case(script="loop", arguments=("--storage", "uint8")),
    "loop, storage float32": Case(script="loop", arguments=("--storage", "float32")),
    "loop, mixed precision bf16": Case(script="loop", arguments=("--mixed-precision", "bf16")),
    "loop, prepare_model_for_kbit_training": Case(script="loop", arguments=("--kbit",)),
    "loop, kbit and mixed precision": Case(script="loop", arguments=("--kbit", "--mixed-precision", "bf16")),
    "loop, model before the Accelerator": Case(script="loop", arguments=("--model-first",)),
    "loop, model first and kbit": Case(script="loop", arguments=("--model-first", "--kbit")),
    "loop, sharded state": Case(script="loop", arguments=("--state-dict", "SHARDED_STATE_DICT", "--save-state")),
    "loop, accumulating two batches": Case(script="loop", arguments=("--accumulate", "2", "--steps", "6")),
    "loop, HSDP 1 x 2": Case(script="loop", arguments=("--mesh", "1", "2")),
    "loop, HSDP 2 x 2": Case(script="loop", arguments=("--mesh", "2", "2"), ranks=4),
    "loop, DDP": Case(script="loop", arguments=("--strategy", "ddp")),
    "loop, one process": Case(script="loop", arguments=("--strategy", "ddp"), ranks=1),
}
