"""The bundles that come with this package: name -> what is in it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["BUNDLES"]

BUNDLES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        # Needed while PEFT and FSDP rebuild a 4-bit model that is partly on meta. The first is to be limited to the
        # quant_states of that model.
        "qlora-build": ("bitsandbytes.quant-state-to-noop", "torch.meta-param-replacement"),
        # Needed for a 4-bit model to run on a CPU; to be limited to its quant_states.
        "qlora-on-cpu": ("bitsandbytes.cpu-matmul-flat", "bitsandbytes.cpu-dequantize-flat"),
        # Needed for a 4-bit model to run, sharded or not; to be limited to its layers.
        "linear4bit-resident": (
            "bitsandbytes.linear4bit-shape",
            "bitsandbytes.linear4bit-apply",
            "bitsandbytes.no-rewrap",
            "bitsandbytes.keep-packing",
        ),
        # Needed for FSDP2 to gather packed weights; to be limited to quantized layers.
        "fsdp2-resident": ("torch.fsdp2-bit-exact-gather",),
        # Both.
        "qlora-resident": ("linear4bit-resident", "fsdp2-resident"),
        # All that building, running and saving one takes, on GPUs or without.
        "qlora-low-memory": (
            "qlora-build",
            "qlora-on-cpu",
            "qlora-resident",
            "torch.fsdp1-sync-on-cpu",
            "peft.adapter-keys-under-wrappers",
        ),
    }
)
