"""The tensors of a checkpoint by name, complete and checked, built from file headers alone."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from surgery.checkpoint.header import Header, Stamp, TensorEntry, read_header
from surgery.checkpoint.layout import Layout, find_layout
from surgery.errors import WeightsMismatchError

__all__ = ["Index"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Index(Mapping[str, TensorEntry]):
    """Map from name to `TensorEntry`, for every tensor of a checkpoint, in the order of its files.

    `metadata` joins the `__metadata__` of the files; where two differ, the first file's value stays.
    `ignored`: names that the index file lists and no file holds; and those that a later file holds again, by name of
    the files: its tensor counts, as in transformers. `stamps`: of the files that are on this machine.
    """

    entries: Mapping[str, TensorEntry]
    files: tuple[Path, ...]
    metadata: Mapping[str, str]
    stamps: Mapping[Path, Stamp]
    ignored: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path) -> Index:
        """Read the headers of the checkpoint at `path`: a folder, or one `*.safetensors` file.

        A folder holds `model.safetensors`, or shards with `model.safetensors.index.json`, or a single file of
        another name. What tensors there are is what the files hold, whatever the index file says of them.

        Raises `CheckpointError` if a file is missing, malformed, or a pickle.
        """
        layout = find_layout(path)
        return cls.join(layout, {file: read_header(file) for file in layout.files})

    @classmethod
    def join(cls, layout: Layout, headers: Mapping[Path, Header]) -> Index:
        """The index of the files of `layout`, by their `headers`."""
        entries: dict[str, TensorEntry] = {}
        repeated: list[str] = []
        metadata: dict[str, str] = {}
        for file in layout.files:
            repeated.extend(entry.name for entry in headers[file].entries if entry.name in entries)
            entries |= {entry.name: entry for entry in headers[file].entries}
            metadata = {**headers[file].metadata, **metadata}
        absent = (name for name in layout.listed if name not in entries)
        return cls(
            entries=MappingProxyType(entries),
            files=layout.files,
            metadata=MappingProxyType(metadata),
            stamps={file: header.stamp for file, header in headers.items() if header.stamp is not None},
            ignored=(*absent, *repeated),
        )

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(entry.nbytes for entry in self.entries.values())

    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""
        return tuple(self.entries)

    def entry(self, name: str) -> TensorEntry:
        """Entry of the tensor `name`. Raises `WeightsMismatchError` if there is none of that name."""
        if name in self.entries:
            return self.entries[name]
        similar = difflib.get_close_matches(name, self.entries, n=1)
        hint = f" The most similar name is {similar[0]!r}." if similar else ""
        folder = self.files[0].parent
        raise WeightsMismatchError(
            f"The checkpoint in {folder} holds no tensor {name!r}.{hint}", missing=[name], path=folder, tensor=name
        )

    def __getitem__(self, name: str) -> TensorEntry:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"Index({len(self)} tensors in {len(self.files)} files, {self.total_bytes} bytes)"
