"""What ranks tell each other to attest a model. Functions are collective, on one rank too, if they do not say other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from surgery.attestation.differences import Difference
from surgery.comm.collectives import all_gather_single, gather_objects
from surgery.quantizers.digest import Record, Sums, cut, page_count, pages_between
from surgery.sharding.base import Shard

__all__ = ["add_up", "complete", "fingerprint", "gather_whole", "rank", "spread", "state_disagreements"]


def rank() -> int:
    """Of this process; 0 without a process group."""
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
    """Sums of a part as sums of the whole, the rest of it counted as zeros; `(pages,)` int64 on the CPU."""
    whole = torch.zeros(page_count(nbytes), dtype=torch.int64)
    pages = pages_between(own.start, own.stop)
    whole[pages.start : pages.stop] = own.pages
    return whole


def complete(records: Sequence[Record]) -> None:
    """Let every rank know the page sums and digests of whole weights, from what each of them has made; once."""
    waiting = [each for each in records if each.whole is None]
    if not waiting:
        return
    vectors = [spread(each.own, each.nbytes) for each in waiting]
    for each, whole in zip(waiting, add_up(vectors, device=waiting[0].device), strict=True):
        each.whole = whole
        each.digest = _digest(each, whole)


def state_disagreements(records: Sequence[Record]) -> list[Difference]:
    """Layers of which a rank has computed another `quant_state` than rank 0, which says so for all; others say nothing.

    All have computed it from the same statistics; on devices of different kinds it could differ all the same.
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
    """Of the layers as they were quantized: 16 hexadecimal digits. Not collective."""
    return _hash(part.encode() for each in records for part in (each.fqn, each.digest))


def gather_whole(shard: Shard, nbytes: int, *, device: torch.device) -> torch.Tensor:
    """The packed weight that `shard` is a part of, `(nbytes,)` uint8 on the CPU; as bytes all the way."""
    mine = shard.piece.data.detach().reshape(-1).view(torch.uint8)
    if shard.group is None:
        return mine.cpu()
    ranges = gather_objects((shard.piece.start, shard.piece.stop), shard.group)
    longest = max(stop - start for start, stop in ranges)
    sent = torch.zeros(longest, dtype=torch.uint8, device=device)
    sent[: mine.numel()] = mine
    received = torch.empty(len(ranges) * longest, dtype=torch.uint8, device=device)
    all_gather_single(received, sent, group=shard.group)
    whole = torch.zeros(nbytes, dtype=torch.uint8)
    for (start, stop), part in zip(ranges, received.cpu().view(-1, longest), strict=True):
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
