"""Selectors and bundles, and plans made of them."""

from __future__ import annotations

import itertools

import pytest

import patches
from patches.builtin import BUILTIN
from patches.builtin.bundles import BUNDLES as BUILTIN_BUNDLES
from patches.registry import Bundles, Registry, is_pattern, select
from tests.helpers.declare import FUNCTIONS, LAYERS, declare
from tests.helpers.fake_upstream import functions
from tests.helpers.snapshot import Snapshot

SCALE = f"{FUNCTIONS}:scale"

pytestmark = pytest.mark.usefixtures("unchanged")


@pytest.fixture
def registry() -> Registry:
    made = Registry(builtin={"lazy.module": "no.such.module"}, find_entry_points=tuple)  # none of what is installed
    for name, tags in (("fast.a", ("speed",)), ("fast.b", ("speed", "gpu")), ("slow.c", ())):
        made.register(declare("x", SCALE, id=name, tags=tags))
    return made


@pytest.fixture
def bundles() -> Bundles:
    made = Bundles({"all": ("slow.c", "quick")})
    made.register("quick", ["fast.*"])
    made.register("one", ["two"])
    made.register("two", ["one"])
    return made


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        (("fast.b",), ["fast.b"]),
        (("fast.*",), ["fast.a", "fast.b"]),
        (("*.[ac]",), ["fast.a", "slow.c"]),
        (("quick",), ["fast.a", "fast.b"]),
        (("all",), ["slow.c", "fast.a", "fast.b"]),
        (("fast.b", "all", "fast.*"), ["fast.b", "slow.c", "fast.a"]),
        (("lazy.*",), ["lazy.module"]),
        (("not.yet.registered",), ["not.yet.registered"]),
        ((), []),
    ],
)
def test_select(selectors: tuple[str, ...], expected: list[str], registry: Registry, bundles: Bundles) -> None:
    assert select(*selectors, registry=registry, bundles=bundles) == expected


@pytest.mark.parametrize(("tag", "expected"), [("speed", ["fast.a", "fast.b"]), ("gpu", ["fast.b"])])
def test_tags(tag: str, expected: list[str]) -> None:
    registry = Registry(find_entry_points=tuple)
    for name, tags in (("fast.b", ("speed", "gpu")), ("fast.a", ("speed",))):
        registry.register(declare("x", SCALE, id=name, tags=tags))
    assert select(f"tag:{tag}", registry=registry) == expected


@pytest.mark.parametrize(
    ("selector", "message"), [("none.*", "no id matches"), ("tag:none", "no patch has the tag"), ("none", "no bundle")]
)
def test_a_selector_that_matches_nothing_raises(selector: str, message: str, bundles: Bundles) -> None:
    registry = Registry(find_entry_points=tuple)
    with pytest.raises(patches.UnknownPatchError, match=message):
        select(selector, registry=registry, bundles=bundles)


def test_a_bundle_in_itself_is_refused(registry: Registry, bundles: Bundles) -> None:
    with pytest.raises(patches.CycleError, match="one contains two contains one") as caught:
        select("one", registry=registry, bundles=bundles)
    assert caught.value.cycle == ("one", "two", "one")


def test_a_name_has_one_meaning(bundles: Bundles) -> None:
    assert bundles.register("quick", ["fast.*"]) == bundles.get("quick")
    with pytest.raises(patches.DuplicatePatchError, match=r"for fast\.\*, and for slow\.c") as caught:
        bundles.register("quick", ["slow.c"])
    assert caught.value.claimants == ("fast.*", "slow.c")


@pytest.mark.parametrize(("name", "members"), [("a.b", ["c.d"]), ("a", []), ("a", "c.d"), ("", ["c.d"])])
def test_wrong_bundles_are_refused(name: str, members: list[str]) -> None:
    with pytest.raises(patches.DefinitionError, match="bundle"):
        Bundles({}).register(name, members)


