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
from families.outcome import Outcome, Verdict
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
        wanted = arms.adapted(arms.stock(folder / "base"), family)
    except Exception as error:
        return _without_stock(family, folder, error)
    try:
        found = arms.ours(folder / "base", family)
    except Exception as error:
        return _without_ours(family, wanted, error)
    with found:
        why = list(differences(found, wanted))  # before a forward, in which some buffers change
        failure = _failure(family, wanted)
        if failure is not None:
            return Outcome(family=family, verdict="stock fails", why=_line(failure))
        why += _run_different(family, folder, found, wanted)
        sizes = {
            "quantized": len(linear4bits(found)),
            "adapters": sum(parameter.requires_grad for parameter in found.parameters()),
        }
    if shard and not why:
        why += sharded.different(family, folder)
    verdict: Verdict = "differs" if why else "exact"
    return Outcome(family=family, verdict=verdict, why="; ".join(why), sharded=shard, **sizes)


def _failure(family: str, model: Any) -> Exception | None:
    """What a forward and a backward of `model` raise."""
    try:
        logits_of(model, family).mean().backward()  # type: ignore[no-untyped-call]  # no annotation upstream
    except Exception as error:
        return error
    model.zero_grad(set_to_none=True)
    return None


def _without_stock(family: str, folder: Path, error: Exception) -> Outcome:
    """What stock cannot load or adapt, this project must not do silently."""
    try:
        with arms.ours(folder / "base", family) as model:
            losses = train(model, family)
    except Exception:
        return Outcome(family=family, verdict="stock fails", why=_line(error))
    return Outcome(family=family, verdict="differs", why=f"trains here alone ({losses}); stock: {_line(error)}")


def _without_ours(family: str, wanted: Any, error: Exception) -> Outcome:
    failure = _failure(family, wanted)
    if failure is not None:
        return Outcome(family=family, verdict="stock fails", why=_line(failure))
    if isinstance(error, surgery.SurgeryError):
        return Outcome(family=family, verdict="refused", why=_line(error))
    return Outcome(family=family, verdict="differs", why=f"not loaded: {_line(error)}")


def _run_different(family: str, folder: Path, found: Any, wanted: Any) -> list[str]:
    """What differs when both run, in the order in which it is looked at; a step that raises is the last."""
    why: list[str] = []
    for step in (_run, _train, _save):
        try:
            why += step(family, folder, found, wanted)
        except Exception as error:
            return [*why, f"{step.__name__[1:]}: {_line(error)}"]
    return why


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
