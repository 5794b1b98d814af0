"""`surgery.low_memory()`: scripts for transformers, PEFT, accelerate and TRL load a share of a model on each rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

import model_surgery_patches as patches
from surgery.bound import bound_in
from surgery.passes.lifetime import WAITING, keep

__all__ = ["BUNDLE", "CARRIED", "carry", "low_memory"]

logger = logging.getLogger("surgery")

#: Patches that a model carries from when it is bound until it is collected.
CARRIED = ("accelerate.fill-sharded", "accelerate.fill-replicated", "accelerate.optimizer-of-meta")

#: Patches that it carries once somebody imports what they are for, which takes memory.
WHEN_IMPORTED = ("transformers.fill-at-move", "trl.fill-reference")

#: Patches of a block of `low_memory`.
BUNDLE = patches.bundle(
    "low-memory", ("transformers.bind-at-load", "transformers.wait-when-loaded", *CARRIED), atomic=True
)


@contextmanager
def low_memory() -> Iterator[None]:
    """A block, or a decorator, in which `from_pretrained` reads nothing, and `prepare` reads what each rank will own.

    Inside, `from_pretrained(...)` of transformers builds a model as always, 4-bit layers of bitsandbytes included, and
    *binds* it to its files; every parameter stays on meta. PEFT adapts it, and `accelerate.prepare`, which the trainers
    of transformers and TRL call, *fills* it: under FSDP2 with each rank's shard; under FSDP1 on rank 0's CPU, from
    where it is broadcast; under DDP and in one process whole. A loop of your own calls `surgery.fill(model)`.

    The block is needed around `from_pretrained` alone. What cannot be loaded so is loaded as without it, and a line of
    the logger `surgery` says why; where an installed library is not one that this was written for, all of it is.
    """
    with ExitStack() as stack:
        try:
            patches.plan(*WAITING)  # which a model gets when it is bound, and which must not fail by then
            stack.enter_context(patches.transaction(BUNDLE.name, reason="surgery.low_memory()"))
        except patches.PatchError as error:
            logger.warning("surgery.low_memory: everything runs as without it: %s", error)
        yield


def _waits(model: nn.Module | None) -> bool:
    return model is not None and bound_in(model) is not None


def carry(model: nn.Module) -> None:
    """Keep the patches by which `model` is filled in force for it, until it is released or collected."""
    scoped = [patches.on(patch, _waits) for patch in CARRIED]
    why = f"a bound {type(model).__name__} waits to be prepared"
    with patches.transaction(*scoped, reason=why) as transaction:
        keep(model, transaction.receipts)
        transaction.commit()
    keep(model, patches.defer(*WHEN_IMPORTED, reason=why).receipts)  # which pass what is not bound
