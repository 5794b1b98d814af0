"""Graphs that torch.compile has made: dropped when a patch changes what they may have traced."""

from __future__ import annotations

import sys

__all__ = ["drop_stale_graphs"]


def drop_stale_graphs() -> None:
    """Make Dynamo forget every graph that it has compiled, so that what it traced before is traced anew.

    All of them, because nothing public tells which graphs have inlined a function. Only the compiled code goes,
    not the counters, the CUDA graphs and the settings that `torch.compiler.reset` also puts back. Nothing is
    imported: without `torch._dynamo` in the process there is no graph.
    """
    dynamo = sys.modules.get("torch._dynamo")
    # Neither is there while another thread is in the middle of importing it: nothing is compiled then.
    drop = getattr(dynamo, "reset_code_caches", None) or getattr(dynamo, "reset", None)
    if drop is not None:
        drop()
