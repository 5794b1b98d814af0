"""Comparison of one family as loaded by upstream and by this project."""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

import surgery
from families import arms, sharded
from families.checkpoint import NotMadeError, save_random
from families.compare import differences, different_losses, different_tensors
from families.exceptions import EXCLUDED, IMPOSSIBLE, LEFT_ALONE
from families.experts import different_experts
from families.inputs import logits_of, train
from families.outcome import Outcome
from surgery.quantizers.bnb import linear4bits

__all__ = ["check"]

#: Tolerance of losses in one process, where both sides compute the same.
TOLERANCE: Final = 0.0

Result = TypeVar("Result")


def check(family: str, shard: bool, drop_in: bool = False) -> Outcome:
    """Check `family`, also with FSDP2 on two ranks if `shard`; loaded in `surgery.low_memory()` if `drop_in`."""
    if family in IMPOSSIBLE:
        return Outcome(family=family, verdict="not made", why=IMPOSSIBLE[family])
    with tempfile.TemporaryDirectory(prefix=f"{family}-") as folder:
        try:
            save_random(family, Path(folder) / "base")
        except NotMadeError as error:
            return Outcome(family=family, verdict="not made", why=str(error))
        outcome = _check_made(family, Path(folder), shard=shard, ours=arms.in_low_memory if drop_in else arms.ours)
        return outcome if outcome.verdict == "stock fails" else _with_experts(outcome, Path(folder) / "base")


def _check_made(family: str, folder: Path, *, shard: bool, ours: Callable[[Path, str], Any]) -> Outcome:
    wanted = _attempt(lambda: arms.adapted(arms.stock(folder / "base"), family))
    found = _attempt(lambda: ours(folder / "base", family))
    if isinstance(wanted, Exception):
        return _outcome_without_stock(family, wanted, found)
    if isinstance(found, Exception):
        return _outcome_without_ours(family, wanted, found)
    with found:
        why = list(differences(found, wanted))  # before a forward, which changes some buffers
        failure = _attempt(lambda: _try_out(wanted))
        if failure is not None:
            return Outcome(family=family, verdict="stock fails", why=_line(failure))
        why += _compare_steps(family, folder, found, wanted)
        sizes = {
            "quantized": len(linear4bits(found)),
            "adapters": sum(parameter.requires_grad for parameter in found.parameters()),
        }
    if why:
        return Outcome(family=family, verdict="differs", why="; ".join(why), **sizes)
    exact = Outcome(family=family, verdict="exact", why="; ".join(_exclusions(family)), **sizes)
    return _compare_with_ranks(exact, folder) if shard else exact


def _compare_with_ranks(exact: Outcome, folder: Path) -> Outcome:
    """Extend an exact outcome by the comparison on two ranks."""
    why = _attempt(lambda: sharded.different(exact.family, folder))
    if isinstance(why, surgery.ConfigError):
        return replace(exact, sharded="refused", why=f"FSDP2: {_line(why)}")
    if isinstance(why, Exception):
        return replace(exact, verdict="differs", why=f"FSDP2: {_line(why)}")
    return replace(exact, verdict="differs", why="; ".join(why)) if why else replace(exact, sharded="exact")


def _with_experts(outcome: Outcome, base: Path) -> Outcome:
    """Extend `outcome` by that of fused experts in 4 bits, with the other weights as before."""
    why = _attempt(lambda: different_experts(base))
    if isinstance(why, surgery.ConfigError):
        return replace(outcome, experts="refused", why="; ".join(filter(None, [outcome.why, f"experts: {_line(why)}"])))
    if isinstance(why, Exception):
        return replace(outcome, verdict="differs", why=f"experts: {_line(why)}")
    if why:
        return replace(outcome, verdict="differs", why="; ".join(why))
    return outcome if why is None else replace(outcome, experts="exact")


def _exclusions(family: str) -> Iterator[str]:
    """The exclusions of the family from the comparison, in words."""
    if family in EXCLUDED:
        yield f"adapters without {', '.join(f'`{name}`' for name in EXCLUDED[family])}: PEFT cannot adapt it"
    if family in LEFT_ALONE:
        yield LEFT_ALONE[family][1]


def _attempt(action: Callable[[], Result]) -> Result | Exception:
    """Return the result of `action`, or the exception that it raises: models fail in many ways."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001  # it becomes a verdict
        return error


def _try_out(model: Any) -> None:
    logits_of(model).mean().backward()  # type: ignore[no-untyped-call]  # no annotation upstream
    model.zero_grad(set_to_none=True)


def _outcome_without_stock(family: str, error: Exception, found: Any) -> Outcome:
    """The outcome for a model that stock cannot load or adapt, which this project must not do silently."""
    if isinstance(found, Exception):
        return Outcome(family=family, verdict="stock fails", why=_line(error))
    with found:
        failure = _attempt(lambda: _try_out(found))
    if failure is not None:
        return Outcome(family=family, verdict="stock fails", why=_line(error))
    return Outcome(family=family, verdict="differs", why=f"trains here alone; stock: {_line(error)}")


def _outcome_without_ours(family: str, wanted: Any, error: Exception) -> Outcome:
    failure = _attempt(lambda: _try_out(wanted))
    if failure is not None:
        return Outcome(family=family, verdict="stock fails", why=_line(failure))
    if isinstance(error, surgery.SurgeryError) and not isinstance(error, surgery.PassError):  # raised too late
        return Outcome(family=family, verdict="refused", why=_line(error))
    return Outcome(family=family, verdict="differs", why=f"not loaded: {_line(error)}")


def _compare_steps(family: str, folder: Path, found: Any, wanted: Any) -> list[str]:
    """Compare both models in each step, and list the differences; a step that raises is the last."""
    why: list[str] = []
    for step in (_run, _train, _save):
        said = _attempt(lambda step=step: list(step(family, folder, found, wanted)))  # type: ignore[misc]
        if isinstance(said, Exception):
            return [*why, f"{step.__name__[1:]}: {_line(said)}"]
        why += said
    return why


def _run(_family: str, _folder: Path, found: Any, wanted: Any) -> Iterator[str]:
    with torch.no_grad():
        logits = [logits_of(model) for model in (found, wanted)]
    yield from different_tensors("logits", {"": logits[0]}, {"": logits[1]})


def _train(_family: str, _folder: Path, found: Any, wanted: Any) -> Iterator[str]:
    losses = list(different_losses(train(found), train(wanted), TOLERANCE))
    yield from losses or (f"after training, {difference}" for difference in differences(found, wanted))


def _save(_family: str, folder: Path, found: Any, _wanted: Any) -> Iterator[str]:
    """Compare the trained adapter, saved and reloaded by plain PEFT over a stock model."""
    surgery.save_adapter(found, folder / "adapter")
    again = arms.reloaded(arms.stock(folder / "base"), folder / "adapter")
    with torch.no_grad():
        logits = [logits_of(model) for model in (again, found)]
    yield from different_tensors("logits of the reloaded adapter", {"": logits[0]}, {"": logits[1]})


def _line(error: BaseException) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 320, placeholder=" ...")
