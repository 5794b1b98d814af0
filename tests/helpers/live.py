"""The bytes of tensors that operations make, and that are still there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):
    """The most bytes, at any one time, of storages that operations have made in the block. given: tensors from before.

    Storages that are made inside of an operation, and freed there, are not seen.
    """

    def __init__(self, given: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._given = {each.untyped_storage()._cdata for each in given}
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(each, torch.Tensor) and not each.is_meta and each.untyped_storage()._cdata not in self._given:
                storage = each.untyped_storage()
                self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        self._seen = {name: seen for name, seen in self._seen.items() if not seen[0].expired()}  # type: ignore[no-untyped-call]
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._seen.values()))
        return found
