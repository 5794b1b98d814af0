"""`peft.fused-4bit-lora`: a 4-bit layer and its LoRA adapter compute as one autograd function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import model_surgery_patches as patches
from surgery.step.dequantize import Workspace
from surgery.step.fuse import PATCH, forward, group

__all__ = ["compute_fused"]


def specimen() -> Any:
    """A small 4-bit layer on the CPU with an adapter that adds something."""
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig
    from peft.tuners.lora import bnb

    with torch.random.fork_rng(devices=()):
        base = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4", device="cpu").to("cpu")
        config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False)
        return bnb.Linear4bit(base, "default", config=config, r=2, lora_alpha=4)


def is_many_nodes() -> bool:
    """Whether the output of PEFT's layer is the sum of a product and what its adapter adds."""
    with torch.enable_grad():
        found = specimen()(torch.ones(2, 64)).grad_fn
    return type(found).__name__ == "AddBackward0"


def check_computes_the_same() -> None:
    """Raise RuntimeError if the output, or a gradient, is another than that of PEFT's layer, or PEFT's was called."""
    layer = specimen()
    group([layer], Workspace())
    outputs, gradients = [], []
    for compute in (layer, lambda x: compute_fused(_refuse, layer, (x,), {})):
        x = torch.linspace(-1, 1, 128).view(2, 64).requires_grad_()
        with torch.enable_grad():
            outputs.append(compute(x))
            trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
            gradients.append(torch.autograd.grad(outputs[-1].square().sum(), [x, *trained]))
    pairs = [tuple(outputs), *zip(*gradients, strict=True)]
    if not all(torch.allclose(stock, fused, rtol=1e-4, atol=1e-5) for stock, fused in pairs):
        raise RuntimeError("expected the output and the gradients of PEFT's layer, found others")


def _refuse(*_args: object, **_kwargs: object) -> Any:
    raise RuntimeError("expected that the layer is fused, found that it is left to PEFT")


@patches.register(
    PATCH,
    target="peft.tuners.lora.bnb:Linear4bit.forward",
    reason="a 4-bit layer with its adapter is some ten autograd nodes and a dozen kernels, each launched from Python",
    upstream="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/bnb.py",
    requires={"peft": ">=0.21,<0.22", "bitsandbytes": ">=0.49,<0.51"},
    signature="(self, x, *args, **kwargs)",
    fingerprint="027a713bed1f0b59",
    probe=is_many_nodes,
    verify=check_computes_the_same,
)
def compute_fused(
    wrapped: Callable[..., torch.Tensor], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.Tensor:
    """Compute by the fused function where it is for this call, else as PEFT does."""
    found = forward(instance, args[0]) if len(args) == 1 and not kwargs else None
    return wrapped(*args, **kwargs) if found is None else found
