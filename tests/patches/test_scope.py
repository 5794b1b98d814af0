from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest

import patches
from tests.helpers.declare import FUNCTIONS, LAYERS, declare
from tests.helpers.fake_upstream import functions, layers

TO = f"{LAYERS}:Unhashable.to"
FORWARD = f"{LAYERS}:Base.forward"

pytestmark = pytest.mark.usefixtures("unchanged")


def test_only_the_given_instances_are_covered_by_identity() -> None:
    covered, equal = layers.Unhashable(1), layers.Unhashable(1)
    assert covered == equal
    with patches.transaction(patches.on(declare("a", TO), [covered]), reason="a test"):
        assert covered.to("cpu") == ("a", "cpu")
        assert equal.to("cpu") == "cpu"
        assert layers.Unhashable.to(covered, "cpu") == ("a", "cpu")
    assert covered.to("cpu") == "cpu"


def test_instances_are_not_changed_and_their_copies_are_not_covered() -> None:
    covered = layers.Unhashable(1)
    with patches.transaction(declare("a", TO), reason="a test", on=[covered]):
        assert vars(covered) == {"value": 1}
        for copied in (copy.copy(covered), copy.deepcopy(covered), pickle.loads(pickle.dumps(covered))):
            assert copied == covered
            assert copied.to("cpu") == "cpu"


def test_scopes_add_up() -> None:
    one, two, three = (layers.Base() for _ in range(3))
    patch = declare("a", FORWARD)
    with patches.transaction(patches.on(patch, [one, two]), reason="outer"):
        with patches.transaction(patches.on(patch, [two, three]), reason="inner"):
            assert [base.forward(1)[0] for base in (one, two, three)] == ["a", "a", "a"]
        assert [base.forward(1)[0] for base in (one, two, three)] == ["a", "a", "Base"]
        with patches.transaction(patch, reason="everywhere"):
            assert three.forward(1) == ("a", ("Base", 1))
        assert three.forward(1) == ("Base", 1)


def test_the_scope_of_a_transaction_is_for_items_without_their_own() -> None:
    one, two = layers.Base(), layers.Base()
    items = (declare("a", FORWARD), patches.on(declare("b", FORWARD), [two]))
    with patches.transaction(*items, reason="a test", on=[one]) as tx:
        assert (one.forward(1)[0], two.forward(1)[0]) == ("a", "b")
        assert [receipt.scope_text for receipt in tx.receipts] == ["1 instance", "1 instance"]


def test_a_class_can_be_the_instance_of_a_classmethod() -> None:
    with patches.transaction(patches.on(declare("a", f"{LAYERS}:Base.build"), [layers.Derived]), reason="a test"):
        assert layers.Derived.build(1) == ("a", ("Derived", 1))
        assert layers.Base.build(1) == ("Base", 1)


def test_a_subject_decides_for_functions() -> None:
    covered, other = layers.Base(), layers.Base()
    patch = declare("a", f"{FUNCTIONS}:describe", subject=lambda instance, args, kwargs: args[0])
    with patches.transaction(patches.on(patch, [covered]), reason="a test"):
        assert functions.describe(covered) == ("a", "Base")
        assert functions.describe(other) == "Base"


@pytest.mark.parametrize("target", [f"{FUNCTIONS}:scale", f"{LAYERS}:Base.add"])
def test_a_function_without_a_subject_cannot_be_limited(target: str) -> None:
    with pytest.raises(patches.ScopeError, match="subject"):
        patches.transaction(patches.on(declare("a", target), [layers.Base()]), reason="a test").__enter__()


def test_no_instance_is_refused() -> None:
    with pytest.raises(patches.ScopeError, match="at least one"):
        patches.on("fake.a", [])
    with pytest.raises(patches.ScopeError, match="at least one"):
        patches.transaction(declare("a", FORWARD), reason="a test", on=[]).__enter__()


def test_an_object_that_cannot_be_referenced_weakly_is_refused() -> None:
    with pytest.raises(patches.ScopeError, match="'int'"):
        patches.transaction(patches.on(declare("a", FORWARD), [1]), reason="a test").__enter__()


def test_a_patch_ends_with_its_last_instance() -> None:
    one, two = layers.Base(), layers.Base()
    gone = weakref.ref(one)
    with patches.transaction(patches.on(declare("a", FORWARD), [one, two]), reason="a test") as tx:
        tx.commit()
    (receipt,) = tx.receipts
    assert receipt.scope_text == "2 instances"
    del one
    assert gone() is None, "the patch must not keep its instances alive"
    assert receipt.scope_text == "1 instance"
    assert two.forward(1)[0] == "a"
    del two
    assert patches.active() == []
    assert (receipt.state, receipt.note) == ("reverted", "every instance is gone")


def test_instances_in_a_reference_cycle_end_too() -> None:
    one = layers.Base()
    one.me = one  # type: ignore[attr-defined]
    with patches.transaction(patches.on(declare("a", FORWARD), [one]), reason="a test") as tx:
        tx.commit()
    del one
    gc.collect()
    assert tx.receipts[0].state == "reverted"


class Letting(type):
    """Classes that let go of an object while they are patched."""

    kept: list[object]

    def __setattr__(cls, name: str, value: object) -> None:
        type.__setattr__(cls, name, value)
        Letting.kept.clear()


class Thing(metaclass=Letting):
    def run(self) -> int:
        return 1


def test_an_instance_that_dies_while_something_is_changed_is_dealt_with_afterwards() -> None:
    Letting.kept = [layers.Base()]
    with patches.transaction(declare("a", FORWARD), reason="a test", on=Letting.kept) as tx:
        tx.commit()
    with patches.transaction(declare("b", f"{__name__}:Thing.run"), reason="a test"):
        assert Letting.kept == []
        assert [receipt.id for receipt in patches.active()] == ["fake.b"]
    assert (tx.receipts[0].state, tx.receipts[0].note) == ("reverted", "every instance is gone")


def test_a_finalizer_may_revert_while_something_is_changed() -> None:
    with patches.transaction(declare("a", f"{FUNCTIONS}:scale"), reason="a test") as tx:
        tx.commit()
    owner = layers.Base()
    weakref.finalize(owner, patches.revert, *tx.receipts)
    Letting.kept = [owner]
    del owner
    with patches.transaction(declare("b", f"{__name__}:Thing.run"), reason="a test"):
        assert Thing().run() == ("b", 1)
        assert functions.scale(2) == 4
    assert tx.receipts[0].state == "reverted"


def test_a_new_object_with_the_id_of_a_dead_one_is_not_covered() -> None:
    kept = layers.Base()
    with patches.transaction(
        patches.on(declare("a", FORWARD), [kept, *(layers.Base() for _ in range(50))]), reason="x"
    ):
        assert all(layers.Base().forward(1) == ("Base", 1) for _ in range(200))
        assert kept.forward(1)[0] == "a"


def test_a_transaction_does_not_keep_its_instances_alive() -> None:
    one = layers.Base()
    gone = weakref.ref(one)
    with patches.transaction(patches.on(declare("a", FORWARD), [one]), reason="a test") as tx:
        del one
        assert gone() is None
    assert tx.receipts[0].state == "reverted"
