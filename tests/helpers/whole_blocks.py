"""4-bit models that are compared with a table: on a CPU whose kernels are wrong for some widths, with right ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import patches

__all__ = ["right_kernels"]


@contextmanager
def right_kernels() -> Iterator[None]:
    """Within, every 4-bit weight of the process is dequantized right; needed where rows are not whole blocks.

    Does nothing on CPUs that get it right.
    """
    with patches.transaction("bitsandbytes.cpu-dequantize-flat", reason="4-bit weights are compared with a table"):
        yield
