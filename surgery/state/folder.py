"""The folder of training states: each in a folder of its own, which has its name from the moment that it is whole."""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from surgery.adapters.place import locked
from surgery.errors import ConfigError, StateError
from surgery.telemetry.atomic import sync

__all__ = ["MANIFEST", "StateFolder", "checksum", "hold", "states", "why_not_whole"]

MANIFEST = "manifest.json"

#: Of the manifest; one that is greater has been written by a later release.
FORMAT = 1

LOCK, STAGED, REMOVED = ".surgery-state-lock", ".surgery-state-staged", ".surgery-state-removed"

#: `000012-step-3000`: by the first number states are in the order in which they were saved.
_NAME = re.compile(r"(\d{6,})-step-\d+")

_held: dict[Path, ExitStack] = {}


def hold(directory: str | os.PathLike[str], *, create: bool = True) -> StateFolder:
    """The folder, which this process has until it ends.

    Raises `ConfigError` if another process has it, or it cannot be written. With `create=False` nothing is made, and
    one that may only be read is taken without a lock.
    """
    if not os.fspath(directory):
        raise ConfigError("expected a folder for training states, found an empty path")
    path = Path(os.path.realpath(directory))
    if path in _held and not (path / LOCK).exists():  # removed by somebody since
        _held.pop(path).close()
    if path in _held or not (create or path.is_dir()):
        return StateFolder(path)
    stack, owner = ExitStack(), os.getpid()
    try:
        if create:
            path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(path, LOCK))
    except OSError as error:
        if not create:
            return StateFolder(path)
        reason = "it is a file" if path.is_file() else error.strerror or error
        raise ConfigError(
            f"the folder of training states {path} cannot be written: {reason}; choose another folder, or mend that"
        ) from error
    _held[path] = stack
    # A child that was forked has it too, and does not own the lock.
    atexit.register(lambda: stack.close() if os.getpid() == owner else None)
    return StateFolder(path)


class StateFolder:
    """A folder that this process holds; see `hold`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def stage(self) -> None:
        """Make an empty folder to write to, after removing what killed processes have left. Raises `StateError`."""
        try:
            self._clear()
            (self.path / STAGED).mkdir()
        except OSError as error:
            raise self._not_written(error) from error

    def commit(self, step: int, manifest: Mapping[str, object], *, files: Mapping[str, list[int]], keep: int) -> Path:
        """Make what was staged the newest state, and remove all but `keep`. Returns its folder.

        files: size and checksum by name, which the ranks have written. Raises `StateError` if one is not here.
        """
        staged, earlier = self.path / STAGED, states(self.path)
        number = int(earlier[0].name.partition("-")[0]) + 1 if earlier else 1
        target = self.path / f"{number:06d}-step-{step}"
        lost = [name for name, (size, _) in files.items() if _size(staged / name) != size]
        if lost:
            raise StateError(
                f"rank 0 does not see {lost[0]}, which another rank has written to {staged}: all ranks need one file "
                "system that they share. Earlier states are as they were",
                path=staged,
            )
        try:
            text = json.dumps({"format": FORMAT, **manifest, "files": files}, indent=1)
            (staged / MANIFEST).write_text(text, encoding="utf-8")
            for file in staged.iterdir():
                sync(file)
            sync(staged)
            staged.rename(target)
            sync(self.path)
        except OSError as error:
            raise self._not_written(error) from error
        self._remove(states(self.path)[keep:])
        return target

    def discard(self) -> None:
        """Remove what was staged."""
        shutil.rmtree(self.path / STAGED, ignore_errors=True)

    def _not_written(self, error: OSError) -> StateError:
        return StateError(
            f"a training state cannot be written to {self.path}: {error}. Earlier states are as they were; make room, "
            "or choose another folder",
            path=self.path,
        )

    def _remove(self, old: Iterable[Path]) -> None:
        """Take its name from a state before its files, so that no part of one is ever found."""
        with suppress(OSError):  # the next save tries again
            for number, state in enumerate(old):
                state.rename(self.path / f"{REMOVED}-{number}")
            self._clear()

    def _clear(self) -> None:
        for left in (*self.path.glob(STAGED), *self.path.glob(f"{REMOVED}-*")):
            shutil.rmtree(left)


def states(path: Path) -> list[Path]:
    """The folders of states, the newest first."""
    found = {state: match for state in path.glob("*-step-*") if (match := _NAME.fullmatch(state.name))}
    return sorted(found, key=lambda state: -int(found[state][1]))


def read_manifest(state: Path) -> dict[str, Any]:
    """The manifest. Raises `ConfigError` if a later release wrote it, and another error if it is not whole."""
    manifest: dict[str, Any] = json.loads((state / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise ConfigError(
            f"{state} has format {manifest['format']}, and this release reads {FORMAT}: use the release that has "
            "written it"
        )
    return manifest


def why_not_whole(state: Path, *, part: int, parts: int) -> str:
    """The fault that is found in the files of a state, every `parts`-th of which is read; empty if there is none."""
    try:
        files = read_manifest(state)["files"]
        for name in sorted(files)[part::parts]:
            size, expected = files[name]
            if _size(state / name) != size:
                return f"{name}: expected {size:,} bytes, found {_size(state / name)}"
            if checksum(state / name) != expected:
                return f"{name}: expected checksum {expected:08x}, found {checksum(state / name):08x}"
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST}: {type(error).__name__}: {error}"
    return ""


def checksum(file: Path) -> int:
    """The CRC-32 of a file."""
    found = 0
    with file.open("rb") as stream:
        for data in _blocks(stream):
            found = zlib.crc32(data, found)
    return found


def _blocks(stream: Any) -> Iterator[bytes]:
    while data := stream.read(1 << 20):
        yield data


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None
