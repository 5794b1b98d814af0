"""`tools/demo.py`: what it calls a failure."""

from __future__ import annotations

from typing import Any

import pytest

from demo import RANKS, TOLERANCE, Losses, failures

GOOD = Losses(base=3.0, adapter=2.0)


def _summary(**changes: Any) -> dict[str, Any]:
    return {"patches_left": [], "memory": [{}] * RANKS, **changes}


def test_a_run_that_keeps_its_promises_has_no_failure() -> None:
    assert not list(failures(_summary(), GOOD, Losses(base=2.9, adapter=2.0 + 0.9 * TOLERANCE)))


@pytest.mark.parametrize(
    ("summary", "trained", "reloaded", "message"),
    [
        (_summary(), Losses(base=2.0, adapter=2.0), GOOD, "training did not lower"),
        (_summary(), GOOD, Losses(base=2.0, adapter=2.0), "does not lower the held-out loss of the plain"),
        (_summary(), GOOD, Losses(base=3.0, adapter=2.0 + 1.1 * TOLERANCE), "away from the trained one's"),
        (_summary(), GOOD, Losses(base=3.0, adapter=float("nan")), "away from the trained one's"),
        (_summary(patches_left=["torch.some-patch"]), GOOD, GOOD, "still active: torch.some-patch"),
        (_summary(memory=[{}]), GOOD, GOOD, f"memory of {RANKS} ranks, found 1"),
    ],
)
def test_each_broken_promise_is_named(
    summary: dict[str, Any], trained: Losses, reloaded: Losses, message: str
) -> None:
    assert any(message in failure for failure in failures(summary, trained, reloaded))
