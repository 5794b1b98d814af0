"""Stamps of the files of a checkpoint, by which a change is noticed while they are in use."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from surgery.errors import CheckpointError

__all__ = ["Stamp"]


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """Size in bytes, time of the last change in ns, inode and its device, and a digest of the first `header_bytes`."""

    size: int
    modified: int
    inode: int
    device: int
    header_bytes: int
    header: str

    @classmethod
    def of(cls, status: os.stat_result, header: bytes) -> Self:
        """The stamp of a file with this `status`, which begins with `header`."""
        return cls(
            size=status.st_size,
            modified=status.st_mtime_ns,
            inode=status.st_ino,
            device=status.st_dev,
            header_bytes=len(header),
            header=_digest(header),
        )

    def check(self, file: Path, descriptor: int) -> None:
        """Raise `CheckpointError` if `file`, open as `descriptor`, has changed; costs one `stat`, reads nothing."""
        try:
            found = file.stat()
        except OSError as error:
            raise _changed(file, str(error)) from error
        if found.st_size != self.size:
            raise _changed(file, f"it had {self.size} bytes, and has {found.st_size}")
        if found.st_mtime_ns != self.modified:
            raise _changed(file, f"it was written to at {found.st_mtime_ns} ns, last before that at {self.modified}")
        if {found.st_ino, os.fstat(descriptor).st_ino} != {self.inode}:
            raise _changed(file, "another file has taken its place")

    def check_header(self, file: Path, descriptor: int) -> None:
        """Do what `check` does, and compare the header, read again."""
        self.check(file, descriptor)
        try:
            header = os.pread(descriptor, self.header_bytes, 0)
        except OSError as error:
            raise _changed(file, str(error)) from error
        if _digest(header) != self.header:
            raise _changed(file, "its header is another one")


def _digest(header: bytes) -> str:
    return hashlib.blake2b(header, digest_size=16).hexdigest()


def _changed(file: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint file {file} has changed since it was opened: {how}. Leave it alone while it is read; start "
        "again.",
        path=file,
    )
