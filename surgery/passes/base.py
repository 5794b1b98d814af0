"""The passes that build a model: what a pass is, its place in the order, and finding those of third parties."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import ClassVar

import torch
from torch import nn

from surgery.comm.ranks import PeerError, StoppedError
from surgery.errors import ConfigError, ExportError, PassError
from surgery.passes.tensors import ShardBuffer, Target

__all__ = ["GROUP", "PLACES", "Batch", "BatchPass", "Naming", "Pass", "find_passes", "group_into_batches", "placed"]

#: The entry point group by which an installed distribution offers passes by name.
GROUP = "surgery.passes"

#: The built-in passes after which `Pass.run` can have its place.
PLACES = ("replace", "adapt", "install", "shard")


class Pass:
    """A step in the building of a model. Third parties subclass it, and override what they need.

    A pass that fails, on any rank, ends the building on all ranks with its name and the place where it failed. It must
    not call a collective: ranks are not at the same tensor at the same time.
    """

    #: What errors and reports call it.
    name: ClassVar[str]

    #: The built-in pass that `run` follows: `replace` (on meta; nothing is read), `adapt` (on meta, with adapters),
    #: `install` (filled), or `shard` (complete).
    after: ClassVar[str] = "replace"

    #: Whether all ranks call collectives in it, alike; for passes that are built in.
    is_collective: ClassVar[bool] = False

    def run(self, model: nn.Module) -> nn.Module:
        """Change `model` and return it, or return what replaces it."""
        return model

    def see_values(self, target: Target, start: int, values: torch.Tensor) -> None:
        """Look at `values` of a tensor, 1-D, from flat element `start` on, as they are before they are quantized.

        Each rank sees its part, piece by piece: `values` are in the checkpoint's dtype, on the CPU or the rank's
        device, and only valid during the call. Weights that the checkpoint has packed are not shown.
        """

    def see_tensor(self, buffer: ShardBuffer) -> None:
        """Look at this rank's part of a tensor once it is complete: packed, with its statistics, or as it is."""


class BatchPass(Pass):
    """A built-in pass over the tensors of one batch at a time."""

    def run_batch(self, batch: Batch) -> None:
        """Work on the tensors of `batch`."""
        raise NotImplementedError


@dataclass(kw_only=True, eq=False)
class Batch:
    """Tensors that are read, quantized and exchanged together: some that follow each other, of one module at least.

    buffers: this rank's part of each, from the moment at which they are read.
    """

    number: int
    targets: tuple[Target, ...]
    buffers: list[ShardBuffer] = field(default_factory=list, repr=False)

    @property
    def fqn(self) -> str:
        """The module of its first tensor."""
        return self.targets[0].module_fqn


def group_into_batches(targets: Iterable[Target], *, elements: int) -> list[Batch]:
    """Batches of at most so many `elements`, unless one assignment alone has more; the same on every rank."""
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
    """A block in which an exception becomes a `PassError` that says where it happened.

    Not if it says so already, or came from outside: another rank has failed, or this one elsewhere.
    """

    def __init__(self, pass_name: str, fqn: str) -> None:
        self.pass_name, self.fqn = pass_name, fqn

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, (ExportError, PassError, PeerError, StoppedError)):
            raise PassError(
                f"pass {self.pass_name} failed at {self.fqn}: {type(error).__name__}: {error}",
                pass_name=self.pass_name,
                fqn=self.fqn,
            ) from error


def find_passes(given: Sequence[Pass | str], *, adapted: bool) -> tuple[Pass, ...]:
    """The passes of `given`, each a pass, or the name of one that an installed distribution offers.

    adapted: whether the model has adapters by then. Raises `ConfigError` for a name that there is not, what is no pass,
    and a place that there is not.
    """
    if not isinstance(given, (list, tuple)):
        # A generator would be empty by the time it is run, without a word.
        raise ConfigError(f"passes: expected a list or tuple of passes, found {given!r:.80}")
    found = tuple(_named(each) if isinstance(each, str) else each for each in given)
    for each in found:
        if not isinstance(each, Pass):
            raise ConfigError(f"passes: expected objects of surgery.Pass or names, found {each!r:.80}")
        if not isinstance(getattr(each, "name", None), str):
            raise ConfigError(f"passes: {type(each).__name__} has no name, by which errors call it: give it one")
        if each.after not in PLACES:
            places = ", ".join(PLACES)
            raise ConfigError(f"pass {each.name}: expected after to be one of {places}, found {each.after!r}")
        if each.after == "adapt" and not adapted:
            raise ConfigError(
                f"pass {each.name} comes after 'adapt', and there are no adapters: use 'replace', or lora="
            )
    return found


def _named(name: str) -> Pass:
    offered = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in offered:
        known = ", ".join(sorted(offered)) or "none is installed"
        raise ConfigError(f"passes: expected the name of an installed pass ({known}), found {name!r:.80}")
    try:
        made = offered[name].load()
        return made() if isinstance(made, type) else made  # type: ignore[no-any-return]  # checked by the caller
    except Exception as error:
        raise ConfigError(
            f"pass {name} ({offered[name].value}) cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def placed(passes: Iterable[Pass], after: str) -> tuple[Pass, ...]:
    """Those of `passes` that change the model after the built-in pass `after`."""
    return tuple(each for each in passes if each.after == after and type(each).run is not Pass.run)
