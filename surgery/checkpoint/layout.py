"""Files that make up a checkpoint, found by their names alone, before any of them is opened.

A weight map is data from outside. It may name files inside the checkpoint's folder and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from surgery.checkpoint.header import parse_json
from surgery.errors import CheckpointError

__all__ = ["INDEX_NAME", "SINGLE_NAME", "Layout", "find_layout", "read_weight_map"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_SUFFIX = ".safetensors"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_ADAPTER_NAME = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The files of a checkpoint, in the order of their names, and the tensors that the index, if any, lists."""

    files: tuple[Path, ...]
    listed: tuple[str, ...] = ()

    @classmethod
    def of_index(cls, folder: Path) -> Layout:
        """Layout that the index file in `folder` describes; whether its files exist is not looked at."""
        weight_map = read_weight_map(folder)
        return cls(files=tuple(folder / name for name in sorted(set(weight_map.values()))), listed=tuple(weight_map))


def find_layout(path: Path) -> Layout:
    """Find the files of the checkpoint at `path`, a folder or one `*.safetensors` file.

    In a folder, `model.safetensors` is taken before `model.safetensors.index.json`, as transformers does;
    without either, the only `*.safetensors` file there is.
    Raises `CheckpointError` if there is no such checkpoint, or if a shard is missing.
    """
    if _is_file(path):
        if path.suffix in _PICKLE_SUFFIXES:
            raise _pickle_only(path, [path.name])
        if path.suffix != _SUFFIX:
            raise CheckpointError(f"Expected a {_SUFFIX} file or a folder, found the file {path}.", path=path)
        return Layout(files=(path,))
    if not path.is_dir():
        raise CheckpointError(
            f"There is no checkpoint at {path}: expected a folder, or a {_SUFFIX} file. Check the path.", path=path
        )
    if (path / SINGLE_NAME).is_file():
        return Layout(files=(path / SINGLE_NAME,))
    if (path / INDEX_NAME).is_file():
        return _sharded(path)
    return _unnamed(path)


def read_weight_map(folder: Path) -> dict[str, str]:
    """Read tensor name -> file name from the index file in `folder`; each file name stays inside `folder`.

    Whether the files exist is not looked at. Raises `CheckpointError` for an index that cannot be used.
    """
    file = folder / INDEX_NAME
    try:
        content = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read the checkpoint index {file}: {error}.", path=file) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"The checkpoint index {file} should hold a weight_map from tensor names to file names, and "
            "does not. Download or save it again.",
            path=file,
        )
    for tensor, name in weight_map.items():
        _check_shard_name(name, tensor=tensor, index=file)
    return weight_map


def _sharded(folder: Path) -> Layout:
    layout = Layout.of_index(folder)
    missing = [file.name for file in layout.files if not _is_file(file)]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of the {len(layout.files)} files that {folder / INDEX_NAME} names are missing: "
            f"{_sample(missing)}. Download or copy them into {folder}.",
            path=folder / missing[0],
        )
    return layout


def _unnamed(folder: Path) -> Layout:
    """The layout of a folder that has neither `model.safetensors` nor an index."""
    try:
        found = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise CheckpointError(f"Cannot list the checkpoint folder {folder}: {error}.", path=folder) from error
    weights = [path for path in found if path.suffix == _SUFFIX and path.name != _ADAPTER_NAME]
    if len(weights) == 1:
        return Layout(files=(weights[0],))
    if weights:
        raise CheckpointError(
            f"{folder} holds {len(weights)} {_SUFFIX} files ({_sample([path.name for path in weights])}) "
            f"and no {INDEX_NAME} that says how they belong together. Add the index, or give the path of "
            "one file.",
            path=folder,
        )
    pickles = [path.name for path in found if path.suffix in _PICKLE_SUFFIXES]
    if pickles:
        raise _pickle_only(folder, pickles)
    if (folder / _ADAPTER_NAME).is_file():
        raise CheckpointError(
            f"{folder} holds a PEFT adapter ({_ADAPTER_NAME}) and no base model. Give the base model's path or hub id.",
            path=folder,
        )
    raise CheckpointError(
        f"{folder} holds no {_SUFFIX} file. Expected {SINGLE_NAME}, or shards with {INDEX_NAME}.", path=folder
    )


def _check_shard_name(name: Any, *, tensor: str, index: Path) -> None:
    # The name, not what it resolves to: in a hub cache every file is a link to a place outside its folder.
    if isinstance(name, str) and _is_inside(name) and name.endswith(_SUFFIX):
        return
    raise CheckpointError(
        f"The checkpoint index {index} puts tensor {tensor!r} into {name!r:.200}. Expected the relative "
        f"name of a {_SUFFIX} file inside the index's folder. Do not use this checkpoint unless you know "
        "why it says so.",
        path=index,
        tensor=tensor,
    )


def _is_file(path: Path) -> bool:
    # `Path.is_file` raises for a name that the file system cannot have, such as one of 300 characters.
    try:
        return path.is_file()
    except OSError:
        return False


def _is_inside(name: str) -> bool:
    # A backslash or a colon separates on some systems and not on others; no real shard has one, nor a NUL.
    if any(character in name for character in "\\:\0"):
        return False
    pure = PurePosixPath(name)
    return not pure.is_absolute() and ".." not in pure.parts


def _pickle_only(path: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} has its weights in pickle files only ({_sample(names)}). Loading a pickle can run any "
        f"code, so only {_SUFFIX} is read. If you trust its author, convert it once: "
        "transformers.AutoModelForCausalLM.from_pretrained(old).save_pretrained(new); otherwise look for a "
        "safetensors version, which the Hub's conversion space (safetensors/convert) can make.",
        path=path,
    )


def _sample(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown}, ... ({len(names) - 5} more)"
