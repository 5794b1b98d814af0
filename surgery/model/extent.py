"""Stop building a model that is larger than what its checkpoint can fill."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.contradiction import contradiction

__all__ = ["bounded"]

#: Parameters that will be tied are counted one by one while a model is built.
TIES = 8
FEW_ELEMENTS = 1 << 20


@contextmanager
def bounded(checkpoint: Checkpoint) -> Iterator[None]:
    """In this thread, end the building of a model that has several times as many elements as the checkpoint.

    Every stored element fills one parameter, however tensors are merged or split on the way. Raises
    `WeightsMismatchError` from within a constructor.
    """
    stored = sum(entry.numel for entry in checkpoint.index.values())
    most = left = TIES * stored + FEW_ELEMENTS
    builder = threading.get_ident()

    def count(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        if parameter is None or threading.get_ident() != builder:
            return
        left -= parameter.numel()
        if left < 0:
            said = f"it describes a model of more than {most:,} elements"
            raise contradiction(checkpoint.path, said, f"{stored:,}")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
