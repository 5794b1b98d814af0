"""Changed files of an installed distribution, found by comparison with its RECORD.

RECORD has a hash and a size for every file:
https://packaging.python.org/en/latest/specifications/recording-installed-packages/
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ForeignError
from ..versions import distributions_of

if TYPE_CHECKING:
    from importlib import metadata

__all__ = ["ChangedFile", "compare_with_record"]


@dataclass(frozen=True, kw_only=True)
class ChangedFile:
    """A file that has changed since installation."""

    distribution: str
    """Name and version."""
    path: str
    """Path as in RECORD: relative to the folder of the installation."""
    state: str
    """modified, or missing."""


def compare_with_record(packages: Iterable[str]) -> list[ChangedFile]:
    """Compare the files of these packages with the RECORD of their distributions, as `patches.changed_files` says."""
    from importlib import metadata

    names = dict.fromkeys(name for package in packages for name in _expect(package))
    return [changed for name in names for changed in _changed(metadata.distribution(name))]


def _expect(package: str) -> Iterable[str]:
    names = distributions_of(package)
    if not names:
        why = f"no installed distribution owns {package!r}; it may be Python's own, or found through PYTHONPATH"
        raise ForeignError(f"cannot compare files: {why}", why=why)
    return names


def _changed(distribution: metadata.Distribution) -> Iterator[ChangedFile]:
    name = f"{distribution.metadata['Name']} {distribution.version}"
    files = distribution.files
    if distribution.read_text("RECORD") is None or files is None:
        why = f"{name} has no RECORD: it was not installed from a wheel"
        raise ForeignError(f"cannot compare files: {why}", why=why)
    for file in files:
        if file.hash is None:
            continue
        state = _state(Path(str(file.locate())), file)
        if state:
            yield ChangedFile(distribution=name, path=str(file), state=state)


def _state(path: Path, recorded: metadata.PackagePath) -> str:
    # Imported here, like subprocess for the clean process, to keep `import patches` fast.
    import base64
    import hashlib

    assert recorded.hash is not None
    try:
        size = path.stat().st_size
    except OSError:
        return "missing"
    if recorded.size is not None and size != recorded.size:
        return "modified"
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, recorded.hash.mode).digest()
    # URL-safe, and without padding.
    found = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    return "" if found == recorded.hash.value.rstrip("=") else "modified"
