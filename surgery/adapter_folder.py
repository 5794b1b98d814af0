"""The folder of an adapter, held by one process: in it is the old adapter, none, or the new one, never a mixture.

A set of files cannot be renamed at once, and a folder that is a mount point cannot be renamed at all. So all is written
to a folder inside of it, brought to the disk, and made valid by one rename of that folder; then its files are moved in
place. If more than the weights and the model card differ, `adapter_config.json`, without which PEFT finds no adapter,
is taken away first and comes last. Who is killed on the way is finished, or cleaned up after, by the next who holds it.
"""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from surgery import tokenizer_files
from surgery.errors import AdapterError, ConfigError
from surgery.folder_lock import locked
from surgery.whole import remove_partials, sync, write_safetensors

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["AdapterFolder", "hold", "make_room"]

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"

#: Where a new adapter is written, and what that folder is called from the moment that it is whole.
STAGED, WHOLE = ".surgery-staged", ".surgery-whole"

#: The weights first, while what they replace can still be told from what is new; the card when all is in place.
_ORDER = {WEIGHTS: 0, CONFIG: 2, CARD: 3}

#: Bytes for configuration, card and header; names of tensors are up to a 64th of them.
_BESIDE = 1 << 16

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_held: dict[Path, AdapterFolder] = {}


