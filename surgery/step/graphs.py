"""CUDA graphs of a training step: the forward and the backward of a model, recorded once and launched as one.

A step over few tokens is bound by the CPU, which launches thousands of kernels. `capture` has a model record them, and
replay the recording from then on. Any loop stays as it is: `model(**batch).loss.backward()`.

The first calls of a kind (the same shapes, the same other arguments) run as ever. Then forward and backward are
recorded into two graphs that share a pool of memory; nothing runs while they are. A call copies its arguments to
where the graphs read them, replays forward, and returns copies of the outputs, which one autograd function connects to
the backward graph.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

import model_surgery_patches as patches
from surgery.errors import ConfigError
from surgery.passes.lifetime import at_release, keep, postponed
from surgery.sharding.base import strategy_of
from surgery.sharding.steps import Steps
from surgery.step.positions import trust_own_positions
from surgery.step.recording import Recorder, Recording, recordable

__all__ = ["SHAPES", "capture", "tally"]

logger = logging.getLogger("surgery")

#: Values, beside tensors, that an argument may have; each value is a kind of call of its own.
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)

#: Kinds of calls that are recorded at most, if nothing else is said.
SHAPES = 8

#: What helps against too many shapes.
ADVICE = ": pad batches to a multiple (pad_to_multiple_of of the collator), or pack samples"


def capture(model: nn.Module, *, warmup: int = 3, limit: int = SHAPES) -> nn.Module:
    """Have `model` replay its training steps as CUDA graphs, until `surgery.release(model)`; returns `model`.

    Call it last: on a model that is complete, adapted and sharded (no sharding, DDP or FSDP2), the outermost one, which
    the loop calls. A bound one, as that of a trainer under `surgery.low_memory` is until it trains, is captured once it
    is filled. What cannot be replayed runs as it would without: evaluation, a forward whose predecessor's backward
    is still to come, FSDP2 without its reduction of gradients (`no_sync`). So does, with a line in the log that says
    why, a model that waits for the GPU within a step (`.item()`, copies to the CPU), and one on a CPU.

    warmup: calls of each kind that run as ever before one is recorded; in them libraries choose and compile kernels.
        A kind is what a recording is good for: arguments of the same shapes, and of the same values where they are not
        tensors, under the same autocast and active adapters.
    limit: kinds that are recorded at most. Each keeps its arguments, outputs and gradients, and all share the memory of
        one step, that of the largest. Batches of ever new lengths come to the limit soon, which the log says once: pad
        them to a multiple of 64 or more tokens (`pad_to_multiple_of` of most collators), or pack samples.

    A replay does what was recorded, not what Python would do today: release and capture again after changing how the
    model computes. Weights may change in place, and other adapters may be made active. Key-value caches are not
    returned. Of outputs, those may be differentiated that were in the calls before. Under FSDP2 `.grad` is the same
    tensor in each step.

    Raises `ConfigError` if `warmup` is less than 1, or calls of `model` are compiled or captured already.
    """
    if warmup < 1:
        raise ConfigError(f"warmup: expected 1 or more calls before the one that is recorded; got {warmup}")
    if postponed(model, partial(capture, warmup=warmup, limit=limit)):
        return model
    steps = strategy_of(model).steps(model)
    module = steps.module
    if module._compiled_call_impl is not None:
        raise ConfigError(
            f"{type(module).__name__} is compiled or captured already: call surgery.release(model) first, or compile "
            "its blocks (surgery.compile_blocks), which can be captured"
        )
    refused = steps.refused or _refused(module)
    if refused is not None:
        logger.warning("surgery: steps run without CUDA graphs: %s", refused)
        return model
    trust_own_positions(module)
    if "trl" in sys.modules:
        with patches.transaction("trl.every-position", reason="steps are recorded as CUDA graphs") as transaction:
            keep(module, transaction.receipts)
            transaction.commit()
    # What `nn.Module.compile` sets: `__call__` uses it in place of `_call_impl`, hooks and all; copies leave it out.
    module._compiled_call_impl = Calls(module, warmup=warmup, limit=limit)
    at_release(module, _undo(module))
    return model


def tally(model: nn.Module) -> str:
    """Tell what became of the training calls of a captured model; empty for one that is not captured."""
    calls = strategy_of(model).steps(model).module._compiled_call_impl
    return calls.tally() if isinstance(calls, Calls) else ""


def _refused(model: nn.Module) -> str | None:
    elsewhere = {each.device.type for each in model.parameters()} - {"cuda"}
    if elsewhere:
        return f"parameters are on {', '.join(sorted(elsewhere))}"
    return None if any(each.requires_grad for each in model.parameters()) else "nothing is trained"


def _undo(module: nn.Module) -> Callable[[], object]:
    reference = weakref.ref(module)

    def undo() -> None:
        module = reference()
        if module is not None and isinstance(module._compiled_call_impl, Calls):
            del module._compiled_call_impl

    return undo


class _NotOfAKindError(Exception):
    """A call that no recording can stand for."""


class Pending:
    """A forward whose backward may come: until it has, or cannot any more since nothing holds its outputs."""

    is_over = False


@dataclass(kw_only=True)
class Kind:
    """Calls with arguments of the same shapes, and what is known of them.

    seen: how many have run. differentiated: what their backward began from, as numbers of differentiable outputs.
    """

    seen: int = 0
    differentiated: set[int] = field(default_factory=set)
    recording: Recording | None = None
    refused: bool = False


class Calls:
    """The calls of a captured model. record: as `Recorder.record`, by default of a recorder of its own."""

    def __init__(
        self, model: nn.Module, *, warmup: int, limit: int, record: Callable[..., Recording] | None = None
    ) -> None:
        self._model = weakref.ref(model)
        self._warmup = warmup
        self._limit = limit
        self._record = record or Recorder().record
        self._kinds: dict[object, Kind] = {}
        self._pending: list[weakref.ref[Pending]] = []
        self._steps: Steps | None = None
        self._switches: list[Any] = []
        self._is_full = False
        self._ran = self._replayed = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the model, replayed where they can be."""
        model: Any = self._model()
        if not (model.training and torch.is_grad_enabled()):
            return model._call_impl(*args, **kwargs)
        given = _without_full_mask(kwargs)
        leaves, structure = tree_flatten((args, given))
        kind = self._kind_of(leaves, structure)
        if kind is None or not self._may_replay(kind):
            return self._run(kind, model, args, kwargs)
        if kind.recording is None:
            self._try_to_record(kind, model, leaves, structure)
        if kind.recording is None:
            return self._run(kind, model, args, kwargs)
        return self._replay(kind.recording, leaves)

    def tally(self) -> str:
        """Count the shapes that were recorded, and the calls that were replayed."""
        recorded = sum(kind.recording is not None for kind in self._kinds.values())
        refused = sum(kind.refused for kind in self._kinds.values())
        return (
            f"{recorded} shapes recorded, {refused} that cannot be; {self._replayed} calls replayed, {self._ran} run "
            "as without"
        )

    def _kind_of(self, leaves: Sequence[Any], structure: TreeSpec) -> Kind | None:
        try:
            key = (str(structure), self._setting(), tuple(map(_described, leaves)))
        except _NotOfAKindError:
            return None
        if key not in self._kinds and len(self._kinds) >= self._limit:
            if not self._is_full:
                logger.warning("surgery: calls of more than %d shapes run without CUDA graphs%s", self._limit, ADVICE)
            self._is_full = True
            return None
        return self._kinds.setdefault(key, Kind())

    def _setting(self) -> object:
        if self._steps is None:  # in the first call, since a trainer may have wrapped modules until then
            model: Any = self._model()
            self._steps = strategy_of(model).steps(model)
            self._switches = [each for each in model.modules() if hasattr(each, "_active_adapter")]
        active = frozenset((each._disable_adapters, str(each._active_adapter)) for each in self._switches)
        return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), active

    def _may_replay(self, kind: Kind) -> bool:
        assert self._steps is not None
        if kind.refused or kind.seen < self._warmup or not kind.differentiated:
            return False
        self._pending = [each for each in self._pending if (pending := each()) is not None and not pending.is_over]
        if self._pending or not self._steps.is_regular():
            return False
        if kind.recording is not None and not kind.recording.holds():
            # Weights were moved, or a failed capture has cost random numbers their state: recordings read the old one.
            self._kinds = {key: each for key, each in self._kinds.items() if each.refused}
            return False
        return True

    def _run(self, kind: Kind | None, model: Any, args: Any, kwargs: Any) -> Any:
        """Call the model as ever, and see whether, and where, its backward begins."""
        self._ran += 1
        with nullcontext() if kind is None or kind.refused else recordable():
            outputs = model._call_impl(*args, **kwargs)
        leaves, structure = tree_flatten(outputs)
        numbers = [n for n, each in enumerate(leaves) if isinstance(each, torch.Tensor) and each.requires_grad]
        pending = self._expect_backward()
        if kind is None or kind.refused:
            for number in numbers:
                leaves[number].register_hook(_ending(pending))
            return outputs
        kind.seen += 1
        begun: Any = Beginning.apply(pending, kind.differentiated, *(leaves[number] for number in numbers))  # type: ignore[no-untyped-call]
        for number, each in zip(numbers, begun, strict=True):
            leaves[number] = each
        return tree_unflatten(leaves, structure)

    def _expect_backward(self) -> Pending:
        pending = Pending()
        self._pending.append(weakref.ref(pending))
        return pending

    def _try_to_record(self, kind: Kind, model: Any, leaves: Sequence[Any], structure: TreeSpec) -> None:
        assert self._steps is not None
        try:
            kind.recording = self._record(model, self._steps, leaves, structure, frozenset(kind.differentiated))
        except Exception as error:  # whatever a model does that cannot be captured; nothing of it was executed
            kind.refused = True
            first = error.__context__ or error
            logger.warning("surgery: calls of this shape run without CUDA graphs: %s", _line(first))
            logger.debug("surgery: it was recorded this far", exc_info=error)
        else:
            number = sum(each.recording is not None for each in self._kinds.values())
            logger.info("surgery: recorded as CUDA graphs: calls of %d shapes, of %d at most", number, self._limit)

    def _replay(self, recording: Recording, leaves: Sequence[Any]) -> Any:
        assert self._steps is not None
        self._replayed += 1
        self._steps.settle()
        recording.take(leaves)
        outputs = Replay.apply(recording, self._expect_backward(), *recording.inputs)  # type: ignore[no-untyped-call]
        return recording.assemble(outputs)


