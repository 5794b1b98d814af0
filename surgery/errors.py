"""Errors that surgery raises on purpose: one root, and a kind for each thing that a caller may handle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ExportError",
    "NotFilledError",
    "PassError",
    "QuantizerError",
    "SelectorError",
    "ShadowedPatchesWarning",
    "StateError",
    "SurgeryError",
    "TraceError",
    "WeightsMismatchError",
]


class SurgeryError(Exception):
    """Root of the errors of this package. The CLI prints it and exits with code 2."""


class ConfigError(SurgeryError, ValueError):
    """An option, or a combination of options, that cannot work. Raised before anything is loaded."""


class SelectorError(ConfigError):
    """A pattern that selects nothing in the model it was given."""

    def __init__(self, message: str, *, patterns: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.patterns = tuple(patterns)


class CheckpointError(SurgeryError):
    """A checkpoint that is missing, malformed, or not what its index says it is."""

    def __init__(self, message: str, *, path: Path | str | None = None, tensor: str | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else Path(path)
        self.tensor = tensor


class WeightsMismatchError(CheckpointError):
    """Checkpoint keys and parameters that do not correspond: missing, unexpected, of another shape or dtype."""

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        path: Path | str | None = None,
        tensor: str | None = None,
    ) -> None:
        super().__init__(message, path=path, tensor=tensor)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)


class DataError(SurgeryError, ValueError):
    """Training data that cannot be read."""

    def __init__(self, message: str, *, path: Path | str | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else Path(path)


class AdapterError(SurgeryError):
    """An adapter that cannot be saved whole. What was in its place is as it was.

    missing: names of parameters that would have been left out. not_finite: how many values are NaN or infinite, by key.
    """

    def __init__(
        self, message: str, *, missing: Sequence[str] = (), not_finite: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(message)
        self.missing = tuple(missing)
        self.not_finite = dict(not_finite or {})


class StateError(SurgeryError):
    """A training state that cannot be written, or not be read; `path` is its folder. Earlier ones are as they were."""

    def __init__(self, message: str, *, path: Path | str | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else Path(path)


class ExportError(SurgeryError):
    """A checkpoint that cannot be written whole. What was in its place is as it was."""


class PassError(SurgeryError, RuntimeError):
    """A pass failed at one site; the exception that made it fail is the `__cause__`."""

    def __init__(self, message: str, *, pass_name: str, fqn: str) -> None:
        super().__init__(message)
        self.pass_name = pass_name
        self.fqn = fqn


class NotFilledError(SurgeryError, RuntimeError):
    """A bound model that is used before it has its weights; `use` is what was tried."""

    def __init__(self, use: str) -> None:
        super().__init__(
            f"{use} needs weights, and this model is bound to a checkpoint, not filled yet: call surgery.fill(model), "
            "or fill() of what surgery.bind() returned, have accelerate or a trainer of transformers prepare it, or "
            "load it outside of surgery.low_memory()"
        )
        self.use = use


class ShadowedPatchesWarning(UserWarning):
    """Another module has the name `patches` in this program; surgery uses its own registry all the same."""


class QuantizerError(SurgeryError, ValueError):
    """A format whose layout or results are not of the sizes that `surgery.quantizers.base.QuantFormat` promises."""


class TraceError(SurgeryError, ValueError):
    """A trace that cannot be written, read or drawn; `path` is its folder or the file at fault."""

    def __init__(self, message: str, *, path: Path | str | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else Path(path)
