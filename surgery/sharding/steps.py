"""Training steps of a model as a capture of CUDA graphs sees them: what they leave behind, and where they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

__all__ = ["Steps"]


class Steps:
    """The steps of a model whose parameters autograd itself knows. Other shardings say what differs.

    module: the module whose calls make the steps.
    """

    #: Why steps cannot be captured; None if they can.
    refused: str | None = None

    #: Whether backward sets `.grad` of parameters by itself, which are not leaves of the autograd graph.
    sets_gradients: bool = False

    def __init__(self, module: nn.Module, refused: str | None = None) -> None:
        self.module = module
        self.refused = refused

    def streams(self) -> Sequence[Any]:
        """The streams, beside the current one, that steps run on."""
        return ()

    def is_regular(self) -> bool:
        """Whether a step now would gather, reduce and free all, and depends on none before it."""
        return True

    def settle(self) -> None:
        """Free what an evaluation has left gathered."""

    def renew(self) -> None:
        """Forget leaves of autograd graphs that earlier steps may still hold."""

    def reset(self) -> None:
        """Become again what it was before a step that has failed midway, of which nothing was executed."""
