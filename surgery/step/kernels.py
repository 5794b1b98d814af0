"""Kernels of other make for the modules of a model: chosen by name, and applied when the model is complete."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from surgery.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["INSTALL", "KERNELS", "KERNELS_HELP", "chosen_kernels", "missing_package", "use_kernels"]

logger = logging.getLogger("surgery")

#: Names of kernels, in the order in which they are applied.
KERNELS = ("fused", "liger")

#: The command that installs what liger needs.
INSTALL = "pip install 'model-surgery[kernels]'"

KERNELS_HELP = (
    "Kernels to train with, separated by commas: fused (4-bit layers with LoRA, each in one function), liger (norms, "
    "rotary embedding, MLP and loss of Liger-Kernel, which needs a GPU and pip install 'model-surgery[kernels]'). For "
    "LoRA in 4 bits on a GPU: fused,liger."
)


def chosen_kernels(value: str | Sequence[str] | None, *, device: torch.device | None = None) -> tuple[str, ...]:
    """The names in `value`, a sequence or text with commas, each once, in the order of `KERNELS`.

    device: on which they are to run; None is not known yet. Raises `ConfigError` for other names, and for what is not
    installed or does not run there.
    """
    names = value.split(",") if isinstance(value, str) else () if value is None else value
    if not isinstance(names, Iterable):
        raise ConfigError(f"kernels: expected names among {', '.join(KERNELS)}, found {value!r:.80}")
    wanted = [name for name in (str(each).strip() for each in names) if name]
    unknown = sorted({*wanted} - {*KERNELS})
    if unknown:
        raise ConfigError(f"kernels: expected names among {', '.join(KERNELS)}, found {unknown[0]!r:.80}")
    if "liger" in wanted:
        _require_liger(device)
    return tuple(name for name in KERNELS if name in wanted)


def missing_package(kernels: Iterable[str]) -> str | None:
    """The command that installs what `kernels` need and is not here; None if all is."""
    return INSTALL if "liger" in kernels and find_spec("liger_kernel") is None else None


def _require_liger(device: torch.device | None) -> None:
    if missing_package(("liger",)) is not None:
        raise ConfigError(f"kernels: liger is not installed here: {INSTALL}, or leave it out")
    if device is not None and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError("kernels: Liger's run on GPUs, and this rank computes on the CPU: leave out liger")


def use_kernels(model: nn.Module, kernels: Sequence[str]) -> None:
    """Apply `kernels`, as `chosen_kernels` names them, to the modules of `model`, which is complete.

    They are patches that are resident until `surgery.release(model)`. What a kernel is not for runs as without it, and
    a line of the logger `surgery` names it.
    """
    if "fused" in kernels:
        from surgery.step.fuse import fuse

        if not fuse(model):
            logger.warning(
                "surgery: %s runs without fused layers: it has no 4-bit layer with LoRA of PEFT. Where adapters are "
                "added later, call surgery.fuse(model) after that",
                type(model).__name__,
            )
    if "liger" in kernels:
        from surgery.step.liger import use_liger

        use_liger(model)
