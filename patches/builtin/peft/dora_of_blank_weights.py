"""`peft.dora-of-blank-weights`: DoRA is added to a layer whose weight has no values yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...registry import REGISTRY

__all__ = ["leave_blank"]


def _given() -> dict[str, Any]:
    """Arguments of PEFT for a linear layer whose weight is one element, shown as often as its shape says."""
    import torch
    from torch import nn

    layer = nn.Linear(4, 2, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.full((1,), torch.nan, device="cpu").expand(2, 4))
    first, second = torch.ones(1, 4, device="cpu"), torch.zeros(2, 1, device="cpu")
    return {"base_layer": layer, "lora_A": first, "lora_B": second, "scaling": 1.0}


def blank_weight_is_read() -> bool:
    """Whether DoRA makes its magnitudes of a weight without values, whatever that takes."""
    import torch
    from peft.tuners.lora.dora import DoraLinearLayer

    kind: Any = DoraLinearLayer  # Any: its constructor is not annotated
    made = kind(fan_in_fan_out=False)
    made.update_layer(**_given())
    return isinstance(made.weight, torch.nn.Parameter)


def check_leaves_blank() -> None:
    """Raise RuntimeError if the magnitudes of a weight without values are not blank, or it is read for them."""
    from types import SimpleNamespace

    made = SimpleNamespace(weight=None)

    def read(**_options: Any) -> None:
        raise RuntimeError("expected magnitudes to be left blank, found that the weight is read")

    leave_blank(read, made, (), _given())
    weight: Any = made.weight
    if weight.shape != (2,) or not weight.isnan().all():
        raise RuntimeError(f"expected two blank magnitudes, found {weight}")


@REGISTRY.register(
    "peft.dora-of-blank-weights",
    target="peft.tuners.lora.dora:DoraLinearLayer.update_layer",
    reason=(
        "DoRA takes its magnitudes from the base weight as soon as it is added; a model that is adapted on meta has "
        "none yet, and a packed weight without its state cannot be dequantized"
    ),
    upstream="https://github.com/huggingface/peft/issues/1737",
    requires={"peft": ">=0.18,<0.22"},
    signature="(self, *, base_layer, lora_A, lora_B, scaling, place_on_cpu=False)",
    probe=blank_weight_is_read,
    verify=check_leaves_blank,
)
def leave_blank(wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Make the magnitudes NaN, for somebody to fill in, where the base weight is one element shown many times.

    They have the shape that they will have, and the dtype and device of the adapter. Other weights are left to PEFT.
    """
    import torch

    weight, like = kwargs["base_layer"]._parameters["weight"], kwargs["lora_B"]
    if weight.is_meta or weight.untyped_storage().nbytes() == weight.nbytes:
        wrapped(*args, **kwargs)
        return
    rows = like.shape[0]
    shape = (rows,) if weight.dim() < 3 else (1, rows, *(1 for _ in weight.shape[2:]))
    instance.weight = torch.nn.Parameter(torch.full(shape, torch.nan, dtype=like.dtype, device=like.device))
