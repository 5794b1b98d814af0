from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import pytest

import patches
from tests.helpers.declare import declare
from tests.helpers.fake_upstream import reloadable

NAME = reloadable.__name__
COMPUTE, RUN, WRAPPED = f"{NAME}:compute", f"{NAME}:Thing.run", f"{NAME}:cached"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    importlib.reload(reloadable)
    yield
    active = patches.active()
    patches.revert(*active)
    assert active == []


def states() -> list[str]:
    return [row.state.value for row in patches.audit()]


def test_a_reload_is_seen_and_the_patch_applied_again() -> None:
    with patches.transaction(declare("a", COMPUTE), declare("b", RUN), reason="a test"):
        old = reloadable.Thing()
        importlib.reload(reloadable)
        assert states() == ["reloaded", "reloaded"]
        assert (reloadable.compute(), reloadable.Thing().run()) == (1, 2)
        patches.reapply("fake.a")
        patches.reapply("fake.b")
        assert states() == ["active", "active"]
        assert (reloadable.compute(), reloadable.Thing().run()) == (("a", 1), ("b", 2))
        assert old.run() == 2
        new = dict(vars(reloadable))
    assert (reloadable.compute(), reloadable.Thing().run()) == (1, 2)
    assert patches.audit(include_reverted=True)[-1].state == "reverted"
    assert {name for name, value in new.items() if vars(reloadable)[name] is not value} == {"compute"}


@pytest.mark.parametrize("target", [COMPUTE, RUN, WRAPPED])
def test_undoing_after_a_reload_leaves_the_new_definitions(target: str) -> None:
    with patches.transaction(declare("a", target), reason="a test"):
        importlib.reload(reloadable)
        assert states() == ["reloaded"]
        module, thing = dict(vars(reloadable)), dict(vars(reloadable.Thing))
    assert [name for name, value in vars(reloadable).items() if module[name] is not value] == []
    assert [name for name, value in vars(reloadable.Thing).items() if thing[name] is not value] == []
    assert states() == []


def test_a_decorated_function_is_applied_again() -> None:
    with patches.transaction(declare("a", WRAPPED), reason="a test"):
        importlib.reload(reloadable)
        stock: Any = reloadable.cached
        patches.reapply("fake.a")
        assert reloadable.cached() == ("a", 3)
    assert reloadable.cached is stock
    assert isinstance(stock, functools._lru_cache_wrapper)


def test_all_patches_of_a_place_move_together_and_keep_their_order() -> None:
    inner, outer = declare("a", COMPUTE), declare("b", COMPUTE, after=("fake.a",))
    with patches.transaction(inner, outer, reason="a test") as tx:
        importlib.reload(reloadable)
        assert patches.reapply(tx.receipts[1]) == tx.receipts
        assert reloadable.compute() == ("b", ("a", 1))
        patches.revert("fake.a")
        assert reloadable.compute() == ("b", 1)
    assert reloadable.compute() == 1


def test_what_is_in_place_stays() -> None:
    with patches.transaction(declare("a", COMPUTE), reason="a test"):
        assert patches.reapply("fake.a") == []
        assert reloadable.compute() == ("a", 1)


def test_what_is_not_active_is_refused() -> None:
    with pytest.raises(patches.NotActiveError, match=r"fake\.a"):
        patches.reapply("fake.a")


def test_what_somebody_else_has_replaced_is_refused() -> None:
    stock = reloadable.compute
    with patches.transaction(declare("a", COMPUTE), reason="a test"):
        ours, reloadable.compute = reloadable.compute, lambda: 7
        with pytest.raises(patches.OverwrittenError, match="overwritten"):
            patches.reapply("fake.a")
        reloadable.compute = ours
    assert reloadable.compute is stock


def test_instances_of_the_old_class_keep_the_patch() -> None:
    old = reloadable.Thing()
    with patches.transaction(declare("a", RUN), reason="a test", on=[old]):
        importlib.reload(reloadable)
        with pytest.raises(patches.ScopeError, match="before the reload"):
            patches.reapply("fake.a")
        assert old.run() == ("a", 2)
    assert old.run() == 2


def test_a_patch_without_effect_on_the_new_definition_is_undone() -> None:
    reloads = 0

    def verify() -> None:
        if reloads:
            raise RuntimeError("no effect any more")

    with patches.transaction(declare("a", COMPUTE, verify=verify), reason="a test"):
        importlib.reload(reloadable)
        reloads = 1
        with pytest.raises(patches.VerifyError, match="no effect any more"):
            patches.reapply("fake.a")
        assert states() == []
        assert reloadable.compute() == 1
