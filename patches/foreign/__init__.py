"""Foreign patches: changes by others, in this process and in the files of installed distributions.

Importing this package loads nothing else of it, so that its functions can be attributes of `patches` at no cost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .compare import Foreign
    from .disk import ChangedFile

__all__ = ["changed_files", "foreign"]


def foreign(*packages: str, timeout: float = 120) -> Foreign:
    """Find foreign patches in these packages, in their modules that are loaded in this process.

    The same modules are imported in a clean process, within `timeout` seconds, and everything that holds code is
    compared: functions, methods, properties, classes, items of dictionaries, wrappers, default arguments. Imports
    nothing in this process. Not listed: objects that this package has installed (see `patches.audit()`), wrappers that
    a package puts around its own code, lazily loaded objects, and values without code.

    Raises ForeignError if a package is not imported, or the clean process fails.
    """
    from .compare import compare

    return compare(packages, timeout=timeout)


def changed_files(*packages: str) -> list[ChangedFile]:
    """Find files that have changed since installation, in the distributions of these packages.

    Reads all files, which takes seconds per gigabyte. Bytecode and files without a hash are not compared. Raises
    ForeignError for a package without a distribution, or whose distribution has no RECORD.
    """
    from .disk import compare_with_record

    return compare_with_record(packages)
