"""Try the place of an adapter, and keep it, before the model is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from surgery.adapters.folder import hold
from surgery.comm.environment import default_device, launched_world_size
from surgery.comm.failures import everyone
from surgery.comm.ranks import current_ranks

__all__ = ["reserve"]


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
        with everyone(ranks, device=device or default_device()):
            if ranks.rank == 0:
                stack.enter_context(hold(directory, overwrite=overwrite))
        yield
