"""`SurgeryPlugin`: axolotl loads, on each rank, what that rank will own."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

from axolotl.integrations.base import BasePlugin
from torch import nn

import model_surgery_patches as patches
from surgery.bound import bound_in, fill
from surgery.errors import ConfigError
from surgery.integrations.axolotl.stock_fsdp2 import STOCK_FSDP2
from surgery.integrations.low_memory import low_memory

__all__ = ["SurgeryPlugin"]

logger = logging.getLogger("surgery")

_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")

#: Options of axolotl that nobody has made work with a model that is filled at `prepare`, and why not.
_REFUSED = {
    **dict.fromkeys(_KERNELS, "reads packed weights around Linear4bit.forward"),
    "deepspeed": "shards by itself",
    "fp32_norms": "is sharded by what axolotl puts in place of accelerate's FSDP2",
    "lora_on_cpu": "moves parts of the model before they are filled",
    "qlora_sharded_model_loading": "reads the checkpoint by itself",
    "quantize_moe_experts": "quantizes experts while transformers reads them",
    "reinit_weights": "reads no checkpoint",
    "relora": "merges into the base weights",
}
_SIZES = ("context_parallel_size", "expert_parallel_size", "tensor_parallel_size")


def _refuse(cfg: dict[str, Any]) -> None:
    asked = {name: why for name, why in _REFUSED.items() if cfg.get(name)}
    asked |= {name: "divides the ranks in another way than FSDP" for name in _SIZES if (cfg.get(name) or 1) > 1}
    if asked:
        reasons = "; ".join(f"{name} {why}" for name, why in asked.items())
        raise ConfigError(f"axolotl: expected none of what surgery.low_memory() does not go with, found: {reasons}")


class SurgeryPlugin(BasePlugin):  # type: ignore[misc]  # untyped where axolotl is not installed
    """Runs a QLoRA training of axolotl in `surgery.low_memory()`.

    From the reading of the YAML to the end of training. Under FSDP accelerate fills the model when the trainer prepares
    it; in one process and under DDP it is filled once it has its adapters, since axolotl moves it to the GPU then.
    Inference, merging, and models that are not in 4 bits are left alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._block = ExitStack()

    def register(self, cfg: dict[str, Any]) -> None:
        """Enter the block before axolotl patches anything, and refuse what does not go together.

        Raises `ConfigError` for such options. LoRA kernels, which axolotl turns on by itself, stay off.
        """
        self._block.close()  # of an earlier configuration in this process
        if cfg.get("inference") or cfg.get("merge_lora"):
            return
        if not cfg.get("load_in_4bit") or cfg.get("adapter") not in ("lora", "qlora"):
            logger.warning("surgery.low_memory: not used, since it is no training of adapters with load_in_4bit: true")
            return
        with ExitStack() as block:
            block.enter_context(low_memory())
            if any(receipt.patch.id == "transformers.bind-at-load" for receipt in patches.active()):
                _refuse(cfg)
                for name in _KERNELS:
                    cfg[name] = False
                block.enter_context(patches.transaction(STOCK_FSDP2.name, reason="surgery.low_memory() in axolotl"))
            self._block = block.pop_all()

    def on_config_validation_error(self, cfg: dict[str, Any]) -> None:  # noqa: ARG002  # axolotl's signature
        """Leave the block."""
        self._block.close()

    def post_lora_load(self, cfg: dict[str, Any], model: nn.Module) -> None:
        """Fill a model that FSDP will not shard."""
        from axolotl.utils.distributed import init_distributed_state

        if not (cfg.get("fsdp_config") or cfg.get("fsdp")) and bound_in(model) is not None:
            init_distributed_state()  # as the trainer would: ranks compare what they are to fill
            fill(model)

    def post_train_unload(self, cfg: dict[str, Any]) -> None:  # noqa: ARG002  # axolotl's signature
        """Leave the block."""
        self._block.close()
