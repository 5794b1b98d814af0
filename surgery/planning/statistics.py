"""How large the quant_state of 4-bit weights is."""

from __future__ import annotations

from collections.abc import Iterable

from surgery.config import Quant
from surgery.passes.targets import Target
from surgery.planning.allowances import STATE_BYTES

__all__ = ["STATISTIC_BYTES", "quant_state_bytes"]

#: A statistic as it is computed and exchanged: float32.
STATISTIC_BYTES = 4

#: Statistics that share one statistic of their own, with double quantization.
NESTED_BLOCKSIZE = 256


def quant_state_bytes(targets: Iterable[Target], quant: Quant) -> int:
    """Of all quantized ones among `targets`: whole, as every rank has it."""
    return sum(_state(target.form.blocks, quant) for target in targets if target.is_quantized)


def _state(blocks: int, quant: Quant) -> int:
    if not quant.double_quant:
        return blocks * STATISTIC_BYTES + STATE_BYTES
    return blocks + -(-blocks // NESTED_BLOCKSIZE) * STATISTIC_BYTES + STATE_BYTES
