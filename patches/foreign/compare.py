"""Foreign patches in this process, found by comparison of loaded modules with a clean process."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from ..activation import ACTIVATIONS
from ..errors import ForeignError
from ..ledger import State, aligned
from ..target import MISSING
from .classify import how_of, kind_of
from .clean import Baseline, CleanProcess
from .dependencies import dependencies_first
from .describe import DATA, describe
from .origin import Origin, origins
from .walk import Binding, bindings

__all__ = ["Foreign", "ForeignPatch", "compare"]


@dataclass(frozen=True, kw_only=True)
class ForeignPatch:
    """One place whose code differs from a clean process."""

    target: str
    """`package.module:Class.attribute`; `...[key]` for an item of a dictionary."""
    kind: str
    """Kind of object in a clean process: function, method, class, item, ...; attribute if there is none."""
    how: str
    """Kind of replacement: function, lambda, wraps, wrapt, partial, mock, class, ...; or kind of change: defaults
    (other default arguments), moved (other code of the same package), value, removed.
    """
    defined_at: tuple[str, ...]
    """`file:line` of every function that is new at the place, outermost first."""
    owner: str
    """Distribution and version of the outermost one, or empty if it belongs to none."""
    was: str
    now: str


class Foreign(tuple[ForeignPatch, ...]):
    """The foreign patches found, in the order of import. `str()` is a table."""

    unchecked: dict[str, str]
    """Module that is loaded here and could not be imported in a clean process -> reason."""

    def __str__(self) -> str:
        lines = [f"not compared: {module}: {why}" for module, why in self.unchecked.items()]
        if not self:
            return "\n".join(["nobody else has patched anything", *lines])
        rows = [(one.target, one.kind, one.how, ", ".join(one.defined_at), one.owner) for one in self]
        return "\n".join([aligned(_HEADER, rows), *lines])

    def to_json(self) -> str:
        """A JSON object: `patches`, a list with one object per patch, and `unchecked`."""
        found = [asdict(one) for one in self]
        return json.dumps({"patches": found, "unchecked": self.unchecked}, indent=2)


_INTACT: Final = (State.ACTIVE, State.DISABLED)
_HEADER: Final = ("target", "kind", "how", "defined at", "owner")


def compare(packages: Sequence[str], *, timeout: float) -> Foreign:
    """Compare the loaded modules of these packages with a clean process, as `patches.foreign` says."""
    if not packages:
        raise _refuse("expected the names of packages, got none")
    for package in packages:
        if package not in sys.modules:
            raise _refuse(f"{package!r} is not imported in this process, so there is nothing to look at")
    ordered = dependencies_first(packages)
    clean = CleanProcess(ordered, timeout=timeout)
    try:
        here = {package: _look(package) for package in ordered}
        baselines = clean.baselines()
    finally:
        clean.stop()
    found = [one for package in ordered for one in _compare(package, here[package], baselines[package])]
    unchecked = {module: why for baseline in baselines.values() for module, why in baseline.failed.items()}
    result = Foreign(found)
    result.unchecked = unchecked
    return result


@dataclass(frozen=True, kw_only=True)
class _Look:
    """The contents of a package in this process: each binding with its description."""

    bindings: Sequence[tuple[Binding, str]]
    ours: frozenset[int]
    """`id` of the objects that this package has installed."""
    targets: frozenset[str]
    """Paths of the bindings that active patches target, which may hold another object than the installed one."""


def _look(package: str) -> _Look:
    with ACTIVATIONS.lock:
        active = [receipt for receipt in ACTIVATIONS.active() if ACTIVATIONS.condition(receipt) in _INTACT]
        return _Look(
            bindings=[(binding, describe(binding.value)) for binding in bindings(package)],
            ours=frozenset(id(ours) for ours in ACTIVATIONS.installed() if describe(ours) != DATA),
            # Up to the parenthesis: the binding of a default argument is its function.
            targets=frozenset(receipt.target.partition("(")[0] for receipt in active),
        )


def _compare(package: str, here: _Look, baseline: Baseline) -> Iterator[ForeignPatch]:
    for binding, now in here.bindings:
        if id(binding.value) in here.ours or binding.path in here.targets:
            continue
        stock = baseline.descriptions.get(binding.path)
        if stock is None and (binding.is_item or binding.owner not in baseline.owners):
            continue  # registries are meant to grow, and for other owners there is no baseline
        if now not in (stock or (DATA,)):
            yield from _judge(package, binding, now, stock or (DATA,))
    yield from _removed(here, baseline)


def _judge(package: str, binding: Binding, now: str, stock: Sequence[str]) -> Iterator[ForeignPatch]:
    fresh = [origin for origin in origins(binding.value) if not any(origin.at in before for before in stock)]
    outside = [origin for origin in fresh if not origin.is_in(package)]
    held_code = any(before != DATA for before in stock)
    if not outside and not held_code:
        return  # the package's own, loaded lazily
    if not held_code and now.startswith("module "):
        return  # imported since
    if not outside and _wraps(now, stock):
        return  # as torch._dynamo, once loaded, does to functions that it cannot trace
    yield _found(
        binding, now=now, stock=stock, origins=outside or fresh or list(origins(binding.value)), moved=not outside
    )


def _wraps(now: str, stock: Sequence[str]) -> bool:
    return any(before != DATA and before in now and not now.startswith(before) for before in stock)


def _found(binding: Binding, *, now: str, stock: Sequence[str], origins: Sequence[Origin], moved: bool) -> ForeignPatch:
    return ForeignPatch(
        target=binding.path,
        kind=kind_of(binding, stock[0]),
        how=how_of(binding.value, now=now, stock=stock, moved=moved),
        defined_at=tuple(dict.fromkeys(origin.at for origin in origins)),
        owner=origins[0].owner if origins else "",
        was=" or ".join(stock),
        now=now,
    )


def _removed(here: _Look, baseline: Baseline) -> Iterator[ForeignPatch]:
    present = {binding.path for binding, _ in here.bindings}
    owners = {binding.owner for binding, _ in here.bindings if binding.name}
    for path, stock in baseline.descriptions.items():
        owner, name = _split(path)
        if path in present or owner not in owners or not any(stock):
            continue
        binding = Binding(owner=owner, name=name, value=MISSING, in_class=":" in owner)
        yield _found(binding, now="", stock=stock, origins=(), moved=False)


def _split(path: str) -> tuple[str, str]:
    """The owner and the name in the path of a binding; for an item, an owner that does not exist."""
    module, _, inner = path.partition(":")
    if "[" in inner or not inner:
        return path, ""
    outer, _, name = inner.rpartition(".")
    return (f"{module}:{outer}" if outer else module), name


def _refuse(why: str) -> ForeignError:
    return ForeignError(f"cannot tell what others have patched: {why}", why=why)
