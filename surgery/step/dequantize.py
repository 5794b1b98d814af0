"""Dequantization of packed 4-bit weights: one Triton kernel, double quantization included, or bitsandbytes' two."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

__all__ = ["Workspace", "dequantize"]

#: Runs by which the two ways are compared on a device.
TRIALS = 5


class Workspace:
    """Memory that one weight after the other is dequantized into: one buffer a device, dtype and stream.

    What is dequantized into it is valid until the next weight is, on the same stream.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype, int], torch.Tensor] = {}

    def take(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for a weight of this shape, `(out, in)`, with any values."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key, elements = (device, dtype, stream), shape.numel()
        held = self._buffers.get(key)
        if held is None or held.numel() < elements:
            held = self._buffers[key] = torch.empty(elements, dtype=dtype, device=device)
        return held[:elements].view(shape)


def dequantize(packed: torch.Tensor, state: QuantState, workspace: Workspace) -> torch.Tensor:
    """The weight of `packed`, `state.shape` in `state.dtype`: bit for bit what bitsandbytes makes of it.

    On a GPU in `workspace`, by the faster of two ways there, which is found out once. packed: of any shape and storage
    dtype.
    """
    if not packed.is_cuda:
        from bitsandbytes import functional

        return functional.dequantize_4bit(packed.reshape(-1, 1), state)
    out = workspace.take(state.shape, state.dtype, packed.device)
    return _fastest(packed.device, state.dtype)(packed, state, out)


def _by_bitsandbytes(packed: torch.Tensor, state: QuantState, out: torch.Tensor) -> torch.Tensor:
    """Three kernels with double quantization: one for the statistics, one that adds their mean, one for the weight."""
    from bitsandbytes import functional

    return functional.dequantize_4bit(packed.reshape(-1, 1), state, out=out)


_Way = Callable[[torch.Tensor, "QuantState", torch.Tensor], torch.Tensor]


@functools.cache
def _fastest(device: torch.device, dtype: torch.dtype) -> _Way:
    """The way that takes less time on `device`; bitsandbytes' where Triton is absent, or does not make the same bits."""
    try:
        triton_way = _triton_way()
        packed, state, out = _specimen(device, dtype)
        if not torch.equal(
            triton_way(packed, state, out.clone()).view(torch.uint8),
            _by_bitsandbytes(packed, state, out).view(torch.uint8),
        ):
            return _by_bitsandbytes
    except (ImportError, RuntimeError):  # no Triton, or none for this GPU, or no compiler
        return _by_bitsandbytes
    ways = (triton_way, _by_bitsandbytes)
    return min(ways, key=lambda way: _milliseconds(functools.partial(way, packed, state, out)))


def _milliseconds(run: Callable[[], object]) -> float:
    """The shortest of a few runs, by the events of the current stream."""
    found = []
    for _ in range(TRIALS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return min(found)


def _specimen(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, QuantState, torch.Tensor]:
    """A weight of the size of those of an 8B model, with double quantization, and memory for it."""
    from bitsandbytes import functional

    with torch.random.fork_rng(devices=[device]):
        values = torch.randn(4096, 4096, dtype=torch.bfloat16, device=device)
    packed, state = functional.quantize_4bit(values.to(dtype), compress_statistics=True, quant_type="nf4")
    return packed, state, torch.empty(values.shape, dtype=dtype, device=device)


@functools.cache
def _triton_way() -> _Way:
    """The Triton kernel. Raises ImportError without Triton."""
    from surgery.step.triton_kernel import BYTES, unpack

    kernel: Any = unpack

    def way(packed: torch.Tensor, state: QuantState, out: torch.Tensor) -> torch.Tensor:
        """Launch the kernel once."""
        nested = state.state2
        values = packed.reshape(-1).view(torch.uint8)
        elements = out.numel()
        kernel[(-(-elements // (2 * BYTES)),)](
            values,
            state.absmax,
            state.code,
            state.absmax if nested is None else nested.absmax,
            state.code if nested is None else nested.code,
            state.code if nested is None else state.offset,
            out,
            elements,
            BLOCKSIZE=state.blocksize,
            NESTED=0 if nested is None else nested.blocksize,
            BYTES=BYTES,
            # A fused multiply-add would round once where bitsandbytes' kernels round twice.
            enable_fp_fusion=False,
        )
        return out

    return way
