"""The layout of a packed 4-bit weight, and restoring it to a tensor that has lost it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

__all__ = ["as_params4bit", "is_quantized", "packed_shape"]


def packed_shape(quant_state: QuantState, storage: torch.dtype) -> tuple[int, int]:
    """The packed shape of a weight of logical shape `quant_state.shape`, stored in dtype `storage`."""
    return (quant_state.shape.numel() + 1) // (2 * storage.itemsize), 1


def is_quantized(tensor: torch.Tensor | None) -> bool:
    """Whether the tensor is a Params4bit with a quant_state of its own."""
    from bitsandbytes.nn.modules import Params4bit

    return isinstance(tensor, Params4bit) and getattr(tensor, "quant_state", None) is not None


def as_params4bit(module: Linear4bit, stored: torch.Tensor, quant_state: QuantState) -> torch.Tensor:
    """Turn `stored`, the weight that `module` holds, into a packed Params4bit with this quant_state.

    The data is not copied. A Parameter is converted in place, because its identity must not change: optimizers
    hold it, FSDP compares it with the one that it stored, and tied modules share it. For a plain tensor, which
    FSDP1 stores in place of a Parameter during computation, a new Params4bit over the same memory is made: if
    the tensor itself became a Parameter, FSDP could not put it back, since a module does not register a
    Parameter that has a history.

    A meta tensor of the logical shape is first given the packed shape and the storage dtype. Returned
    unchanged: a Params4bit that has its quant_state; other subclasses (DTensor: a shard is not a packed
    weight); and a tensor that does not have the packed shape, such as the one-dimensional shard that FSDP1
    keeps with `use_orig_params=True`.
    """
    import torch
    from bitsandbytes.nn.modules import Params4bit

    if is_quantized(stored) or type(stored) not in (torch.Tensor, torch.nn.Parameter, Params4bit):
        return stored
    if stored.is_meta and stored.shape == quant_state.shape:
        storage = getattr(stored, "quant_storage", module.quant_storage)
        stored.data = torch.empty(packed_shape(quant_state, storage), dtype=storage, device="meta")
    if stored.shape != packed_shape(quant_state, stored.dtype):
        return stored
    weight = _alias(stored) if type(stored) is torch.Tensor else _become_params4bit(stored)
    vars(weight).update(
        quant_state=quant_state,
        blocksize=quant_state.blocksize,
        compress_statistics=quant_state.nested,
        quant_type=quant_state.quant_type,
        quant_storage=stored.dtype,
        module=module,
        bnb_quantized=True,
    )
    return weight


def _alias(tensor: torch.Tensor) -> Params4bit:
    from bitsandbytes.nn.modules import Params4bit

    # `.data`, because `detach` fails on a view of a flat parameter that has been written to since.
    return Params4bit(tensor.data, requires_grad=False)


def _become_params4bit(parameter: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.nn.modules import Params4bit

    parameter.requires_grad = False
    parameter.__class__ = Params4bit
    return parameter
