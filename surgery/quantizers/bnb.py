"""4-bit weights of bitsandbytes: packed shapes, quantization in runs of whole blocks, `Params4bit`, `quant_state`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.config import Quant
from surgery.errors import ConfigError
from surgery.model.fqn import join

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

__all__ = [
    "BnbQuantizer",
    "as_params4bit",
    "is_linear_like",
    "is_params4bit",
    "kept_parameters",
    "linear4bits",
    "packed_shape",
    "with_data",
]

#: Elements quantized at a time. bitsandbytes' CPU kernel takes some 16 bytes of temporaries for each, the CUDA kernel
#: almost none: 2 MiB, no slower than more, and glibc gives less of it back to ask for it again (half the page faults);
#: and on a GPU 128 MiB of a 16-bit weight, so that most parts are one run.
RUN_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}

#: Statistics that share one statistic of their own, with double quantization; as in upstream's `quantize_4bit`.
NESTED_BLOCKSIZE = 256


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


def kept_parameters(model: nn.Module, dtype: torch.dtype, *, ends: bool = True) -> dict[str, nn.Parameter]:
    """Floating-point parameters of `model`, by FQN, that are neither in `dtype`, the model's, nor packed.

    Upstream keeps them so. ends: with those of the embedding and of the output head, which may be large.
    """
    from bitsandbytes.nn import Linear4bit

    named = ("get_input_embeddings", "get_output_embeddings")
    left_out = set() if ends else {getattr(model, name, lambda: None)() for name in named}
    found: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        stored = {dtype, module.weight.dtype} if isinstance(module, Linear4bit) else {dtype}
        for name, parameter in module._parameters.items() if module not in left_out else ():
            if parameter is not None and parameter.is_floating_point() and parameter.dtype not in stored:
                found[join(prefix, name)] = parameter
    return found


def _quantize_blocks(run: torch.Tensor, quant: Quant) -> tuple[torch.Tensor, torch.Tensor]:
    """`(packed bytes, float32 absmax)` of a flat run of whole blocks (the last one of a weight may be partial)."""
    # The operator under `functional.quantize_4bit`, which also copies a table of codes to the device, and waits for it.
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(run, quant.blocksize, quant.quant_type, torch.uint8)
    return packed.reshape(-1), absmax


def _quant_states(
    absmaxes: Sequence[torch.Tensor], shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype], quant: Quant
) -> list[QuantState]:
    """The `QuantState`s that `quantize_4bit` would build from these statistics."""
    from bitsandbytes.functional import QuantState

    make = functools.partial(QuantState, blocksize=quant.blocksize, quant_type=quant.quant_type)
    codes = [_code(quant.quant_type, absmax.device) for absmax in absmaxes]
    if not quant.double_quant:
        return [
            make(absmax, shape=shape, code=code, dtype=dtype)
            for absmax, shape, code, dtype in zip(absmaxes, shapes, codes, dtypes, strict=True)
        ]
    offsets = [absmax.mean() for absmax in absmaxes]
    nested = _quantize_statistics([absmax - offset for absmax, offset in zip(absmaxes, offsets, strict=True)])
    return [
        make(absmax, shape=shape, code=code, dtype=dtype, offset=offset, state2=state2)
        for (absmax, state2), shape, code, dtype, offset in zip(nested, shapes, codes, dtypes, offsets, strict=True)
    ]


def _quantize_statistics(statistics: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, QuantState]]:
    """What `quantize_blockwise(each, blocksize=256)` gives for each; by one kernel for all where no block would have
    statistics of two.
    """
    whole = all(each.numel() % NESTED_BLOCKSIZE == 0 for each in statistics)
    groups = [statistics] if whole and len(statistics) > 1 else [[each] for each in statistics]
    return [found for group in groups for found in _quantize_together(group)]


def _quantize_together(statistics: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, QuantState]]:
    from bitsandbytes.functional import QuantState

    code = _dynamic_code(statistics[0].device)
    together = torch.cat(list(statistics)) if len(statistics) > 1 else statistics[0]
    quantized, absmax = torch.ops.bitsandbytes.quantize_blockwise.default(together, code, NESTED_BLOCKSIZE)
    sizes = [each.numel() for each in statistics]
    parts = _apart(quantized, sizes), _apart(absmax, [-(-size // NESTED_BLOCKSIZE) for size in sizes])
    return [
        (part, QuantState(nested, code=code, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32))
        for part, nested in zip(*parts, strict=True)
    ]


def _apart(tensor: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """ShardBuffers of so many elements of a 1-D tensor, each in memory of its own, as upstream's are."""
    return [tensor] if len(sizes) == 1 else [part.clone() for part in torch.split(tensor, list(sizes))]


