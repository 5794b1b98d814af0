"""The place of an adapter: its folder, room on its disk, and what is there that no adapter may be saved over."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from surgery.errors import ConfigError

__all__ = ["allocate", "made", "refuse_base", "refuse_model", "refuse_what_stays"]

_WEIGHTS = ("model*.safetensors*", "consolidated*.safetensors*", "pytorch_model*.bin*")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def made(path: Path) -> Iterator[None]:
    """A block at the end of which a folder that was made for it goes again, if it is empty."""
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
