from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import patches
from tests.helpers.declare import FUNCTIONS, LAYERS, declare
from tests.helpers.fake_upstream import functions, layers
from tests.helpers.snapshot import Snapshot

SCALE = f"{FUNCTIONS}:scale"
FORWARD = f"{LAYERS}:Base.forward"
DESCRIBE = f"{FUNCTIONS}:describe"

pytestmark = pytest.mark.usefixtures("unchanged")


def test_the_block_has_the_patch_and_afterwards_nothing_has(unchanged: Snapshot) -> None:
    with patches.transaction(declare("a", SCALE), reason="a test") as tx:
        assert functions.scale(2) == ("a", 4)
        assert [receipt.state for receipt in tx.receipts] == ["active"]
    assert unchanged.differences() == []
    assert [receipt.state for receipt in tx.receipts] == ["reverted"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_whatever_the_block_raises_everything_is_undone(unchanged: Snapshot, error: type[BaseException]) -> None:
    with (
        pytest.raises(error),
        patches.transaction(declare("a", SCALE), declare("b", FORWARD), reason="a test"),
    ):
        raise error
    assert unchanged.differences() == []
    assert patches.active() == []


def test_commit_keeps_what_is_applied_so_far_and_revert_undoes_it(unchanged: Snapshot) -> None:
    with patches.transaction(declare("a", SCALE), reason="a test") as tx:
        tx.commit()
        tx.apply(declare("b", FORWARD))
    assert [receipt.id for receipt in patches.active()] == ["fake.a"]
    assert functions.scale(2) == ("a", 4)
    assert patches.revert("fake.a") == tx.receipts[:1]
    assert unchanged.differences() == []


@contextmanager
def _committed(*declared: patches.Patch) -> Iterator[patches.Transaction]:
    with patches.transaction(*declared, reason="a test") as tx:
        tx.commit()
        yield tx


def test_commit_survives_an_exception_later_in_the_block() -> None:
    with pytest.raises(ValueError, match="later"), _committed(declare("a", SCALE)) as tx:
        raise ValueError("later")
    patches.revert(*tx.receipts)


def test_revert_by_receipt_may_be_repeated_and_by_id_not() -> None:
    with patches.transaction(declare("a", SCALE), reason="a test") as tx:
        tx.commit()
    assert patches.revert(tx.receipts[0]) == tx.receipts
    assert patches.revert(tx.receipts[0]) == []
    with pytest.raises(patches.NotActiveError, match=r"'fake\.a' is not active; active: none"):
        patches.revert("fake.a")


def test_rollback_undoes_at_once_and_closes() -> None:
    with patches.transaction(declare("a", SCALE), reason="a test") as tx:
        tx.rollback()
        assert functions.scale(2) == 4
        with pytest.raises(patches.TransactionError, match="closed"):
            tx.commit()


def test_a_savepoint_is_undone_alone() -> None:
    with patches.transaction(declare("a", SCALE), reason="a test") as tx:
        savepoint = tx.savepoint()
        tx.apply(declare("b", SCALE))
        assert functions.scale(2) == ("b", ("a", 4))
        savepoint.rollback()
        assert functions.scale(2) == ("a", 4)
        tx.apply(declare("c", SCALE))
        savepoint.rollback()
        assert functions.scale(2) == ("a", 4)


def test_rolling_back_ends_later_savepoints() -> None:
    with patches.transaction(reason="a test") as tx:
        early, late = tx.savepoint(), tx.savepoint()
        early.rollback()
        with pytest.raises(patches.TransactionError, match="this savepoint is gone"):
            late.rollback()


def _apply_in_turn(tx: patches.Transaction, *declared: patches.Patch) -> None:
    for patch in declared:
        tx.apply(patch)


def test_a_savepoint_block_that_raises_leaves_the_transaction_open() -> None:
    with patches.transaction(declare("a", SCALE), reason="a test") as tx:
        with pytest.raises(patches.IncompatibleError), tx.savepoint():
            _apply_in_turn(tx, declare("b", SCALE), declare("c", f"{FUNCTIONS}:gone"))
        assert functions.scale(2) == ("a", 4)
        tx.apply(declare("b", SCALE))
        assert functions.scale(2) == ("b", ("a", 4))


def test_a_failed_transaction_stays_failed_and_keeps_its_cause(unchanged: Snapshot) -> None:
    with patches.transaction(declare("a", SCALE), reason="a test") as tx:
        with pytest.raises(patches.IncompatibleError) as caught:
            tx.apply(declare("b", f"{FUNCTIONS}:gone"))
        for operation in (tx.commit, tx.savepoint, tx.apply):
            with pytest.raises(patches.TransactionError, match="failed") as again:
                operation()
            assert again.value.__cause__ is caught.value
    assert unchanged.differences() == []


def test_nested_transactions_are_independent() -> None:
    outer, inner = (patches.transaction(declare(tag, SCALE), reason="a test") for tag in ("a", "b"))
    with outer, inner:
        assert functions.scale(2) == ("b", ("a", 4))
        inner.commit()
    assert functions.scale(2) == ("b", 4)
    patches.revert(*inner.receipts)


def test_a_transaction_is_entered_once() -> None:
    tx = patches.transaction(reason="a test")
    with tx, pytest.raises(patches.TransactionError, match="expected a transaction that is not begun"):
        tx.__enter__()
    with pytest.raises(patches.TransactionError, match="closed"):
        tx.__enter__()


def test_a_reason_is_asked_for() -> None:
    with pytest.raises(patches.TransactionError, match="reason"):
        patches.transaction("fake.a", reason=" ")


def test_order_follows_after_whatever_the_order_given() -> None:
    inner, middle, outer = (
        declare("inner", SCALE),
        declare("middle", SCALE, after=("fake.inner",)),
        declare("outer", SCALE, after=("fake.inner", "fake.middle", "fake.absent")),
    )
    expected = ("outer", ("middle", ("inner", 4)))
    with patches.transaction(outer, middle, inner, reason="a test") as tx:
        assert functions.scale(2) == expected
        assert [receipt.id for receipt in tx.receipts] == ["fake.inner", "fake.middle", "fake.outer"]
    with patches.transaction(outer, reason="a"), patches.transaction(inner, reason="b"):
        assert functions.scale(2) == ("outer", ("inner", 4))
        with patches.transaction(middle, reason="c"):
            assert functions.scale(2) == expected


def test_without_constraints_the_order_is_the_one_given() -> None:
    with patches.transaction(declare("b", SCALE), declare("a", SCALE), reason="a test"):
        assert functions.scale(2) == ("a", ("b", 4))


def test_cycles_are_refused_naming_every_patch_in_them(unchanged: Snapshot) -> None:
    one, two = declare("one", SCALE, after=("fake.two",)), declare("two", FORWARD, after=("fake.one",))
    with pytest.raises(patches.CycleError) as caught, patches.transaction(one, two, reason="a test"):
        pass
    assert set(caught.value.cycle) == {"fake.one", "fake.two"}
    with patches.transaction(one, reason="a test"):
        with pytest.raises(patches.CycleError):
            patches.transaction(two, reason="a test").__enter__()
        assert functions.scale(2) == ("one", 4)
    assert unchanged.differences() == []


def test_conflicts_are_refused_in_both_directions_and_against_what_is_active() -> None:
    one, two = declare("one", SCALE, conflicts=("fake.two",)), declare("two", FORWARD)
    for first, second in ((one, two), (two, one)):
        with pytest.raises(patches.ConflictError, match=r"fake\.one.*fake\.two") as caught:
            patches.transaction(first, second, reason="a test").__enter__()
        assert caught.value.patch_ids == ("fake.one", "fake.two")
        with patches.transaction(first, reason="a test"), pytest.raises(patches.ConflictError):
            patches.transaction(second, reason="a test").__enter__()


def test_two_patches_with_one_id_are_refused() -> None:
    with (
        patches.transaction(declare("a", SCALE), reason="a test"),
        pytest.raises(patches.ConflictError, match="two patches have the id"),
    ):
        patches.transaction(declare("a", SCALE), reason="a test").__enter__()


@pytest.fixture(scope="module", autouse=True)
def _needed() -> None:
    patches.register(declare("needed-base", SCALE))
    patches.register(declare("needed-middle", FORWARD, needs=("fake.needed-base",)))


def test_needs_are_pulled_in_before_who_needs_them() -> None:
    with patches.transaction(declare("top", DESCRIBE, needs=("fake.needed-middle",)), reason="a test") as tx:
        assert [receipt.id for receipt in tx.receipts] == [
            "fake.needed-base",
            "fake.needed-middle",
            "fake.top",
        ]


def test_needs_take_the_scope_of_who_needs_them() -> None:
    covered, other = layers.Base(), layers.Base()
    patches.register(declare("needed-method", FORWARD))
    top = declare("top", f"{LAYERS}:Derived.forward", needs=("fake.needed-method",))
    with patches.transaction(patches.on(top, [covered]), reason="a test"):
        assert covered.forward(1) == ("needed-method", ("Base", 1))
        assert other.forward(1) == ("Base", 1)


def test_needs_that_are_asked_for_keep_the_scope_they_were_asked_with() -> None:
    top = declare("top", FORWARD, needs=("fake.needed-base",))
    instance = layers.Base()
    with patches.transaction(patches.on(top, [instance]), "fake.needed-base", reason="a test") as tx:
        assert [(receipt.id, receipt.scope_text) for receipt in tx.receipts] == [
            ("fake.needed-base", "process"),
            ("fake.top", "1 instance"),
        ]


class Brittle(type):
    """Classes that refuse to be patched on demand."""

    broken: str | None = None

    def __setattr__(cls, name: str, value: object) -> None:
        if name == Brittle.broken and value is not vars(cls)[name]:
            raise RuntimeError("refused")
        super().__setattr__(name, value)


class Fragile(metaclass=Brittle):
    def one(self) -> int:
        return 1

    def two(self) -> int:
        return 2

    def three(self) -> int:
        return 3


NAMES = ("one", "two", "three")


def three(**fields: dict[str, Any]) -> list[patches.Patch]:
    return [declare(name, f"{__name__}:Fragile.{name}", **fields.get(name, {})) for name in NAMES]


@pytest.mark.parametrize("failing", NAMES)
def test_if_one_cannot_be_applied_none_is(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Snapshot(Fragile)
    monkeypatch.setattr(Brittle, "broken", failing)
    with pytest.raises(patches.ApplyError, match="refused") as caught:
        patches.transaction(*three(), reason="a test").__enter__()
    assert caught.value.patch_id == f"fake.{failing}"
    assert caught.value.undone == tuple(f"fake.{name}" for name in NAMES[: NAMES.index(failing) + 1])
    assert taken.differences() == []
    assert patches.active() == []


@pytest.mark.parametrize("failing", NAMES)
@pytest.mark.parametrize("error", [AssertionError, KeyboardInterrupt])
def test_if_one_cannot_be_verified_none_stays(failing: str, error: type[BaseException]) -> None:
    def verify() -> None:
        assert Fragile().three() == ("three", 3)  # everything is applied before anything is verified
        raise error("no effect")

    taken = Snapshot(Fragile)
    expected = patches.VerifyError if issubclass(error, Exception) else error
    with pytest.raises(expected, match="no effect"):
        patches.transaction(*three(**{failing: {"verify": verify}}), reason="a test").__enter__()
    assert taken.differences() == []
    assert patches.active() == []


@pytest.mark.parametrize("failing", NAMES)
def test_one_that_cannot_be_resolved_keeps_all_from_being_applied(failing: str) -> None:
    paths = {name: "gone" if name == failing else name for name in NAMES}
    specs = [declare(name, f"{__name__}:Fragile.{path}") for name, path in paths.items()]
    written: list[str] = []
    original = Brittle.__setattr__
    Brittle.__setattr__ = lambda cls, name, value: (written.append(name), original(cls, name, value))[1]  # type: ignore[method-assign,assignment]
    try:
        with pytest.raises(patches.IncompatibleError):
            patches.transaction(*specs, reason="a test").__enter__()
    finally:
        Brittle.__setattr__ = original  # type: ignore[method-assign]
    assert written == []


def test_one_failing_undo_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Snapshot(Fragile)
    with pytest.raises(patches.UndoError) as caught, patches.transaction(*three(), reason="a test") as tx:
        monkeypatch.setattr(Brittle, "broken", "two")
    assert [str(error) for error in caught.value.exceptions] == ["refused"]
    assert taken.differences() == ["Fragile.two"]
    assert Fragile().two() == 2, "what could not be taken away has no effect"
    monkeypatch.setattr(Brittle, "broken", None)
    patches.revert(*tx.receipts)
    assert taken.differences() == []


def _break_and_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Brittle, "broken", "two")
    raise KeyError("body")


def test_a_failing_undo_is_noted_on_the_exception_that_ends_the_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tx = patches.transaction(*three(), reason="a test")
    with pytest.raises(KeyError) as caught, tx:
        _break_and_raise(monkeypatch)
    assert any("refused" in note for note in caught.value.__notes__)
    monkeypatch.setattr(Brittle, "broken", None)
    patches.revert(*tx.receipts)


def test_the_ledger_tells_who_applied_what_and_what_became_of_it() -> None:
    with patches.transaction(declare("a", SCALE), reason="the reason") as tx:
        pass
    entries = patches.LEDGER.entries[-2:]
    assert [entry.state for entry in entries] == ["active", "reverted"]
    assert {(entry.id, entry.target, entry.reason, entry.serial) for entry in entries} == {
        ("fake.a", SCALE, "the reason", tx.receipts[0].serial)
    }
    assert entries[0].by.startswith(f"{__file__}:")
    assert entries[0].owner == tx.receipts[0].owner
