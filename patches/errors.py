"""The errors that this package raises on purpose: one root, and a kind for each thing to handle."""

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
    """Root of the errors of this package."""


class DefinitionError(PatchError, ValueError):
    """A patch that is declared wrongly; `field` is the field to correct."""

    def __init__(self, message: str, *, patch_id: str, field: str) -> None:
        super().__init__(message)
        self.patch_id = patch_id
        self.field = field


class UnknownPatchError(PatchError, LookupError):
    """No patch of this id is registered, built in, or offered by an installed distribution; or no patch is what a
    selector asks for.
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
    """A target that cannot be parsed, does not resolve, or cannot be patched; `why` is the bare cause."""

    def __init__(self, message: str, *, target: str, why: str) -> None:
        super().__init__(message)
        self.target = target
        self.why = why


class ScopeError(PatchError, ValueError):
    """Instances that a patch cannot be limited to."""

    def __init__(self, message: str, *, patch_id: str) -> None:
        super().__init__(message)
        self.patch_id = patch_id


class ConflictError(PatchError):
    """Two patches that may not be active together; `patch_ids` holds both."""

    def __init__(self, message: str, *, patch_ids: Sequence[str]) -> None:
        super().__init__(message)
        self.patch_ids = tuple(patch_ids)


class CycleError(PatchError):
    """Patches that each ask to come after the other; `cycle` lists them, the first repeated at the end."""

    def __init__(self, message: str, *, cycle: Sequence[str]) -> None:
        super().__init__(message)
        self.cycle = tuple(cycle)


class ForeignError(PatchError):
    """What others have patched cannot be told; `why` is the bare cause."""

    def __init__(self, message: str, *, why: str) -> None:
        super().__init__(message)
        self.why = why


class IncompatibleError(PatchError):
    """A patch that cannot be applied to what is installed."""

    def __init__(self, message: str, *, patch_id: str, why: str) -> None:
        super().__init__(message)
        self.patch_id = patch_id
        self.why = why


class DriftError(IncompatibleError):
    """A target that is not what the patch was written for, or that somebody else has patched; see `on_drift`."""


class DriftWarning(UserWarning):
    """A patch was applied to a target that is not what it was written for, since it says so."""


class DeferredPatchWarning(UserWarning):
    """A patch that waited for its module could not be applied when that was imported; the audit says why."""


class JournalError(PatchError):
    """A folder without a journal, or a file in it that is not one; `path` names it."""

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class ManifestError(PatchError):
    """A manifest that cannot be read, or whose patches this process would apply otherwise; `differences` has a line
    for each way in which it differs.
    """

    def __init__(self, message: str, *, differences: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.differences = tuple(differences)


class ProbeError(PatchError):
    """A probe raised, so that nobody knows whether its patch is needed; what it raised is the `__cause__`."""

    def __init__(self, message: str, *, patch_id: str) -> None:
        super().__init__(message)
        self.patch_id = patch_id


class ApplyError(PatchError):
    """Installing one patch failed; `undone` lists the ids that were applied before it and are undone now."""

    def __init__(self, message: str, *, patch_id: str, undone: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.patch_id = patch_id
        self.undone = tuple(undone)


class VerifyError(ApplyError):
    """A patch was installed, but its `verify` did not see the effect; everything was undone."""


class TransactionError(PatchError):
    """An operation that the state of the transaction (`state`) does not allow."""

    def __init__(self, message: str, *, state: str) -> None:
        super().__init__(message)
        self.state = state


class NotActiveError(PatchError, LookupError):
    """Asked to revert a patch that is not active."""

    def __init__(self, message: str, *, patch_id: str) -> None:
        super().__init__(message)
        self.patch_id = patch_id


class OverwrittenError(PatchError):
    """Somebody else has replaced what was installed at `target`; it is left as found.

    `state` is "buried" where the foreign object still leads to ours, "reloaded" where the module was
    executed again, and "overwritten" otherwise.
    """

    def __init__(self, message: str, *, target: str, state: str, found: object) -> None:
        super().__init__(message)
        self.target = target
        self.state = state
        self.found = found


class WrapperError(PatchError, RuntimeError):
    """The wrapper of an attribute patch raised AttributeError for an attribute that is there.

    Let through, it would read as "no such attribute": `hasattr` would say False, and a class with
    `__getattr__` would silently go on with the unpatched value.
    """

    def __init__(self, message: str, *, target: str) -> None:
        super().__init__(message)
        self.target = target


class UndoError(ExceptionGroup[Exception], PatchError):
    """Some patches could not be undone, one exception for each; all others were."""

    def derive(self, excs: Sequence[Exception]) -> UndoError:  # type: ignore[override]  # no other kind is in it
        """As ExceptionGroup's: `split` and `except*` give groups of this class."""
        return UndoError(self.message, excs)
