"""`Patch`: the declaration of one patch, as data."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from .errors import DefinitionError, TargetError
from .signature import parse_signature
from .target import Kind, parse
from .versions import parse_specifier

__all__ = ["Patch", "Probe", "Subject", "Verify", "Wrapper"]

Wrapper: TypeAlias = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]
"""`(wrapped, instance, args, kwargs) -> result`, as in wrapt: `wrapped` is bound, and `args` omit the
instance.
"""

Subject: TypeAlias = Callable[[Any, tuple[Any, ...], dict[str, Any]], object]
Probe: TypeAlias = Callable[[], bool]
Verify: TypeAlias = Callable[[], None]

_ID: Final = re.compile(r"[a-z0-9][a-z0-9_-]*(?:\.[a-z0-9][a-z0-9_-]*)+")
_KINDS: Final = ("auto", *Kind)
_ON_DRIFT: Final = ("error", "warn", "skip")
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{16}")
_ALIASES: Final = ("report", "rewrite", "ignore")


@dataclass(frozen=True, kw_only=True, eq=False)
class Patch:
    """Declaration of one patch. Patches compare by identity.

    Raises DefinitionError if a field is invalid; nothing is imported to check.
    """

    id: str
    """`upstream.kebab-name`."""
    target: str
    """`package.module:Class.attribute`."""
    wrapper: Wrapper
    reason: str
    """Reason for the patch: the defect, in a sentence."""
    upstream: str = ""
    """Link to the issue, or to the source that shows the defect; several are separated by spaces."""
    requires: Mapping[str, str] = field(default_factory=dict)
    """Distribution -> PEP 440 window in which the defect is known; all must hold."""
    kind: str = "auto"
    """"auto", or the `Kind` that the target must have. "attribute" wraps reads of values that instances
    store.
    """
    traced: bool = False
    """Whether torch.compile traces the target: plain functions are installed. Without it, a compiled region runs the
    stock code of a function or method as if there were no patch, since Dynamo silently looks through wrapt's objects;
    `patches show` says so. Properties, attributes and values are traced either way.
    """
    subject: Subject | None = None
    """`(instance, args, kwargs) -> object`: the object by which a call is in scope or not. None: the instance."""
    after: tuple[str, ...] = ()
    """Ids that are applied before this one, and so wrap further inside if they share its target."""
    needs: tuple[str, ...] = ()
    """Ids that are always applied together with this one, before it."""
    conflicts: tuple[str, ...] = ()
    """Ids that may not be active together with this one."""
    probe: Probe | None = None
    """Returns True if the defect is present. Needs no GPU or process group; never runs while the patch is active."""
    verify: Verify | None = None
    """Raises if the applied patch does not have its effect."""
    tags: tuple[str, ...] = ()
    """Words by which to select it: `tag:word`."""
    fingerprint: str | tuple[str, ...] = ()
    """Fingerprint of the upstream source that the patch was written for, as printed by
    `patches show --fingerprint ID`; several for several versions.
    """
    signature: str = ""
    """Signature of the target as written: `(self, x, *, by=2)`. Names, kinds, and which parameters have defaults
    must match.
    """
    on_drift: str = "error"
    """Policy if the source or the signature differs: "error", "warn" and apply, or "skip"."""
    on_foreign: str = "allow"
    """Policy if somebody else has patched the target already: "allow", "error", "warn" or "skip"."""
    aliases: str = "report"
    """Policy for copies of the target made by `from x import f`: "report" names them in `patches audit`, "rewrite"
    patches and restores them too, "ignore" declares that they do not matter.
    """

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise self._refuse("id", f"{self.id!r} is not of the form 'upstream.kebab-name'")
        if not self.reason.strip():
            raise self._refuse("reason", "it is empty; say which defect the patch is for")
        if self.kind not in _KINDS:
            raise self._refuse("kind", f"{self.kind!r} is not one of {', '.join(_KINDS)}")
        if self.aliases not in _ALIASES:
            raise self._refuse("aliases", f"{self.aliases!r} is not one of {', '.join(_ALIASES)}")
        self._check_target()
        self._check_wrapper()
        self._check_ids()
        self._check_requires()
        self._check_drift()

    def _check_target(self) -> None:
        try:
            parse(self.target)
        except TargetError as error:
            raise self._refuse("target", error.why) from error

    def _check_wrapper(self) -> None:
        if not callable(self.wrapper):
            raise self._refuse("wrapper", f"{self.wrapper!r} is not callable")
        try:
            inspect.signature(self.wrapper).bind(None, None, (), {})
        except TypeError as error:
            raise self._refuse("wrapper", f"it must accept (wrapped, instance, args, kwargs): {error}") from error
        except ValueError:  # no signature, as for callables written in C: a mismatch shows when it is called
            return

    def _check_ids(self) -> None:
        for name in ("after", "needs", "conflicts", "tags"):
            # A string is a sequence of strings, so `needs="a.b"` would mean "a", "." and "b".
            if isinstance(getattr(self, name), str):
                raise self._refuse(name, f"expected a tuple, got the string {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if self.id in getattr(self, name):
                raise self._refuse(name, "it names the patch itself")

    def _check_requires(self) -> None:
        for distribution, window in self.requires.items():
            try:
                parse_specifier(window)
            except ValueError as error:
                raise self._refuse("requires", f"{distribution}: {error}") from error
        object.__setattr__(self, "requires", MappingProxyType(dict(self.requires)))

    def _check_drift(self) -> None:
        given = self.fingerprint
        object.__setattr__(self, "fingerprint", (given,) if isinstance(given, str) else tuple(given))
        for value in self.fingerprint:
            if not _FINGERPRINT.fullmatch(value):
                raise self._refuse("fingerprint", f"{value!r} is not 16 hexadecimal digits")
        for name, policies in (("on_drift", _ON_DRIFT), ("on_foreign", ("allow", *_ON_DRIFT))):
            if getattr(self, name) not in policies:
                raise self._refuse(name, f"{getattr(self, name)!r} is not one of {', '.join(policies)}")
        try:
            parse_signature(self.signature or "()")
        except ValueError as error:
            raise self._refuse("signature", str(error)) from error

    def _refuse(self, name: str, why: str) -> DefinitionError:
        return DefinitionError(f"patch {self.id!r}, field {name!r}: {why}", patch_id=self.id, field=name)

    @property
    def module(self) -> str:
        """The module that defines the wrapper."""
        return getattr(self.wrapper, "__module__", None) or "?"

    @property
    def claimant(self) -> str:
        """The declarer of the patch: `module:qualified.name` of its wrapper."""
        return f"{self.module}:{getattr(self.wrapper, '__qualname__', repr(self.wrapper))}"
