"""A family under FSDP2 on two ranks, against one process of this project."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

import surgery
from families import arms
from families.compare import different_losses, different_tensors
from families.inputs import IDS, logits_of, train
from tests.helpers.ranks import RanksFailedError, run_ranks

__all__ = ["different"]

#: How far losses may be apart, as part of the loss: ranks add gradients up in another order.
TOLERANCE: Final = 1e-5

#: In bfloat16 each rank gets the same rows, so that both compute what one process does, bit for bit; in float32 each
#: gets its half, and gradients have to be those of the whole.
PRECISIONS: Final = ((torch.bfloat16, False), (torch.float32, True))


def different(family: str, folder: Path) -> list[str]:
    """What two ranks do otherwise than one process does, in words. Raises `ConfigError` if they refuse it."""
    try:
        ranks = run_ranks(_on_rank, 2, family, folder, timeout=150)
    except RanksFailedError as error:
        return [f"FSDP2: {str(error).strip().splitlines()[-1]}"]
    if isinstance(ranks[0], surgery.ConfigError):
        raise ranks[0]
    return [line for dtype, halves in PRECISIONS for line in _different_losses(family, folder, dtype, halves, ranks)]


def _different_losses(
    family: str, folder: Path, dtype: torch.dtype, halves: bool, ranks: list[dict[bool, list[float]]]
) -> Iterator[str]:
    with arms.ours(folder / "base", family, dtype=dtype) as alone:
        wanted = train(alone)
        for found in ranks:
            yield from (f"FSDP2, {dtype}: {line}" for line in different_losses(found[halves], wanted, TOLERANCE))
        if not halves:
            yield from _different_when_saved(folder, alone)


def _different_when_saved(folder: Path, alone: Any) -> Iterator[str]:
    again = arms.reloaded(arms.stock(folder / "base"), folder / "sharded")
    with torch.no_grad():
        logits = [logits_of(model) for model in (again, alone)]
    yield from different_tensors("FSDP2: logits of the reloaded adapter", {"": logits[0]}, {"": logits[1]})


def _on_rank(family: str, folder: Path) -> dict[bool, list[float]] | surgery.ConfigError:
    """Mean losses over the ranks, by whether each has its half of the rows; or why not. The first adapter is saved."""
    losses = {}
    for dtype, halves in PRECISIONS:
        try:
            sharded = arms.ours(folder / "base", family, dtype=dtype, shard=surgery.FSDP2())
        except surgery.ConfigError as refusal:
            return refusal
        with sharded as model:
            arms.as_it_is(model)
            ids = IDS.chunk(2)[dist.get_rank()] if halves else IDS
            losses[halves] = _mean(train(model, ids))
            if not halves:
                surgery.save_adapter(model, folder / "sharded")
    return losses


def _mean(losses: list[float]) -> list[float]:
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()
