"""Digests of quantized weights, kept from when they were made: for every page of a tensor, one sum of 64 bits.

The bytes are taken as words of 32 bits. Each is multiplied by an odd number that its place in the page decides, and the
products are added modulo 2**64. So what two ranks compute of two parts, wherever they are cut, adds up to what one
computes of the whole. A single changed word always shows, since an odd factor loses no bits of a difference; of words
that are exchanged, or changed together, all but about one in 2**32 do. It guards against faults, not against forgery.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from surgery.errors import ConfigError
from surgery.quantizers.base import QuantFormat, packed_names, quantized_modules

__all__ = [
    "PAGE",
    "Made",
    "Piece",
    "Place",
    "Record",
    "Records",
    "Sums",
    "cut",
    "on_cpu",
    "page_count",
    "page_sums",
    "pages_between",
    "record",
    "records_of",
    "settle",
]

#: Bytes of a page, which has one sum: small enough to tell where a difference is, and 8,192 times the size of the sum.
PAGE = 1 << 16
WORDS = PAGE // 4

#: Bytes taken at a time. On their way they become words of 64 bits, so that temporaries are three times as large: what
#: a CPU keeps in its cache (four times as fast), and on a GPU enough for its kernels to be busy.
RUN_BYTES = {"cpu": 1 << 18, "cuda": 1 << 24}


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """A part of a tensor, which is looked at as bytes: `data` (contiguous, any dtype) begins at byte `start` of it."""

    data: torch.Tensor
    start: int = 0

    @property
    def stop(self) -> int:
        """The byte after the last one."""
        return self.start + self.data.nbytes

    @property
    def pages(self) -> range:
        """The pages of the whole that the piece has bytes of."""
        return pages_between(self.start, self.stop)


def page_count(nbytes: int) -> int:
    """Number of pages in so many bytes, a partial one counted."""
    return -(-nbytes // PAGE)


def pages_between(start: int, stop: int) -> range:
    """The pages that bytes `start` to `stop` (exclusive) are in; none for no bytes."""
    return range(start // PAGE, page_count(stop)) if stop > start else range(0)


def page_sums(pieces: Sequence[Piece]) -> list[torch.Tensor]:
    """The page sums of each of `pieces`, `(pages,)` int64, on their device, which is the same for all.

    Bytes of a page that are not in the piece count as zeros. Takes three kernels for every `RUN_BYTES`, however
    many pieces these are, and waits for none.
    """
    if not pieces:
        return []
    sums = [_sums(run) for run in _runs(pieces)]
    together = torch.cat(sums) if sums else torch.empty(0, dtype=torch.int64, device=pieces[0].data.device)
    return cut(together, [len(piece.pages) for piece in pieces])


def on_cpu(sums: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same sums on the CPU, brought there together, because each transfer waits for the device."""
    if not sums:
        return []
    return cut(torch.cat(list(sums)).cpu(), [each.numel() for each in sums])