class Replay(torch.autograd.Function):
    """The two graphs of a recording as one function of what is trained."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, pending: Pending, *_inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Copies of the outputs."""
        ctx.recording, ctx.pending = recording, pending
        ctx.set_materialize_grads(False)
        recording.forward.replay()
        outputs = tuple(output.clone() for output in recording.outputs)
        ctx.mark_non_differentiable(
            *(o for o, needs in zip(outputs, recording.differentiable, strict=True) if not needs)
        )
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the inputs."""
        if ctx.pending.is_over:
            raise RuntimeError(
                "a captured step was differentiated a second time, but the first has overwritten what it needs: add "
                "the losses up before backward(), or call surgery.release(model)"
            )
        ctx.pending.is_over = True
        return (None, None, *ctx.recording.differentiate(gradients))


class Beginning(torch.autograd.Function):
    """Copies of a call's outputs, to see which of them a backward begins from.

    The outputs themselves do not tell: a loss is made of logits, which are an output too.
    """

    @staticmethod
    def forward(ctx: Any, pending: Pending, seen: set[int], *outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The copies."""
        ctx.pending, ctx.seen = pending, seen
        ctx.set_materialize_grads(False)
        return tuple(output.clone() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """The gradients."""
        ctx.pending.is_over = True
        ctx.seen.update(number for number, gradient in enumerate(gradients) if gradient is not None)
        return (None, None, *gradients)


def _ending(pending: Pending) -> Callable[[torch.Tensor], None]:
    def hook(_gradient: torch.Tensor) -> None:
        pending.is_over = True

    return hook


def _described(leaf: Any) -> object:
    if not isinstance(leaf, torch.Tensor):
        if isinstance(leaf, PLAIN):
            return type(leaf), leaf
        raise _NotOfAKindError
    if leaf.requires_grad or isinstance(leaf, DTensor):
        raise _NotOfAKindError
    return leaf.shape, leaf.dtype, leaf.device


def _without_full_mask(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` without an attention mask that masks nothing.

    transformers looks for that too, which waits for the GPU, and so not while a graph is recorded: it would compute
    with the mask then, by other kernels.
    """
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and bool(mask.all()):
        return {**kwargs, "attention_mask": None}
    return kwargs


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
