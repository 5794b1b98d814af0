"""What a pass is: frozen data with a name, that changes the whole model or one layer of it.

`requires` and `ensures` are facts about the model, by name; a pipeline checks that every required fact is ensured by
an earlier pass before it runs the first one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from torch import nn

from surgery.comm.ranks import PeerError, StoppedError
from surgery.errors import PassError
from surgery.model.fqn import split
from surgery.passes.targets import Target

__all__ = ["Batch", "BatchPass", "MeetingPass", "ModelPass", "Naming", "Pass", "group_into_batches"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What is read, quantized and exchanged together: targets that follow each other, of one module at least."""

    number: int
    targets: tuple[Target, ...]

    @property
    def fqn(self) -> str:
        """The module of its first target."""
        return split(self.targets[0].fqn)[0]


def group_into_batches(targets: Iterable[Target], *, elements: int) -> list[Batch]:
    """Layers of at most so many `elements`, unless one assignment alone has more. The same on every rank."""
    groups: list[list[Target]] = []
    size = 0
    for target in targets:
        same = bool(groups) and groups[-1][-1].assignment is target.assignment
        if not same and (not groups or size + target.form.numel > elements):
            groups.append([])
            size = 0
        groups[-1].append(target)
        size += target.form.numel
    return [Batch(number=number, targets=tuple(group)) for number, group in enumerate(groups)]


class Naming:
    """Turns an exception inside the block into a `PassError` that says where it happened, unless it says so already, or
    came from outside: another rank has failed, or this one elsewhere.
    """

    def __init__(self, pass_name: str, fqn: str) -> None:
        self.pass_name, self.fqn = pass_name, fqn

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, (PassError, PeerError, StoppedError)):
            raise PassError(
                f"pass {self.pass_name} failed at {self.fqn}: {type(error).__name__}: {error}",
                pass_name=self.pass_name,
                fqn=self.fqn,
            ) from error


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
class BatchPass(Protocol):
    """A pass over one layer at a time. The pipeline runs all consecutive ones on a layer before the next layer, but for
    a `MeetingPass` among them.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]
    ensures: ClassVar[frozenset[str]]

    def run_batch(self, layer: Batch) -> None:
        """Work on the targets of `layer`."""
        ...


@runtime_checkable
class MeetingPass(BatchPass, Protocol):
    """A layer pass in which ranks wait for each other. It, and those after it, are one layer behind those before it."""

    def arrive(self, layer: Batch) -> None:
        """Tell the others that the passes before are done with `layer`; from then on they may count on `run_batch`."""
        ...
