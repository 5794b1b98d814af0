"""`bitsandbytes.keep-packing`: evaluation on a CPU with AVX512-BF16 leaves the packed weight unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from ...errors import IncompatibleError
from ...registry import REGISTRY
from ._specimen import packed_linear4bit

if TYPE_CHECKING:
    from bitsandbytes.nn.modules import Linear4bit

__all__ = ["report_no_avx512bf16"]

_ID = "bitsandbytes.keep-packing"


def evaluation_repacks() -> bool:
    """Whether one forward in eval mode, on this CPU, rewrites the weight in place."""
    import torch

    layer = packed_linear4bit().eval()
    if not hasattr(layer, "support_avx512bf16_for_cpu"):
        return False  # before 0.49; and before 0.47 a forward on a CPU raises
    with torch.no_grad():
        layer(torch.zeros(1, 64, dtype=torch.bfloat16))
    return _is_repacked(layer)


def check_reports_no_avx512bf16() -> None:
    """Raise RuntimeError if the wrapper returns the CPU's own answer."""
    if report_no_avx512bf16(lambda: True, packed_linear4bit(), (), {}):
        raise RuntimeError("Linear4bit still reports AVX512-BF16, so that evaluation would repack its weight")


@REGISTRY.register(
    _ID,
    kind="attribute",
    target="bitsandbytes.nn.modules:Linear4bit.support_avx512bf16_for_cpu",
    reason=(
        "the first forward in eval mode on a CPU with AVX512-BF16 repacks weight and quant_state in place, "
        "with a loss; FSDP brings back the weight alone, and everything computed from then on is wrong"
    ),
    upstream="https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078",
    requires={"bitsandbytes": ">=0.49"},
    probe=evaluation_repacks,
    verify=check_reports_no_avx512bf16,
)
def report_no_avx512bf16(
    _wrapped: Callable[[], bool], instance: Linear4bit, _args: tuple[()], _kwargs: dict[str, Any]
) -> Literal[False]:
    """Always return False for `module.support_avx512bf16_for_cpu`, which forward reads before it repacks.

    Raises IncompatibleError for a layer that was repacked before the patch was applied: bitsandbytes' inverse
    has errors of up to 5e-3, so the original cannot be recovered.
    """
    if _is_repacked(instance):
        raise IncompatibleError(
            f"{_ID}: expected a Linear4bit in bitsandbytes' packed layout, found one whose weight an earlier "
            "forward in eval mode has repacked for AVX512-BF16, which loses precision; quantize or load the "
            "layer again, and apply this patch before it is evaluated",
            patch_id=_ID,
            why="the weight is already repacked",
        )
    return False


def _is_repacked(layer: Linear4bit) -> bool:
    return bool(getattr(layer.quant_state, "packing_format_for_cpu", False))
