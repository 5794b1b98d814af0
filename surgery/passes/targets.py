"""What a model stores of each tensor that a checkpoint fills: form, dtype, and whether it is quantized first."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from surgery.checkpoint import Index, TensorEntry
from surgery.model.fqn import split
from surgery.model.keys import Assignment
from surgery.quantizers.base import Layout, QuantFormat, check_layout
from surgery.sharding.partition import Form

__all__ = ["Target", "find_targets"]

NO_PRECISIONS: Mapping[str, torch.dtype] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """One parameter or persistent buffer of a model whose linear modules are replaced already, on meta.

    shape, dtype: as stored, so packed for a weight that is quantized. logical: that weight's own shape, `(out, in)`;
    layout: how it is packed; both None for what is not quantized. precision: the dtype in which it is quantized; None
    for the model's.
    source: where the checkpoint has it, if one range of a file holds what one range of it is made of; None if
    upstream's conversion merges or splits tensors for it, or the checkpoint holds it transposed.
    read_as: the dtype in which the checkpoint has it.
    places: the modules that hold it, and its name in each; several if it is tied.
    """

    fqn: str
    places: tuple[tuple[nn.Module, str], ...]
    shape: torch.Size
    dtype: torch.dtype
    form: Form
    assignment: Assignment
    read_as: torch.dtype
    source: TensorEntry | None
    logical: torch.Size | None = None
    layout: Layout | None = None
    precision: torch.dtype | None = None
    is_transposed: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether what is stored is a packed weight."""
        return self.logical is not None

    @property
    def nbytes(self) -> int:
        """Size of what is stored."""
        return self.shape.numel() * self.dtype.itemsize


def find_targets(
    model: nn.Module,
    assignments: Iterable[Assignment],
    index: Index,
    quant: QuantFormat,
    *,
    tied: Mapping[str, tuple[str, ...]],
    transposed: frozenset[str] = frozenset(),
    precisions: Mapping[str, torch.dtype] = NO_PRECISIONS,
) -> tuple[Target, ...]:
    """The targets of `assignments`, in their order.

    tied: first FQN of every parameter and persistent buffer -> aliases. transposed: FQNs of weights that the checkpoint
    has as `(in, out)`. precisions: FQN of a weight -> the dtype in which it is quantized, if not the model's.
    Raises QuantizerError for a weight that is stored in another layout than the format says.
    """
    make = functools.partial(_target, model, index, quant, tied=tied, transposed=transposed, precisions=precisions)
    return tuple(make(name, assignment) for assignment in assignments for name in assignment.targets)


def _target(
    model: nn.Module,
    index: Index,
    quant: QuantFormat,
    name: str,
    assignment: Assignment,
    *,
    tied: Mapping[str, tuple[str, ...]],
    transposed: frozenset[str],
    precisions: Mapping[str, torch.dtype],
) -> Target:
    path, leaf = split(name)
    owner = model.get_submodule(path)
    tensor: torch.Tensor = getattr(owner, leaf)
    is_quantized = leaf == "weight" and quant.is_quantized(owner)
    logical, layout = (quant.logical(owner), quant.layout(owner)) if is_quantized else (None, None)
    if logical is not None and layout is not None:
        check_layout(quant, name, tensor, logical, layout)
    rows = tensor.shape[0] if tensor.shape else 1
    numel = (logical or tensor.shape).numel()
    # Packed rows are of whole bytes, so that all but the last are full.
    row = layout.values_per_byte * tensor.dtype.itemsize if layout is not None else numel // max(rows, 1)
    one_to_one = assignment.converter is None and name not in transposed
    return Target(
        fqn=name,
        places=tuple((model.get_submodule(split(place)[0]), split(place)[1]) for place in (name, *tied.get(name, ()))),
        shape=tensor.shape,
        dtype=tensor.dtype,
        form=Form(
            rows=rows,
            row=row,
            numel=numel,
            blocksize=layout.blocksize if layout is not None else None,
            is_buffer=not isinstance(tensor, nn.Parameter),
        ),
        assignment=assignment,
        read_as=assignment.dtypes[assignment.targets.index(name)],
        source=index[assignment.sources[0]] if one_to_one else None,
        logical=logical,
        layout=layout,
        precision=precisions.get(name),
        is_transposed=name in transposed,
    )
