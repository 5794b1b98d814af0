"""The tensors of a checkpoint by name, complete and checked, built from file headers alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from surgery.checkpoint.header import Header, TensorEntry, read_header
from surgery.checkpoint.layout import Layout, find_layout
from surgery.checkpoint.stamp import Stamp
from surgery.errors import CheckpointError, WeightsMismatchError

__all__ = ["Index", "TensorEntry"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Index(Mapping[str, TensorEntry]):
    """Name -> `TensorEntry` for every tensor of a checkpoint, in the order of its files.

    `metadata` joins the `__metadata__` of the files; where two differ, the first file's value stays. `stamps` are of
    the files that are on this machine.
    """

    entries: Mapping[str, TensorEntry]
    files: tuple[Path, ...]
    metadata: Mapping[str, str]
    stamps: Mapping[Path, Stamp]

    @classmethod
    def open(cls, path: Path) -> Index:
        """Read the headers of the checkpoint at `path`: a folder, or one `*.safetensors` file.

        A folder holds `model.safetensors`, or shards with `model.safetensors.index.json`, or a single file of
        another name. Tensors that a shard holds and the index file does not list are included, so that
        whoever consumes the checkpoint has to account for them.

        Raises `CheckpointError` if anything is missing, malformed, contradictory, or in a pickle.
        """
        layout = find_layout(path)
        return cls.join(layout, {file: read_header(file) for file in layout.files})

    @classmethod
    def join(cls, layout: Layout, headers: Mapping[Path, Header]) -> Index:
        """The index of the files of `layout`, by their `headers`. Raises `CheckpointError` if they contradict."""
        entries = _unique_entries(headers)
        _check_weight_map(layout, entries)
        metadata: dict[str, str] = {}
        for header in headers.values():
            metadata = {**header.metadata, **metadata}
        return cls(
            entries=MappingProxyType(entries),
            files=layout.files,
            metadata=MappingProxyType(metadata),
            stamps={file: header.stamp for file, header in headers.items() if header.stamp is not None},
        )

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(entry.nbytes for entry in self.entries.values())

    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""
        return tuple(self.entries)

    def entry(self, name: str) -> TensorEntry:
        """Where the tensor `name` lies. Raises `WeightsMismatchError` if there is none of that name."""
        if name in self.entries:
            return self.entries[name]
        similar = difflib.get_close_matches(name, self.entries, n=1)
        hint = f" The most similar name is {similar[0]!r}." if similar else ""
        folder = self.files[0].parent
        raise WeightsMismatchError(
            f"The checkpoint in {folder} holds no tensor {name!r}.{hint}",
            missing=[name],
            path=folder,
            tensor=name,
        )

    def __getitem__(self, name: str) -> TensorEntry:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"Index({len(self)} tensors in {len(self.files)} files, {self.total_bytes} bytes)"


def _unique_entries(headers: Mapping[Path, Header]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file, header in headers.items():
        for entry in header.entries:
            first = entries.setdefault(entry.name, entry)
            if first is not entry:
                raise CheckpointError(
                    f"Tensor {entry.name!r} is in two files of the checkpoint, {first.file} and {file}: "
                    "it is not clear which one is meant. Remove the file that is not part of the checkpoint.",
                    path=file,
                    tensor=entry.name,
                )
    return entries


def _check_weight_map(layout: Layout, entries: Mapping[str, TensorEntry]) -> None:
    """Check that each tensor is where the index file says that it is."""
    for name, file in layout.weight_map.items():
        entry = entries.get(name)
        if entry is None or entry.file != file:
            found = "the file does not hold it" if entry is None else f"it is in {entry.file.name}"
            raise CheckpointError(
                f"The index of the checkpoint says that tensor {name!r} is in {file}, but {found}. "
                "Download or save the checkpoint again.",
                path=file,
                tensor=name,
            )
