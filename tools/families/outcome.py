"""Result of the sweep for one family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["VERDICTS", "Outcome", "Verdict"]

Verdict = Literal["exact", "refused", "stock fails", "not made", "differs"]

#: Verdict -> meaning.
VERDICTS: Final[dict[Verdict, str]] = {
    "exact": "every bit of the model, its logits, both losses and the reloaded adapter are those of stock",
    "refused": "refused before a weight is read, though stock runs it",
    "stock fails": "stock transformers, bitsandbytes and PEFT fail, and so does this project",
    "not made": "no tiny model of it can be made from its config alone, or none that runs",
    "differs": "a mistake of this project",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result for one family.

    family: a `model_type`. why: the reason in one line; if exact, what was left out.

    sharded: the result under FSDP2 on two ranks; empty if not tried. quantized, adapters: number of 4-bit layers, and
    of adapter tensors. experts: the result of fused experts in 4 bits; empty if there are none.
    """

    family: str
    verdict: Verdict
    why: str = ""
    sharded: Literal["", "exact", "refused"] = ""
    experts: Literal["", "exact", "refused"] = ""
    quantized: int = 0
    adapters: int = 0
    seconds: float = 0.0
