"""What a pass is: frozen data with a name, that changes the whole model or one layer of it.

`requires` and `ensures` are facts about the model, by name; a pipeline checks that every required fact is ensured by
an earlier pass before it runs the first one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from torch import nn

from surgery.walk import Site
from surgery.weights import Assignment

__all__ = ["Layer", "LayerPass", "ModelPass", "Pass"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """What is read, quantized and placed together: the sites that one set of checkpoint tensors fills.

    Nearly always one module. Several where upstream's conversion splits a tensor among modules.
    """

    sites: tuple[Site, ...]
    assignments: tuple[Assignment, ...]

    @property
    def fqn(self) -> str:
        """The name of its first site."""
        return self.sites[0].fqn


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Base of all passes; subclasses add their options as fields."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()


@runtime_checkable
class ModelPass(Protocol):
    """A pass over the whole model. Returns the model to go on with, which may be another object."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]
    ensures: ClassVar[frozenset[str]]

    def run(self, model: nn.Module) -> nn.Module:
        """Change `model` and return it, or return what replaces it."""
        ...


@runtime_checkable
class LayerPass(Protocol):
    """A pass over one layer at a time. The pipeline runs all consecutive ones on a layer before the next layer."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]
    ensures: ClassVar[frozenset[str]]

    def run_layer(self, layer: Layer) -> None:
        """Change the modules of `layer` in place."""
        ...
