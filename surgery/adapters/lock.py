"""A lock on a folder, which the kernel releases when its process ends, however it does."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from surgery.errors import ConfigError

__all__ = ["LOCK", "locked"]

LOCK = ".surgery-lock"

_OWNER = b"process "

# What `flock` says on a file system without locks (NFS mounted with `nolock` has them among the processes of a host).
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A block during which no other process is in a block of `folder`, by whatever path it came there.

    On a file system without locks two processes are not noticed. The file of the lock is removed at the end; one that a
    killed process has left is taken over.

    Raises `ConfigError` that names the process which has the lock, or says that the file is none of ours, and `OSError`
    if the folder cannot be written.
    """
    file = folder / LOCK
    descriptor = _take(file)
    try:
        _write_owner(descriptor)
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        os.close(descriptor)


def _take(file: Path) -> int:
    """The descriptor of the locked file, which is in its place: who had it before may have removed it meanwhile."""
    while True:
        if file.is_symlink():
            raise _not_ours(file)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            _lock(descriptor, file)
            if _is_in_place(descriptor, file):
                _check_ours(descriptor, file)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, file: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
        raise ConfigError(
            f"{file.parent} is in use by {owner}; two jobs would replace each other's adapter: choose another output, "
            "or wait until that one has ended"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _is_in_place(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.lstat())
    except FileNotFoundError:
        return False


def _check_ours(descriptor: int, file: Path) -> None:
    """Raise `ConfigError` unless this is a file with one name, empty or naming an owner, which may be overwritten."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise _not_ours(file)
    if found.st_size and not os.pread(descriptor, len(_OWNER), 0).startswith(_OWNER):
        raise _not_ours(file)


def _not_ours(file: Path) -> ConfigError:
    return ConfigError(
        f"expected {file} to be the lock of an earlier job, or not there, found something else; remove it, or choose "
        "another output"
    )


def _write_owner(descriptor: int) -> None:
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, _OWNER + f"{os.getpid()} on {os.uname().nodename}, since {started}\n".encode(), 0)
