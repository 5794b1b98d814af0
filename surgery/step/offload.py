"""Inputs of recomputed blocks that wait for backward in pinned memory of the host, copied beside the computing."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["Offload"]


class Offload:
    """Host memory and streams for the inputs of one model's blocks. It needs a device: what is on a CPU stays.

    The copy of an input to the host runs while its block computes, and the memory on the device is free once the next
    block begins. In backward, each block that begins has the input of the block before it copied back. Host memory is
    used again in later steps, whatever their shapes, and freed with the model: a buffer for each input that waits at
    any one time, as large as the largest input. A copy of this object, or a pickle, begins with none.
    """

    def __init__(self) -> None:
        self._lanes: dict[torch.device, _Lane] = {}

    def __reduce__(self) -> tuple[type[Offload], tuple[()]]:
        return type(self), ()

    def saving(self, tensor: torch.Tensor, *, stays: bool) -> saved_tensors_hooks:
        """A context in which `tensor`, if autograd saves it, waits on the host, and all else where it is.

        stays: for the last block, whose backward comes next: it stays, and the one before it is copied back.
        """
        lane = self._lane(tensor.device)
        given = weakref.ref(tensor)  # autograd keeps this function for as long as what it has packed

        def pack(saved: torch.Tensor) -> Any:
            if lane is None or saved is not given() or type(saved) is not torch.Tensor:
                return saved
            return lane.send(saved.detach(), stays=stays)

        return saved_tensors_hooks(pack, _unpack)

    def _lane(self, device: torch.device) -> _Lane | None:
        if not leaves(device):
            return None
        if device not in self._lanes:
            self._lanes[device] = _Lane(device)
        return self._lanes[device]


def leaves(device: torch.device) -> bool:
    """Whether memory of `device` is not the host's own."""
    return device.type not in ("cpu", "meta")


def _unpack(packed: Any) -> torch.Tensor:
    return packed.take() if isinstance(packed, _Waiting) else packed


class _Lane:
    """The way from a device and back: one stream for all copies, so that each begins when those before have ended.

    free: buffers by their id. recorded: those that a CUDA graph copies to and from whenever it is replayed. leaving:
    what may still be read by the copy to the host, and its version as torch counts operations in place. newest: what
    was sent last.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream(device)
        self._is_copying = False
        self.free: dict[int, torch.Tensor] = {}
        self.recorded: dict[int, torch.Tensor] = {}
        self.leaving: tuple[torch.Tensor, int] | None = None
        self.newest: Callable[[], _Waiting | None] = lambda: None

    def send(self, tensor: torch.Tensor, *, stays: bool) -> _Waiting:
        self.settle()
        buffer = None if stays else self._buffer(tensor.nbytes)
        waiting = _Waiting(self, tensor, buffer, self.newest)
        if waiting.on_host is not None:
            self.copy(waiting.on_host, tensor)
            self.leaving = tensor, tensor._version
        self.newest = weakref.ref(waiting)
        return waiting

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy after all that was computed until now, beside what is computed from now on."""
        self._stream.wait_stream(self._module.current_stream(self.device))
        with self._module.stream(self._stream):
            target.copy_(source, non_blocking=True)
        self._is_copying = True

    def settle(self) -> None:
        """Have what is computed from now on wait for the copies until now; the host does not wait."""
        if self._is_copying:  # else a graph that is being recorded would wait for what is not part of it
            self._module.current_stream(self.device).wait_stream(self._stream)
            self._is_copying = False
        leaving, self.leaving = self.leaving, None
        if leaving is not None and leaving[0]._version != leaving[1]:
            raise RuntimeError(
                "a decoder block has changed its input in place while that was copied to the host for backward: change "
                "a copy of it, or do not offload activations"
            )

    def is_capturing(self) -> bool:
        """Whether what is computed now is recorded as a CUDA graph."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _buffer(self, nbytes: int) -> torch.Tensor:
        """The smallest free buffer of `nbytes` or more; a new one takes the place of a free one that is too small."""
        fitting = [each for each in list(self.free.values()) if each.nbytes >= nbytes]
        if fitting:
            return self.free.pop(id(min(fitting, key=lambda each: each.nbytes)))
        if self.free:
            self.free.popitem()
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.device.type != "cpu")


class _Waiting:
    """A tensor that backward will ask for. on_host: the copy of it; None for what stays on the device."""

    def __init__(
        self,
        lane: _Lane,
        tensor: torch.Tensor,
        buffer: torch.Tensor | None,
        before: Callable[[], _Waiting | None],
    ) -> None:
        self._lane, self._buffer, self._before = lane, buffer, before
        self._home = lane.recorded if lane.is_capturing() else lane.free
        self._on_device = tensor if buffer is None else None
        self.on_host = None if buffer is None else buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    def take(self) -> torch.Tensor:
        """The tensor on its device, and begin to copy the one that was sent before it."""
        self.fetch()
        self._lane.settle()
        found = self._on_device
        assert found is not None
        if self.on_host is not None:
            self._on_device = None
        before = self._before()
        if before is not None:
            before.fetch()
        return found

    def fetch(self) -> None:
        """Begin to copy the tensor back. Its memory is of the stream that computes, as all others."""
        if self._on_device is None and self.on_host is not None:
            self._on_device = torch.empty(self.on_host.shape, dtype=self.on_host.dtype, device=self._lane.device)
            self._lane.copy(self._on_device, self.on_host)

    def __del__(self) -> None:
        if self._buffer is None:
            return
        if self._on_device is not None:
            self._lane.settle()  # backward ended early, and the copy must not write into what others are given
        # The next copy into it comes behind those that it is part of, on the same stream.
        self._home[id(self._buffer)] = self._buffer
