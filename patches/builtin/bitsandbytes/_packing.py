"""What a packed 4-bit weight looks like, and how a tensor that lost this is one again."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

__all__ = ["as_params4bit", "is_quantized", "packed_shape"]


def packed_shape(quant_state: QuantState, storage: torch.dtype) -> tuple[int, int]:
    """The shape in which a weight of shape `quant_state.shape` is stored as values of type `storage`."""
    return (quant_state.shape.numel() + 1) // (2 * storage.itemsize), 1


def is_quantized(tensor: torch.Tensor | None) -> bool:
    """Whether this is a Params4bit that carries its own quant_state."""
    from bitsandbytes.nn.modules import Params4bit

    return isinstance(tensor, Params4bit) and getattr(tensor, "quant_state", None) is not None


def as_params4bit(module: Linear4bit, stored: torch.Tensor, quant_state: QuantState) -> torch.Tensor:
    """`stored`, which `module` holds as its weight, as a packed Params4bit with this quant_state.

    The data is not copied. A Parameter becomes one in place, because its identity is not ours to change:
    optimizers hold it, FSDP compares it with the one that it put there, and tied modules share it. A plain
    tensor, which FSDP1 puts in the place of a Parameter while it computes, gets a Params4bit over the same
    memory: turned into a Parameter itself, it could not be put back by FSDP, since a module does not register
    a Parameter that has a history.

    A meta tensor of the logical shape takes the packed shape and the storage dtype first. Returned as they
    are: a Params4bit that has its quant_state; other subclasses (DTensor: a shard is no packed weight); and a
    tensor that is not of the packed shape, such as the one-dimensional shard that FSDP1 keeps with
    `use_orig_params=True`.
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

    # `.data`, because a view of a flat parameter that was written to since refuses `detach`.
    return Params4bit(tensor.data, requires_grad=False)


def _become_params4bit(parameter: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.nn.modules import Params4bit

    parameter.requires_grad = False
    parameter.__class__ = Params4bit
    return parameter
