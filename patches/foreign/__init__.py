"""Foreign patches: changes by others, in this process and in the files of installed distributions."""

from __future__ import annotations

from .compare import Foreign, ForeignPatch, foreign
from .disk import ChangedFile, changed_files

__all__ = ["ChangedFile", "Foreign", "ForeignPatch", "changed_files", "foreign"]
