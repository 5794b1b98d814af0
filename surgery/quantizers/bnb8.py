"""8-bit linear layers of bitsandbytes (LLM.int8), of weights that a checkpoint has in int8 already.

`Linear8bitLt.forward` keeps the weight that it was given first in a state of its own, and puts that in the place of its
parameter: a gathered weight would stay for ever. Sharded layers have a forward that takes the weight as it is now.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from surgery.checkpoint import PackedSettings, PackedWeight, TensorEntry
from surgery.checkpoint.packed import INT8
from surgery.config import Quant8
from surgery.errors import ConfigError
from surgery.model.pretrained import is_pretrained, mark_quantized
from surgery.model.tree import is_conv1d, was_conv1d
from surgery.quantizers.base import Layout, QuantFormat, register

__all__ = ["Bnb8bit"]


@functools.cache
def _sharded_linear() -> Any:
    """The class of layers whose weight is int8 in another dtype, `(n, 1)`, and theirs for one forward only."""
    import bitsandbytes
    from bitsandbytes.nn import Linear8bitLt

    class ShardedLinear8bit(Linear8bitLt):
        """A `Linear8bitLt` that keeps no weight; `quant_state` is the `SCB` of all rows, `(out,)` float32."""

        quant_state: torch.Tensor | None = None

        #: PEFT asks this before the weight, whose dtype is that of the storage, in which adapters would be rounded.
        compute_dtype = torch.int8

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """`x @ weight.T + bias`, as `Linear8bitLt`."""
            state = copy.copy(self.state)
            packed = self.weight.detach().view(-1).view(torch.int8)
            state.CB = packed[: self.out_features * self.in_features].view(self.out_features, self.in_features)
            state.SCB, state.is_training = self.quant_state, self.training
            bias: torch.Tensor | None = getattr(self, "bias", None)
            bias = None if bias is None else bias.to(x.dtype)
            out: torch.Tensor = bitsandbytes.matmul(x, state.CB, bias=bias, state=state)
            return out

    return ShardedLinear8bit


class Bnb8bit(QuantFormat):
    """`Linear8bitLt` of bitsandbytes: a byte a value, and the largest absolute value of each row."""

    label = "bitsandbytes 8-bit"
    quantizes = False

    options: Quant8

    def __init__(self, options: Quant8, *, dtype: torch.dtype, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__(options, dtype=dtype, compute_dtype=compute_dtype)
        if compute_dtype not in (None, dtype):
            raise ConfigError(
                f"compute_dtype={compute_dtype} with weights in 8 bits, whose layers multiply in the dtype of their "
                f"input: leave it out, or use dtype={compute_dtype}"
            )

    @property
    def storage(self) -> torch.dtype:
        """`quant_storage`, or the dtype of the model."""
        return self.options.storage_for(self.dtype)

    def replacement(self, module: Any) -> nn.Module:
        """A frozen `Linear8bitLt` on meta, its weight in packed shape; also in the place of upstream's own."""
        out_features, in_features = module.weight.shape[:: -1 if is_conv1d(module) else 1]
        bias = getattr(module, "bias", None)
        new: Any = _sharded_linear()(
            in_features,
            out_features,
            bias=bias is not None,
            has_fp16_weights=False,
            threshold=self.options.threshold,
            device="meta",
        )
        packed = self.layout(new, "weight").packed_shape(self.logical(new, "weight"), self.storage)
        new.weight = nn.Parameter(torch.empty(packed, dtype=self.storage, device="meta"), requires_grad=False)
        if bias is not None:
            # FSDP1 flattens weight and bias into one tensor, which has one dtype.
            as_stored = self.storage.is_floating_point and bias.dtype == self.dtype
            dtype = self.storage if as_stored else bias.dtype
            new.bias = nn.Parameter(torch.empty(bias.shape, dtype=dtype, device="meta"))
        new.source_cls = getattr(
            module, "source_cls", type(module)
        )  # as transformers sets it: what to transpose when it saves
        new.train(module.training)
        new._is_hf_initialized = True  # as transformers sets it: what not to initialize
        frozen: nn.Module = new.requires_grad_(requires_grad=False)
        return frozen

    @classmethod
    def is_quantized(cls, module: nn.Module) -> bool:
        """Whether `module` is a `Linear8bitLt`."""
        from bitsandbytes.nn import Linear8bitLt

        return isinstance(module, Linear8bitLt)

    def is_transposed(self, module: nn.Module) -> bool:
        """Whether `module` is transformers' `Conv1D`, or the `Linear8bitLt` that upstream has made of one."""
        return super().is_transposed(module) or was_conv1d(module)

    def layout(self, module: Any, name: str) -> Layout:
        """An element a byte, a statistic a row."""
        return Layout(values_per_byte=1, blocksize=module.in_features)

    def mark(self, model: nn.Module) -> None:
        """Set what transformers sets on a model that it loads in 8 bits, and what PEFT chooses its LoRA layer by."""
        model.is_loaded_in_8bit = True  # type: ignore[assignment]
        if is_pretrained(model):
            mark_quantized(model, dtype=self.dtype, load_in_8bit=True, llm_int8_threshold=self.options.threshold)

    def options_for(self, packing: PackedSettings) -> Quant8:
        """The options with the threshold of the checkpoint, unless one was asked for.

        Raises `ConfigError` for weights in 4 bits.
        """
        if packing.quant_type != INT8:
            raise ConfigError(
                f"quant: asked for 8 bits, and the checkpoint is packed already, as {packing.kind}: leave it out, or "
                "use surgery.Quant()"
            )
        return replace(self.options, threshold=packing.threshold) if self.options.threshold is None else self.options

    def stored_state(
        self, stored: PackedWeight, statistics: torch.Tensor, read: Callable[[TensorEntry], torch.Tensor]
    ) -> torch.Tensor:
        """`SCB`, the largest absolute values of rows, `(out,)` float32."""
        return statistics

    @staticmethod
    def like(parameter: Any, data: torch.Tensor) -> nn.Parameter:
        """An `Int8Params` with the same statistics, or a plain parameter, as `parameter` is."""
        from bitsandbytes.nn import Int8Params

        if not isinstance(parameter, Int8Params):
            return QuantFormat.like(parameter, data)
        return Int8Params(data, requires_grad=False, CB=None if parameter.CB is None else data, SCB=parameter.SCB)

    def state_of(self, module: Any, name: str) -> torch.Tensor:
        """`SCB`: of a whole layer that of the state, or of the parameter until a forward has moved it."""
        found: torch.Tensor | None = vars(module).get("quant_state", module.state.SCB)
        state: torch.Tensor = module.weight.SCB if found is None else found
        return state

    def finish(self, model: nn.Module) -> None:
        """Make the layers those of bitsandbytes: what stays whole, PEFT can merge into and transformers can save."""
        from bitsandbytes.nn import Int8Params, Linear8bitLt

        layers: list[Any] = [each for each in model.modules() if type(each) is _sharded_linear()]
        for module in layers:
            weight = module.weight.detach().view(-1).view(torch.int8).view(self.logical(module, "weight"))
            module.weight = Int8Params(weight, requires_grad=False, CB=weight, SCB=vars(module).pop("quant_state"))
            module.__class__ = Linear8bitLt


register(Quant8, Bnb8bit)