def cut(together: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """The 1-D tensor `together` in parts of `sizes` elements."""
    return list(together.split(list(sizes)))  # type: ignore[no-untyped-call]  # no annotation upstream


def _runs(pieces: Sequence[Piece]) -> Iterator[list[torch.Tensor]]:
    """All pages of all pieces, one after the other, in runs of as many bytes, and a shorter last one."""
    size = RUN_BYTES.get(pieces[0].data.device.type, RUN_BYTES["cuda"])
    run: list[torch.Tensor] = []
    room = size
    for segment in itertools.chain.from_iterable(map(_segments, pieces)):
        for part in _divide(segment, room, size):
            run.append(part)
            room -= part.numel()
            if not room:
                yield run
                run, room = [], size
    if run:
        yield run


def _segments(piece: Piece) -> list[torch.Tensor]:
    """The bytes of `piece`, with zeros around them that make them whole pages; nothing for an empty piece."""
    if not piece.data.numel():
        return []
    flat = piece.data.detach()
    data = (flat if flat.dim() == 1 else flat.view(-1)).view(torch.uint8)
    before, after = piece.start % PAGE, -piece.stop % PAGE
    zeros = _zeros(piece.data.device) if before or after else data
    return [*([zeros[:before]] if before else []), data, *([zeros[:after]] if after else [])]


def _divide(segment: torch.Tensor, first: int, size: int) -> Iterator[torch.Tensor]:
    """`segment` in parts: at most `first` bytes, then at most `size` each."""
    if segment.numel() <= first:
        yield segment
        return
    yield segment[:first]
    for start in range(first, segment.numel(), size):
        yield segment[start : start + size]


def _sums(run: list[torch.Tensor]) -> torch.Tensor:
    words = torch.cat(run) if len(run) > 1 or run[0].storage_offset() % 4 else run[0]
    return (words.view(torch.int32).view(-1, WORDS) * _factors(words.device)).sum(dim=1)


@functools.cache
def _zeros(device: torch.device) -> torch.Tensor:
    return torch.zeros(PAGE, dtype=torch.uint8, device=device)


@functools.cache
def _factors(device: torch.device) -> torch.Tensor:
    """An odd number of 64 bits for every word of a page, the same everywhere; `(WORDS,)` int64.

    SplitMix64 (Steele, Lea, Flood, 2014), from 0 on.
    """
    bits = np.arange(1, WORDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((bits ^ bits >> np.uint64(31) | np.uint64(1)).view(np.int64)).to(device)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sums:
    """The page sums of bytes `start` to `stop` (exclusive) of a packed weight."""

    start: int
    stop: int
    pages: torch.Tensor


@dataclass(kw_only=True, eq=False)
class Record:
    """One packed weight as it was quantized, or its statistics where they are a parameter too.

    fqn: of the module if the weight is its only one, else of the parameter, in the model before adapters and sharding.
    quant: its format. nbytes: of the packed weight.
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


#: A module, and the name of one of its parameters.
Place: TypeAlias = tuple[nn.Module, str]

#: Packed parameters in the order of the model, which is the same on every rank.
Records: TypeAlias = Mapping[Place, Record]

_records: weakref.WeakKeyDictionary[nn.Module, dict[str, Record]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """A packed weight that this rank has made a part of, or its statistics.

    fqn, quant, nbytes: as in `Record`. places: that hold it. piece: the part. state: of the whole weight.
    """

    fqn: str
    quant: QuantFormat
    places: Sequence[Place]
    nbytes: int
    piece: Piece
    state: Any


def record(made: Sequence[Made]) -> None:
    """Remember weights as this rank has made them.

    Waits for no device: what is remembered stays there, 1 byte for every 8 KiB of packed weights, until it is used.
    """
    of_states = [{} if each.state is None else each.quant.state_tensors(each.state) for each in made]
    # Once each: tables of codes are the same tensors for all weights.
    flat = {tensor: Piece(data=tensor) for tensors in of_states for tensor in tensors.values()}
    sums = page_sums([*(each.piece for each in made), *flat.values()])
    of_tensor = dict(zip(flat, sums[len(made) :], strict=True))
    for each, pages, tensors in zip(made, sums, of_states, strict=False):
        found = Record(
            fqn=each.fqn,
            quant=each.quant,
            nbytes=each.nbytes,
            device=each.piece.data.device,
            own=Sums(start=each.piece.start, stop=each.piece.stop, pages=pages),
            states={name: of_tensor[tensor] for name, tensor in tensors.items()},
            settings={} if each.state is None else dict(each.quant.state_settings(each.state)),
        )
        for module, name in each.places:
            _records.setdefault(module, {})[name] = found


def records_of(model: nn.Module) -> dict[Place, Record]:
    """The record of every packed parameter of `model`; raises `ConfigError` if there is none of one, or no such."""
    places = [(layer, name) for layer in quantized_modules(model) for name in packed_names(layer)]
    unknown = [place for place in places if place[1] not in _records.get(place[0], {})]
    if not places:
        raise ConfigError("attest: expected quantized layers, found none: a model of quant=None has none")
    if unknown:
        raise ConfigError(
            f"expected a model whose quantized layers surgery.qlora has made, found {len(places)} layers, of "
            f"{len(unknown)} of which nothing was recorded then: attest what surgery.qlora returned, not a copy"
        )
    return {(layer, name): _records[layer][name] for layer, name in places}


def settle(records: Iterable[Record]) -> None:
    """Bring what is remembered to the CPU, where it is compared; once."""
    waiting = [each for each in records if each.own.pages.device.type != "cpu"]
    moved = iter(on_cpu([sums for each in waiting for sums in (each.own.pages, *each.states.values())]))
    for each in waiting:
        each.own = replace(each.own, pages=next(moved))
        each.states = {name: next(moved) for name in each.states}
