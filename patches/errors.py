"""The exceptions and warnings of this package: one root, and one class for each case that callers handle."""

from __future__ import annotations

from typing import Any

__all__ = [
    "ApplyError", "ConflictError", "CycleError", "DeferredPatchWarning", "DefinitionError", "DriftError",
    "DriftWarning", "DuplicatePatchError", "ForeignError", "IncompatibleError", "JournalError", "ManifestError",
    "NotActiveError", "OverwrittenError", "PatchError", "ProbeError", "ScopeError", "TargetError", "TransactionError",
    "UndoError", "UnknownPatchError", "VerifyError", "VersionWarning", "WrapperError",
]  # fmt: skip


class PatchError(Exception):
    """Base class of this package's errors. The facts of a case are attributes, annotated in its class."""

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        vars(self).update(facts)


class DefinitionError(PatchError, ValueError):
    """A patch declaration is invalid; `field` is the field to correct."""

    patch_id: str
    field: str


class UnknownPatchError(PatchError, LookupError):
    """No patch of this id is registered, built in, or provided by an installed distribution; or a selector matches
    nothing.
    """

    patch_id: str
    suggestions: tuple[str, ...] = ()


class DuplicatePatchError(PatchError):
    """Two claims on one id; `claimants` names both."""

    patch_id: str
    claimants: tuple[str, ...]


class TargetError(PatchError):
    """A target cannot be parsed, does not resolve, or cannot be patched; `why` is the cause alone."""

    target: str
    why: str
    suggestion: str = ""
    """A target that resolves, or is at least of the right form, and is spelt almost like this one."""
    is_absent: bool = False
    """Whether nothing is there: the module, a name on the way, or the target itself."""


class ScopeError(PatchError, ValueError):
    """A patch cannot be limited to the given instances."""

    patch_id: str


class ConflictError(PatchError):
    """Two patches may not be active together; `patch_ids` holds both."""

    patch_ids: tuple[str, ...]


class CycleError(PatchError):
    """Patches are ordered in a cycle; `cycle` lists them, the first repeated at the end."""

    cycle: tuple[str, ...]


class ForeignError(PatchError):
    """Foreign patches cannot be determined; `why` is the cause alone."""

    why: str


class IncompatibleError(PatchError):
    """A patch cannot be applied to the installed versions, or an atomic bundle not as a whole."""

    patch_id: str
    why: str


class DriftError(IncompatibleError):
    """A target differs from the one the patch was written for, in version (`on_unknown`) or source (`on_drift`), or
    somebody else has patched it (`on_foreign`).
    """


class DriftWarning(UserWarning):
    """A patch was applied to a target that has drifted or that somebody else has patched, because it is set to warn."""


class VersionWarning(UserWarning):
    """A patch was applied to a version outside its window, because it is set to warn."""


class DeferredPatchWarning(UserWarning):
    """A deferred patch could not be applied when its module was imported; the audit says why."""


class JournalError(PatchError):
    """A folder has no journal, or a file in it is not a valid journal; `path` names it."""

    path: str


class ManifestError(PatchError):
    """A manifest cannot be read, or this process would apply its patches differently; `differences` has a line for
    each difference.
    """

    differences: tuple[str, ...] = ()


class ProbeError(PatchError):
    """A probe raised, so it is unknown whether its patch is needed; the exception is the `__cause__`."""

    patch_id: str


class ApplyError(PatchError):
    """Installing a patch failed; `undone` lists the ids that were applied before it and have been undone."""

    patch_id: str
    undone: tuple[str, ...] = ()


class VerifyError(ApplyError):
    """A patch was installed, but its `verify` did not find the effect; everything was undone."""


class TransactionError(PatchError):
    """The state of the transaction (`state`) does not allow the operation."""

    state: str


class NotActiveError(PatchError, LookupError):
    """A patch that is to be reverted is not active."""

    patch_id: str


class OverwrittenError(PatchError):
    """Somebody else has replaced the object that was installed at `target`; theirs is left in place.

    `state` is "buried" if the foreign object still leads to ours, "reloaded" if the module was executed again,
    and "overwritten" otherwise.
    """

    target: str
    state: str
    found: object


class WrapperError(PatchError, RuntimeError):
    """The wrapper of an attribute patch raised AttributeError for an attribute that exists.

    Passed on, it would mean "no such attribute": `hasattr` would return False, and a class with `__getattr__`
    would silently use the unpatched value.
    """

    target: str


class UndoError(ExceptionGroup[Exception], PatchError):
    """Some patches could not be undone, with one exception for each; all others were."""

    def derive(self, excs: Any) -> UndoError:  # type: ignore[override]  # no other kind is in it
        """Derive a group of this class, for `split` and `except*`."""
        return UndoError(self.message, excs)
