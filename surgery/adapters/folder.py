"""The folder of an adapter, held by one process: in it is the old adapter, none, or the new one, never a mixture.

A set of files cannot be renamed at once, and a folder that is a mount point cannot be renamed at all. So all is written
to a folder inside of it, brought to the disk, and made valid by one rename of that folder; then its files are moved in
place. If more than the weights and the model card differ, `adapter_config.json`, without which PEFT finds no adapter,
is taken away first and comes last. Who is killed on the way is finished, or cleaned up after, by the next who holds it.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from surgery.adapters.metadata import TOKENIZER_FILES, tokenizer_sizes
from surgery.adapters.place import allocate, locked, made, refuse_base, refuse_model, refuse_what_stays
from surgery.checkpoint.header import DTYPES, LENGTH_BYTES, read_header
from surgery.comm.environment import compute_device, launched_world_size
from surgery.comm.failures import everyone
from surgery.comm.ranks import current_ranks
from surgery.errors import AdapterError, CheckpointError, ConfigError
from surgery.telemetry.atomic import remove_partials, sync

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["AdapterFolder", "hold", "make_room", "reserve"]

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"

#: What may be written, or replaced, beside an adapter; the last by `surgery finetune`.
_COMPANIONS = (CARD, *TOKENIZER_FILES, "summary.json")

#: A key of the metadata of `WEIGHTS`: names of the tokenizer's files that were saved with them, as a JSON list.
_TOKENIZER = "tokenizer_files"

#: Where a new adapter is written, and what that folder is called from the moment that it is whole.
STAGED, WHOLE = ".surgery-staged", ".surgery-whole"

#: The weights first, while what they replace can still be told from what is new; the card when all is in place.
_ORDER = {WEIGHTS: 0, CONFIG: 2, CARD: 3}

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: Bytes for configuration, card and header; names of tensors are up to a 64th of them.
_BESIDE = 1 << 16

_held: dict[Path, AdapterFolder] = {}


@contextmanager
def hold(directory: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[AdapterFolder]:
    """Hold `directory`, to save adapters in it, for a block; a block inside of another has the same folder.

    It is made if it is not there, tried by writing to it, and put in order after processes that were killed. Links are
    followed. A folder that was made, and nothing was put in, is removed at the end.

    Raises `ConfigError` if it cannot be written, if another process has it, if a whole model is in it, or if there is
    an adapter, or a file of a name that one has, and `overwrite` is false.
    """
    if not os.fspath(directory):
        raise ConfigError("expected a folder for the adapter, found an empty path")
    path = Path(os.path.realpath(directory))
    folder = _held.get(path)
    if folder is not None:
        # What has come in the way since it was tried is left to `save`, which loses nothing.
        if not overwrite:
            folder.check(overwrite=False)
        yield folder
        return
    refuse_model(path)
    with ExitStack() as stack:
        folder = AdapterFolder(path)
        try:
            stack.enter_context(made(path))
            stack.enter_context(locked(path))
            stack.callback(folder.leave)
            folder.settle()
            folder.check(overwrite=overwrite)
        except OSError as error:
            reason = "it is a file" if path.is_file() else error.strerror or error
            raise ConfigError(
                f"the output folder {path} cannot be written: {reason}; choose another output, or mend that"
            ) from error
        _held[path] = folder
        stack.callback(_held.pop, path)
        yield folder


def make_room(nbytes: int, *, base: Path) -> None:
    """Reserve what an adapter of `nbytes` and the tokenizer of `base` need in every folder that this process holds.

    Raises `ConfigError` where there is less, or where the folder is `base` itself.
    """
    for folder in _held.values():
        refuse_base(folder.path, base)
        sizes = tokenizer_sizes(base)
        total = nbytes + sum(sizes)
        # Beside the tokenizer: weights, configuration, card and summary.
        folder.make_room(total + total // 64 + _BESIDE, files=4 + len(sizes))


class AdapterFolder:
    """A folder that this process holds; see `hold`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._staged, self._whole = path / STAGED, path / WHOLE

    def settle(self) -> None:
        """Finish a save that was whole, and remove one that was not. Raises `OSError`."""
        if self._staged.exists():
            shutil.rmtree(self._staged)
        remove_partials(self.path)
        if self._whole.exists():
            self._move_in_place()

    def leave(self) -> None:
        """Settle at the end of the block; what fails is done by the next who holds the folder."""
        with suppress(OSError):
            self.settle()

    def check(self, *, overwrite: bool) -> None:
        """Raise `ConfigError` if there is something that may not, or cannot, be replaced by a file."""
        refuse_what_stays(self.path, (CONFIG, WEIGHTS, *_COMPANIONS))
        if overwrite:
            return
        for name in (CONFIG, WEIGHTS):
            if (self.path / name).exists():
                raise ConfigError(
                    f"{self.path} already has an adapter ({name}); choose another output, or overwrite it (--overwrite)"
                )
        foreign = [name for name in _COMPANIONS if os.path.lexists(self.path / name)]
        if foreign:
            raise ConfigError(
                f"{self.path} has no adapter, but files of names that one has ({', '.join(foreign)}); choose another "
                "output, or overwrite them"
            )

    def make_room(self, nbytes: int, *, files: int = 1) -> None:
        """Reserve `nbytes` of the disk, in so many files, until an adapter is written.

        Raises `ConfigError` where there is less.
        """
        try:
            self._stage()
            for number in range(1, files):
                (self._staged / str(number)).touch()
            with (self._staged / "room").open("wb") as file:
                allocate(file.fileno(), nbytes)
        except OSError as error:
            free = shutil.disk_usage(self.path).free
            shutil.rmtree(self._staged, ignore_errors=True)
            raise ConfigError(
                f"the adapter needs {nbytes:,} bytes in {self.path}, for {files} files, found {free:,} free "
                f"({error.strerror or error}, of bytes or of files); choose another output, or remove something there"
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
        try:
            self._stage()
            self._write(tensors, config, card, tokenizer)
            self._staged.rename(self._whole)
        except OSError as error:
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
        names = list(tokenizer) or _saved_tokenizer(self.path / WEIGHTS)
        metadata = {"format": "pt", _TOKENIZER: json.dumps(sorted(names))}
        _write_tensors(self._staged / WEIGHTS, tensors, metadata)
        config.save_pretrained(str(self._staged))
        (self._staged / CARD).write_text(card, encoding="utf-8")
        for name, content in tokenizer.items():
            (self._staged / name).write_bytes(content)
        self._drop_unchanged()
        for file in self._staged.iterdir():
            sync(file)
        sync(self._staged)

    def _drop_unchanged(self) -> None:
        """Leave in place all but weights and card, if nothing else differs: one rename is then enough."""
        others = [file for file in self._staged.iterdir() if file.name not in (WEIGHTS, CARD)]
        if self._outdated(self._staged) or not all(_is_same(file, self.path / file.name) for file in others):
            return
        for file in others:
            file.unlink()

    def _outdated(self, new: Path) -> list[Path]:
        """Files in place that the earlier adapter has saved of its tokenizer, which has other files in `new`."""
        names = {file.name for file in new.iterdir()}
        if names.isdisjoint(TOKENIZER_FILES):
            return []
        saved = _saved_tokenizer(self.path / WEIGHTS)
        return [self.path / name for name in saved if name not in names and (self.path / name).exists()]

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


def _saved_tokenizer(weights: Path) -> list[str]:
    """Names of the tokenizer's files that were saved with `weights`; none if that was not by us."""
    try:
        names = set(json.loads(read_header(weights).metadata.get(_TOKENIZER, "[]")))
    except (CheckpointError, ValueError, TypeError):
        return []
    return sorted(names.intersection(TOKENIZER_FILES))


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


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, one tensor in memory at a time where they are made when they are asked for."""
    fields: dict[str, object] = {"__metadata__": dict(metadata)}
    # Wide elements first, so that all are aligned, as safetensors writes them.
    widths = {name: tensor.element_size() for name, tensor in tensors.items()}
    order, end = sorted(widths, key=lambda name: -widths[name]), 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        fields[name] = {"dtype": _NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
    header = json.dumps(fields, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
        for name in order:
            file.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _is_same(file: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(file, other, shallow=False)


@contextmanager
def reserve(
    directory: str | os.PathLike[str], *, overwrite: bool = True, device: torch.device | None = None
) -> Iterator[None]:
    """A block in which `save_adapter(model, directory)` will find a place; to be entered on all ranks alike.

    Rank 0 makes the folder, writes to it, finishes or removes what killed processes have left there, and locks it until
    the block ends. `surgery.qlora` in the block also reserves the disk space that its adapter will need, before it
    reads a weight.

    Args:
        directory: for the adapter; links are followed.
        overwrite: whether an adapter that is there, or a file of a name that one has, may be replaced.
        device: on which the process group speaks; None means this rank's accelerator, or the CPU.

    Raises:
        ConfigError: the folder cannot be written, another process has it, it is that of a whole model, or there is an
            adapter, or a file of a name that one has, which may not be replaced.
        PeerError: on the other ranks.
    """
    ranks = current_ranks(launched_world_size())
    with ExitStack() as stack:
        with everyone(ranks, device=compute_device(device)):
            if ranks.rank == 0:
                stack.enter_context(hold(directory, overwrite=overwrite))
        yield
