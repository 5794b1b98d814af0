"""One family, loaded by upstream and by this project, side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

import surgery
from families import arms, sharded
from families.checkpoint import NotMadeError, save_random
from families.compare import different_losses, different_tensors, differences
from families.exceptions import IMPOSSIBLE
from families.inputs import logits_of, train
from families.outcome import Outcome
from surgery.quantizers.bnb import linear4bits

__all__ = ["check"]

#: How far losses may be apart in one process, where both sides compute the same.
ALONE: Final = 0.0


def check(family: str, *, shard: bool) -> Outcome:
    """The outcome for `family`; with FSDP2 on two ranks too, where `shard`."""
    if family in IMPOSSIBLE:
        return Outcome(family=family, verdict="not made", why=IMPOSSIBLE[family])
    with tempfile.TemporaryDirectory(prefix=f"{family}-") as folder:
        try:
            save_random(family, Path(folder) / "base")
        except NotMadeError as error:
            return Outcome(family=family, verdict="not made", why=str(error))
        return _check_made(family, Path(folder), shard=shard)


def _check_made(family: str, folder: Path, *, shard: bool) -> Outcome:
    try:
        wanted = arms.adapted(arms.stock(folder / "base"))
        logits_of(wanted, family).mean().backward()  # type: ignore[no-untyped-call]  # no annotation upstream
        wanted.zero_grad(set_to_none=True)
    except Exception as error:
        return _without_stock(family, folder, error)
    try:
        found = arms.ours(folder / "base")
    except surgery.SurgeryError as error:
        return Outcome(family=family, verdict="refused", why=_line(error))
    except Exception as error:
        return Outcome(family=family, verdict="differs", why=f"not loaded: {_line(error)}")
    counts = {
        "quantized": len(linear4bits(found)),
        "adapters": sum(parameter.requires_grad for parameter in found.parameters()),
    }
    why = list(_found_different(family, folder, found, wanted, shard=shard))
    verdict = "differs" if why else "exact"
    return Outcome(family=family, verdict=verdict, why="; ".join(why), sharded=shard and not why, **counts)


def _without_stock(family: str, folder: Path, error: Exception) -> Outcome:
    """What stock cannot do, this project must not do silently."""
    try:
        with arms.ours(folder / "base") as model:
            losses = train(model, family)
    except Exception:
        return Outcome(family=family, verdict="stock fails", why=_line(error))
    return Outcome(family=family, verdict="stock fails", why=f"{_line(error)} (trains here: {losses})")


def _found_different(family: str, folder: Path, found: Any, wanted: Any, *, shard: bool) -> Iterator[str]:
    """Everything that differs, in the order in which it is looked at."""
    with found:
        for step in (_load, _run, _train, _save):
            try:
                yield from step(family, folder, found, wanted)
            except Exception as error:
                yield f"{step.__name__[1:]}: {_line(error)}"
                return
    if shard:
        yield from sharded.different(family, folder)


def _load(_family: str, _folder: Path, found: Any, wanted: Any) -> Iterator[str]:
    yield from differences(found, wanted)


def _run(family: str, _folder: Path, found: Any, wanted: Any) -> Iterator[str]:
    with torch.no_grad():
        logits = [logits_of(model, family) for model in (found, wanted)]
    yield from different_tensors("logits", {"": logits[0]}, {"": logits[1]})


def _train(family: str, _folder: Path, found: Any, wanted: Any) -> Iterator[str]:
    losses = list(different_losses(train(found, family), train(wanted, family), ALONE))
    yield from losses or (f"after training, {difference}" for difference in differences(found, wanted))


def _save(family: str, folder: Path, found: Any, _wanted: Any) -> Iterator[str]:
    """The trained adapter in plain PEFT over a stock model."""
    surgery.save_adapter(found, folder / "adapter")
    again = arms.reloaded(arms.stock(folder / "base"), folder / "adapter")
    with torch.no_grad():
        logits = [logits_of(model, family) for model in (again, found)]
    yield from different_tensors("logits of the reloaded adapter", {"": logits[0]}, {"": logits[1]})


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
