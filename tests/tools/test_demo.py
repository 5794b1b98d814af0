"""`tools/demo.py`: what it calls a failure."""

from __future__ import annotations

from typing import Any

import pytest

from demo import RANKS, ROUNDED_TOLERANCE, SAVED, STEPS, TOLERANCE, Losses, failures

GOOD = Losses(base=3.0, adapter=2.0)
NAN = float("nan")


def _summary(**changes: Any) -> dict[str, Any]:
    return {"patches_left": [], "memory": [{}] * RANKS, "steps": STEPS, "resumed_after": SAVED, **changes}


def test_a_run_that_keeps_its_promises_has_no_failure() -> None:
    plain = Losses(base=2.5, adapter=2.0 - 0.9 * TOLERANCE)
    rounded = Losses(base=3.0 + 0.9 * ROUNDED_TOLERANCE, adapter=2.0 - 0.9 * ROUNDED_TOLERANCE)
    assert not list(failures(_summary(), GOOD, plain, rounded))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"trained": Losses(base=2.0, adapter=2.0)}, "training did not lower"),
        ({"plain": Losses(base=2.0, adapter=2.0)}, "does not lower the held-out loss of the plain"),
        ({"plain": Losses(base=3.0, adapter=2.0 + 1.1 * TOLERANCE)}, "on the plain model, more than"),
        ({"plain": Losses(base=3.0, adapter=NAN)}, "on the plain model, more than"),
        ({"rounded": Losses(base=3.0, adapter=2.0 + 1.1 * ROUNDED_TOLERANCE)}, "on rounded weights"),
        ({"rounded": Losses(base=3.0 + 1.1 * ROUNDED_TOLERANCE, adapter=2.0)}, "on rounded weights"),
        ({"rounded": Losses(base=NAN, adapter=2.0)}, "on rounded weights"),
        ({"rounded": Losses(base=3.0, adapter=NAN)}, "on rounded weights"),
        ({"summary": _summary(patches_left=["torch.some-patch"])}, "still active: torch.some-patch"),
        ({"summary": _summary(resumed_after=0)}, f"resumed after {SAVED}; found {STEPS}, 0"),
        ({"summary": _summary(memory=[{}])}, f"memory of {RANKS} ranks, found 1"),
    ],
)
def test_each_broken_promise_is_named(changed: dict[str, Any], message: str) -> None:
    run = {"summary": _summary(), "trained": GOOD, "plain": GOOD, "rounded": GOOD, **changed}
    assert any(message in failure for failure in failures(**run))


def test_losses_come_from_the_first_and_the_last_evaluation() -> None:
    evaluations = [{"step": step, "loss": 3.0 - step} for step in range(3)]
    assert Losses.of(evaluations) == Losses(base=3.0, adapter=1.0)
