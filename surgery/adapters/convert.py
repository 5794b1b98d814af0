"""A saved adapter written once more, as vLLM reads it."""

from __future__ import annotations

import os
from pathlib import Path

from surgery.adapters.folder import hold
from surgery.adapters.metadata import TOKENIZER_FILES, Base, render_card
from surgery.adapters.place import refuse_base
from surgery.adapters.saved import SavedAdapter
from surgery.adapters.serving import check_served, serve
from surgery.checkpoint import Checkpoint, Reader
from surgery.errors import ConfigError

__all__ = ["convert"]

Source = str | os.PathLike[str]


def convert(
    source: Source,
    directory: Source,
    *,
    base: Source | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the adapter `source`, in PEFT's format, to `directory` as vLLM reads it: see `surgery.adapters.serving`.

    It is read and written a parameter at a time, and is there whole, or not at all.

    Args:
        source: a folder, or a hub id.
        directory: made if it is not there; links are followed.
        base: the model that it was trained on, whose names and configuration are read; None is the one that it names.
        revision: branch, tag or commit of `base`; None is the one that the adapter was trained on, if it says so.
        overwrite: whether an adapter that is there, or a file of a name that one has, may be replaced.

    Raises:
        ConfigError: no adapter that vLLM takes, or of another model; a folder that cannot be written.
        CheckpointError: a file that is broken.
        AdapterError: a value that is not finite, or a disk that is full.
    """
    adapter = SavedAdapter.open(source)
    check_served(adapter.config)
    config = adapter.fresh_config(trainable=False)
    name = base or adapter.base.name
    if name is None:
        raise ConfigError(f"{adapter.path} does not say which model it was trained on: name it (--base)")
    if Path(os.path.realpath(directory)) == Path(os.path.realpath(adapter.path)):
        raise ConfigError(f"expected another folder than {adapter.path}, from which a training goes on, found the same")
    is_same = os.fspath(name) == adapter.base.name
    with hold(directory, overwrite=overwrite) as folder:
        checkpoint = Checkpoint.open(name, revision=revision or (adapter.base.revision if is_same else None))
        adapter.check_base(Base.of(checkpoint))
        refuse_base(folder.path, checkpoint.path)
        tokenizer = {
            file.name: file.read_bytes() for file in map(adapter.path.joinpath, TOKENIZER_FILES) if file.is_file()
        }
        with Reader(adapter.index) as reader:
            served, tensors = serve(config, checkpoint, adapter.index, reader.read)
            served.base_model_name_or_path, served.revision = adapter.base.name, adapter.base.revision
            folder.save(tensors, served, card=render_card(served, {}), tokenizer=tokenizer)
            reader.check_unchanged()