@functools.cache
def _code(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 values of a 4-bit type. One tensor for all weights: making one copies to the device, and waits for it."""
    from bitsandbytes.functional import get_4bit_type

    code: torch.Tensor = get_4bit_type(quant_type, device=device)
    return code


@functools.cache
def _dynamic_code(device: torch.device) -> torch.Tensor:
    """The 256 values that statistics are quantized to; one tensor for all, as `_code`."""
    from bitsandbytes.functional import create_dynamic_map

    code: torch.Tensor = create_dynamic_map().to(device)
    return code


def as_params4bit(
    data: torch.Tensor, module: Linear4bit, quant: Quant, quant_state: QuantState | None = None
) -> nn.Parameter:
    """A frozen `Params4bit` over `data` (packed shape, any device), belonging to `module`; it counts as quantized."""
    from bitsandbytes.nn import Params4bit

    return Params4bit(
        data,
        requires_grad=False,
        quant_state=quant_state,
        blocksize=quant.blocksize,
        compress_statistics=quant.double_quant,
        quant_type=quant.quant_type,
        quant_storage=module.quant_storage,
        module=module,
        bnb_quantized=True,
    )


def is_params4bit(parameter: torch.Tensor) -> bool:
    """Whether `parameter` is bitsandbytes' own kind, which carries how it is quantized."""
    from bitsandbytes.nn import Params4bit

    return isinstance(parameter, Params4bit)


def with_data(parameter: Any, data: torch.Tensor) -> nn.Parameter:
    """A `Params4bit` like `parameter`, with the same `quant_state`, over `data`."""
    from bitsandbytes.nn import Params4bit

    return Params4bit(
        data,
        requires_grad=False,
        quant_state=parameter.quant_state,
        blocksize=parameter.blocksize,
        compress_statistics=parameter.compress_statistics,
        quant_type=parameter.quant_type,
        quant_storage=parameter.quant_storage,
        module=parameter.module,
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

    @property
    def blocksize(self) -> int:
        """Elements that share one absmax."""
        return self.quant.blocksize

    def run_elements(self, device: torch.device) -> int:
        """Whole blocks; every block size is a power of two, and divides these."""
        return RUN_ELEMENTS.get(device.type, RUN_ELEMENTS["cuda"])

    def replacement(self, linear: Any) -> nn.Module:
        """A frozen `Linear4bit` on meta, its weight in packed shape, for an `nn.Linear` or `Conv1D`.

        Its bias takes the dtype of the storage, unless it is kept in another one than the model's.
        """
        from bitsandbytes.nn import Linear4bit

        out_features, in_features = linear.weight.shape[:: -1 if is_conv1d(linear) else 1]
        storage = self.quant.storage_for(self.dtype)
        packed = packed_shape((out_features, in_features), storage)
        bias = getattr(linear, "bias", None)
        new: Any = Linear4bit(
            in_features,
            out_features,
            bias=bias is not None,
            compute_dtype=self.compute_dtype,
            compress_statistics=self.quant.double_quant,
            quant_type=self.quant.quant_type,
            quant_storage=storage,
            device="meta",
        )
        new.weight = as_params4bit(torch.empty(packed, dtype=storage, device="meta"), new, self.quant)
        if bias is not None:
            # FSDP1 flattens weight and bias into one tensor, which has one dtype.
            bias_dtype = storage if storage.is_floating_point and bias.dtype == self.dtype else bias.dtype
            new.bias = nn.Parameter(torch.empty(bias.shape, dtype=bias_dtype, device="meta"))
        new.train(linear.training)
        # As transformers sets them: what to transpose when it saves, and what not to initialize.
        new.source_cls, new._is_hf_initialized = type(linear), True
        frozen: nn.Module = new.requires_grad_(requires_grad=False)
        return frozen

    def is_quantized(self, module: nn.Module) -> bool:
        """Whether `module` is a `Linear4bit`."""
        from bitsandbytes.nn import Linear4bit

        return isinstance(module, Linear4bit)

    def logical(self, module: Any) -> torch.Size:
        """`(out, in)`."""
        return torch.Size((module.out_features, module.in_features))

    def quantize(self, run: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """By the same kernel as `bitsandbytes.functional.quantize_4bit`, which makes a table of codes each time too."""
        return _quantize_blocks(run.to(dtype or self.dtype), self.quant)

    def states(
        self,
        statistics: Sequence[torch.Tensor],
        shapes: Sequence[torch.Size],
        dtypes: Sequence[torch.dtype | None] | None = None,
    ) -> list[QuantState]:
        """The `QuantState`s that `quantize_4bit` would have made of the whole weights.

        With double quantization the statistics of a weight are quantized too, all together, because their mean is taken
        off first.
        """
        quantized_from = [dtype or self.dtype for dtype in dtypes or [None] * len(shapes)]
        return _quant_states(statistics, shapes, quantized_from, self.quant)

    def parameter(self, module: Any, packed: torch.Tensor, state: QuantState) -> nn.Parameter:
        """A `Params4bit`."""
        return as_params4bit(packed, module, self.quant, state)

    def set_state(self, module: Any, state: QuantState) -> None:
        """As `module.quant_state`, where bitsandbytes looks for it when a parameter has lost its own."""
        module.quant_state = state
