"""Files that are whole or absent: written aside in the same folder, on the disk before they have their name."""

from __future__ import annotations

import errno
import os
from pathlib import Path

__all__ = ["remove_partials", "sync", "write_whole"]

_PARTIAL = ".partial"


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8; a reader sees the old file or the new one, never a part. Raises `OSError`."""
    # Ranks of several hosts may write the same file to one file system.
    partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}{_PARTIAL}")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def remove_partials(folder: Path, name: str = "*") -> None:
    """Remove what `write_whole` has left in `folder`, of files that match `name`, where its process was killed."""
    for partial in folder.glob(f".{name}.*{_PARTIAL}"):
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems, of FUSE for example, know no fsync of a folder.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)
