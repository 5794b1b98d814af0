"""Disabling without undoing, and counting calls."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import patches
from tests.helpers.declare import FUNCTIONS, LAYERS, declare
from tests.helpers.fake_upstream import functions, layers, values
from tests.helpers.snapshot import Snapshot

SCALE = f"{FUNCTIONS}:scale"

pytestmark = pytest.mark.usefixtures("unchanged")


def test_a_disabled_patch_stays_where_it_is_and_lets_calls_through(unchanged: Snapshot) -> None:
    with patches.transaction(declare("a", SCALE), declare("b", SCALE), reason="a test") as tx:
        installed = functions.scale
        assert patches.disable("fake.a") == tx.receipts[:1]
        assert functions.scale is installed
        assert functions.scale(2) == ("b", 4)
        assert [(row.id, row.state) for row in patches.audit()] == [("fake.a", "disabled"), ("fake.b", "active")]
        assert patches.active() == tx.receipts
        assert patches.disable("fake.a") == []
        assert patches.enable("fake.a") == tx.receipts[:1]
        assert functions.scale(2) == ("b", ("a", 4))
        assert tx.receipts[0].state == "active"
    assert unchanged.differences() == []


def test_one_receipt_of_two_can_be_disabled() -> None:
    patch, one, two = declare("a", f"{LAYERS}:Base.forward"), layers.Base(), layers.Base()
    with (
        patches.transaction(patches.on(patch, [one]), reason="a") as first,
        patches.transaction(patches.on(patch, [two]), reason="b"),
    ):
        patches.disable(*first.receipts)
        assert one.forward(1) == ("Base", 1)
        assert two.forward(1) == ("a", ("Base", 1))


def test_a_disabled_value_is_back_until_it_is_enabled() -> None:
    with patches.transaction(declare("a", f"{values.__name__}:LIMIT", kind="value"), reason="a test"):
        patches.disable("fake.a")
        assert values.LIMIT == 3
        patches.enable("fake.a")
        assert values.LIMIT == ("a", 3)
        patches.disable("fake.a")
    assert values.LIMIT == 3


def test_a_value_follows_whichever_receipt_is_enabled() -> None:
    patch = declare("a", f"{values.__name__}:LIMIT", kind="value")
    with patches.transaction(patch, reason="a") as first:
        patches.disable(*first.receipts)
        with patches.transaction(patch, reason="b"):
            assert values.LIMIT == ("a", 3)
        assert values.LIMIT == 3


def test_a_value_that_somebody_else_has_replaced_cannot_be_disabled() -> None:
    with patches.transaction(declare("a", f"{values.__name__}:LIMIT", kind="value"), reason="a test") as tx:
        ours, values.LIMIT = values.LIMIT, 99
        with pytest.raises(patches.UndoError):
            patches.disable(*tx.receipts)
        assert values.LIMIT == 99
        values.LIMIT = ours
        patches.enable(*tx.receipts)
        assert values.LIMIT == ("a", 3)


def test_what_somebody_else_does_to_a_disabled_value_leaves_nothing_to_undo() -> None:
    foreign = ["theirs"]
    values.LIMIT = foreign
    with patches.transaction(declare("a", f"{values.__name__}:LIMIT", kind="value"), reason="a test") as tx:
        patches.disable(*tx.receipts)
        assert values.LIMIT is foreign
        values.LIMIT = 3
    assert values.LIMIT == 3
    assert len(patches.audit()) == 0


def test_what_is_not_active_cannot_be_disabled() -> None:
    with pytest.raises(patches.NotActiveError, match="active: none"):
        patches.disable("fake.a")


def test_the_ledger_has_it() -> None:
    with patches.transaction(declare("a", SCALE), reason="a test"):
        patches.disable("fake.a")
    assert [entry.state for entry in patches.LEDGER.entries[-3:]] == ["active", "disabled", "reverted"]


def test_calls_are_counted_if_asked_for() -> None:
    patch, covered = declare("a", f"{LAYERS}:Base.forward"), layers.Base()
    with (
        patches.transaction(patch, reason="a", on=[covered]) as plain,
        patches.transaction(patch, reason="b", on=[covered], count_calls=True) as counting,
    ):
        for instance in (covered, covered, layers.Base()):
            instance.forward(1)
        patches.disable("fake.a")
        covered.forward(1)
        assert (plain.receipts[0].calls, counting.receipts[0].calls) == (None, 2)
        assert [row.calls for row in patches.audit()] == [None, 2]
        assert str(patches.audit()).splitlines()[0].split()[-1] == "calls"
    assert counting.receipts[0].calls == 2


def test_a_second_count_starts_at_nought() -> None:
    patch = declare("a", SCALE)
    with patches.transaction(patch, reason="a", count_calls=True) as first:
        functions.scale(1)
        with patches.transaction(patch, reason="b", count_calls=True) as second:
            functions.scale(1)
        assert (first.receipts[0].calls, second.receipts[0].calls) == (2, 1)


def test_no_call_from_a_thread_is_lost() -> None:
    def call() -> None:
        for _ in range(2000):
            functions.scale(1)

    with patches.transaction(declare("a", SCALE), reason="a test", count_calls=True) as tx:
        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert tx.receipts[0].calls == 8000


def test_uncounted_calls_run_the_wrapper_itself() -> None:
    seen: list[Any] = []

    def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        import sys

        seen.append(sys._getframe(1).f_code.co_name)
        return wrapped(*args, **kwargs)

    for count in (False, True):
        with patches.transaction(declare("a", SCALE, wrapper=wrapper), reason="a test", count_calls=count):
            functions.scale(1)
    assert seen == ["patched", "counted"]


def test_compiled_code_sees_a_patch_being_disabled() -> None:
    import torch

    scale = declare("a", SCALE, wrapper=lambda wrapped, _, args, kwargs: wrapped(*args, **kwargs) + 100)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return functions.scale(x)

    one = torch.ones(())
    with patches.transaction(scale, reason="a test", count_calls=True) as tx:
        assert compiled(one).item() == 102
        patches.disable("fake.a")
        assert compiled(one).item() == 2
        patches.enable("fake.a")
        assert compiled(one).item() == 102
        assert tx.receipts[0].calls == 2
