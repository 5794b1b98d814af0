"""`Patch`: the declaration of one patch, as data; and `on`, which limits one to some objects."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import FrameType, MappingProxyType, ModuleType
from typing import Any, Final, Literal, TypeAlias, TypedDict, cast

from .drift import parse_signature
from .errors import DefinitionError, ScopeError, TargetError
from .target import MISSING, STORED, Kind, Target, parse
from .versions import parse_specifier

__all__ = ["Chosen", "Fields", "Patch", "Scope", "Scoped", "Wrapper", "caller", "chosen", "on"]

Wrapper: TypeAlias = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]
"""`(wrapped, instance, args, kwargs) -> result`, as in wrapt: `wrapped` is bound, and `args` omit the instance."""

_Target: TypeAlias = str | Target | tuple[str | Target, ...]
_Kind: TypeAlias = Literal[
    "auto", "function", "method", "classmethod", "staticmethod", "property", "setter", "attribute", "value", "class",
    "add", "delete",
]  # fmt: skip
_Subject: TypeAlias = Callable[[Any, tuple[Any, ...], dict[str, Any]], object]
_Policy: TypeAlias = Literal["error", "warn", "skip"]
_PASSED_OVER: Final = (__name__.partition(".")[0], "contextlib")
_ID: Final = re.compile(r"[a-z0-9][a-z0-9_-]*(?:\.[a-z0-9][a-z0-9_-]*)+")
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{16}")
_CHOICES: Final = {
    "kind": ("auto", *Kind),
    "aliases": ("report", "rewrite", "ignore"),
    "on_unknown": ("error", "warn", "skip"),
    "on_drift": ("error", "warn", "skip"),
    "on_foreign": ("allow", "error", "warn", "skip"),
}


class Fields(TypedDict, total=False):
    """The fields of `Patch` that `register` takes, apart from the id, the target and the reason."""

    wrapper: Wrapper | None
    replace: Any
    factory: Callable[[], Any] | None
    upstream: str
    requires: Mapping[str, str]
    kind: _Kind
    optional: bool
    subject: _Subject | None
    after: tuple[str, ...]
    needs: tuple[str, ...]
    conflicts: tuple[str, ...]
    probe: Callable[[], bool] | None
    verify: Callable[[], None] | None
    tags: tuple[str, ...]
    fingerprint: str | tuple[str, ...]
    signature: str
    on_unknown: _Policy
    on_drift: _Policy
    on_foreign: Literal["allow", "error", "warn", "skip"]
    aliases: Literal["report", "rewrite", "ignore"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Patch:
    """Declaration of one patch. Patches compare by identity.

    Says what to do by exactly one of `wrapper`, `replace` and `factory`, or by kind="delete". Raises DefinitionError
    if a field is invalid; nothing is imported to check.
    """

    id: str
    """`upstream.kebab-name`."""
    target: _Target
    """`package.module:Class.attribute`, an item `module:TABLE[key]`, a default argument `module:function(parameter)`,
    or `patches.at(object, "name")`. Several, for several releases: the first that is there.
    """
    wrapper: Wrapper | None = None
    replace: Any = MISSING
    """The replacement itself: a function with the parameters of the target (`self` too), a subclass of a class, or a
    value.
    """
    factory: Callable[[], Any] | None = None
    """Function without arguments that makes the replacement when the patch is applied."""
    reason: str
    """Reason for the patch: the defect, in a sentence."""
    upstream: str = ""
    """Link to the issue, or to the source that shows the defect; several are separated by spaces."""
    requires: Mapping[str, str] = field(default_factory=dict)
    """Distribution -> PEP 440 window in which the defect is known; all must hold, or else see `on_unknown`."""
    kind: _Kind = "auto"
    """"auto", or the `Kind` that the target must have. "attribute" wraps reads of values that instances store."""
    optional: bool = False
    """Whether a target that is not there is skipped; otherwise it is an error."""
    subject: _Subject | None = None
    """`(instance, args, kwargs) -> object`: the object by which a call is in scope or not. None: the instance."""
    after: tuple[str, ...] = ()
    """Ids that are applied before this one, and so wrap further inside if they share its target."""
    needs: tuple[str, ...] = ()
    """Ids that are always applied together with this one, before it."""
    conflicts: tuple[str, ...] = ()
    """Ids that may not be active together with this one."""
    probe: Callable[[], bool] | None = None
    """Returns True if the defect is present. Needs no GPU or process group; never runs while the patch is active."""
    verify: Callable[[], None] | None = None
    """Raises if the applied patch does not have its effect."""
    tags: tuple[str, ...] = ()
    """Words by which to select it: `tag:word`."""
    fingerprint: str | tuple[str, ...] = ()
    """Fingerprint of the source that it was written for, by `patches show --fingerprint ID`; several for several."""
    signature: str = ""
    """Signature of the target: `(self, x, *, by=2)`. Names, kinds, and which parameters have defaults must match."""
    on_unknown: _Policy = "warn"
    """Policy if the installed version is outside `requires`, and neither the source nor a probe says that the patch is
    right for it: "error", "warn" and apply, or "skip".
    """
    on_drift: _Policy = "error"
    """Policy if the source or the signature differs: "error", "warn" and apply, or "skip"."""
    on_foreign: Literal["allow", "error", "warn", "skip"] = "allow"
    """Policy if somebody else has patched the target already: "allow", "error", "warn" or "skip"."""
    aliases: Literal["report", "rewrite", "ignore"] = "report"
    """Policy for copies of the target made by `from x import f`: "report" names them in `patches audit`, "rewrite"
    patches and restores them too, "ignore" declares that they do not matter.
    """
    targets: tuple[Target, ...] = field(init=False, default=())
    """Every target, parsed. `target` is the first, as text."""
    module: str = field(init=False, default="?")
    """The module that defines the wrapper or the replacement, or else that makes the patch."""
    claimant: str = field(init=False, default="?")
    """The declarer of the patch: `module:qualified.name` of its wrapper or replacement."""
    declared_in: frozenset[str] = field(init=False, default=frozenset())
    """The modules in which the patch and its wrapper or replacement are written."""

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise self._refuse("id", f"{self.id!r} is not of the form 'upstream.kebab-name'")
        if not self.reason.strip():
            raise self._refuse("reason", "it is empty; say which defect the patch is for")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise self._refuse(name, f"{getattr(self, name)!r} is not one of {', '.join(allowed)}")
        self._check_target()
        self._check_deed()
        self._name_declarer()
        self._check_ids()
        self._check_formats()

    def _check_target(self) -> None:
        given: tuple[Any, ...] = self.target if isinstance(self.target, tuple) else (self.target,)
        if not given:
            raise self._refuse("target", "expected at least one target, got none")
        for one in given:
            if not isinstance(one, str | Target):
                expected = "a string, a tuple of strings, or patches.at(obj, name)"
                raise self._refuse("target", f"expected {expected}, got {one!r}")
        try:
            targets = tuple(one if isinstance(one, Target) else parse(one) for one in given)
        except TargetError as error:
            hint = f"; did you mean {error.suggestion!r}?" if error.suggestion else ""
            raise self._refuse("target", f"{error.target!r}: {error.why}{hint}") from error
        self._set(targets=targets, target=str(targets[0]))

    def _check_deed(self) -> None:
        nothing = {"wrapper": None, "replace": MISSING, "factory": None}
        given = [name for name, default in nothing.items() if getattr(self, name) is not default]
        if self.kind == "delete" and given:
            raise self._refuse(given[0], "nothing is needed to delete the target")
        if self.kind != "delete" and len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise self._refuse("wrapper", f"expected one of wrapper, replace and factory, got {found}")
        for name in ("wrapper", "factory", "probe", "verify", "subject"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise self._refuse(name, f"{getattr(self, name)!r} is not callable")
        if self.wrapper is not None:
            self._check_wrapper(self.wrapper)
        if self.kind == "auto" and self.replace is not MISSING:
            is_class, is_value = isinstance(self.replace, type), not callable(self.replace)
            self._set(kind="class" if is_class else "value" if is_value else "auto")

    def _name_declarer(self) -> None:
        deed: Any = self.wrapper or self.factory or (None if self.replace is MISSING else self.replace)
        deed = deed.func if isinstance(deed, functools.partial) else deed
        qualname = getattr(deed, "__qualname__", None)
        declaring = str(_outside(sys._getframe(1)).f_globals.get("__name__", "?"))
        written = getattr(deed, "__globals__", {}).get("__name__", declaring)
        module = str(getattr(deed, "__module__", None) or declaring) if isinstance(qualname, str) else declaring
        self._set(module=module, claimant=f"{module}:{qualname or repr(deed)}")
        self._set(declared_in=frozenset({module, declaring, written}))

    def _check_wrapper(self, wrapper: Wrapper) -> None:
        try:
            inspect.signature(wrapper).bind(None, None, (), {})
        except TypeError as error:
            raise self._refuse("wrapper", f"it must accept (wrapped, instance, args, kwargs): {error}") from error
        except ValueError:  # no signature, as for callables written in C: a mismatch shows when it is called
            return

    def _check_ids(self) -> None:
        for name in ("after", "needs", "conflicts", "tags"):
            # A string is a sequence of strings, so `needs="a.b"` would mean "a", "." and "b".
            if isinstance(getattr(self, name), str):
                raise self._refuse(name, f"expected a tuple, got the string {getattr(self, name)!r}")
            self._set(**{name: tuple(getattr(self, name))})
            if self.id in getattr(self, name):
                raise self._refuse(name, "it names the patch itself")

    def _check_formats(self) -> None:
        given = self.fingerprint
        self._set(fingerprint=(given,) if isinstance(given, str) else tuple(given))
        for value in self.fingerprint:
            if not _FINGERPRINT.fullmatch(value):
                raise self._refuse("fingerprint", f"{value!r} is not 16 hexadecimal digits")
        if not isinstance(self.requires, Mapping):
            raise self._refuse("requires", f"expected {{distribution: window}}, got {self.requires!r}")
        for distribution, window in self.requires.items():
            try:
                parse_specifier(window)
            except ValueError as error:
                raise self._refuse("requires", f"{distribution}: {error}") from error
        self._set(requires=MappingProxyType(dict(self.requires)))
        try:
            parse_signature(self.signature or "()")
        except ValueError as error:
            raise self._refuse("signature", str(error)) from error

    def __deepcopy__(self, memo: object = None) -> Patch:
        return self  # two of one id exclude each other

    __copy__ = __deepcopy__

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _refuse(self, name: str, why: str) -> DefinitionError:
        return DefinitionError(f"patch {self.id!r}, field {name!r}: {why}", patch_id=self.id, field=name)

    def wrapper_for(self, kind: Kind) -> tuple[Wrapper, Callable[..., Any] | None]:
        """The patch in the form of a wrapper of a place of this kind, and the function that replaces it, if one does.

        Runs the factory, if there is one.
        """
        if self.wrapper is not None:
            return self.wrapper, None
        made = MISSING if self.kind == "delete" else self.replace if self.factory is None else self.factory()
        if kind in STORED:
            return lambda _wrapped, _instance, _args, _kwargs: made, None
        if not callable(made):
            how = "`replace` must be" if self.factory is None else "the factory must return"
            raise TypeError(f"{how} a function for a target of kind {kind.value!r}, and {made!r} is none")
        call = cast("Callable[..., Any]", made)
        if kind in (Kind.FUNCTION, Kind.STATICMETHOD):
            return lambda _wrapped, _instance, args, kwargs: call(*args, **kwargs), call
        return lambda _wrapped, instance, args, kwargs: call(instance, *args, **kwargs), call

    def spared(self) -> frozenset[str]:
        """The modules whose copies of the target are left alone, since the patch may call the stock code by them: those
        that declare it, and those beside them that they import.
        """
        named: set[str] = set(self.declared_in)
        for module in self.declared_in:
            beside = module.rpartition(".")[0]
            for held in list(vars(sys.modules[module]).values()) if beside and module in sys.modules else ():
                name = getattr(held, "__name__" if isinstance(held, ModuleType) else "__module__", None)
                named.update({name} if isinstance(name, str) and name.rpartition(".")[0] == beside else ())
        return frozenset(named - {target.module for target in self.targets})


def caller() -> str:
    """`file:line` of the innermost frame that is not in this package."""
    frame = _outside(sys._getframe(1))
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _outside(frame: FrameType) -> FrameType:
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _PASSED_OVER:
        frame = frame.f_back
    return frame


# Some objects only ----------------------------------------------------------------------------------------------------

Chosen: TypeAlias = tuple[object, ...] | Callable[[Any], bool]
"""Objects, or a predicate that chooses them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scoped:
    """A patch and the objects to limit it to, as made by `on`. Keeps the objects alive."""

    patch: str | Patch
    instances: Chosen


