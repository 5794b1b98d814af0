"""An estimate of what autograd keeps, from the shapes of linear layers; attention is taken to keep no scores."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.planning.allowances import LOSS_COPIES, NORM_COPIES
from surgery.planning.inventory import Inventory
from surgery.planning.setting import Setting, Training

__all__ = ["Activations", "estimate"]

FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Activations:
    """kept: from forward to backward, of all blocks. recomputed: of one block, in backward. logits: at the loss."""

    kept: int
    recomputed: int
    logits: int


def estimate(inventory: Inventory, setting: Setting, training: Training) -> Activations:
    """Each linear layer keeps its input, for the adapter, and its output, for what comes after; norms keep copies in
    float32. A checkpointed block keeps its input alone.
    """
    norms = NORM_COPIES * inventory.hidden * FLOAT32_BYTES
    blocks = [unit.features * setting.compute_dtype.itemsize + norms for unit in inventory.blocks]
    inputs = len(blocks) * inventory.hidden * setting.dtype.itemsize
    logit = LOSS_COPIES * FLOAT32_BYTES + setting.compute_dtype.itemsize
    return Activations(
        kept=training.tokens * (inputs if training.checkpointing else sum(blocks)),
        recomputed=training.tokens * max(blocks, default=0) if training.checkpointing else 0,
        logits=training.tokens * inventory.vocabulary * logit,
    )
