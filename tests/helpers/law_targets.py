"""One target of every kind, how what is active there can be read, and what differs while it is patched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.helpers.declare import FUNCTIONS, LAYERS
from tests.helpers.fake_upstream import brittle, functions, layers, values

__all__ = ["LAW_OWNERS", "LAW_TARGETS", "LawTarget", "replace_class", "tags", "write_tagged"]

VALUES = values.__name__

LAW_OWNERS: tuple[Any, ...] = (
    *(functions, values, layers.Base, layers.Derived, layers.Unhashable, layers.Holder, layers.Leaf),
    *(values.ACTIVATIONS, values.STEPS, values.resize, values.OPTIONS, values.Options, values.Box, values.Case),
    brittle.Fragile,
)


@dataclass(frozen=True, kw_only=True)
class LawTarget:
    """A place to patch."""

    read: Callable[[], Any]
    """What the target gives now, with the tags of the active patches around it."""
    differs: str
    """How a Snapshot names the place."""
    fields: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    """The target that shows through this one, by inheritance."""


def tags(result: Any) -> set[str]:
    """The tags around a result; of a class, those of the classes it is made from."""
    if isinstance(result, type):
        return {base.__name__ for base in result.__mro__ if base.__name__.startswith("law")}
    found = set()
    while isinstance(result, tuple) and len(result) == 2 and str(result[0]).startswith("law"):
        found.add(result[0])
        result = result[1]
    return found


def replace_class(tag: str) -> Callable[..., type]:
    """A wrapper for a target of kind "class"."""
    return lambda read, *_: type(tag, (read(),), {})


def write_tagged(tag: str) -> Callable[..., None]:
    """A wrapper for a setter."""

    def wrapper(write: Callable[[Any], None], instance: Any, args: tuple[Any], kwargs: Any) -> None:
        write((tag, args[0]))

    return wrapper


def _written() -> Any:
    box = values.Box(None)
    box.content = 1
    return box._content


_VALUE = {"kind": "value"}
_ATTRIBUTE = {"kind": "attribute"}

LAW_TARGETS: dict[str, LawTarget] = {
    f"{FUNCTIONS}:scale": LawTarget(read=lambda: functions.scale(2), differs=f"{FUNCTIONS}.scale"),
    f"{FUNCTIONS}:lazy": LawTarget(read=lambda: functions.lazy(2), differs=f"{FUNCTIONS}.lazy"),
    f"{LAYERS}:Base.forward": LawTarget(read=lambda: layers.Base().forward(1), differs="Base.forward"),
    f"{LAYERS}:Base.build": LawTarget(read=lambda: layers.Base.build(1), differs="Base.build"),
    f"{LAYERS}:Base.add": LawTarget(read=lambda: layers.Base().add(1, 2), differs="Base.add"),
    f"{LAYERS}:Base.size": LawTarget(read=lambda: layers.Base().size, differs="Base.size"),
    f"{LAYERS}:Derived.forward": LawTarget(
        read=lambda: layers.Derived().forward(1), differs="Derived.forward", base=f"{LAYERS}:Base.forward"
    ),
    f"{LAYERS}:Derived.size": LawTarget(
        read=lambda: layers.Derived().size, differs="Derived.size", base=f"{LAYERS}:Base.size"
    ),
    f"{LAYERS}:Holder.weight": LawTarget(
        read=lambda: layers.Holder(1).weight, differs="Holder.weight", fields=_ATTRIBUTE
    ),
    f"{LAYERS}:Leaf.scale": LawTarget(read=lambda: layers.Leaf(1).scale, differs="Leaf.scale", fields=_ATTRIBUTE),
    f"{VALUES}:LIMIT": LawTarget(read=lambda: values.LIMIT, differs=f"{VALUES}.LIMIT", fields=_VALUE),
    f"{VALUES}:Options.kinds": LawTarget(read=lambda: values.Options.kinds, differs="Options.kinds", fields=_VALUE),
    f"{VALUES}:ACTIVATIONS[relu]": LawTarget(read=lambda: values.ACTIVATIONS["relu"](1), differs="dict.relu"),
    f"{VALUES}:ACTIVATIONS[1]": LawTarget(read=lambda: values.ACTIVATIONS[1], differs="dict.1", fields=_VALUE),
    f"{VALUES}:STEPS[0]": LawTarget(read=lambda: values.STEPS[0], differs="list.0", fields=_VALUE),
    f"{VALUES}:resize(size)": LawTarget(read=lambda: values.resize("")[1], differs="resize.__defaults__"),
    f"{VALUES}:resize(mode)": LawTarget(read=lambda: values.resize("")[2], differs="resize.__defaults__"),
    f"{VALUES}:resize(pad)": LawTarget(read=lambda: values.resize("")[3], differs="resize.(pad)"),
    f"{VALUES}:OPTIONS.level": LawTarget(read=lambda: values.OPTIONS.level, differs="Options.level", fields=_VALUE),
    f"{VALUES}:OPTIONS.describe": LawTarget(read=lambda: values.OPTIONS.describe(1), differs="Options.describe"),
    f"{VALUES}:Box.content": LawTarget(read=_written, differs="Box.content", fields={"kind": "setter"}),
    f"{VALUES}:Case": LawTarget(read=lambda: values.Case, differs=f"{VALUES}.Case", fields={"kind": "class"}),
}
