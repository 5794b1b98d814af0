"""The patches that come with this package: id -> the module that registers it when imported.

One patch per file, named after it. The patched library is imported inside its functions only.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

__all__ = ["BUILTIN"]

_IDS: Final = (
    "accelerate.fsdp-on-cpu",
    "bitsandbytes.cpu-dequantize-flat",
    "bitsandbytes.cpu-matmul-flat",
    "bitsandbytes.keep-packing",
    "bitsandbytes.linear4bit-apply",
    "bitsandbytes.linear4bit-shape",
    "bitsandbytes.no-rewrap",
    "bitsandbytes.params4bit-to-meta",
    "bitsandbytes.quant-state-to-noop",
    "peft.adapter-keys-under-wrappers",
    "peft.adapter-lost-in-cache",
    "peft.dora-of-blank-weights",
    "peft.factors-proxy-left-behind",
    "peft.merge-of-parametrized",
    "torch.fsdp1-raw-reads",
    "torch.fsdp1-sync-on-cpu",
    "torch.fsdp2-bit-exact-gather",
    "torch.meta-param-replacement",
)

BUILTIN: Final[Mapping[str, str]] = MappingProxyType(
    {patch_id: f"{__name__}.{patch_id.replace('-', '_')}" for patch_id in _IDS}
)
