"""Of five patches the k-th fails, at every stage: nothing is changed, and the error says what was undone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import patches
from tests.helpers.declare import declare
from tests.helpers.fake_upstream.brittle import Brittle, Fragile
from tests.helpers.snapshot import Snapshot

NAMES = ("one", "two", "three", "four", "five")
TARGET = f"{Fragile.__module__}:Fragile"
STAGES: dict[str, tuple[dict[str, Any], type[patches.PatchError], str]] = {
    "resolve": ({"target": f"{TARGET}.gone"}, patches.IncompatibleError, "no attribute 'gone'"),
    "check versions": ({"requires": {"no-such-distribution": ""}}, patches.IncompatibleError, "not installed"),
    "check source": ({"fingerprint": "0" * 16}, patches.DriftError, "its source has changed"),
    "check probe": ({"probe": lambda: 1 / 0}, patches.ProbeError, "division by zero"),
    "check needs": ({"needs": ("fake.unknown",)}, patches.UnknownPatchError, "fake.unknown"),
    "check conflicts": ({"conflicts": ("fake.active",)}, patches.ConflictError, "fake.active"),
    "apply": ({}, patches.ApplyError, "is refused"),
    "verify": ({"verify": lambda: 1 / 0}, patches.VerifyError, "does not have its effect: division by zero"),
}
UNDONE_BY = ("apply", "verify")


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    taken = Snapshot(Fragile)
    with patches.transaction(declare("active", f"{TARGET}.six"), reason="was there before") as tx:
        before, active = Snapshot(Fragile), patches.active()
        yield
        Brittle.refusing.clear()
        assert before.differences() == []
        assert patches.active() == active == tx.receipts
    assert taken.differences() == []


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("failing", NAMES)
def test_nothing_is_changed(failing: str, stage: str) -> None:
    fields, kind, message = STAGES[stage]
    made = [declare(name, **{"target": f"{TARGET}.{name}", **(fields if name == failing else {})}) for name in NAMES]
    if stage == "apply":
        Brittle.refusing.add(failing)
    with pytest.raises(kind, match=message) as caught:
        patches.transaction(*made, reason="a test").__enter__()
    if stage in UNDONE_BY:
        last = NAMES.index(failing) + 1 if stage == "apply" else len(NAMES)
        undone = tuple(f"fake.{name}" for name in NAMES[:last])
        assert caught.value.undone == undone  # type: ignore[attr-defined]  # an ApplyError
        assert f"undone: {', '.join(undone)}" in str(caught.value)
    assert [getattr(Fragile(), name)() for name in (*NAMES, "six")] == [1, 2, 3, 4, 5, ("active", 6)]