@contextmanager
def hold(directory: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[AdapterFolder]:
    """A block during which `directory` is this process's to save adapters in; one inside the other is the same.

    It is made if it is not there, tried by writing to it, and put in order after processes that were killed. Links are
    followed. A folder that was made, and nothing was put in, is removed at the end.

    Raises `ConfigError` if it cannot be written, if another process has it, or if there is an adapter in it and
    `overwrite` is false.
    """
    path = Path(os.path.realpath(directory))
    folder = _held.get(path)
    if folder is not None:
        folder.check(overwrite=overwrite)
        yield folder
        return
    with ExitStack() as stack:
        folder = AdapterFolder(path)
        try:
            stack.enter_context(_made(path))
            stack.enter_context(locked(path))
            stack.callback(folder.leave)
            folder.settle()
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(
                f"the output folder {path} cannot be written: {reason}; choose another output, or mend that"
            ) from error
        folder.check(overwrite=overwrite)
        _held[path] = folder
        stack.callback(_held.pop, path)
        yield folder


def make_room(nbytes: int) -> None:
    """Reserve what an adapter and its tokenizer of `nbytes` need in every folder that this process holds.

    Raises `ConfigError` where there is less.
    """
    for folder in _held.values():
        folder.make_room(nbytes + nbytes // 64 + _BESIDE)


class AdapterFolder:
    """A folder that this process holds; see `hold`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._staged, self._whole = path / STAGED, path / WHOLE

    def settle(self) -> None:
        """Finish a save that had become whole, and remove what had not. Raises `OSError`."""
        if self._staged.exists():
            shutil.rmtree(self._staged)
        remove_partials(self.path)
        if self._whole.exists():
            self._move_in_place()

    def leave(self) -> None:
        """The same as `settle`, at the end: what fails here is done by the next who holds the folder."""
        with suppress(OSError):
            self.settle()

    def check(self, *, overwrite: bool) -> None:
        """Raise `ConfigError` if there is something that may not, or cannot, be replaced by a file."""
        for name in (CONFIG, WEIGHTS, CARD):
            file = self.path / name
            if file.is_dir():
                raise ConfigError(f"expected {name} in {self.path} to be a file, found a folder; choose another output")
            if file.exists() and not overwrite and name != CARD:
                raise ConfigError(
                    f"{self.path} already has an adapter ({name}); choose another output, or overwrite it"
                )

    def make_room(self, nbytes: int) -> None:
        """Reserve `nbytes` of the disk until an adapter is written. Raises `ConfigError` where there is less."""
        try:
            self._stage()
            with (self._staged / "room").open("wb") as file:
                _allocate(file.fileno(), nbytes)
        except OSError as error:
            free = shutil.disk_usage(self.path).free
            shutil.rmtree(self._staged, ignore_errors=True)
            raise ConfigError(
                f"the adapter needs {nbytes:,} bytes in {self.path}, found {free:,} free "
                f"({error.strerror or error}); choose another output, or remove something there"
            ) from error

    def save(
        self,
        tensors: Mapping[str, torch.Tensor],
        config: PeftConfig,
        *,
        card: str,
        tokenizer: Mapping[str, bytes],
    ) -> None:
        """Replace the adapter by `tensors`, by PEFT's keys, on the CPU, and `config` as PEFT writes it.

        card: the text of README.md. tokenizer: its files by name; the one that is there stays if there are none.

        Raises `AdapterError`, and leaves the adapter there as it was, if a value is not finite or the disk is full;
        where only the last step fails, it names the folder in which the new adapter is whole.
        """
        _refuse_not_finite(tensors)
        from safetensors import SafetensorError

        try:
            self._stage()
            self._write(tensors, config, card, tokenizer)
            self._staged.rename(self._whole)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self._staged, ignore_errors=True)
            raise AdapterError(
                f"the adapter cannot be written to {self.path}: {error}; what was there is as it was. Save it to "
                "another folder, or make room"
            ) from error
        try:
            sync(self.path)
            self._move_in_place()
        except OSError as error:
            raise AdapterError(
                f"the adapter is whole in {self._whole}, but its files cannot be moved to {self.path}: {error}; move "
                "them, or mend that and save or run again"
            ) from error

    def _stage(self) -> None:
        """Make an empty folder to write to."""
        self.path.mkdir(parents=True, exist_ok=True)  # somebody may have removed it while the model was trained
        self.settle()
        self._staged.mkdir()

    def _write(
        self, tensors: Mapping[str, torch.Tensor], config: PeftConfig, card: str, tokenizer: Mapping[str, bytes]
    ) -> None:
        write_safetensors(self._staged / WEIGHTS, _separate(tensors), {"format": "pt"})
        config.save_pretrained(str(self._staged))
        (self._staged / CARD).write_text(card, encoding="utf-8")
        for name, content in tokenizer.items():
            (self._staged / name).write_bytes(content)
        self._drop_unchanged()
        for file in self._staged.iterdir():
            sync(file)
        sync(self._staged)

    def _drop_unchanged(self) -> None:
        """If nothing but weights and card differs from what is in place, leave the rest there: one rename is enough."""
        others = [file for file in self._staged.iterdir() if file.name not in (WEIGHTS, CARD)]
        if self._outdated(self._staged) or not all(_is_same(file, self.path / file.name) for file in others):
            return
        for file in others:
            file.unlink()

    def _outdated(self, new: Path) -> list[Path]:
        """Files in place of a tokenizer that has other files in `new`."""
        names = {file.name for file in new.iterdir()}
        if names.isdisjoint(tokenizer_files.NAMES):
            return []
        return [self.path / name for name in tokenizer_files.NAMES if name not in names and (self.path / name).exists()]

    def _move_in_place(self) -> None:
        """Move the files of a whole adapter, from wherever that was stopped."""
        files = sorted(self._whole.iterdir(), key=lambda file: _ORDER.get(file.name, 1))
        names = {file.name for file in files}
        if CONFIG in names:
            (self.path / CONFIG).unlink(missing_ok=True)
        for file in self._outdated(self._whole) if WEIGHTS in names else ():
            file.unlink()
        for file in files:
            file.replace(self.path / file.name)
        self._whole.rmdir()
        sync(self.path)


def _refuse_not_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    counts = {name: int((~tensor.isfinite()).sum()) for name, tensor in tensors.items()}
    bad = {name: count for name, count in counts.items() if count}
    if not bad:
        return
    listed = [f"{name}: {count:,} of {tensors[name].numel():,}" for name, count in list(bad.items())[:8]]
    more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
    raise AdapterError(
        f"expected finite numbers in the adapter, found NaN or infinity in {len(bad)} of {len(tensors)} tensors "
        f"({'; '.join(listed)}{more}). Nothing was saved; train with a lower learning rate, or in another precision",
        not_finite=bad,
    )


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` as safetensors takes them: contiguous, and no two in the same memory."""
    separate: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.contiguous()
        separate[name] = own.clone() if own.untyped_storage().data_ptr() in taken else own
        taken.add(separate[name].untyped_storage().data_ptr())
    return separate


def _allocate(descriptor: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, max(nbytes, 1))
    except OSError as error:
        # A file system that cannot reserve is asked what is free instead.
        if error.errno in _FULL or shutil.disk_usage(descriptor).free < nbytes:
            raise


def _is_same(file: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(file, other, shallow=False)


@contextmanager
def _made(path: Path) -> Iterator[None]:
    """A block at the end of which a folder that was made for it goes again, if it is empty."""
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if is_new:
            with suppress(OSError):  # there is something in it
                path.rmdir()
