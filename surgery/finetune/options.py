"""Options of `surgery finetune` and `surgery dpo`: ours, beside those of TRL's own configuration classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from surgery.errors import ConfigError
from surgery.planning.arguments import EXPERTS_HELP, OFFLOADING_HELP, Experts, parse_mesh
from surgery.step.kernels import KERNELS_HELP, chosen_kernels

__all__ = ["DEFAULTS", "FLASH", "Options"]


#: Names of attention implementations that keep packed samples apart begin so.
FLASH = ("flash_attention", "kernels-community/flash", "kernels-community/vllm-flash")

#: TRL's options that begin differently here, as QLoRA needs them. None is decided once the model and data are known.
DEFAULTS: dict[str, Any] = {
    "output_dir": "adapter",
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": None,
    "use_cpu": None,
    "packing": None,
    "assistant_only_loss": None,
    "dtype": "bfloat16",
    "use_peft": True,
    "lora_dropout": 0.0,
    "lora_target_modules": ["all-linear"],
    "load_in_4bit": None,
    "use_bnb_nested_quant": True,
}

#: The same for preferences, where small steps away from the reference model are wanted.
DPO_DEFAULTS: dict[str, Any] = {**DEFAULTS, "learning_rate": 5e-6}
DPO_DEFAULTS.pop("packing")
DPO_DEFAULTS.pop("assistant_only_loss")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that TRL's classes do not have. The metadata of each field is its help."""

    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Training data: hub ids, files (JSONL, JSON, CSV, Parquet, Arrow) or folders of them; several are "
            'concatenated. JSON for more: \'{"path": "org/name", "name": "subset", "split": "train_sft", '
            '"columns": ["messages"], "fraction": 0.3}\', as TRL\'s DatasetConfig.'
        },
    )
    eval_data: list[str] = field(default_factory=list, metadata={"help": "Data to evaluate on, likewise."})
    eval_fraction: float | None = field(
        default=None, metadata={"help": "Evaluate on this fraction of --data, which is then not trained on."}
    )
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "Go on from this adapter of PEFT, a folder or a hub id, in place of a new one; its configuration "
            "decides on --lora-r and the like."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after so many evaluations without a better one; needs --eval-strategy and "
            "--load-best-model-at-end."
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read --data while training, instead of before; needs --max-steps."}
    )
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Replace an adapter that is in --output, or files of its names, and remove checkpoints of an "
            "earlier run."
        },
    )
    experts: Experts = field(default="4bit", metadata={"help": EXPERTS_HELP})
    activation_offloading: bool = field(default=False, metadata={"help": OFFLOADING_HELP})
    fsdp: Literal["2", "1", "none"] = field(
        default="2",
        metadata={
            "help": "Which FSDP shards the model on several ranks (1 needs GPUs); none keeps it whole on each (DDP)."
        },
    )
    compile: bool = field(
        default=False,
        metadata={
            "help": "Compile the decoder blocks, once for all, in the first steps, which wait for that. For families "
            "without --kernels. --torch-compile, transformers' own, compiles the whole model. Not with --fsdp 1 or "
            "--attest."
        },
    )
    mesh: str | None = field(
        default=None, metadata={"help": "REPLICATExSHARD, such as 2x4 on 8 ranks: shard over 4, twice (FSDP2)."}
    )
    kernels: str | None = field(default=None, metadata={"help": KERNELS_HELP})
    plan: Literal["check", "only", "off"] = field(
        default="check",
        metadata={
            "help": "Plan the memory of every rank first: refuse what no GPU here can hold, print the plan and stop, "
            "or do not."
        },
    )
    packed_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder where the first run keeps the 4-bit weights that it has made, and others read them: a "
            "quarter of the bytes, and no quantizing."
        },
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "Record forward and backward once for each shape of a batch as CUDA graphs, and replay them: the "
            "GPU does not wait for Python. Worth it for steps of few tokens. Batches are padded to a multiple of "
            "--pad-to-multiple-of (default here: 64); after 8 shapes, and where a model waits for the GPU, steps run "
            "as without, which the log says. Takes about the memory of one step more. GPUs only, not with --fsdp 1."
        },
    )
    attest: bool = field(
        default=False,
        metadata={"help": "Check that the base model stays, bit for bit, what was quantized; stop where it does not."},
    )
    trace: str | None = field(
        default=None,
        metadata={"help": "Folder for what every rank did: trace.html shows memory over time, phases, bytes read."},
    )

    def __post_init__(self) -> None:
        chosen_kernels(self.kernels)
        if not self.data:
            raise ConfigError("expected --data, or `data:` in --config: a hub id, or a file or folder; found none")
        if self.eval_data and self.eval_fraction is not None:
            raise ConfigError("expected --eval-data or --eval-fraction, found both; give one")
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise ConfigError(f"expected --eval-fraction between 0 and 1, found {self.eval_fraction}")
        if self.eval_fraction is not None and self.streaming:
            raise ConfigError(
                "--eval-fraction needs the number of samples, which --streaming does not know: give --eval-data"
            )
        if parse_mesh(self.mesh) is not None and self.fsdp != "2":
            raise ConfigError(f"expected --fsdp 2 with --mesh, found --fsdp {self.fsdp}")

    @property
    def has_evaluation(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self.eval_data) or self.eval_fraction is not None
