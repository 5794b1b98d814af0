"""Recordings of one call of a model and of its backward, as CUDA graphs over tensors that stay in place."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from surgery.sharding.steps import Steps

__all__ = ["CannotRecordError", "Recorder", "Recording", "check_reaches", "hand_over", "is_recordable", "recordable"]

#: Values, beside tensors, that an output may have: each replay returns the same.
PLAIN = (type(None), bool, int, float, str)

#: Graphs whose capture has failed: the allocator may still ask them which streams were theirs.
_failed: list[Any] = []

#: The states of random numbers that were given up, for devices by number: how many.
_given_up: Counter[int] = Counter()

#: Calls that are under way, and are, or will be, recorded.
_recordable: list[None] = []


@contextmanager
def recordable() -> Iterator[None]:
    """A block around a call that is recorded, or one before it that has to run the same kernels."""
    _recordable.append(None)
    try:
        yield
    finally:
        _recordable.pop()


def is_recordable() -> bool:
    """Whether the call that is under way is, or will be, recorded: it may not wait for the GPU."""
    return bool(_recordable)


class CannotRecordError(Exception):
    """A call that cannot be recorded, and why."""


class Recording:
    """A recorded call: where it reads arguments and writes outputs, and where its backward reads and writes gradients.

    inputs: what an autograd function takes for what is trained. outputs: the tensors of the result, as the forward
    graph writes them; differentiable: which of them need a gradient. starts: those that backward begins from, by their
    number among the differentiable ones -> the gradient, as the backward graph reads it. gradients: of `trained`, as
    the backward graph writes them; None for what had no part in it.
    """

    outputs: Sequence[torch.Tensor] = ()
    differentiable: Sequence[bool] = ()
    starts: dict[int, torch.Tensor]
    gradients: Sequence[torch.Tensor | None] = ()

    #: The graphs, which are to be replayed one after the other.
    forward: Any = None
    backward: Any = None

    def __init__(self, model: nn.Module, steps: Steps, leaves: Sequence[Any], structure: TreeSpec) -> None:
        self.arguments = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.structure = structure
        self.trained = [each for each in model.parameters() if each.requires_grad]
        self.sets_gradients = steps.sets_gradients
        # Without an input that needs a gradient, an autograd function has no backward.
        anchor = torch.zeros((), device=self.trained[0].device, requires_grad=True)
        self.inputs = [anchor] if steps.sets_gradients else self.trained
        self._read = [*model.parameters(), *model.buffers()]
        self._places = _places(self._read)
        self._device = self.trained[0].device.index
        self._given_up = _given_up[self._device]
        self._result: list[Any] = []
        self._result_structure: TreeSpec | None = None
        self._own: list[torch.Tensor | None] = []

    def holds(self) -> bool:
        """Whether the model's weights are where they were, and random numbers go on from the state that is read."""
        return self._given_up == _given_up[self._device] and _places(self._read) == self._places

    def take(self, leaves: Sequence[Any]) -> None:
        """Copy the tensors among the leaves of a call's arguments to where the forward graph reads them."""
        for place, leaf in zip(self.arguments, leaves, strict=True):
            if isinstance(leaf, torch.Tensor):
                place.copy_(leaf)

    def keep_result(self, result: Any) -> list[torch.Tensor]:
        """Note what a call has returned; returns the differentiable outputs, which `outputs` leaves out of autograd."""
        leaves, self._result_structure = tree_flatten(result)
        strange = [leaf for leaf in leaves if not isinstance(leaf, (torch.Tensor, *PLAIN))]
        if strange:
            raise CannotRecordError(f"it returns a {type(strange[0]).__name__}")
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self._result = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        self.differentiable = [tensor.requires_grad for tensor in tensors]
        self.outputs = [tensor.detach() for tensor in tensors]
        return [tensor for tensor in tensors if tensor.requires_grad]

    def keep_gradients(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Note where gradients of `trained` are written."""
        self.gradients = gradients
        if self.sets_gradients:
            self._own = [None if gradient is None else torch.empty_like(gradient) for gradient in gradients]

    def assemble(self, outputs: Sequence[torch.Tensor]) -> Any:
        """Make what the call returns, with `outputs` for the tensors in it."""
        assert self._result_structure is not None
        left = iter(outputs)
        leaves = [
            next(left) if is_tensor else leaf for is_tensor, leaf in zip(self._is_tensor, self._result, strict=True)
        ]
        return tree_unflatten(leaves, self._result_structure)

    def differentiate(self, gradients: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        """Replay backward from gradients of the outputs; returns those of `inputs`.

        Raises `RuntimeError` for an output that backward did not begin from when it was recorded.
        """
        given = [each for each, needs in zip(gradients, self.differentiable, strict=True) if needs]
        for number, gradient in enumerate(given):
            if gradient is not None and number not in self.starts:
                raise RuntimeError(
                    f"backward of a captured step begins from output {number} of those that can be differentiated, "
                    f"but in the calls before it was recorded it began from {sorted(self.starts)}: release the model "
                    "(surgery.release), and capture it again without mixing losses"
                )
        for number, start in self.starts.items():
            gradient = given[number]
            start.zero_() if gradient is None else start.copy_(gradient)
        self.backward.replay()
        if self.sets_gradients:
            hand_over(self.trained, self.gradients, self._own)
            return [None]
        return _fresh(self.gradients)


def hand_over(
    parameters: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor | None],
    own: Sequence[torch.Tensor | None],
) -> None:
    """Add `gradients` to `.grad` of `parameters`, as backward does; one that has none gets its tensor of `own`.

    Tensors may be `DTensor`s, all alike. `gradients` are only read.
    """
    written: list[tuple[torch.Tensor, torch.Tensor]] = []
    added: list[tuple[torch.Tensor, torch.Tensor]] = []
    for parameter, gradient, mine in zip(parameters, gradients, own, strict=True):
        if gradient is None or mine is None:
            continue
        if parameter.grad is None:
            parameter.grad = mine
            written.append((_local(mine), _local(gradient)))
        else:
            added.append((_local(parameter.grad), _local(gradient)))
    with torch.no_grad():
        if written:
            torch._foreach_copy_([mine for mine, _ in written], [gradient for _, gradient in written])
        if added:
            torch._foreach_add_([mine for mine, _ in added], [gradient for _, gradient in added])


def _fresh(gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Copies, which autograd may keep as the gradients of parameters."""
    made = [None if gradient is None else torch.empty_like(gradient) for gradient in gradients]
    there = [each for each in made if each is not None]
    if there:
        torch._foreach_copy_(there, [each for each in gradients if each is not None])
    return made


def _local(tensor: Any) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor  # `to_local` is for autograd, and slow


def _places(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [_local(tensor).data_ptr() for tensor in tensors]


class Recorder:
    """Records calls of one model. Its graphs share memory, so that one forward at a time may wait for its backward."""

    def __init__(self) -> None:
        self._stream: Any = None
        self._pool: Any = None

    def record(
        self, model: nn.Module, steps: Steps, leaves: Sequence[Any], structure: TreeSpec, started: frozenset[int]
    ) -> Recording:
        """Record the call of `model` on `leaves`, and a backward that begins from the differentiable outputs `started`.

        Nothing is executed. Raises whatever the model does while it is captured, and leaves it as it was before.
        """
        steps.settle()
        recording = Recording(model, steps, leaves, structure)
        _check(recording)
        device = recording.trained[0].device
        self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        steps.renew()
        try:
            with torch.cuda.device(device), _undisturbed(), recordable():
                self._record(recording, model, steps, started)
        except BaseException:
            self._pool = None
            steps.reset()
            _renew_generator(device)
            raise
        finally:
            steps.renew()
        return recording

    def _record(self, recording: Recording, model: nn.Module, steps: Steps, started: frozenset[int]) -> None:
        module: Any = model
        args, kwargs = tree_unflatten(recording.arguments, recording.structure)
        if _would_cache(model, kwargs):
            kwargs = {**kwargs, "use_cache": False}
        # Leaves of their own, which no earlier step holds: those live on the stream of that step, and have hooks.
        with nullcontext(()) if steps.sets_gradients else _aliases(model, recording.trained) as aliases:
            with self._capturing(steps.streams()) as recording.forward:
                result = module._call_impl(*args, **kwargs)
            outputs = recording.keep_result(result)
            del result
            if not started <= set(range(len(outputs))):
                raise CannotRecordError(f"it returns {len(outputs)} outputs that need gradients")
            recording.starts = {number: torch.empty_like(outputs[number]) for number in sorted(started)}
            ends, starts = [outputs[number] for number in recording.starts], list(recording.starts.values())
            if not steps.sets_gradients:
                check_reaches(ends)
            with self._capturing(steps.streams()) as recording.backward:
                if steps.sets_gradients:
                    gradients = _set_gradients(ends, starts, recording.trained)
                else:
                    gradients = list(torch.autograd.grad(ends, aliases, starts, allow_unused=True))
        recording.keep_gradients(gradients)

    @contextmanager
    def _capturing(self, others: Sequence[Any]) -> Iterator[torch.cuda.CUDAGraph]:
        """A block whose CUDA work, on the current stream and on `others`, becomes a graph.

        The others join the capture when it begins, since some work there waits for nothing, and are joined at its end.
        """
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        with torch.cuda.stream(self._stream):
            # Other threads may do as they like: NCCL's asks for events, a loader pins memory.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                for other in others:
                    other.wait_stream(self._stream)
                yield graph
                for other in others:
                    self._stream.wait_stream(other)
                graph.capture_end()
            except BaseException:
                _abandon(graph, self._pool)
                raise


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End a capture that has failed, and give its memory back."""
    try:
        graph.capture_end()
    except RuntimeError:  # the capture is not valid any more
        _failed.append(graph)
        device = torch.cuda.current_device()
        for give_back in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
            with suppress(RuntimeError):
                give_back(device, pool)


def _renew_generator(device: torch.device) -> None:
    """Have random numbers be drawn again after a capture has failed.

    Until torch 2.12 the state of the generator goes on as if graphs were captured, and raises. One with the same seed
    and offset takes its place; graphs that were recorded before go on reading the other, so they do not hold any more.
    """
    index: int = device.index
    generator = torch.cuda.default_generators[index]
    offset = generator.get_offset()
    try:
        torch.rand((), device=device)
    except RuntimeError:
        generator.graphsafe_set_state(generator.clone_state())
        _given_up[index] += 1
    else:
        generator.set_offset(offset)


def _check(recording: Recording) -> None:
    elsewhere = {each.device.type for each in recording.trained} - {"cuda"}
    if elsewhere:
        raise CannotRecordError(f"trained parameters are on {', '.join(sorted(elsewhere))}")
    if recording.sets_gradients and any(
        getattr(each, "_post_accumulate_grad_hooks", None) for each in recording.trained
    ):
        raise CannotRecordError("parameters have hooks that run when their gradient is there")


def check_reaches(ends: Sequence[torch.Tensor]) -> None:
    """Raise `CannotRecordError` if a reentrant checkpoint is behind `ends`: autograd sees no parameters beyond it."""
    left: list[Any] = [end.grad_fn for end in ends]
    seen = set[Any]()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise CannotRecordError("activations are recomputed by reentrant checkpoints: set use_reentrant=False")
        left += [following for following, _ in node.next_functions]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A block without garbage collection, which could free what belongs to a stream, and without casts of autocast."""
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        if collects:
            gc.enable()


@contextmanager
def _aliases(model: nn.Module, trained: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """A block in which modules have other parameters, over the same memory, in the place of `trained`."""
    made = {id(each): nn.Parameter(each.detach()) for each in trained}
    before = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in made
    ]
    try:
        for module, name, parameter in before:
            module._parameters[name] = made[id(parameter)]
        yield [made[id(each)] for each in trained]
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter


def _set_gradients(
    ends: Sequence[torch.Tensor], starts: Sequence[torch.Tensor], trained: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Run backward; returns the `.grad` that it has made for each of `trained`, which then have theirs as before."""
    before = [each.grad for each in trained]
    try:
        for each in trained:
            each.grad = None
        torch.autograd.backward(ends, starts)
        return [each.grad for each in trained]
    finally:
        for each, gradient in zip(trained, before, strict=True):
            each.grad = gradient


def _would_cache(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a model of transformers would return keys and values, which nobody asks for in training."""
    return bool(getattr(getattr(model, "config", None), "use_cache", False)) and not (
        {"use_cache", "past_key_values"} & kwargs.keys()
    )
