"""A family under FSDP2 on two ranks, against one process of this project."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

import surgery
from families import arms
from families.compare import different_losses, different_tensors
from families.inputs import IDS, logits_of, train
from tests.helpers.ranks import RanksFailedError, run_ranks

__all__ = ["different"]

#: In bfloat16 each rank gets the same rows, so that both compute what one process does; in float32 each gets its half,
#: and gradients have to be those of the whole. With how far losses may be apart, as part of the loss: gradients of
#: layers that run several times are added up in another order, which bfloat16 rounds.
ARMS: Final = ((torch.bfloat16, False, 1e-3), (torch.float32, True, 1e-5))


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Mean losses over the ranks, by whether each had its half of the rows; and logits of the first model, trained."""

    losses: dict[bool, list[float]]
    logits: torch.Tensor


def different(family: str, folder: Path) -> list[str]:
    """What two ranks do otherwise than one process does, in words. Raises `ConfigError` if they refuse it."""
    try:
        ranks = run_ranks(_on_rank, 2, family, folder, timeout=150)
    except RanksFailedError as error:
        return [f"FSDP2: {str(error).strip().splitlines()[-1]}"]
    if isinstance(ranks[0], surgery.ConfigError):
        raise ranks[0]
    return [*_different_losses(family, folder, ranks), *_different_when_saved(folder, ranks[0])]


def _different_losses(family: str, folder: Path, ranks: list[Trained]) -> Iterator[str]:
    for dtype, halves, tolerance in ARMS:
        with arms.ours(folder / "base", family, dtype=dtype) as alone:
            wanted = train(alone)
        for found in ranks:
            said = different_losses(found.losses[halves], wanted, tolerance)
            yield from (f"FSDP2, {dtype}: {line}" for line in said)


def _different_when_saved(folder: Path, trained: Trained) -> Iterator[str]:
    again = arms.reloaded(arms.stock(folder / "base"), folder / "sharded")
    with torch.no_grad():
        logits = logits_of(again)
    yield from different_tensors("FSDP2: logits of the reloaded adapter", {"": logits}, {"": trained.logits})


def _on_rank(family: str, folder: Path) -> Trained | surgery.ConfigError:
    """What has come of both models; or why not. The adapter of the first is saved."""
    losses, logits = {}, torch.empty(0)
    for dtype, halves, _ in ARMS:
        try:
            sharded = arms.ours(folder / "base", family, dtype=dtype, shard=surgery.FSDP2())
        except surgery.ConfigError as refusal:
            return refusal
        with sharded as model:
            arms.as_it_is(model)
            losses[halves] = _mean(train(model, IDS.chunk(2)[dist.get_rank()] if halves else IDS))
            if not halves:
                surgery.save_adapter(model, folder / "sharded")
                with torch.no_grad():
                    logits = logits_of(model)
    return Trained(losses=losses, logits=logits)


def _mean(losses: list[float]) -> list[float]:
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()
