"""When Python looks for reference cycles during training."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["collecting_between_steps"]

#: Optimizer steps between two looks.
STEPS_BETWEEN = 50


@contextmanager
def collecting_between_steps() -> Iterator[Callable[[int], None]]:
    """A block in which garbage is collected only when what it gives is called with a step that is due.

    Left to itself, Python looks whenever enough objects were made, in the middle of a step, on each rank in another
    one, and all others wait for that rank in their next collective.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()

    def collect(step: int) -> None:
        if step % STEPS_BETWEEN == 0:
            gc.collect(1)

    try:
        yield collect
    finally:
        if was_enabled:
            gc.enable()
