"""The place of an adapter: its folder and the lock on it, room on its disk, and what may not be saved over."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from surgery.errors import ConfigError

__all__ = ["LOCK", "allocate", "locked", "made", "refuse_base", "refuse_model", "refuse_what_stays"]

_WEIGHTS = ("model*.safetensors*", "consolidated*.safetensors*", "pytorch_model*.bin*")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def made(path: Path) -> Iterator[None]:
    """A block with the folder `path`, which is removed at the end if it was made here and is empty."""
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if is_new:
            with suppress(OSError):  # there is something in it
                path.rmdir()


def allocate(descriptor: int, nbytes: int) -> None:
    """Give an open file `nbytes` of the disk. Raises `OSError` where there is less."""
    try:
        os.posix_fallocate(descriptor, 0, max(nbytes, 1))
    except OSError as error:
        # A file system that cannot reserve is asked what is free instead.
        if error.errno in _FULL or shutil.disk_usage(descriptor).free < nbytes:
            raise


def refuse_base(folder: Path, base: Path) -> None:
    """Raise `ConfigError` if `folder` is that of the base model, by whatever path."""
    if os.path.realpath(folder) == os.path.realpath(base):
        raise _of_model(folder, "it is the base model's own folder")


def refuse_model(folder: Path) -> None:
    """Raise `ConfigError` if weights of a whole model are in `folder`, or its config.json."""
    for pattern in _WEIGHTS:
        for file in folder.glob(pattern):
            raise _of_model(folder, f"{file.name} is in it")
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):  # not there, or none of a model
        return
    if isinstance(config, dict) and not config.keys().isdisjoint({"model_type", "architectures"}):
        raise _of_model(folder, "a model's config.json is in it")


def refuse_what_stays(folder: Path, names: Iterable[str]) -> None:
    """Raise `ConfigError` if one of `names` in `folder` is something that no file can be renamed over."""
    for name in names:
        path = folder / name
        if not os.path.lexists(path):
            continue
        if path.is_dir():
            raise ConfigError(f"expected {name} in {folder} to be a file, found a folder; choose another output")
        reason = _why_it_stays(path)
        if reason is not None:
            raise ConfigError(f"{name} in {folder} cannot be replaced: {reason}; choose another output, or mend that")


def _of_model(folder: Path, found: str) -> ConfigError:
    return ConfigError(
        f"expected a folder for an adapter, found that of a model: {folder} ({found}); choose another output, such as "
        "a folder inside of it"
    )


def _why_it_stays(path: Path) -> str | None:
    there, folder = path.lstat(), path.parent.stat()
    if folder.st_mode & stat.S_ISVTX and os.geteuid() not in (0, folder.st_uid, there.st_uid):
        return "it belongs to another user, and the folder is sticky"
    if _mount(path) != _mount(path.parent):
        return "it is a mount point"
    try:
        # Nothing is written. That its mode forbids writing is another error, and keeps nobody from replacing it.
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW))
    except OSError as error:
        return "it is immutable, or may only be appended to" if error.errno == errno.EPERM else None
    return None


def _mount(path: Path) -> str | None:
    """The number of the mount that `path` is in; `os.path.ismount` overlooks a file that is mounted alone."""
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    try:
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii").splitlines()
    except OSError:  # no /proc
        return None
    finally:
        os.close(descriptor)
    return next((line for line in lines if line.startswith("mnt_id:")), None)


LOCK = ".surgery-lock"

_OWNER = b"process "

# What `flock` says on a file system without locks (NFS mounted with `nolock` has them among the processes of a host).
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def locked(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Lock `folder` for a block, against other processes by whatever path. name: of the file of the lock.

    On a file system without locks two processes are not noticed. The file of the lock is removed at the end; one that a
    killed process has left is taken over.

    Raises `ConfigError` that names the process which has the lock, or says that the file is none of ours, and `OSError`
    if the folder cannot be written.
    """
    file = folder / name
    descriptor = _take(file)
    try:
        started = time.strftime("%Y-%m-%d %H:%M:%S %z")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _OWNER + f"{os.getpid()} on {os.uname().nodename}, since {started}\n".encode(), 0)
        yield
    finally:
        with suppress(OSError):
            file.unlink()
        os.close(descriptor)


def _take(file: Path) -> int:
    """The descriptor of the locked file, which is still in its place: its last owner may have removed it."""
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
            f"{file.parent} is in use by {owner}; two jobs would replace each other's output: choose another output, "
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
