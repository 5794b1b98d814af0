"""Dequantization of packed 4-bit weights: one Triton kernel, double quantization included, or bitsandbytes' two."""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from surgery.quantizers.stack import code_of

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

__all__ = ["Workspace"]

#: Runs by which the two ways are compared on a device.
TRIALS = 5


class Workspace:
    """Memory that one weight after the other is dequantized into: one buffer a device, dtype and stream.

    What is there is valid until the next weight is dequantized on the same stream: hold `lock` until what reads it is
    launched, since another thread may run the same layers. budget: bytes of weights that are dequantized once, and
    kept; the first ones that are asked for.
    """

    def __init__(self, budget: int = 0) -> None:
        self.lock = threading.Lock()
        self._left = budget
        self._kept: dict[int, tuple[QuantState, torch.Tensor]] = {}  # by what a state is: it cannot be hashed
        self._buffers: dict[tuple[torch.device, torch.dtype, int], torch.Tensor] = {}

    def weight(self, packed: torch.Tensor, state: QuantState) -> torch.Tensor:
        """The weight of `packed`, `state.shape` in `state.dtype`: bit for bit what bitsandbytes makes of it.

        On a GPU by the faster of two ways there, which is found out once. packed: bytes, 1-D and uint8.
        """
        kept = self._kept.get(id(state))
        if kept is not None:
            return kept[1]
        size = state.shape.numel() * state.dtype.itemsize
        if size > self._left:
            return _dequantize(packed, state, self._buffer)
        self._left -= size
        new = _dequantize(packed, state, torch.empty)
        self._kept[id(state)] = state, new
        return new

    def _buffer(self, shape: torch.Size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for a weight of this shape, `(out, in)`, with any values."""
        key, elements = (device, dtype, torch._C._cuda_getCurrentRawStream(device.index)), shape.numel()
        held = self._buffers.get(key)
        if held is None or held.numel() < elements:
            held = self._buffers[key] = torch.empty(elements, dtype=dtype, device=device)
        return held[:elements].view(shape)


def _dequantize(packed: torch.Tensor, state: QuantState, memory: Callable[..., torch.Tensor]) -> torch.Tensor:
    if not packed.is_cuda:
        found: torch.Tensor = functional().dequantize_4bit(packed.view(-1, 1), state)
        return found
    out = memory(state.shape, dtype=state.dtype, device=packed.device)
    return _fastest(packed.device, state.dtype, state.quant_type)(packed, state, out)


def _by_bitsandbytes(packed: torch.Tensor, state: QuantState, out: torch.Tensor) -> torch.Tensor:
    """Three kernels with double quantization: one for the statistics, one that adds their mean, one for the weight."""
    functional().dequantize_4bit(packed.view(-1, 1), state, out=out)
    return out


_Way = Callable[[torch.Tensor, "QuantState", torch.Tensor], torch.Tensor]


@functools.cache
def _fastest(device: torch.device, dtype: torch.dtype, quant_type: str) -> _Way:
    """The faster way on `device`; bitsandbytes' where Triton is absent, or does not make the same bits."""
    try:
        triton_way = _triton_way()
        packed, state, out = _specimen(device, dtype, quant_type)
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
    found: list[float] = []
    event: Any = torch.cuda.Event
    for _ in range(TRIALS):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return min(found)


def _specimen(device: torch.device, dtype: torch.dtype, quant_type: str) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """A weight of the size of those of an 8B model, with double quantization, and memory for it."""
    with torch.random.fork_rng(devices=[device]):
        values = torch.randn(4096, 4096, dtype=torch.bfloat16, device=device)
    packed, state = functional().quantize_4bit(values.to(dtype), compress_statistics=True, quant_type=quant_type)
    return packed.view(-1), state, torch.empty(values.shape, dtype=dtype, device=device)


@functools.cache
def _triton_way() -> _Way:
    """The Triton kernel. Raises ImportError without Triton."""
    from surgery.step.triton_kernel import BYTES, unpack

    kernel: Any = unpack

    def way(packed: torch.Tensor, state: QuantState, out: torch.Tensor) -> torch.Tensor:
        """Launch the kernel once."""
        nested = state.state2
        elements = out.numel()
        kernel[(-(-elements // (2 * BYTES)),)](
            packed,
            state.absmax,
            _code(state.quant_type, out.device),
            state.absmax if nested is None else nested.absmax,
            state.absmax if nested is None else nested.code,
            state.absmax if nested is None else state.offset,
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


@functools.cache
def _code(quant_type: str, device: torch.device) -> torch.Tensor:
    """The values of a 4-bit type, as bitsandbytes' kernel for a GPU has them: with a zero that is negative in fp4."""
    code = code_of(quant_type, device)
    if quant_type == "fp4":
        code = code.clone()
        code[8] = -0.0
    return code


@functools.cache
def functional() -> Any:
    """`bitsandbytes.functional`, imported when it is needed. Its functions are looked up there, so that patches act."""
    return importlib.import_module("bitsandbytes.functional")
