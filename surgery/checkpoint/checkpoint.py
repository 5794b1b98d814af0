"""An open checkpoint: found, downloaded if need be, and checked; no weight is read yet."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgery.checkpoint.header import TensorEntry, parse_json, read_header
from surgery.checkpoint.hub import resolve
from surgery.checkpoint.index import Index
from surgery.checkpoint.layout import Layout
from surgery.checkpoint.reader import Reader
from surgery.checkpoint.refusals import require_usable
from surgery.errors import CheckpointError

__all__ = ["Checkpoint", "read_config"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Checkpoint:
    """An unquantized safetensors checkpoint that can be read.

    `source` is what the user gave; `path` the folder it is in; `revision` the commit, for a hub id, else
    None; `config` the content of `config.json`, None if there is none. `fetch` gets the elements `start`
    to `stop` of a tensor of a checkpoint that is looked at on the hub; None if its files are here.
    """

    source: str
    path: Path
    revision: str | None
    index: Index
    config: dict[str, Any] | None
    fetch: Callable[[TensorEntry, int, int], torch.Tensor] | None = None

    @classmethod
    def open(
        cls, path_or_hub_id: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
    ) -> Checkpoint:
        """Open a folder, a `*.safetensors` file, or a hub id (see `surgery.checkpoint.hub.resolve`).

        Reads headers only. For a hub id in a distributed job, every rank has to call it.
        Raises `CheckpointError` for whatever would make the checkpoint unusable.
        """
        found = resolve(path_or_hub_id, revision=revision, token=token)
        folder = found.path if found.path.is_dir() else found.path.parent
        config = read_config(folder)
        index = Index.open(found.path)
        require_usable(index, config, path=found.path)
        return cls(source=os.fspath(path_or_hub_id), path=folder, revision=found.revision, index=index, config=config)

    @classmethod
    def of_files(cls, files: Sequence[str | os.PathLike[str]], *, source: str) -> Checkpoint:
        """Open these `*.safetensors` files as one checkpoint, called `source`, as somebody else has found them.

        Reads headers only. Raises `CheckpointError` for whatever would make the checkpoint unusable.
        """
        found = [Path(file) for file in files]
        index = Index.join(Layout(files=tuple(found)), {file: read_header(file) for file in found})
        config = read_config(found[0].parent)
        require_usable(index, config, path=found[0].parent)
        return cls(source=source, path=found[0].parent, revision=None, index=index, config=config)

    def names(self) -> tuple[str, ...]:
        """The names of all tensors, in the order of the files."""
        return self.index.names()

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
