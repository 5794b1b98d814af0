"""The exceptions and warnings of this package: one root, and one class for each case that callers handle."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "ApplyError",
    "ConflictError",
    "CycleError",
    "DeferredPatchWarning",
    "DefinitionError",
    "DriftError",
    "DriftWarning",
    "DuplicatePatchError",
    "ForeignError",
    "IncompatibleError",
    "JournalError",
    "ManifestError",
    "NotActiveError",
    "OverwrittenError",
    "PatchError",
    "ProbeError",
    "ScopeError",
    "TargetError",
    "TransactionError",
    "UndoError",
    "UnknownPatchError",
    "VerifyError",
    "WrapperError",
]


class PatchError(Exception):
    """Base class of this package's errors."""


class DefinitionError(PatchError, ValueError):
    """A patch declaration is invalid; `field` is the field to correct."""

    def __init__(self, message: str, *, patch_id: str, field: str) -> None:
        super().__init__(message)
        self.patch_id = patch_id
        self.field = field


class UnknownPatchError(PatchError, LookupError):
    """No patch of this id is registered, built in, or provided by an installed distribution; or a selector matches
    nothing.
    """

    def __init__(self, message: str, *, patch_id: str, suggestions: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.patch_id = patch_id
        self.suggestions = tuple(suggestions)


class DuplicatePatchError(PatchError):
    """Two claims on one id; `claimants` names both."""

    def __init__(self, message: str, *, patch_id: str, claimants: Sequence[str]) -> None:
        super().__init__(message)
        self.patch_id = patch_id
        self.claimants = tuple(claimants)


class TargetError(PatchError):
    """A target cannot be parsed, does not resolve, or cannot be patched; `why` is the cause alone."""

    def __init__(self, message: str, *, target: str, why: str) -> None:
        super().__init__(message)
        self.target = target
        self.why = why


class ScopeError(PatchError, ValueError):
    """A patch cannot be limited to the given instances."""

    def __init__(self, message: str, *, patch_id: str) -> None:
        super().__init__(message)
        self.patch_id = patch_id


class ConflictError(PatchError):
    """Two patches may not be active together; `patch_ids` holds both."""

    def __init__(self, message: str, *, patch_ids: Sequence[str]) -> None:
        super().__init__(message)
        self.patch_ids = tuple(patch_ids)


class CycleError(PatchError):
    """Patches are ordered in a cycle; `cycle` lists them, the first repeated at the end."""

    def __init__(self, message: str, *, cycle: Sequence[str]) -> None:
        super().__init__(message)
        self.cycle = tuple(cycle)


class ForeignError(PatchError):
    """Foreign patches cannot be determined; `why` is the cause alone."""

    def __init__(self, message: str, *, why: str) -> None:
        super().__init__(message)
        self.why = why


class IncompatibleError(PatchError):
    """A patch cannot be applied to the installed versions."""

    def __init__(self, message: str, *, patch_id: str, why: str) -> None:
        super().__init__(message)
        self.patch_id = patch_id
        self.why = why


class DriftError(IncompatibleError):
    """A target differs from the one the patch was written for, or somebody else has patched it; see `on_drift`."""


class DriftWarning(UserWarning):
    """A patch was applied to a target that has drifted or that somebody else has patched, because it is set to warn."""


class DeferredPatchWarning(UserWarning):
    """A deferred patch could not be applied when its module was imported; the audit says why."""


class JournalError(PatchError):
    """A folder has no journal, or a file in it is not a valid journal; `path` names it."""

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class ManifestError(PatchError):
    """A manifest cannot be read, or this process would apply its patches differently; `differences` has a line for
    each difference.
    """

    def __init__(self, message: str, *, differences: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.differences = tuple(differences)


class ProbeError(PatchError):
    """A probe raised, so it is unknown whether its patch is needed; the exception is the `__cause__`."""

    def __init__(self, message: str, *, patch_id: str) -> None:
        super().__init__(message)
        self.patch_id = patch_id


class ApplyError(PatchError):
    """Installing a patch failed; `undone` lists the ids that were applied before it and have been undone."""

    def __init__(self, message: str, *, patch_id: str, undone: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.patch_id = patch_id
        self.undone = tuple(undone)


class VerifyError(ApplyError):
    """A patch was installed, but its `verify` did not find the effect; everything was undone."""


class TransactionError(PatchError):
    """The state of the transaction (`state`) does not allow the operation."""

    def __init__(self, message: str, *, state: str) -> None:
        super().__init__(message)
        self.state = state


class NotActiveError(PatchError, LookupError):
    """A patch that is to be reverted is not active."""

    def __init__(self, message: str, *, patch_id: str) -> None:
        super().__init__(message)
        self.patch_id = patch_id


class OverwrittenError(PatchError):
    """Somebody else has replaced the object that was installed at `target`; theirs is left in place.

    `state` is "buried" if the foreign object still leads to ours, "reloaded" if the module was executed again,
    and "overwritten" otherwise.
    """

    def __init__(self, message: str, *, target: str, state: str, found: object) -> None:
        super().__init__(message)
        self.target = target
        self.state = state
        self.found = found


class WrapperError(PatchError, RuntimeError):
    """The wrapper of an attribute patch raised AttributeError for an attribute that exists.

    Passed on, it would mean "no such attribute": `hasattr` would return False, and a class with `__getattr__`
    would silently use the unpatched value.
    """

    def __init__(self, message: str, *, target: str) -> None:
        super().__init__(message)
        self.target = target


class UndoError(ExceptionGroup[Exception], PatchError):
    """Some patches could not be undone, with one exception for each; all others were."""

    def derive(self, excs: Sequence[Exception]) -> UndoError:  # type: ignore[override]  # no other kind is in it
        """Derive a group of this class, for `split` and `except*`."""
        return UndoError(self.message, excs)
