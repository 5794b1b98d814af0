"""4-bit weights of bitsandbytes: packed shapes, quantization in runs of whole blocks, `Params4bit`, `quant_state`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.config import Quant
from surgery.errors import ConfigError

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

__all__ = [
    "BnbQuantizer",
    "as_params4bit",
    "is_linear_like",
    "linear4bits",
    "packed_shape",
    "quantize_in_runs",
]

#: Elements quantized at a time. bitsandbytes' CPU kernel takes some 16 bytes of temporaries for each, the CUDA kernel
#: almost none: 4 MiB, no slower than more; and one launch for all but the largest weights.
RUN_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 28}


def packed_shape(shape: torch.Size | tuple[int, ...], storage: torch.dtype) -> tuple[int, int]:
    """Shape `(n, 1)` of the packed form, in elements of `storage`, of a weight of logical `shape`.

    Two 4-bit values make a byte, and an odd last value takes a byte of its own; bytes that do not fill an element of
    `storage` cannot be stored, and raise `ConfigError`.
    """
    elements = torch.Size(shape).numel()
    size = (elements + 1) // 2
    if size % storage.itemsize:
        raise ConfigError(
            f"a weight of shape {tuple(shape)} packs into {size} bytes, which {storage} ({storage.itemsize} bytes an "
            "element) cannot hold: choose a smaller quant_storage, or leave the module in 16 bits with skip_modules"
        )
    return size // storage.itemsize, 1


def is_linear_like(module: nn.Module) -> bool:
    """Whether bitsandbytes has a 4-bit form of `module`: exactly `nn.Linear`, or transformers' transposed `Conv1D`."""
    return type(module) is nn.Linear or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D` (GPT-2): a linear layer that keeps its weight as `(in, out)`."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def linear4bits(model: nn.Module) -> list[Linear4bit]:
    """Every `Linear4bit` of `model`, once each."""
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def quantize_in_runs(
    weight: torch.Tensor,
    quant: Quant,
    *,
    storage: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
    keep_packed: bool = True,
) -> tuple[torch.Tensor, QuantState]:
    """Quantize `weight`, bit-identically to `quantize_4bit(weight.to(device, dtype))`, a run of whole blocks at a time.

    Args:
        weight: logical shape `(out, in)`, any floating dtype, strides and device but meta.
        quant: type, blocksize and double quantization; its storage is not looked at.
        storage: dtype of the packed result.
        dtype: what the weight is cast to before it is quantized; becomes `quant_state.dtype`.
        device: where it is quantized, and where the results are.
        keep_packed: False gives the packed tensor on meta; its bytes are dropped run by run.

    Returns:
        The packed tensor, `packed_shape(weight.shape, storage)`, and its `QuantState`, both on `device`.

    Blocks are independent, so runs of them are too; the absmax values of all runs are quantized together at the end,
    because double quantization subtracts their common mean.
    """
    weight = weight.detach()
    run = max(RUN_ELEMENTS.get(device.type, 1 << 24) // quant.blocksize, 1) * quant.blocksize
    packed = torch.empty(packed_shape(weight.shape, storage), dtype=storage, device=device if keep_packed else "meta")
    out = packed.reshape(-1).view(torch.uint8)
    absmax = torch.empty(-(-weight.numel() // quant.blocksize), dtype=torch.float32, device=device)
    for start in range(0, weight.numel(), run):
        stop = min(start + run, weight.numel())
        piece, stats = _quantize_blocks(_elements(weight, start, stop).to(device, dtype), quant)
        absmax[start // quant.blocksize :][: stats.numel()] = stats
        if keep_packed:
            out[start // 2 :][: piece.numel()] = piece
    return packed, _quant_state(absmax, weight.shape, dtype, quant)


def _elements(weight: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Elements `start` to `stop` of the flattened `weight`; copies the rows that they are in if it is transposed."""
    columns = weight.shape[1]
    first, last = start // columns, -(-stop // columns)
    return weight[first:last].reshape(-1)[start - first * columns : stop - first * columns]


def _quantize_blocks(run: torch.Tensor, quant: Quant) -> tuple[torch.Tensor, torch.Tensor]:
    """`(packed bytes, float32 absmax)` of a flat run of whole blocks (the last one of a weight may be partial)."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        run, blocksize=quant.blocksize, quant_type=quant.quant_type, quant_storage=torch.uint8
    )
    return packed.reshape(-1), state.absmax


def _quant_state(absmax: torch.Tensor, shape: torch.Size, dtype: torch.dtype, quant: Quant) -> QuantState:
    """The `QuantState` that `quantize_4bit` would build from these statistics."""
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

    common: dict[str, Any] = {
        "shape": shape,
        "dtype": dtype,
        "blocksize": quant.blocksize,
        "code": get_4bit_type(quant.quant_type, device=absmax.device),
        "quant_type": quant.quant_type,
    }
    if not quant.double_quant:
        return QuantState(absmax=absmax, **common)
    offset = absmax.mean()
    quantized, state2 = quantize_blockwise(absmax - offset, blocksize=256)
    return QuantState(absmax=quantized, offset=offset, state2=state2, **common)


def as_params4bit(data: torch.Tensor, module: Linear4bit, quant_state: QuantState) -> nn.Parameter:
    """A quantized, frozen `Params4bit` over `data` (packed shape, any device), belonging to `module`."""
    from bitsandbytes.nn import Params4bit

    return Params4bit(
        data,
        requires_grad=False,
        quant_state=quant_state,
        blocksize=quant_state.blocksize,
        compress_statistics=quant_state.nested,
        quant_type=quant_state.quant_type,
        quant_storage=module.quant_storage,
        module=module,
        bnb_quantized=True,
    )


@dataclass(frozen=True, kw_only=True)
class BnbQuantizer:
    """`Linear4bit` of bitsandbytes 0.47 and later (the first that quantizes every type on CPU).

    dtype: of the model: weights are cast to it before they are quantized, as `from_pretrained(dtype=...)` does.
    compute_dtype: in which the layer multiplies; None lets bitsandbytes follow its input.
    """

    quant: Quant
    dtype: torch.dtype
    compute_dtype: torch.dtype | None

    def replacement(self, linear: Any) -> nn.Module:
        """A frozen `Linear4bit` on meta for an `nn.Linear` or `Conv1D`; its bias takes the dtype of the storage."""
        from bitsandbytes.nn import Linear4bit, Params4bit

        out_features, in_features = linear.weight.shape[:: -1 if is_conv1d(linear) else 1]
        storage = self.quant.storage_for(self.dtype)
        packed_shape((out_features, in_features), storage)
        bias = getattr(linear, "bias", None)
        new = Linear4bit(
            in_features,
            out_features,
            bias=bias is not None,
            compute_dtype=self.compute_dtype,
            compress_statistics=self.quant.double_quant,
            quant_type=self.quant.quant_type,
            quant_storage=storage,
            device="meta",
        )
        new.weight = Params4bit(
            linear.weight.new_empty((out_features, in_features), device="meta"),
            requires_grad=False,
            blocksize=self.quant.blocksize,
            compress_statistics=self.quant.double_quant,
            quant_type=self.quant.quant_type,
            quant_storage=storage,
            module=new,
        )
        if bias is not None:
            # FSDP1 flattens weight and bias into one tensor, which has one dtype.
            bias_dtype = storage if storage.is_floating_point else bias.dtype
            new.bias = nn.Parameter(torch.empty(bias.shape, dtype=bias_dtype, device="meta"))
        new.train(linear.training)
        return new.requires_grad_(requires_grad=False)

    def is_quantized(self, module: nn.Module) -> bool:
        """Whether `module` is a `Linear4bit`."""
        from bitsandbytes.nn import Linear4bit

        return isinstance(module, Linear4bit)

    def quantize(self, module: nn.Module, weight: torch.Tensor, *, device: torch.device, keep_packed: bool) -> None:
        """Set `module.weight` (on `device`, or on meta) and `module.quant_state` (on `device`) from `weight`."""
        packed, quant_state = quantize_in_runs(
            weight,
            self.quant,
            storage=module.quant_storage,  # type: ignore[arg-type]  # a Linear4bit attribute, unknown to nn.Module
            dtype=self.dtype,
            device=device,
            keep_packed=keep_packed,
        )
        module.weight = as_params4bit(packed, module, quant_state)  # type: ignore[arg-type]
        module.quant_state = quant_state  # type: ignore[assignment]
