"""The bundles that come with this package: name -> members."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["BUNDLES"]

BUNDLES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        # Needed while PEFT and FSDP rebuild a 4-bit model that is partly on meta. Limit the first to the
        # quant_states of that model.
        "qlora-build": ("bitsandbytes.quant-state-to-noop", "torch.meta-param-replacement"),
        # Needed for a 4-bit model to run on a CPU; limit to its quant_states.
        "qlora-on-cpu": ("bitsandbytes.cpu-matmul-flat", "bitsandbytes.cpu-dequantize-flat"),
        # Needed for a 4-bit model to run, sharded or not; limit to its layers.
        "linear4bit-resident": ("bitsandbytes.linear4bit-apply", "bitsandbytes.keep-packing"),
        # Needed for FSDP, which puts plain tensors in the place of packed weights; limit to quantized layers.
        "fsdp-resident": ("bitsandbytes.linear4bit-shape", "bitsandbytes.no-rewrap"),
        # Needed for FSDP2 to gather packed weights; limit to quantized layers.
        "fsdp2-resident": ("torch.fsdp2-bit-exact-gather",),
        # All of them.
        "qlora-resident": ("linear4bit-resident", "fsdp-resident", "fsdp2-resident"),
        # Everything needed to build, run and save a sharded 4-bit model, with or without GPUs.
        "qlora-low-memory": (
            "qlora-build",
            "qlora-on-cpu",
            "qlora-resident",
            "torch.fsdp1-sync-on-cpu",
            "peft.adapter-keys-under-wrappers",
        ),
    }
)