def on(patch: str | Patch, instances: Iterable[object] | Callable[[Any], bool]) -> Scoped:
    """Limit a patch to these objects: `transaction(on("a.b", [x, y]), reason=...)`.

    Other objects of the class keep their stock behaviour. The objects are compared by identity, need not be
    hashable, are not changed (they pickle and deepcopy as before; a copy is not covered), and the patch does not
    keep them alive. Instead of objects, a predicate chooses: it is asked on every call, and may not call the target.
    Raises ScopeError if there are none.
    """
    picked = chosen(instances)
    if picked is None or (isinstance(picked, tuple) and not picked):
        patch_id = patch if isinstance(patch, str) else patch.id
        raise ScopeError(f"{patch_id!r} was given no instance; expected at least one", patch_id=patch_id)
    return Scoped(patch=patch, instances=picked)


def chosen(on: Iterable[object] | Callable[[Any], bool] | None) -> Chosen | None:
    """The objects, or the predicate that chooses them, as `on=` takes either. Raises ScopeError for a single object."""
    if on is None or (callable(on) and not isinstance(on, Iterable)):
        return on
    try:
        return tuple(on)
    except TypeError as error:
        what = f"an object of type {type(on).__name__!r}; to limit patches to that one, pass [it]"
        raise ScopeError(f"expected objects or a predicate, got {what}", patch_id="") from error


