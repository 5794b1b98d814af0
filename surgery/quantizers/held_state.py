"""A `QuantState` whose tensors are a parameter of its layer, so that they are sharded and gathered with the weight."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from surgery.quantizers.base import STATISTICS
from surgery.quantizers.stack import NESTED_BLOCKSIZE, PackedStack, check_not_cast, code_of, dynamic_code

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

__all__ = ["assembled", "held_state", "whole_state"]


def assembled(stack: PackedStack, state: QuantState) -> torch.Tensor:
    """The statistics of one whole weight as bytes, uint8 and 1-D, in the order of `stack.sections`."""
    found = {"absmax": state.absmax}
    if state.state2 is not None:
        found |= {"nested_absmax": state.state2.absmax, "offset": state.offset}
    return stack.assemble(found)


def whole_state(stack: PackedStack, found: Mapping[str, torch.Tensor]) -> QuantState:
    """The state of a weight by itself, of the bytes of each of `stack.sections`."""
    from bitsandbytes.functional import QuantState

    parts = stack.typed(found)
    device, nested = parts["absmax"].device, None
    if stack.double_quant:
        code = dynamic_code(device)
        nested = QuantState(parts["nested_absmax"], code=code, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32)
    return QuantState(
        parts["absmax"],
        shape=torch.Size(stack.shape),
        code=code_of(stack.quant_type, device),
        blocksize=stack.blocksize,
        quant_type=stack.quant_type,
        dtype=stack.dtype,
        offset=parts["offset"][0] if stack.double_quant else None,
        state2=nested,
    )


def held_state(layer: Any, stack: PackedStack) -> QuantState:
    """The state of the weight of `layer`, whose statistics are in its `weight_statistics`, laid out as `stack` says.

    Tensors are looked up whenever they are used: by then FSDP has gathered the parameter, in backward as in forward.
    """
    found: QuantState = _kind()(layer, stack)
    return found


def _view(state: Any, name: str) -> torch.Tensor:
    stack: PackedStack = state.stack
    held = getattr(state.layer, "weight" + STATISTICS).detach()
    check_not_cast(state.layer, held)
    return stack.views(held)[name]


def _again(state: Any) -> tuple[Any, ...]:
    """The call that makes it once more, of its layer: what is pickled."""
    return held_state, (state.layer, state.stack)


def _copied(state: Any, memo: dict[int, Any]) -> Any:
    """The state of the copy of its layer, for the copy of its weight too; None for a weight that is copied alone.

    bitsandbytes copies the state of a weight without saying which other copies there are.
    """
    if id(state.layer) not in memo:
        return None
    new = held_state(memo[id(state.layer)], state.stack)
    weight = memo.get(id(state.layer._parameters["weight"]))
    if weight is not None:
        weight.quant_state = new
    return new


@functools.cache
def _kind() -> Any:
    from bitsandbytes.functional import QuantState

    class HeldState(QuantState):
        """Statistics of a weight as views of a parameter."""

        def __init__(self, layer: Any, stack: PackedStack) -> None:
            self.layer, self.stack = layer, stack
            self.shape, self.dtype = torch.Size(stack.shape), stack.dtype
            self.blocksize, self.quant_type, self.nested = stack.blocksize, stack.quant_type, stack.double_quant

        @property
        def absmax(self) -> torch.Tensor:
            """float32, or uint8 with double quantization, `(blocks,)`."""
            return _view(self, "absmax")

        @property
        def code(self) -> torch.Tensor:
            """The 16 values of the 4-bit type."""
            return code_of(self.quant_type, getattr(self.layer, "weight" + STATISTICS).device)

        @property
        def offset(self) -> torch.Tensor | None:
            """The mean of the statistics, with double quantization."""
            return _view(self, "offset")[0] if self.nested else None

        @property
        def state2(self) -> QuantState | None:
            """The state of the statistics, with double quantization."""
            if not self.nested:
                return None
            nested = _view(self, "nested_absmax")
            code = dynamic_code(nested.device)
            return QuantState(nested, code=code, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32)

        def to(self, device: Any) -> None:
            """Nothing: the parameter moves."""

        __reduce__, __deepcopy__ = _again, _copied

    return HeldState
