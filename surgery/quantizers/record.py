"""What is remembered of each 4-bit layer from when it was quantized; beside the modules, never on them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import nn

from surgery.errors import ConfigError
from surgery.model.fqn import split
from surgery.passes.buffers import ShardBuffer
from surgery.quantizers import states
from surgery.quantizers.bnb import linear4bits
from surgery.quantizers.digest import Piece, on_cpu, page_sums

__all__ = ["Record", "Records", "Sums", "record", "records_of", "settle"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """The page sums of bytes `start` to `stop` (exclusive) of a packed weight."""

    start: int
    stop: int
    pages: torch.Tensor

    @classmethod
    def of(cls, piece: Piece, pages: torch.Tensor) -> Sums:
        """`pages` are the sums of `piece`."""
        return cls(start=piece.start, stop=piece.stop, pages=pages)


@dataclass(kw_only=True, eq=False)
class Record:
    """One layer as it was quantized.

    fqn: of the module, in the model before adapters and sharding. nbytes: of its packed weight.
    device: where it was quantized, and what the ranks' process group speaks.
    own: of bytes that this rank has vouched for: those that it made, later those that it was found to hold rightly.
    states: page sums of the tensors of `quant_state`, and settings: the rest of it; whole on every rank.
    whole: page sums of the whole packed weight, once the ranks have added up what they made; digest: of these and all
    of the state, from then on.
    """

    fqn: str
    nbytes: int
    device: torch.device
    own: Sums
    states: dict[str, torch.Tensor]
    settings: dict[str, str]
    whole: torch.Tensor | None = None
    digest: str = ""


#: Layers in the order of the model, which is the same on every rank.
Records: TypeAlias = Mapping[nn.Module, Record]

_records: weakref.WeakKeyDictionary[nn.Module, Record] = weakref.WeakKeyDictionary()


def record(parts: Iterable[ShardBuffer]) -> None:
    """Remember the quantized ones of `parts`, whose rows this rank has made and whose state is known.

    Waits for no device: what is remembered stays there, 1 byte for every 8 KiB of packed weights, until it is used.
    """
    quantized = [part for part in parts if part.target.is_quantized]
    packed = [Piece(data=part.read_rows(), start=_first_byte(part)) for part in quantized]
    of_states = [states.tensors(part.state) for part in quantized]
    # Once each: tables of codes are the same tensors for all weights.
    flat = {tensor: Piece(data=tensor) for tensors in of_states for tensor in tensors.values()}
    sums = page_sums([*packed, *flat.values()])
    of_tensor = dict(zip(flat, sums[len(packed) :], strict=True))
    for part, piece, pages, tensors in zip(quantized, packed, sums, of_states, strict=False):
        made = Record(
            fqn=split(part.target.fqn)[0],
            nbytes=part.target.nbytes,
            device=part.data.device,
            own=Sums.of(piece, pages),
            states={name: of_tensor[tensor] for name, tensor in tensors.items()},
            settings=states.settings(part.state),
        )
        _records.update((module, made) for module, _ in part.target.places)


def _first_byte(part: ShardBuffer) -> int:
    """Where in the packed weight the rows begin that this rank has made."""
    return part.slice.reads.start * part.row * part.data.element_size()


def records_of(model: nn.Module) -> dict[nn.Module, Record]:
    """The record of every 4-bit layer of `model`; raises `ConfigError` if there is none of a layer, or no layer."""
    layers = linear4bits(model)
    unknown = [layer for layer in layers if layer not in _records]
    if not layers or unknown:
        raise ConfigError(
            f"expected a model whose 4-bit layers surgery.qlora has quantized, found {len(layers)} layers, of "
            f"{len(unknown)} of which nothing was recorded then: attest what surgery.qlora returned, not a copy"
        )
    return {layer: _records[layer] for layer in layers}


def settle(records: Iterable[Record]) -> None:
    """Bring what is remembered to the CPU, where it is compared; once."""
    waiting = [each for each in records if each.own.pages.device.type != "cpu"]
    moved = iter(on_cpu([sums for each in waiting for sums in (each.own.pages, *each.states.values())]))
    for each in waiting:
        each.own = replace(each.own, pages=next(moved))
        each.states = {name: next(moved) for name in each.states}