def test_every_builtin_bundle_holds_known_patches_that_may_be_together() -> None:
    for name in BUILTIN_BUNDLES:
        chosen = select(name)
        assert set(chosen) <= set(BUILTIN)
        conflicts = {other for patch_id in chosen for other in patches.get(patch_id).conflicts}
        assert not conflicts & set(chosen)


def test_only_ids_have_a_dot() -> None:
    assert not is_pattern("a.b")
    assert all(map(is_pattern, ("bundle", "a.*", "tag:a.b", "a.[bc]")))


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    for tag in ("select-a", "select-b"):
        patches.register(declare(tag, SCALE, tags=("selected",)))
    patches.bundle("selection", ["fake.select-b", "fake.select-a"])


@pytest.mark.parametrize("selector", ["selection", "tag:selected", "fake.select-*"])
def test_a_selector_goes_wherever_an_id_goes(selector: str) -> None:
    with patches.transaction(selector, reason="a test") as tx:
        tx.commit()
    assert sorted(receipt.id for receipt in patches.active()) == ["fake.select-a", "fake.select-b"]
    assert len(patches.disable(selector)) == 2
    assert functions.scale(2) == 4
    assert len(patches.revert(selector)) == 2
    with pytest.raises(patches.NotActiveError, match="nothing of"):
        patches.revert(selector)


def test_a_bundle_can_be_limited_to_instances() -> None:
    method = f"{LAYERS}:Unhashable.to"
    patches.register(declare("select-method", method))
    patches.bundle("methods", ["fake.select-method"])
    from tests.helpers.fake_upstream import layers

    covered, other = layers.Unhashable(1), layers.Unhashable(2)
    with patches.transaction(patches.on("methods", [covered]), reason="a test"):
        assert (covered.to("x"), other.to("x")) == (("select-method", "x"), "x")


def test_selectors_that_overlap_apply_once() -> None:
    with patches.transaction("fake.select-a", "selection", "tag:selected", reason="a test") as tx:
        assert len(tx.receipts) == 2


def test_a_plan_explains_and_changes_nothing(unchanged: Snapshot) -> None:
    gone = declare("gone", SCALE, probe=lambda: False)
    needing = declare("needing", SCALE, needs=("fake.select-a",), after=("fake.select-b",))
    plan = patches.plan(needing, gone, "fake.select-b")
    assert [step.patch.id for step in plan.steps] == ["fake.select-b", "fake.select-a", "fake.needing"]
    assert [step.patch.id for step in plan.skipped] == ["fake.gone"]
    lines = plan.explain().splitlines()
    assert lines[0].split() == ["step", "id", "target", "scope", "verdict", "why"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["1", "fake.select-b"],
        ["2", "fake.select-a"],
        ["3", "fake.needing"],
        ["skip", "fake.gone"],
    ]
    assert unchanged.differences() == []
    assert patches.active() == []
    assert patches.plan().explain() == "nothing to apply"


def test_a_plan_is_refused_as_the_transaction_would_be() -> None:
    hostile = declare("hostile", SCALE, conflicts=("fake.select-a",))
    with pytest.raises(patches.ConflictError) as caught:
        patches.plan(hostile, "fake.select-a")
    assert str(caught.value).count("tests.helpers.declare:tagging") == 2
    with patches.transaction("fake.select-a", reason="a test"), pytest.raises(patches.ConflictError):
        patches.plan(hostile)


def test_order_follows_the_constraints_however_they_are_given() -> None:
    chain = [declare(f"o{n}", SCALE, after=(f"fake.o{n + 1}",) if n < 3 else ()) for n in range(4)]
    for given in itertools.permutations(chain):
        assert [step.patch.id for step in patches.plan(*given).steps] == ["fake.o3", "fake.o2", "fake.o1", "fake.o0"]


def test_a_cycle_names_the_claimants() -> None:
    one, two = declare("one", SCALE, after=("fake.two",)), declare("two", SCALE, after=("fake.one",))
    with pytest.raises(patches.CycleError, match=r"fake\.one \(tests\.helpers\.declare:tagging"):
        patches.plan(one, two)
