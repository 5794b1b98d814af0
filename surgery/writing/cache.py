"""A cache of packed checkpoints: what the first run has quantized, the next ones read, a quarter of the bytes.

In its folder a checkpoint has the name of its model and a digest of everything that decides its bytes. Beside it, in
`NAME.json`, are sizes and times of its files, as they were when it was whole: one that has changed since is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from surgery.adapters.metadata import versions
from surgery.bound import building
from surgery.checkpoint import Checkpoint
from surgery.comm.collectives import gather_objects
from surgery.comm.environment import compute_device
from surgery.comm.failures import everyone
from surgery.config import Quant
from surgery.errors import ConfigError
from surgery.telemetry.atomic import write_whole
from surgery.writing.quantize import identity, quantize, stored_dtype

__all__ = ["packed_in"]


def packed_in(
    directory: str | os.PathLike[str],
    checkpoint: Checkpoint | str | os.PathLike[str],
    *,
    quant: Any,
    dtype: torch.dtype | None,
    device: torch.device | None = None,
) -> tuple[Checkpoint, Quant]:
    """`checkpoint` with the weights that the cache `directory` has of it, packed, and `quant` as it is read with.

    Quantized into the cache first, by all ranks, if they are not there, or not as they were written; to be called on
    all ranks alike. One that is packed already is returned as it is. Errors are those of `surgery.quantize`.
    """
    if not isinstance(quant, Quant):
        raise ConfigError(f"packed_cache: expected weights in 4 bits, quant=surgery.Quant(...), found {quant!r:.80}")
    if not os.fspath(directory):
        raise ConfigError("packed_cache: expected a folder, found an empty path")
    device = compute_device(device)
    with building(device) as ranks:
        with everyone(ranks, device=device):
            opened = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
        if opened.packing is not None:
            return opened, quant
        dtype = dtype or stored_dtype(opened)
        of_bytes = replace(quant, quant_storage=None)
        folder = Path(directory).absolute() / _name(opened, of_bytes, dtype, device)
        with everyone(ranks, device=device):
            is_there = ranks.rank == 0 and _is_whole(folder)
            if ranks.rank == 0 and not is_there:
                shutil.rmtree(folder, ignore_errors=True)
        is_there = gather_objects(is_there)[0]
    if not is_there:
        quantize(opened, folder, quant=of_bytes, dtype=dtype, device=device)
        if ranks.rank == 0:
            with suppress(OSError):  # without it the next run quantizes again
                write_whole(_manifest(folder), json.dumps(_stamps(folder)))
    packed = Checkpoint.open(folder)
    # All but the weights is the source's: what adapters name as their base, and what the model is built of.
    packed = replace(packed, source=opened.source, path=opened.path, revision=opened.revision, config=opened.config)
    has_stacks = any(weight.settings.is_stack for weight in packed.packed.values())
    return packed, replace(quant, skip_modules=(), experts=quant.experts and has_stacks)


def _name(checkpoint: Checkpoint, quant: Quant, dtype: torch.dtype, device: torch.device) -> str:
    what = [identity(checkpoint), str(quant), str(dtype), device.type, versions()]
    digest = hashlib.blake2b(json.dumps(what).encode(), digest_size=16).hexdigest()
    return f"{Path(checkpoint.source).name or 'model'}-{digest}"


def _manifest(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _is_whole(folder: Path) -> bool:
    """Whether `folder` has the very files that were written."""
    try:
        return bool(json.loads(_manifest(folder).read_bytes()) == _stamps(folder))
    except (OSError, ValueError):
        return False


def _stamps(folder: Path) -> dict[str, list[int]]:
    # The time of the last change is not for programs to set, unlike that of the last write.
    found = {str(path.relative_to(folder)): path.stat() for path in sorted(folder.rglob("*"))}
    return {name: [status.st_size, status.st_mtime_ns, status.st_ctime_ns] for name, status in found.items()}
