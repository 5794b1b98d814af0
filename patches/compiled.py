"""Compiled graphs of torch.compile: dropped when a patch changes code that they may have traced."""

from __future__ import annotations

import sys

__all__ = ["drop_stale_graphs"]


def drop_stale_graphs() -> None:
    """Make Dynamo forget every compiled graph, so that code is traced anew.

    All graphs, because no public API tells which ones have inlined a function. Only compiled code is dropped,
    not the counters, CUDA graphs and settings that `torch.compiler.reset` also resets. Nothing is imported:
    without `torch._dynamo` in the process there is no graph.
    """
    dynamo = sys.modules.get("torch._dynamo")
    # While another thread is still importing it, nothing has been compiled either.
    drop = getattr(dynamo, "reset_code_caches", None) or getattr(dynamo, "reset", None)
    if drop is not None:
        drop()
