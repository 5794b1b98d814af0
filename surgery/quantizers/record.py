"""Records of quantized layers as they were made: kept beside the modules, never on them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import nn

from surgery.errors import ConfigError
from surgery.quantizers.base import QuantFormat, quantized_modules
from surgery.quantizers.digest import Piece, on_cpu, page_sums

__all__ = ["Made", "Record", "Records", "Sums", "record", "records_of", "settle"]


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

    fqn: of the module, in the model before adapters and sharding. quant: its format. nbytes: of its packed weight.
    device: where it was quantized, and what the ranks' process group speaks.
    own: of bytes that this rank has vouched for: those that it made, later those that it was found to hold rightly.
    states: page sums of the tensors of `quant_state`, and settings: the rest of it; whole on every rank.
    whole: page sums of the whole packed weight, once the ranks have added up what they made; digest: of these and all
    of the state, from then on.
    """

    fqn: str
    quant: QuantFormat
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """A packed weight that this rank has made a part of.

    fqn: of its module. modules: that hold it. nbytes: of the whole weight. piece: the part. state: of the whole weight.
    """

    fqn: str
    modules: tuple[nn.Module, ...]
    nbytes: int
    piece: Piece
    state: Any


def record(made: Sequence[Made], quant: QuantFormat) -> None:
    """Remember weights as this rank has made them, in the format `quant`.

    Waits for no device: what is remembered stays there, 1 byte for every 8 KiB of packed weights, until it is used.
    """
    of_states = [quant.state_tensors(each.state) for each in made]
    # Once each: tables of codes are the same tensors for all weights.
    flat = {tensor: Piece(data=tensor) for tensors in of_states for tensor in tensors.values()}
    sums = page_sums([*(each.piece for each in made), *flat.values()])
    of_tensor = dict(zip(flat, sums[len(made) :], strict=True))
    for each, pages, tensors in zip(made, sums, of_states, strict=False):
        found = Record(
            fqn=each.fqn,
            quant=quant,
            nbytes=each.nbytes,
            device=each.piece.data.device,
            own=Sums.of(each.piece, pages),
            states={name: of_tensor[tensor] for name, tensor in tensors.items()},
            settings=dict(quant.state_settings(each.state)),
        )
        _records.update((module, found) for module in each.modules)


def records_of(model: nn.Module) -> dict[nn.Module, Record]:
    """The record of every quantized layer of `model`; raises `ConfigError` if there is none of a layer, or no layer."""
    layers = quantized_modules(model)
    unknown = [layer for layer in layers if layer not in _records]
    if not layers or unknown:
        raise ConfigError(
            f"expected a model whose quantized layers surgery.qlora has made, found {len(layers)} layers, of "
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
