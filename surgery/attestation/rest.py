"""Compare what ranks hold between uses, shards and `quant_state`, with what was quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from surgery.attestation import states
from surgery.attestation.agreement import add_up, of_all_ranks, rank, spread
from surgery.attestation.differences import Difference
from surgery.attestation.digest import Piece, on_cpu, page_count, page_sums
from surgery.attestation.record import Records, Sums
from surgery.attestation.shards import Shard

__all__ = ["shard_differences", "state_differences"]


def state_differences(records: Records) -> list[Difference]:
    """Where `quant_state` on this rank is not what it was; not collective."""
    found: list[Difference] = []
    now = {layer: states.state_of(layer) for layer in records}
    wanted = [(layer, name) for layer, record in records.items() for name in record.states]
    tensors = [states.tensors(now[layer]).get(name) for layer, name in wanted]
    sums = iter(on_cpu(page_sums([Piece(data=tensor) for tensor in tensors if tensor is not None])))
    for (layer, name), tensor in zip(wanted, tensors, strict=True):
        expected = records[layer].states[name]
        pages = _differing(next(sums), expected) if tensor is not None else list(range(len(expected)))
        if pages:
            found.append(_of_state(records[layer].fqn, name, len(pages), len(expected)))
    for layer, record in records.items():
        current = states.settings(now[layer])
        for name, was in record.settings.items():
            if current.get(name) != was:
                found.append(_of_state(record.fqn, f"{name} is {current.get(name)}, was {was}"))
    return found


def _of_state(layer: str, what: str, pages: int = 0, of_pages: int = 0) -> Difference:
    return Difference(layer=layer, where="quant_state", ranks=(rank(),), what=what, pages=pages, of_pages=of_pages)


def _differing(one: torch.Tensor, other: torch.Tensor) -> list[int]:
    """Pages of which the sums differ; all if there are more or fewer of them."""
    if one.shape != other.shape:
        return list(range(max(len(one), len(other))))
    return torch.nonzero(one != other).flatten().tolist()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Held:
    """What this rank holds of one layer. is_known: of bytes that it has vouched for, so that it is compared alone."""

    layer: nn.Module
    shard: Shard
    sums: Sums
    is_known: bool


def shard_differences(records: Records, shards: Mapping[nn.Module, Shard]) -> list[Difference]:
    """Where packed weights on this rank are not what they were; collective. `records` are complete.

    A rank that holds the bytes that it has vouched for compares them by itself. Where the sharding has cut elsewhere,
    sums are added up over the ranks that hold a weight among them; of a page that is wrong, and that several hold bytes
    of, no one can say whose they are. Bytes found right are vouched for from then on.
    """
    sums = on_cpu(page_sums([shards[layer].piece for layer in records]))
    held = [
        _held(records[layer].own, layer, shards[layer], pages) for layer, pages in zip(records, sums, strict=True)
    ]
    found = [difference for each in held if each.is_known for difference in _own_difference(records, each)]
    if not all(of_all_ranks(all(each.is_known for each in held))):
        found += _shared_differences(records, held, guilty={each.layer for each in found})
    return found


def _held(own: Sums, layer: nn.Module, shard: Shard, pages: torch.Tensor) -> _Held:
    piece = shard.piece
    is_known = (piece.start, piece.stop) == (own.start, own.stop) or not piece.data.numel()
    return _Held(
        layer=layer,
        shard=shard,
        sums=Sums(start=piece.start, stop=piece.stop, pages=pages),
        is_known=is_known,
    )


def _own_difference(records: Records, held: _Held) -> list[Difference]:
    record = records[held.layer]
    if not held.sums.pages.numel():
        return []
    pages = _differing(held.sums.pages, record.own.pages)
    return [_at_rest(record.fqn, (rank(),), len(pages), page_count(record.nbytes))] if pages else []


def _at_rest(fqn: str, ranks: tuple[int, ...], pages: int, of_pages: int) -> Difference:
    return Difference(layer=fqn, where="at rest", ranks=ranks, pages=pages, of_pages=of_pages)


def _shared_differences(records: Records, held: list[_Held], *, guilty: set[str]) -> list[Difference]:
    """Of the weights whose parts do not add up; vouches for those that do. `guilty`: layers that this rank has named."""
    wrong: dict[str, list[int]] = {}
    for group, members in _by_group(held).items():
        for each, total in zip(members, _totals(records, members, group), strict=True):
            record = records[each.layer]
            pages = _differing(total, record.whole) if record.whole is not None else []
            if pages:
                wrong[record.fqn] = pages
            else:
                record.own = each.sums
    ...
    return []


def _by_group(held: list[_Held]) -> dict[dist.ProcessGroup | None, list[_Held]]:
    groups: dict[dist.ProcessGroup | None, list[_Held]] = {}
    for each in held:
        groups.setdefault(each.shard.group, []).append(each)
    return groups


def _totals(records: Records, members: list[_Held], group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    vectors = [spread(each.sums, records[each.layer].nbytes) for each in members]
    if group is None:
        return vectors
    return add_up(vectors, device=records[members[0].layer].device, group=group)
