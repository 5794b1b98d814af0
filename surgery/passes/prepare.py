"""A model on meta with its weights matched and its modules replaced: all checks that need no weight are made here."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from surgery.adapters.rehearsal import Trained
from surgery.passes.setting import Setting
from surgery.passes.targets import Target

__all__ = ["Prepared"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """What is known of a model before a weight is read.

    model: on meta, its modules replaced, not adapted yet. targets: what the checkpoint fills, in the model's order.
    trained: parameters that adapters will make trainable. unsharded: FQNs of parameters that stay whole on every rank.
    ignored: names of the checkpoint that nothing is made of. initialized: FQNs of buffers that it lacks.
    """

    model: nn.Module = field(repr=False)
    setting: Setting
    targets: tuple[Target, ...] = field(repr=False)
    trained: tuple[Trained, ...] = field(repr=False)
    unsharded: frozenset[str]
    ignored: tuple[str, ...] = ()
    initialized: tuple[str, ...] = ()
