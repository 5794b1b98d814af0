"""An open checkpoint: found, downloaded if need be, and checked; no weight is read yet."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from surgery.checkpoint.header import TensorEntry, parse_json, read_header
from surgery.checkpoint.hub import resolve
from surgery.checkpoint.index import Index
from surgery.checkpoint.layout import Layout
from surgery.checkpoint.packed import PackedSettings, PackedWeight, find_packed
from surgery.checkpoint.reader import Reader
from surgery.checkpoint.refusals import require_usable
from surgery.errors import CheckpointError

__all__ = ["Checkpoint", "read_config"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Checkpoint:
    """A safetensors checkpoint that can be read: in 16 or 32 bits, or with packed weights of bitsandbytes.

    `source` is what the user gave; `path` the folder it is in; `revision` the commit, for a hub id, else
    None; `config` the content of `config.json`, None if there is none; `packed` the packed weights by name. `fetch`
    gets the elements `start` to `stop` of a tensor of a checkpoint that is looked at on the hub; None if its files are
    here.
    """

    source: str
    path: Path
    revision: str | None
    index: Index
    config: dict[str, Any] | None
    packed: Mapping[str, PackedWeight] = field(default_factory=dict)
    fetch: Callable[[TensorEntry, int, int], torch.Tensor] | None = None

    @classmethod
    def open(
        cls, path_or_hub_id: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
    ) -> Checkpoint:
        """Open a folder, a `*.safetensors` file, or a hub id (see `surgery.checkpoint.hub.resolve`).

        Reads headers, and settings of packed weights. For a hub id in a distributed job, every rank has to call it.
        Raises `CheckpointError` for whatever would make the checkpoint unusable.
        """
        found = resolve(path_or_hub_id, revision=revision, token=token)
        folder = found.path if found.path.is_dir() else found.path.parent
        config = read_config(folder)
        index = Index.open(found.path)
        packed = _packed(index, config, folder)
        source = os.fspath(path_or_hub_id)
        return cls(source=source, path=folder, revision=found.revision, index=index, config=config, packed=packed)

    @classmethod
    def of_files(cls, files: Sequence[str | os.PathLike[str]], *, source: str) -> Checkpoint:
        """Open these `*.safetensors` files as one checkpoint, called `source`, as somebody else has found them.

        Reads headers, and settings of packed weights. Raises `CheckpointError` for whatever would make it unusable.
        """
        found = [Path(file) for file in files]
        index = Index.join(Layout(files=tuple(found)), {file: read_header(file) for file in found})
        folder = found[0].parent
        config = read_config(folder)
        packed = _packed(index, config, folder)
        return cls(source=source, path=folder, revision=None, index=index, config=config, packed=packed)

    @property
    def places(self) -> tuple[Path, ...]:
        """Its folder, and its files, which may be links to other folders."""
        return (self.path, *self.index.files)

    def names(self) -> tuple[str, ...]:
        """The names of all tensors, in the order of the files."""
        return self.index.names()

    @property
    def packing(self) -> PackedSettings | None:
        """The settings of its packed weights, all of one kind, a stack's if there is one; None if there are none."""
        return max((weight.settings for weight in self.packed.values()), key=lambda each: each.is_stack, default=None)

    def weights(self) -> tuple[str, ...]:
        """The names of all tensors but those beside packed weights."""
        beside = {entry.name for weight in self.packed.values() for entry in weight.side()}
        return tuple(name for name in self.index if name not in beside)

    def logical(self, name: str) -> TensorEntry:
        """The entry of a tensor; of a packed weight with the shape and dtype that it has unpacked."""
        return self.packed[name].logical if name in self.packed else self.index[name]

    def entry(self, name: str) -> TensorEntry:
        """Entry of the tensor `name`. Raises `WeightsMismatchError` if the checkpoint does not hold it."""
        return self.index.entry(name)

    def reader(self, *, on_read: Callable[[int], None] | None = None) -> Reader:
        """A new reader, to be used as a context manager; `on_read` is told how many bytes each read has brought."""
        return Reader(self.index, on_read=on_read)

    def __contains__(self, name: object) -> bool:
        return name in self.index

    def __repr__(self) -> str:
        dtypes = Counter(str(entry.dtype).removeprefix("torch.") for entry in self.index.values())
        at = "" if self.revision is None else f" at {self.revision[:12]}"
        return (
            f"<Checkpoint {self.source}{at}: {len(self.index)} tensors in {len(self.index.files)} files, "
            f"{self.index.total_bytes / 1e9:.3g} GB, {', '.join(dtype for dtype, _ in dtypes.most_common())}>"
        )


def _packed(index: Index, config: dict[str, Any] | None, folder: Path) -> dict[str, PackedWeight]:
    with Reader(index) as reader:
        packed = find_packed(index, config, path=folder, read=reader.read_range)
    require_usable(index, config, packed, path=folder)
    return packed


def read_config(folder: Path) -> dict[str, Any] | None:
    """Read `config.json` of `folder`; None if there is none. Raises `CheckpointError` for one that is no object."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        config = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read the model's config {file}: {error}.", path=file) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"Expected a JSON object in {file}, found {type(config).__name__}.", path=file)
    return config
