"""Comparison of a family under FSDP2 on two ranks with one process of this project."""

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

#: (dtype, whether ranks split the rows, relative tolerance of losses). In bfloat16 both ranks get the same rows, so
#: that they compute the same as one process; in float32 each gets half, and gradients must be those of the whole. The
#: tolerance is needed since gradients of layers that run several times are summed in another order, with rounding.
ARMS: Final = ((torch.bfloat16, False, 1e-3), (torch.float32, True, 1e-5))


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Losses averaged over ranks, by whether the rows were split, and logits of the first model after training."""

    losses: dict[bool, list[float]]
    logits: torch.Tensor


def different(family: str, folder: Path) -> list[str]:
    """Differences between two ranks and one process, in words. Raises `ConfigError` if the ranks refuse the family."""
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
    """Train both models on this rank and save the first one's adapter; returns the refusal if there is one."""
    losses, logits = {}, torch.empty(0)
    for dtype, halves, _ in ARMS:
        try:
            sharded = arms.ours(folder / "base", family, dtype=dtype, shard=surgery.FSDP2())
        except surgery.ConfigError as refusal:
            return refusal
        with sharded as model:
            arms.keep_packing(model)
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