class Scope:
    """The living objects to which one receipt is limited, or a predicate that chooses them."""

    __slots__ = ("__weakref__", "_covered", "_on_empty", "_patch_id", "ids", "predicate")

    def __init__(self, chosen: Chosen, *, patch_id: str) -> None:
        """Reference the objects weakly. Raises ScopeError for an object that cannot be."""
        self.ids: dict[int, weakref.ref[object]] = {}
        """`id` -> weak reference, of every covered object that is alive."""
        self.predicate: Callable[[Any], bool] | None = None if isinstance(chosen, tuple) else chosen
        self._covered: dict[int, int] | None = None
        self._on_empty: Callable[[], None] | None = None
        self._patch_id = patch_id
        if isinstance(chosen, tuple):
            self.add(chosen)

    def __len__(self) -> int:
        return len(self.ids)

    def __str__(self) -> str:
        if self.predicate is not None:
            return f"where {getattr(self.predicate, '__qualname__', repr(self.predicate))}"
        return f"{len(self)} instance{'' if len(self) == 1 else 's'}"

    def add(self, instances: Iterable[object]) -> None:
        """Cover these objects too, or none of them. Raises ScopeError if one cannot be referenced weakly."""
        added = {id(instance): self._watch(instance) for instance in instances if id(instance) not in self.ids}
        self.ids.update(added)
        if self._covered is not None:
            _count(self._covered, added, 1)

    def cover(self, covered: dict[int, int] | None) -> None:
        """Keep the number of scopes that cover each object in `covered`: `id` -> number. None: nowhere."""
        if covered is self._covered:
            return
        if self._covered is not None:
            _count(self._covered, list(self.ids), -1)
        self._covered = covered
        if covered is not None:
            _count(covered, list(self.ids), 1)

    def when_empty(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the last object is gone: now, or later at any moment."""
        self._on_empty = callback
        if not self.ids and self.predicate is None:
            callback()

    def _watch(self, instance: object) -> weakref.ref[object]:
        key = id(instance)

        def forget(_: object) -> None:
            # Runs before the memory, and so the id, can be reused for another object. No lock: it would deadlock.
            if self.ids.pop(key, None) is not None and self._covered is not None:
                _count(self._covered, (key,), -1)
            if not self.ids and self._on_empty is not None:
                self._on_empty()

        try:
            return weakref.ref(instance, forget)
        except TypeError as error:
            raise ScopeError(
                f"{self._patch_id!r} cannot be limited to an object of type {type(instance).__name__!r}: it cannot "
                "be referenced weakly; apply the patch without `on`, or give it another subject",
                patch_id=self._patch_id,
            ) from error


def _count(covered: dict[int, int], keys: Iterable[int], step: int) -> None:
    for key in keys:
        number = covered.get(key, 0) + step
        if number > 0:
            covered[key] = number
        else:
            covered.pop(key, None)
