"""Faults that an adversary found: probes, layers, discarded classes, windows, implicit methods, recursion, memory."""

from __future__ import annotations

import abc
import collections
import copy
import functools
import gc
import importlib
import pickle
import sys
import time
import types
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import patches
from tests.helpers.declare import FUNCTIONS, LAYERS, declare
from tests.helpers.fake_upstream import copies, functions, layers
from tests.helpers.snapshot import Snapshot

SCALE, FORWARD = f"{FUNCTIONS}:scale", f"{LAYERS}:Base.forward"

pytestmark = pytest.mark.usefixtures("unchanged")


@pytest.fixture
def lib(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An empty module, imported as `fault_lib`."""
    module = types.ModuleType("fault_lib")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def passing(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs)


# A cached probe ------------------------------------------------------------------------------------------------------


def is_stock() -> bool:
    return functions.scale(2) == 4


def test_a_probe_that_was_asked_while_another_patch_mended_the_defect_is_asked_again() -> None:
    probed = declare("probed", SCALE, probe=is_stock)
    with patches.transaction(declare("other", SCALE), reason="a test"):
        assert patches.verdict(probed).kind == "obsolete"
    assert patches.verdict(probed).kind == "needed"
    with patches.transaction(probed, reason="a test") as tx:
        assert [receipt.id for receipt in tx.receipts] == ["fake.probed"]
        assert functions.scale(2) == ("probed", 4)


def test_a_probe_does_not_see_the_effect_of_its_own_patch() -> None:
    probed = declare("probed", SCALE, probe=is_stock)
    with patches.transaction(declare("other", f"{LAYERS}:Base.forward")):
        with patches.transaction(probed) as first:
            second = patches.transaction(probed).__enter__()
            assert patches.verdict(probed, fresh=True).kind == "needed"
            first.rollback()
        assert functions.scale(2) == ("probed", 4)
        second.rollback()
    assert functions.scale(2) == 4


def test_a_probe_that_was_asked_while_somebody_else_mended_the_defect_is_asked_again() -> None:
    probed = declare("probed", SCALE, probe=is_stock)
    with mock.patch(f"{FUNCTIONS}.scale", lambda x: x):
        assert patches.verdict(probed).kind == "obsolete"
    assert patches.verdict(probed).kind == "needed"


@pytest.mark.parametrize("error", [OSError("the network is down"), ImportError("a circle"), MemoryError()])
def test_an_error_of_a_probe_is_not_kept(error: Exception) -> None:
    answers: list[Any] = [error, True]

    def probe() -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return bool(answer)

    patch = declare("a", SCALE, probe=probe)
    with pytest.raises(patches.ProbeError):
        patches.transaction(patch, reason="a test").__enter__()
    with patches.transaction(patch, reason="a test"):
        assert functions.scale(2) == ("a", 4)


def test_a_probe_can_be_asked_again() -> None:
    answers = [False, True]
    patch = declare("a", SCALE, probe=lambda: answers[0])
    assert patches.verdict(patch).kind == "obsolete"
    answers.pop(0)
    assert patches.verdict(patch).kind == "obsolete", "with nothing active, one answer is enough"
    assert patches.verdict(patch, fresh=True).kind == "needed"
    assert patches.verdict(patch).kind == "needed"


def run_cell() -> patches.Transaction:
    """A cell of a notebook, that registers a patch and commits it."""

    @patches.register("fake.cell", target=SCALE, reason="a test", probe=is_stock)
    def wrapper(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        return "cell", wrapped(*args, **kwargs)

    with patches.transaction("fake.cell", reason="a test") as tx:
        tx.commit()
    return tx


def test_a_cell_that_is_run_again_does_not_end_its_patch() -> None:
    run_cell()
    run_cell()
    assert functions.scale(2) == ("cell", 4)
    patches.revert_all()
    assert functions.scale(2) == 4
    assert patches.verdict("fake.cell").kind == "needed"
    assert [receipt.id for receipt in run_cell().receipts] == ["fake.cell"]
    assert functions.scale(2) == ("cell", 4)
    patches.revert_all()


# Layered mappings ----------------------------------------------------------------------------------------------------


def layered() -> dict[str, tuple[MutableMapping[str, Any], dict[str, Any]]]:
    """Mappings in layers, each with the layer that it inherits from."""
    from transformers.utils.generic import GeneralInterface

    class Interface(GeneralInterface):  # type: ignore[misc]
        _global_mapping = {"key": layers.Base.add}  # noqa: RUF012 - as transformers has it

    class Falling(collections.UserDict[str, Any]):
        def __missing__(self, key: str) -> Any:
            return below[key]

        def __contains__(self, key: object) -> bool:
            return key in self.data or key in below

    below = {"key": layers.Base.add}
    chain = {"key": layers.Base.add}
    return {
        "ChainMap": (collections.ChainMap({}, chain), chain),
        "transformers": (Interface(), Interface._global_mapping),
        "UserDict": (Falling(), below),
    }


def top(mapping: Any) -> dict[str, Any]:
    """The layer that is written to."""
    found = [getattr(mapping, name, None) for name in ("data", "_local_mapping")]
    return next((one for one in found if one is not None), None) or getattr(mapping, "maps", [{}])[0]


@pytest.mark.parametrize("how", ["ChainMap", "transformers", "UserDict"])
def test_undo_in_layers_leaves_the_top_one_empty(how: str, lib: types.ModuleType) -> None:
    lib.TABLE, below = layered()[how]
    stock, new = lib.TABLE["key"], lambda x, y: "new"
    with patches.transaction(declare("a", "fault_lib:TABLE[key]"), reason="a test"):
        with patches.transaction(declare("b", "fault_lib:TABLE[key]"), reason="a test"):
            assert lib.TABLE["key"](1, 2) == ("b", ("a", 3))
        assert lib.TABLE["key"](1, 2) == ("a", 3)
    assert lib.TABLE["key"] is stock
    assert top(lib.TABLE) == {}
    below["key"] = new
    assert lib.TABLE["key"] is new, "a later registration is seen"


@pytest.mark.parametrize("how", ["ChainMap", "transformers", "UserDict"])
def test_undo_in_layers_keeps_what_was_in_the_top_one(how: str, lib: types.ModuleType) -> None:
    lib.TABLE, below = layered()[how]
    lib.TABLE["key"] = own = layers.Derived.add
    with patches.transaction(declare("a", "fault_lib:TABLE[key]"), reason="a test"):
        assert lib.TABLE["key"](1, 2) == ("a", 3)
    assert top(lib.TABLE) == {"key": own}
    assert below["key"] is layers.Base.add


@pytest.mark.parametrize("how", ["ChainMap", "transformers"])
def test_a_value_in_layers_is_replaced_and_deleted_again(how: str, lib: types.ModuleType) -> None:
    lib.TABLE, below = layered()[how]
    patch = patches.Patch(id="fake.a", target="fault_lib:TABLE[key]", kind="value", replace=1, reason="a test")
    with patches.transaction(patch):
        assert lib.TABLE["key"] == 1
    assert (top(lib.TABLE), below) == ({}, {"key": layers.Base.add})


# A class and its method ----------------------------------------------------------------------------------------------


def subclass(wrapped: Callable[[], Any], *_: Any) -> type:
    class Thing(wrapped()):  # type: ignore[misc]
        tag = "replaced"

    return Thing


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_class_and_its_method_in_one_transaction(lib: types.ModuleType, order: tuple[int, int]) -> None:
    lib.Thing = stock = type("Thing", (), {"run": lambda self: "stock", "__module__": "fault_lib", "tag": ""})
    both = (declare("whole", "fault_lib:Thing", kind="class", wrapper=subclass), declare("part", "fault_lib:Thing.run"))
    before = Snapshot(lib, stock)
    with patches.transaction(*(both[index] for index in order), reason="a test"):
        assert (lib.Thing.tag, lib.Thing().run()) == ("replaced", ("part", "stock"))
        assert {row.state for row in patches.audit()} == {"active"}
    assert before.differences() == []
    assert lib.Thing().run() == "stock"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_class_and_its_method_one_after_the_other(lib: types.ModuleType, order: tuple[int, int]) -> None:
    lib.Thing = stock = type("Thing", (), {"run": lambda self: "stock", "__module__": "fault_lib", "tag": ""})
    both = (declare("whole", "fault_lib:Thing", kind="class", wrapper=subclass), declare("part", "fault_lib:Thing.run"))
    before = Snapshot(lib, stock)
    with patches.transaction(both[order[0]], reason="a test"), patches.transaction(both[order[1]], reason="a test"):
        assert lib.Thing().run() == ("part", "stock")
        assert "reloaded" not in {row.state for row in patches.audit()}
    assert before.differences() == []
    assert len(patches.audit()) == 0


def test_no_audit_says_reloaded_where_somebody_has_replaced_the_class(lib: types.ModuleType) -> None:
    lib.Thing = stock = type("Thing", (), {"run": lambda self: "stock", "__module__": "fault_lib"})
    with patches.transaction(declare("a", "fault_lib:Thing.run"), reason="a test"):
        lib.Thing = type("Thing", (stock,), {"__module__": "elsewhere"})
        assert lib.Thing().run() == ("a", "stock")
        assert "reloaded" not in {row.state for row in patches.audit()}
        lib.Thing = stock
    assert stock().run() == "stock"


# The ledger ----------------------------------------------------------------------------------------------------------


class Large:
    """What a wrapper may hold."""


def test_nothing_keeps_a_wrapper_that_was_undone() -> None:
    def apply() -> weakref.ref[Large]:
        held = Large()

        def wrapper(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
            return held, wrapped(*args, **kwargs)

        with patches.transaction(declare("a", SCALE, wrapper=wrapper), reason="a test"):
            assert functions.scale(2)[0] is held
        return weakref.ref(held)

    held = apply()
    gc.collect()
    assert held() is None


def test_nothing_keeps_the_frames_of_what_failed() -> None:
    def fail() -> list[weakref.ref[Large]]:
        in_verify, in_probe, in_block = Large(), Large(), Large()

        def verify() -> None:
            local = in_verify
            raise ValueError(str(local))

        def probe() -> bool:
            local = in_probe
            raise ValueError(str(local))

        with suppress(patches.VerifyError):
            patches.transaction(declare("a", SCALE, verify=verify), reason="a test").__enter__()
        with suppress(patches.ProbeError):
            patches.transaction(declare("b", SCALE, probe=probe), reason="a test").__enter__()
        with suppress(ValueError), patches.transaction(declare("c", SCALE), reason="a test"):
            local = in_block
            raise ValueError(str(local))
        return [weakref.ref(one) for one in (in_verify, in_probe, in_block)]

    held = fail()
    gc.collect()
    assert [one() for one in held] == [None, None, None]


def test_the_history_is_bounded_and_newest_last() -> None:
    patch = declare("a", SCALE, wrapper=passing)

    def cycle(times: int) -> int:
        for _ in range(times):
            with patches.transaction(patch, reason="a test"):
                pass
        return len(patches.audit(include_reverted=True))

    assert cycle(20) > 0
    assert cycle(3000) < 3000
    assert {row.id for row in list(patches.audit(include_reverted=True))[-20:]} == {"fake.a"}


def test_what_is_active_stays_in_the_ledger_however_much_comes_after() -> None:
    with patches.transaction(declare("old", f"{LAYERS}:Base.forward"), reason="a test"):
        for _ in range(3000):
            with patches.transaction(declare("a", SCALE, wrapper=passing), reason="a test"):
                pass
        assert [row.id for row in patches.audit()] == ["fake.old"]
        assert [row.reason for row in patches.audit()] == ["a test"]


# Versions ------------------------------------------------------------------------------------------------------------

OUTSIDE = {"wrapt": ">=99"}


def test_an_installed_version_outside_the_window_is_a_warning_with_the_reason() -> None:
    with pytest.warns(patches.VersionWarning, match=r"fake\.a.*wrapt .*>=99"):
        tx = patches.transaction(declare("a", SCALE, requires=OUTSIDE), reason="a test").__enter__()
    assert functions.scale(2) == ("a", 4)
    tx.__exit__(None, None, None)


def test_the_warning_points_to_the_transaction() -> None:
    with pytest.warns(patches.VersionWarning) as caught:
        patches.transaction(declare("a", SCALE, requires=OUTSIDE), reason="a test").__enter__().rollback()
    assert caught[0].filename == __file__


def test_a_window_can_be_an_error() -> None:
    patch = declare("a", SCALE, requires=OUTSIDE, on_unknown="error")
    with pytest.raises(patches.PatchError, match=r"wrapt .*>=99"):
        patches.transaction(patch, reason="a test").__enter__()
    with patches.transaction(patch, reason="a test", force=True):
        assert functions.scale(2) == ("a", 4)


def test_a_window_can_skip() -> None:
    with patches.transaction(declare("a", SCALE, requires=OUTSIDE, on_unknown="skip"), reason="a test") as tx:
        assert functions.scale(2) == 4
        assert [receipt.id for receipt in tx.skipped] == ["fake.a"]
        assert "wrapt" in tx.skipped[0].verdict.why


@pytest.mark.parametrize("policy", ["error", "warn", "skip"])
def test_inside_the_window_no_policy_matters(policy: str) -> None:
    with patches.transaction(declare("a", SCALE, requires={"wrapt": ">=1"}, on_unknown=policy), reason="a test"):
        assert functions.scale(2) == ("a", 4)


def test_any_other_policy_is_refused() -> None:
    with pytest.raises(patches.DefinitionError, match="on_unknown"):
        declare("a", SCALE, on_unknown="ignore")


# Atomic bundles ------------------------------------------------------------------------------------------------------


def bundle_of(name: str, second: dict[str, Any], **options: bool) -> str:
    """A bundle of two registered patches, the second as given."""
    one, two = f"fake.{name}-one", f"fake.{name}-two"
    patches.register(declare("x", SCALE, id=one))
    patches.register(declare("x", **{"target": f"{LAYERS}:Base.add", "id": two, **second}))
    patches.bundle(name, [one, two], **options)
    return name


LEFT_OUT: dict[str, dict[str, Any]] = {
    "obsolete": {"probe": lambda: False},
    "unknown": {"requires": OUTSIDE, "on_unknown": "skip"},
    "drifted": {"signature": "(other)", "on_drift": "skip"},
    "optional": {"target": f"{FUNCTIONS}:gone", "optional": True},
}


@pytest.mark.parametrize("why", LEFT_OUT)
def test_a_bundle_leaves_out_what_does_not_apply(why: str) -> None:
    with patches.transaction(bundle_of(f"loose-{why}", LEFT_OUT[why]), reason="a test") as tx:
        assert functions.scale(2) == ("x", 4)
        assert [receipt.id for receipt in tx.skipped] == [f"fake.loose-{why}-two"]


@pytest.mark.parametrize("why", LEFT_OUT)
def test_an_atomic_bundle_applies_whole_or_not_at_all(why: str, unchanged: Snapshot) -> None:
    bundle_of(f"atom-{why}", LEFT_OUT[why], atomic=True)
    with pytest.raises(patches.PatchError, match=rf"atom-{why}.* atomic .*fake\.atom-{why}-two"):
        patches.transaction(f"atom-{why}", declare("other", f"{LAYERS}:Base.forward"), reason="a test").__enter__()
    assert (unchanged.differences(), patches.active()) == ([], [])


@pytest.mark.parametrize("why", LEFT_OUT)
def test_an_atomic_bundle_is_not_split_where_it_might_have_waited(why: str) -> None:
    bundle_of(f"atom-late-{why}", LEFT_OUT[why], atomic=True)
    with pytest.raises(patches.PatchError, match="atomic"):
        patches.defer(f"atom-late-{why}")
    assert patches.active() == []


def test_an_atomic_bundle_that_fits_is_applied() -> None:
    name = bundle_of("atom-whole", {}, atomic=True)
    with patches.transaction(name, reason="a test") as tx:
        assert len(tx.receipts) == 2
        assert (functions.scale(2), layers.Base.add(1, 2)) == (("x", 4), ("x", 3))


def test_an_atomic_bundle_inside_another_bundle_is_atomic() -> None:
    inner = bundle_of("atom-inner", {"probe": lambda: False}, atomic=True)
    patches.bundle("atom-outer", [inner])
    with pytest.raises(patches.PatchError, match="atom-inner"):
        patches.transaction("atom-outer", reason="a test").__enter__()
    assert patches.active() == []


# Implicit class methods and descriptors ------------------------------------------------------------------------------


class Plugin:
    made: list[str] = []  # noqa: RUF012 - a registry, as plugins have it

    def __init_subclass__(cls, **options: Any) -> None:
        Plugin.made.append(cls.__name__)

    def __class_getitem__(cls, item: Any) -> Any:
        return cls.__name__, item

    def __new__(cls, *args: Any) -> Any:
        made = super().__new__(cls)
        made.args = args  # type: ignore[attr-defined]
        return made


class Heir(Plugin):
    pass


class Bare:
    pass


def use_subclass(cls: Any) -> Any:
    made = type("Made", (cls,), {})
    return made.__name__, Plugin.made[-1:]


IMPLICIT: dict[str, Callable[[Any], Any]] = {
    "__init_subclass__": use_subclass,
    "__class_getitem__": lambda cls: cls[int],
    "__new__": lambda cls: getattr(cls(1, 2), "args", None),
}


@pytest.mark.parametrize("cls", [Plugin, Heir])
@pytest.mark.parametrize("name", IMPLICIT)
def test_an_implicit_class_method_is_patched(cls: Any, name: str) -> None:
    seen: list[Any] = []

    def wrapper(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        seen.append(instance)
        return wrapped(*args, **kwargs)

    before, stock = Snapshot(Plugin, Heir), IMPLICIT[name](cls)
    patch = declare("a", f"{__name__}:{cls.__name__}.{name}", wrapper=wrapper)
    with patches.transaction(patch, reason="a test"):
        assert IMPLICIT[name](cls) == stock
        assert len(seen) == 1
        assert name == "__new__" or isinstance(seen[0], type)
    assert before.differences() == []
    assert IMPLICIT[name](cls) == stock


def test_an_init_subclass_that_only_object_has_is_patched() -> None:
    seen: list[Any] = []

    def wrapper(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        seen.append(instance)
        return wrapped(*args, **kwargs)

    before = Snapshot(Bare)
    with patches.transaction(declare("a", f"{__name__}:Bare.__init_subclass__", wrapper=wrapper), reason="a test"):
        assert type("Made", (Bare,), {}).__name__ == "Made"
        assert len(seen) == 1
    assert before.differences() == []


class Field:
    """A descriptor that must be told its name."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.told = owner, name

    def __get__(self, instance: Any, owner: type) -> Any:
        return self.told


@pytest.mark.parametrize("how", ["wrapper", "replace", "factory"])
def test_a_descriptor_put_in_place_is_told_its_name(how: str) -> None:
    given = {"wrapper": lambda *_: Field(), "replace": Field(), "factory": Field}[how]
    patch = patches.Patch(**{"id": "fake.a", "target": f"{LAYERS}:Holder.scale", "kind": "value", "reason": "a test",
                             how: given})  # fmt: skip
    with patches.transaction(patch, reason="a test"):
        assert layers.Holder.scale == (layers.Holder, "scale")
    assert layers.Holder.scale == 1


def test_a_cached_property_put_in_place_works() -> None:
    def slow(self: Any) -> int:
        return 5

    patch = declare("a", f"{LAYERS}:Base.expensive", kind="value", wrapper=lambda *_: functools.cached_property(slow))
    with patches.transaction(patch, reason="a test"):
        assert layers.Base().expensive == 5
    assert layers.Base().expensive == 1


@pytest.mark.parametrize(
    ("target", "kind", "advice"),
    [
        (f"{LAYERS}:Base.gone", "value", "add"),
        (f"{LAYERS}:Base.table[gone]", "value", "add"),
        (f"{FUNCTIONS}:gone", "value", "add"),
        (f"{FUNCTIONS}:limit", "auto", "value"),
        (f"{LAYERS}:Base", "auto", "class"),
        (f"{LAYERS}:Base.expensive", "auto", "value"),
    ],
)
def test_a_refusal_names_the_kind_that_works(target: str, kind: str, advice: str) -> None:
    with pytest.raises(patches.IncompatibleError, match=f'kind="{advice}"'):
        patches.transaction(declare("a", target, kind=kind), reason="a test").__enter__()


# Aliases, third parties, scopes, recursion ---------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A library, and the package of an adapter that keeps the original in one module and wraps it in another."""
    (tmp_path / "alias_lib.py").write_text("def f(x):\n    return x * 2\n")
    folder = tmp_path / "alias_adapter"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "stock.py").write_text("from alias_lib import f as stock_f\ndef fallback(x):\n    return stock_f(x)\n")
    (folder / "wrap.py").write_text(
        "import functools\nfrom alias_lib import f as stock_f\nfrom . import stock\n"
        "def by_sibling(wrapped, instance, args, kwargs):\n    return 'ours', stock.fallback(*args)\n"
        "def tagged(tag, wrapped, instance, args, kwargs):\n    return tag, stock_f(*args)\n"
        "by_partial = functools.partial(tagged, 'ours')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("alias_adapter.wrap")
    for name in [name for name in sys.modules if name.startswith("alias_")]:
        del sys.modules[name]


@pytest.mark.parametrize("wrapper", ["by_sibling", "by_partial"])
def test_a_rewritten_alias_does_not_recurse(adapter: types.ModuleType, wrapper: str) -> None:
    lib: Any = sys.modules["alias_lib"]
    patch = declare("a", "alias_lib:f", wrapper=getattr(adapter, wrapper), aliases="rewrite")
    with patches.transaction(patch, reason="a test"):
        assert lib.f(2) == ("ours", 4)
    assert lib.f(2) == 4
    assert adapter.stock.stock_f is adapter.stock_f is lib.f


@pytest.mark.parametrize("calls", ["revert_all", "revert", "audit"])
def test_a_third_party_that_undoes_out_of_order_leaves_no_row(lib: types.ModuleType, calls: str) -> None:
    lib.f = stock = lambda x: x
    lib.f = lambda x: ("theirs", stock(x))
    patch = declare("a", "fault_lib:f")
    with suppress(patches.UndoError), patches.transaction(patch, reason="a test"):
        lib.f = stock  # they undo what they did before us
        assert lib.f(1) == 1
    with suppress(patches.UndoError, patches.NotActiveError):
        {"revert_all": patches.revert_all, "revert": lambda: patches.revert("fake.a"), "audit": patches.audit}[calls]()
    assert len(patches.audit()) == 0
    assert lib.f is stock
    with patches.transaction(patch, reason="a test"):
        assert lib.f(1) == ("a", 1)
    assert lib.f is stock


def timed(call: Callable[[], Any], times: int) -> float:
    started = time.process_time()
    for _ in range(times):
        call()
    return time.process_time() - started


@pytest.mark.parametrize("receipts", ["one for all", "one for each"])
def test_many_scoped_objects_cost_no_more_per_call_than_two(lib: types.ModuleType, receipts: str) -> None:
    makes = [type(f"Thing{count}", (), {"run": lambda self: 1}) for count in (2, 2000)]
    calls = []
    opened = []
    for number, (cls, count) in enumerate(zip(makes, (2, 2000), strict=True)):
        setattr(lib, f"Thing{number}", cls)
        patch = declare(f"a{number}", f"fault_lib:Thing{number}.run", wrapper=passing)
        things = [cls() for _ in range(count)]
        groups = [things] if receipts == "one for all" else [[thing] for thing in things]
        with patches.transaction(*(patches.on(patch, group) for group in groups), reason="a test") as tx:
            tx.commit()
        opened.append((tx, things))
        calls += [things[0].run, things[-1].run, cls().run]
    samples = [[timed(call, 2000) for call in calls] for _ in range(9)]
    best = [min(sample[position] for sample in samples) for position in range(len(calls))]
    patches.revert_all()
    assert max(best[3:]) <= 2 * max(best[:3]), best


def depth(function: Callable[[int], int]) -> int:
    """The number of calls of itself that a function survives."""
    low, high = 1, sys.getrecursionlimit()
    while high - low > 1:
        middle = (low + high) // 2
        try:
            function(middle)
        except RecursionError:
            high = middle
        else:
            low = middle
    return low


def down(n: int) -> int:
    return 0 if n == 0 else 1 + down(n - 1)


def by_hand(n: int) -> int:
    return 0 if n == 0 else 1 + hand(n - 1)


def around(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return passing(function, None, args, kwargs)

    return patched


hand = around(by_hand)


@pytest.mark.parametrize("scoped", [False, True])
def test_a_patched_recursive_function_keeps_its_depth(scoped: bool) -> None:
    """At least half of what it has under a closure by hand: that closure, the wrapper and the original take a frame."""
    patch = declare("a", f"{__name__}:down", wrapper=passing, subject=lambda instance, args, kwargs: Plugin)
    with patches.transaction(patch, reason="a test", on=[Plugin] if scoped else None):
        assert down(10) == 10
        assert 2 * depth(down) >= depth(hand)


@pytest.mark.parametrize("how", ["others", "disabled"])
def test_a_recursive_function_that_a_patch_lets_through_keeps_half_of_its_depth(how: str) -> None:
    stock = depth(down)
    patch = declare("a", f"{__name__}:down", wrapper=passing, subject=lambda instance, args, kwargs: Heir)
    with patches.transaction(patch, reason="a test", on=[Plugin] if how == "others" else None):
        if how == "disabled":
            patches.disable("fake.a")
        assert 2 * depth(down) >= stock - 10


def test_what_replaces_a_recursive_function_keeps_half_of_its_depth() -> None:
    stock = depth(down)

    def stand_in(n: int) -> int:
        return 0 if n == 0 else 1 + down(n - 1)

    with patches.transaction(patches.Patch(id="fake.a", target=f"{__name__}:down", replace=stand_in, reason="a test")):
        assert 2 * depth(down) >= stock - 10


# What a patched thing is ----------------------------------------------------------------------------------------------


class Shape(abc.ABC):
    @property
    @abc.abstractmethod
    def area(self) -> int:
        """The area."""

    @area.setter
    @abc.abstractmethod
    def area(self, value: int) -> None: ...


@pytest.mark.parametrize("kind", ["property", "setter"])
def test_a_patched_property_keeps_its_name_its_doc_and_that_it_is_abstract(kind: str) -> None:
    def described() -> list[object]:
        area = vars(Shape)["area"]
        return [area.__doc__, area.fget.__name__, area.fset.__name__, type("Sub", (Shape,), {}).__abstractmethods__]

    stock = described()
    with patches.transaction(declare("a", f"{__name__}:Shape.area", kind=kind, wrapper=passing)):
        assert described() == stock


def test_what_holds_a_receipt_or_a_patch_is_copied() -> None:
    with patches.transaction(declare("a", SCALE)) as tx:
        holder = types.SimpleNamespace(receipts=tx.receipts, patch=tx.receipts[0].patch)
        copied = copy.deepcopy(holder)
        assert (copied.receipts, copied.patch) == (tx.receipts, holder.patch)
        assert patches.revert(copy.copy(copied.receipts[0])) == tx.receipts
        assert functions.scale(2) == 4
        assert copy.copy(holder.patch) is holder.patch


@pytest.mark.parametrize("where", ["module", "item", "object"])
def test_what_a_name_other_than_its_own_holds_is_pickled_while_it_is_patched(where: str) -> None:
    held = types.SimpleNamespace(scale=functions.scale)
    target: Any = f"{copies.__name__}:resize" if where == "module" else f"{copies.__name__}:BY_NAME[scale]"
    read: dict[str, Callable[[], Any]] = {
        "module": lambda: copies.resize, "item": lambda: copies.BY_NAME["scale"], "object": lambda: held.scale
    }  # fmt: skip
    with patches.transaction(declare("a", patches.at(held, "scale") if where == "object" else target)):
        patched = read[where]()
        assert patched(2) == pickle.loads(pickle.dumps(patched))(2) == ("a", 4)
        data = pickle.dumps(patched)
    assert read[where]() is functions.scale
    assert pickle.loads(data)(2) == pickle.loads(pickle.dumps(patched))(2) == 4


# What is given in place of what is expected ---------------------------------------------------------------------------


class Called:
    def __call__(self, other: object) -> bool:
        return other is self

    def run(self) -> str:
        return "stock"


def test_one_object_in_place_of_a_list_is_refused() -> None:
    one: Any = Called()
    for patch, given in ((declare("a", f"{__name__}:Called.run"), one), (declare("b", FORWARD), layers.Base())):
        for begin in (
            lambda: patches.transaction(patch, on=given).__enter__(),  # noqa: B023
            lambda: patches.transaction(patches.on(patch, given)).__enter__(),  # noqa: B023
        ):
            with pytest.raises(patches.ScopeError, match=r"pass \[it\]"):
                begin()


@pytest.mark.parametrize("field", ["target", "probe", "verify", "subject"])
def test_a_field_of_the_wrong_type_is_named(field: str) -> None:
    with pytest.raises(patches.DefinitionError, match=rf"field '{field}'.*3"):
        declare("a", **{"target": SCALE, field: 3})


def test_a_replacement_that_is_no_function_is_named_as_such() -> None:
    patch = patches.Patch(id="fake.a", target=SCALE, kind="function", replace=3, reason="a test")
    with pytest.raises(patches.ApplyError, match="`replace` must be a function"):
        patches.transaction(patch).__enter__()


def test_a_receipt_that_is_not_in_a_list_cannot_be_kept() -> None:
    with patches.transaction(declare("a", SCALE)) as tx, pytest.raises(TypeError, match="iterable"):
        patches.keep(tx.receipts[0], layers.Base())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields", [{"kind": "delete", "wrapper": None}, {"kind": "value", "wrapper": lambda *_: subclass}]
)
def test_the_audit_names_a_value_that_somebody_else_has_left(lib: types.ModuleType, fields: dict[str, Any]) -> None:
    lib.run = stock = functions.scale
    with pytest.raises(patches.UndoError), patches.transaction(declare("a", "fault_lib:run", **fields)):
        lib.run = hand
    assert [row.state for row in patches.audit()] == ["overwritten"]
    lib.run = stock
    assert len(patches.audit()) == 0


# What a foreign `__setattr__` does ------------------------------------------------------------------------------------


class Rewriting(type):
    def __setattr__(cls, name: str, value: object) -> None:
        super().__setattr__(name, staticmethod(value) if callable(value) else value)


class Rewritten(metaclass=Rewriting):
    def run(self) -> str:
        return "stock"


class RewrittenToo(Rewritten):
    pass


@pytest.mark.parametrize("owner", [Rewritten, RewrittenToo])
def test_a_refusal_leaves_nothing_of_what_a_metaclass_has_stored(owner: type) -> None:
    before = Snapshot(Rewritten, RewrittenToo)
    with pytest.raises(patches.TargetError, match="stores it elsewhere"):
        patches.transaction(declare("a", f"{__name__}:{owner.__name__}.run")).__enter__()
    assert before.differences() == []
    assert Rewritten().run() == "stock"


def test_a_property_of_a_module_s_class_is_refused(lib: types.ModuleType) -> None:
    class Redirecting(types.ModuleType):
        @property
        def run(self) -> object:
            return self.__dict__["_run"]

        @run.setter
        def run(self, value: object) -> None:
            self.__dict__["_run"] = value

    lib.__class__ = Redirecting
    lib.run = functions.scale
    with pytest.raises(patches.IncompatibleError, match=r"property of class .*Redirecting"):
        patches.transaction(declare("a", "fault_lib:run")).__enter__()
    assert lib.run is functions.scale


class Registering:
    """Stores functions elsewhere, as a torch module does its children."""

    def __init__(self) -> None:
        super().__setattr__("children", {})
        self.size = 3

    def __setattr__(self, name: str, value: object) -> None:
        if callable(value):
            self.__dict__.pop(name, None)
            self.children[name] = value
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self.children.pop(name, None) is None:
            super().__delattr__(name)


@pytest.mark.parametrize(("name", "kind"), [("extra", "add"), ("size", "value")])
def test_a_patch_that_an_object_stores_elsewhere_is_refused_and_leaves_nothing(name: str, kind: str) -> None:
    one = Registering()
    with pytest.raises(patches.ApplyError, match="had no effect"):
        patches.transaction(declare("a", patches.at(one, name), kind=kind, wrapper=None, replace=passing)).__enter__()
    assert vars(one) == {"children": {}, "size": 3}
    assert len(patches.audit()) == 0
