"""Conversions of transformers that put whole tensors one behind the other, found by watching one on meta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

__all__ = ["Watched"]

aten = torch.ops.aten

#: Operations that move elements by the numbers of dimensions alone, whatever sizes and values are.
MOVES = frozenset(
    {
        aten.alias.default,
        aten.cat.default,
        aten.clone.default,
        aten.detach.default,
        aten.permute.default,
        aten.stack.default,
        aten.t.default,
        aten.transpose.int,
    }
)

#: The sizes of a twin: few elements, and no two dimensions of one size, whose order would not show.
SIZES = (2, 3, 4, 5, 6)


class Watched(TorchDispatchMode):
    """A block in which `sources`, on meta, are converted, and small numbered twins beside them by the same operations.

    The conversion sees the true shapes and dtypes, and so does what it will do. Where `MOVES` alone have put whole
    twins one behind the other, they put whole tensors of any sizes so. After any other operation nothing is known.
    """

    def __init__(self, sources: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # no annotation upstream
        self._sources = sources
        self._is_known = all(each.numel() and each.dim() <= len(SIZES) for each in sources.values())
        # Tensors are held, so that no other one gets their id.
        self._twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        #: The first number of each source -> its name and the number behind its last.
        self._ids: dict[int, tuple[str, int]] = {}
        start = 0
        for name, each in sources.items():
            shape = torch.Size(SIZES[: each.dim()])
            stop = start + shape.numel()
            self._twins[id(each)] = each, torch.arange(start, stop, device="cpu").view(shape)
            self._ids[start] = name, stop
            start = stop

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func` with the tensors; and with their twins, while all is known."""
        result = func(*args, **(kwargs or {}))
        self._is_known = self._is_known and func in MOVES
        if self._is_known:
            try:
                twins = tree_map_only(torch.Tensor, lambda tensor: self._twins[id(tensor)][1], args)
                self._twins[id(result)] = result, func(*twins, **(kwargs or {}))
            except (KeyError, RuntimeError):  # a tensor from elsewhere; or sizes that are equal by chance
                self._is_known = False
        return result

    def order(self, result: torch.Tensor) -> tuple[str, ...]:
        """The sources that `result` is, in its dtype, one whole one behind the other; () if it is not, or not known."""
        if not self._is_known or id(result) not in self._twins:
            return ()
        ids: list[int] = self._twins[id(result)][1].flatten().tolist()
        found: list[str] = []
        done = 0
        while done < len(ids):
            name, stop = self._ids.get(ids[done], ("", 0))
            whole = list(range(ids[done], stop))
            if not whole or ids[done : done + len(whole)] != whole or self._sources[name].dtype != result.dtype:
                return ()
            found.append(name)
            done += len(whole)
        return tuple(found)
