"""Compare shards and `quant_state`, between uses, with what was quantized.

Functions are collective, on one rank too, unless they say otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from surgery.attestation.differences import Difference
from surgery.comm.collectives import all_gather_flat, gather_objects
from surgery.quantizers.digest import (
    Piece,
    Place,
    Record,
    Records,
    Sums,
    cut,
    on_cpu,
    page_count,
    page_sums,
    pages_between,
)
from surgery.sharding.base import Part

__all__ = [
    "complete",
    "fingerprint",
    "gather_whole",
    "rank",
    "shard_differences",
    "spread",
    "state_differences",
    "state_disagreements",
]


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def add_up(
    vectors: Sequence[torch.Tensor], *, device: torch.device, group: dist.ProcessGroup | None = None
) -> list[torch.Tensor]:
    """The sums over the ranks of `group` of int64 `vectors`, modulo 2**64, on the CPU; `device` is what it speaks."""
    if not dist.is_initialized() or not vectors:
        return list(vectors)
    together = torch.cat(list(vectors)).to(device)
    dist.all_reduce(together, group=group)
    return cut(together.cpu(), [each.numel() for each in vectors])


def spread(own: Sums, nbytes: int) -> torch.Tensor:
    """Page sums of a part, extended to the whole with zeros; `(pages,)` int64 on the CPU."""
    whole = torch.zeros(page_count(nbytes), dtype=torch.int64)
    pages = pages_between(own.start, own.stop)
    whole[pages.start : pages.stop] = own.pages
    return whole


def complete(records: Sequence[Record]) -> None:
    """Complete the records, once, with page sums and digests of whole weights, from the sums of all ranks."""
    waiting = [each for each in records if each.whole is None]
    if not waiting:
        return
    vectors = [spread(each.own, each.nbytes) for each in waiting]
    for each, whole in zip(waiting, add_up(vectors, device=waiting[0].device), strict=True):
        each.whole = whole
        each.digest = _digest(each, whole)


def state_disagreements(records: Sequence[Record]) -> list[Difference]:
    """Layers of which a rank has computed another `quant_state`, on rank 0; none on the others.

    All compute it from the same statistics, but devices of different kinds may differ.
    """
    if len(set(gather_objects(fingerprint(records)))) == 1:
        return []
    mine = {each.fqn: each.digest for each in records}
    by_rank = gather_objects(mine)
    if rank() != 0:
        return []
    what = "as quantized is not what rank 0 has quantized"
    return [
        Difference(layer=fqn, where="quant_state", ranks=(number,), what=what)
        for number, found in enumerate(by_rank)
        for fqn, digest in found.items()
        if digest != by_rank[0][fqn]
    ]


def fingerprint(records: Sequence[Record]) -> str:
    """Fingerprint of the layers as they were quantized: 16 hexadecimal digits. Not collective."""
    return _hash(part.encode() for each in records for part in (each.fqn, each.digest))


def gather_whole(shard: Part, nbytes: int, *, device: torch.device) -> torch.Tensor:
    """The whole packed weight of `shard`, `(nbytes,)` uint8 on the CPU, gathered as bytes."""
    mine = shard.piece.data.detach().reshape(-1).view(torch.uint8)
    if shard.group is None:
        return mine.cpu()
    ranges = gather_objects((shard.piece.start, shard.piece.stop), shard.group)
    parts = all_gather_flat(mine.to(device), [stop - start for start, stop in ranges], group=shard.group).cpu()
    whole = torch.zeros(nbytes, dtype=torch.uint8)
    for (start, stop), part in zip(ranges, parts, strict=True):
        whole[start:stop] = part[: stop - start]
    return whole


def _digest(record: Record, whole: torch.Tensor) -> str:
    sums = {"weight": whole, **record.states}
    tensors = (part for name, pages in sums.items() for part in (name.encode(), pages.numpy().tobytes()))
    return _hash([*tensors, *(f"{name} {text}".encode() for name, text in record.settings.items())])


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def state_differences(records: Records) -> list[Difference]:
    """Differences of `quant_state` on this rank from what it was; not collective."""
    kept = {place: record for place, record in records.items() if record.states or record.settings}
    now = {place: record.quant.state_of(*place) for place, record in kept.items()}
    tensors = {place: record.quant.state_tensors(now[place]) for place, record in kept.items()}
    wanted = [(layer, name) for layer, record in kept.items() for name in record.states]
    pieces = [Piece(data=tensors[layer][name]) for layer, name in wanted if name in tensors[layer]]
    sums = iter(on_cpu(page_sums(pieces)))
    found: list[Difference] = []
    for layer, name in wanted:
        was = records[layer].states[name]
        pages = len(_differing(next(sums), was)) if name in tensors[layer] else len(was)
        if pages:
            found.append(_of_state(records[layer].fqn, name, pages, len(was)))
    for layer, record in kept.items():
        settings = record.quant.state_settings(now[layer])
        changed = {name: text for name, text in record.settings.items() if settings.get(name) != text}
        found += [_of_state(record.fqn, f"{name} is {settings.get(name)}, was {was}") for name, was in changed.items()]
    return found


def _of_state(layer: str, what: str, pages: int = 0, of_pages: int = 0) -> Difference:
    return Difference(layer=layer, where="quant_state", ranks=(rank(),), what=what, pages=pages, of_pages=of_pages)


def _differing(one: torch.Tensor, other: torch.Tensor) -> list[int]:
    """Pages of which the sums differ; all if there are more or fewer of them."""
    if torch.equal(one, other):
        return []
    if one.shape != other.shape:
        return list(range(max(len(one), len(other))))
    return torch.nonzero(one != other).flatten().tolist()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Held:
    """Part of one layer on this rank. is_known: these are the bytes that it has vouched for, or none at all."""

    record: Record
    shard: Part
    sums: Sums
    is_known: bool

    def differing(self) -> list[int]:
        """Pages that are not as they were, of known bytes."""
        return _differing(self.sums.pages, self.record.own.pages) if self.sums.pages.numel() else []


def shard_differences(records: Records, shards: Mapping[Place, Part]) -> list[Difference]:
    """Differences of packed weights on this rank from what they were; collective. `records` are complete.

    A rank that holds the bytes that it has vouched for compares them by itself. Where the sharding has cut elsewhere,
    sums are added up over the ranks that hold a weight among them. Of a page that is wrong, and that several of them
    hold bytes of, nobody can say whose they are; but bytes that were found right are vouched for from then on.
    """
    sums = on_cpu(page_sums([shards[layer].piece for layer in records]))
    held = [_held(record, shards[layer], pages) for (layer, record), pages in zip(records.items(), sums, strict=True)]
    own = {each.record.fqn: pages for each in held if each.is_known and (pages := each.differing())}
    if all(gather_objects(all(each.is_known for each in held))):
        return [_at_rest(each.record, (rank(),), own[each.record.fqn]) for each in held if each.record.fqn in own]
    return _shared_differences(held, own)


def _held(record: Record, shard: Part, pages: torch.Tensor) -> _Held:
    piece = shard.piece
    return _Held(
        record=record,
        shard=shard,
        sums=Sums(start=piece.start, stop=piece.stop, pages=pages),
        is_known=(piece.start, piece.stop) == (record.own.start, record.own.stop) or not piece.data.numel(),
    )


def _at_rest(record: Record, ranks: tuple[int, ...], pages: Sequence[int]) -> Difference:
    of_pages = page_count(record.nbytes)
    return Difference(layer=record.fqn, where="at rest", ranks=ranks, pages=len(pages), of_pages=of_pages)


def _shared_differences(held: Sequence[_Held], own: Mapping[str, Sequence[int]]) -> list[Difference]:
    """Differences of weights whose parts do not add up; vouches for the others. `own`: pages known to differ."""
    wrong = _not_adding_up(held)
    for each in held:
        if each.record.fqn not in wrong:
            each.record.own = each.sums
    anywhere = {fqn for of_rank in gather_objects(list(wrong)) for fqn in of_rank}
    claims = gather_objects(
        {fqn: _claim(each, adds_up=fqn not in wrong) for each in held if (fqn := each.record.fqn) in anywhere}
    )
    found = []
    for each in held:
        pages = wrong.get(each.record.fqn, [])
        suspects = _suspects(each, claims, pages) if pages else ()
        if suspects[:1] == (rank(),):  # one speaks for all
            found.append(_at_rest(each.record, suspects, own.get(each.record.fqn, pages)))
    return found


class _Claim(NamedTuple):
    """Statement of a rank on its part of a weight that is wrong somewhere; `is_right` is None if it is unknown."""

    start: int
    stop: int
    sums: list[int]
    is_right: bool | None

    def judged_by(self, others: Iterable[_Claim]) -> bool | None:
        """Whether it is right, by those who have the same bytes and know; None if none of them does."""
        if self.is_right is not None:
            return self.is_right
        same = (other for other in others if (other.start, other.stop) == (self.start, self.stop))
        return next((other.sums == self.sums for other in same if other.is_right), None)


def _claim(held: _Held, *, adds_up: bool) -> _Claim:
    """State what is known of a part. adds_up: the parts that ranks of this group hold make the right whole."""
    is_right = not held.differing() if held.is_known else (adds_up or None)
    return _Claim(held.sums.start, held.sums.stop, held.sums.pages.tolist(), is_right)


def _suspects(held: _Held, claims: Sequence[Mapping[str, _Claim]], pages: Sequence[int]) -> tuple[int, ...]:
    """The ranks of this group that are wrong; or, if it is none for certain, all that hold bytes of wrong `pages`."""
    group = held.shard.group
    members = (rank(),) if group is None else tuple(sorted(dist.get_process_group_ranks(group)))
    of_layer = [by_layer[held.record.fqn] for by_layer in claims]
    verdicts = {member: of_layer[member].judged_by(of_layer) for member in members}
    wrong = tuple(member for member, is_right in verdicts.items() if is_right is False)
    return wrong or tuple(
        member
        for member, is_right in verdicts.items()
        if is_right is None and not set(pages).isdisjoint(pages_between(*of_layer[member][:2]))
    )


def _not_adding_up(held: Sequence[_Held]) -> dict[str, list[int]]:
    """FQN -> pages that differ, of the weights whose parts do not add up in the group of this rank."""
    groups: dict[dist.ProcessGroup | None, list[_Held]] = {}
    for each in held:
        groups.setdefault(each.shard.group, []).append(each)
    wrong = {}
    for group, members in groups.items():
        totals = [spread(each.sums, each.record.nbytes) for each in members]
        if group is not None:  # else there is nothing to add: this rank holds everything
            totals = add_up(totals, device=members[0].record.device, group=group)
        for each, total in zip(members, totals, strict=True):
            assert each.record.whole is not None
            wrong[each.record.fqn] = _differing(total, each.record.whole)
    return {fqn: pages for fqn, pages in wrong.items() if pages}
