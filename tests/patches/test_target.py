from __future__ import annotations

import pytest

from patches.errors import TargetError
from patches.target import MISSING, Kind, Place, describe, locate, parse
from tests.helpers.declare import FUNCTIONS, LAYERS
from tests.helpers.fake_upstream import functions, layers


def place(text: str, kind: str = "auto") -> Place:
    target = parse(text)
    return describe(target, locate(target), kind)


def test_parse_splits_module_and_path() -> None:
    target = parse("a.b:C.d")
    assert (target.module, target.path) == ("a.b", ("C", "d"))
    assert str(target) == "a.b:C.d"


@pytest.mark.parametrize("text", ["", "a.b", "a.b:", ":c", "a.b:C..d", "a b:c", "a:b:c", "a.1:b"])
def test_parse_refuses_other_forms(text: str) -> None:
    with pytest.raises(TargetError, match="not of the form"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"{FUNCTIONS}:scale", Kind.FUNCTION),
        (f"{FUNCTIONS}:floor", Kind.FUNCTION),
        (f"{LAYERS}:Base.forward", Kind.METHOD),
        (f"{LAYERS}:Base.build", Kind.CLASSMETHOD),
        (f"{LAYERS}:Base.add", Kind.STATICMETHOD),
        (f"{LAYERS}:Base.size", Kind.PROPERTY),
        (f"{LAYERS}:Derived.build", Kind.CLASSMETHOD),
    ],
)
def test_kinds_are_found(text: str, kind: Kind) -> None:
    assert place(text).kind == kind
    assert place(text, kind).kind == kind


def test_what_is_found_is_not_bound() -> None:
    own = place(f"{LAYERS}:Base.build")
    assert own.own is own.found is vars(layers.Base)["build"]
    inherited = place(f"{LAYERS}:Derived.build")
    assert inherited.own is MISSING
    assert inherited.found is own.own
    assert inherited.owner is layers.Derived


def test_a_module_may_make_attributes_on_demand() -> None:
    lazy = place(f"{FUNCTIONS}:lazy")
    assert lazy.found is functions._on_demand
    assert lazy.own is MISSING


@pytest.mark.parametrize(
    ("text", "kind", "why"),
    [
        ("no_such_module:f", "auto", "importing 'no_such_module'"),
        (f"{LAYERS}:Nothing.forward", "auto", "no attribute 'Nothing'"),
        (f"{LAYERS}:Base.nothing", "auto", "no attribute 'nothing'"),
        (f"{LAYERS}:Base.table.copy", "auto", "neither a module nor a class"),
        (f"{LAYERS}:Base", "auto", "it is a class"),
        (f"{LAYERS}:Base.__init__", "auto", "only the __init__ of object"),
        (f"{LAYERS}:Base.__new__", "auto", "only the __new__ of object"),
        (f"{LAYERS}:Base.expensive", "auto", "cached_property"),
        (f"{LAYERS}:Base.table", "auto", "neither a method nor"),
        (f"{LAYERS}:Base.write_only", "auto", "without a getter"),
        (f"{FUNCTIONS}:limit", "auto", "cannot be called"),
        (f"{LAYERS}:Base.forward", "property", "kind is 'method'"),
        ("builtins:dict.get", "auto", "immutable type"),
        (f"{FUNCTIONS}:limit", "attribute", "this is a module"),
        (f"{LAYERS}:Slotted.weight", "attribute", "no __dict__"),
        (f"{LAYERS}:Base.size", "attribute", "it is a property"),
    ],
)
def test_what_cannot_be_patched_is_refused_with_the_reason(text: str, kind: str, why: str) -> None:
    with pytest.raises(TargetError, match=why) as caught:
        place(text, kind)
    assert caught.value.target == text


def test_an_attribute_need_not_be_on_the_class() -> None:
    found = place(f"{LAYERS}:Holder.weight", "attribute")
    assert found.own is found.found is MISSING
