"""Import of all modules that any way uses, before anything is measured."""

from __future__ import annotations

import importlib

import patches

__all__ = ["import_upstream"]

#: Packages import many of their modules lazily; these are the ones that some way uses.
MODULES = (
    "accelerate",
    "accelerate.utils.fsdp_utils",
    "bitsandbytes",
    "peft",
    "peft.tuners.lora.bnb",
    "peft.utils.transformers_weight_conversion",
    "safetensors.torch",
    "surgery.recipe",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "transformers",
    "transformers.integrations.bitsandbytes",
    "transformers.models.llama.modeling_llama",
    "transformers.quantizers.quantizer_bnb_4bit",
)


def import_upstream() -> None:
    """Import `MODULES` and patches, and keep transformers from drawing progress bars."""
    for name in MODULES:
        importlib.import_module(name)
    for patch_id in patches.select("qlora-build", "qlora-on-cpu", "qlora-resident", "torch.fsdp1-sync-on-cpu"):
        patches.get(patch_id)  # each is a module
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
