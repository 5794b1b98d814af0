"""LoRA on experts in 4 bits: PEFT's wrapper of a parameter, in split form. Imports PEFT."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from peft import LoraConfig
from peft.tuners.lora import layer
from torch import nn

from surgery.errors import ConfigError
from surgery.quantizers.grouped import SplitLora
from surgery.quantizers.stack import stacks_of

__all__ = ["NO_MERGE", "ParamWrapper"]

#: What is said to whoever merges adapters into packed experts.
NO_MERGE = (
    "adapters cannot be merged into experts in 4 bits in memory: save the adapter, and merge the files by `surgery "
    "merge`; unload() takes the adapters off"
)


class ParamWrapper(layer.ParamWrapper):
    """`ParamWrapper` of PEFT over a packed stack: the same parameters, keys and nesting, and PEFT's own name.

    PEFT adds the product of the factors to the whole weight, which is never there. These hand the factors down to the
    forward of the experts, which multiplies each token by those of its experts; so dropout works too.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: LoraConfig, **options: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, parameter_name, config=_undropped(config), **options)
        self._drop(adapter_name, config)

    def update_layer(self, adapter_name: str, *args: Any, config: LoraConfig, **options: Any) -> None:
        """Add an adapter, with dropout if `config` has it."""
        super().update_layer(adapter_name, *args, config=_undropped(config), **options)
        self._drop(adapter_name, config)

    def _drop(self, adapter_name: str, config: LoraConfig) -> None:
        if config.lora_dropout:
            self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)

    def get_param(self) -> torch.Tensor:
        """A stand-in with the shape `(experts, d1, d2)` and the dtype of the values, on their device; one element."""
        stack = stacks_of(self.get_base_layer())[self.parameter_name]
        packed: torch.Tensor = super().get_param()
        return packed.new_empty((), dtype=stack.dtype).expand(stack.experts, *stack.shape)

    def forward(self, x: torch.Tensor, *args: Any, lora: tuple[SplitLora, ...] = (), **options: Any) -> Any:
        """The experts' forward with the factors of the active adapters, and those that outer wrappers hand down."""
        self._check_forward_args(x, *args, **options)
        options.pop("adapter_names", None)
        own = (
            ()
            if self.disable_adapters
            else tuple(map(self._split, filter(self.lora_A.__contains__, self.active_adapters)))
        )
        return self.base_layer(x, *args, lora=(*lora, *own), **options)

    def _split(self, adapter_name: str) -> SplitLora:
        dropout = self.lora_dropout[adapter_name]
        return SplitLora(
            parameter=self.parameter_name,
            a=self.lora_A[adapter_name].weight,
            b=self.lora_B[adapter_name].weight,
            scaling=self.scaling[adapter_name],
            dropout=None if isinstance(dropout, nn.Identity) else dropout,
        )

    def merge(self, *_args: Any, **_options: Any) -> NoReturn:
        """Raise `ConfigError`."""
        raise ConfigError(NO_MERGE)


def _undropped(config: LoraConfig) -> LoraConfig:
    """`config` without dropout, which PEFT refuses for parameters."""
    new = copy.copy(config)
    new.lora_dropout = 0.0
    return new
