"""`torch.fsdp2-bit-exact-gather`: FSDP2 gathers packed 4-bit weights without changing a bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from patches.registry import REGISTRY

if TYPE_CHECKING:
    import torch
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import AllGatherResult

__all__ = ["gather_as_bytes"]


def copying_changes_bits() -> bool:
    """Whether the copy into FSDP2's buffer changes a bit pattern of bfloat16 or float16.

    Tried with all 65,536 of each, on this process's accelerator, or on the CPU where it has none.
    """
    import torch

    for dtype in _half_types():
        stored = _all_patterns().view(dtype)
        copy = torch.empty_like(stored)
        torch._foreach_copy_([copy], [stored])
        if not _same_bits(copy, stored):
            return True
    return False


def check_gathers_as_bytes() -> None:
    """Raises RuntimeError where a 4-bit weight of any bit pattern is another after the wrapper, or of another dtype."""
    for dtype in _half_types():
        stored = _all_patterns().view(dtype)
        gathered = gather_as_bytes(_copy_in, None, ([_specimen(stored)],), {}).all_gather_output
        if gathered.dtype != dtype or not _same_bits(gathered, stored):
            raise RuntimeError(f"packed weights stored as {dtype} are still copied as numbers, which changes some bits")


def _group(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
    """The parameters that are gathered together."""
    parameters: Sequence[Any] = args[0] if args else kwargs["fsdp_params"]
    return parameters


def _a_4bit_layer(_instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """The first quantized layer of a group: all of its layers belong to one model."""
    modules = (parameter._module_info.module for parameter in _group(args, kwargs))
    # `vars`, since a module that has no quant_state takes its time to say so, and most groups of most models have none.
    return next((module for module in modules if vars(module).get("quant_state") is not None), None)


@REGISTRY.register(
    "torch.fsdp2-bit-exact-gather",
    target="torch.distributed.fsdp._fully_shard._fsdp_param_group:foreach_all_gather",
    reason=(
        "on CUDA, FSDP2 copies a group of parameters that are all bfloat16 or all float16 as numbers, which rewrites "
        "every NaN: packed 4-bit weights stored so (bnb_4bit_quant_storage) are not what was quantized, silently"
    ),
    upstream="https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1945",
    requires={"torch": ">=2.6"},
    traced=True,  # torch 2.6 to 2.11 compile the gather where `skip_fsdp_hooks` is off
    subject=_a_4bit_layer,
    probe=copying_changes_bits,
    verify=check_gathers_as_bytes,
)
def gather_as_bytes(
    wrapped: Callable[..., AllGatherResult], _instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AllGatherResult:
    """Start the all-gather of a group of parameters; one with a 4-bit layer and 16-bit storage is copied as bytes.

    FSDP2 copies a group of several dtypes as bytes, in buffers of the same size and as many kernels. So such a group
    is given one parameter more, of no elements and another dtype. What is returned is as stock: without that
    parameter, and in the dtype of the group, so that what follows takes the same way as without the patch.
    """
    group = _group(args, kwargs)
    if _a_4bit_layer(None, args, kwargs) is None or not any(map(_is_half, group)):
        return wrapped(*args, **kwargs)
    # First, so that no version of the copy has an empty tensor at the end of its list.
    mixed = [_NoBytes(group[0].device), *group]
    result = wrapped(mixed, *args[1:], **kwargs) if args else wrapped(**{**kwargs, "fsdp_params": mixed})
    return _as_stock(result)


class _NoBytes:
    """As much of an FSDPParam as FSDP2 asks for when it gathers: one that has no elements, and is of bytes."""

    param_dtype = None
    offload_to_cpu = False

    def __init__(self, device: torch.device) -> None:
        import torch

        self.all_gather_inputs = [torch.empty(0, dtype=torch.uint8, device=device)]


def _is_half(parameter: Any) -> bool:
    """Whether a parameter is gathered in a dtype whose NaN the copy rewrites."""
    return (parameter.param_dtype or parameter.orig_dtype) in _half_types()


def _as_stock(result: AllGatherResult) -> AllGatherResult:
    """The result without its first parameter, and, where the others are of one dtype, with a buffer of that.

    A group that is of several dtypes without it stays one of bytes.
    """
    dtypes, numels = result.param_all_gather_input_dtypes[1:], result.param_all_gather_input_numels[1:]
    buffer, sizes = result.all_gather_output, result.all_gather_input_split_sizes[1:]
    of_group = {*chain.from_iterable(dtypes)}
    if len(of_group) == 1:
        buffer, sizes = buffer.view(*of_group), [*chain.from_iterable(numels)]
    return result._replace(
        all_gather_output=buffer,
        param_all_gather_input_dtypes=dtypes,
        param_all_gather_input_numels=numels,
        all_gather_input_split_sizes=sizes,
    )


def _half_types() -> tuple[torch.dtype, torch.dtype]:
    import torch

    return torch.bfloat16, torch.float16


def _all_patterns() -> torch.Tensor:
    """Every value of 16 bits, as int16, on the device at hand; (65536,)."""
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    return torch.equal(one.view(torch.int16), other.view(torch.int16))


def _specimen(stored: torch.Tensor) -> Any:
    """What stands for the FSDPParam of a 4-bit weight, of which `stored` is this rank's shard."""
    return SimpleNamespace(
        param_dtype=None,
        orig_dtype=stored.dtype,
        offload_to_cpu=False,
        device=stored.device,
        all_gather_inputs=[stored],
        _module_info=SimpleNamespace(module=SimpleNamespace(quant_state="there")),
    )


def _copy_in(fsdp_params: list[Any]) -> AllGatherResult:
    """What foreach_all_gather does before it communicates, with FSDP2's own decisions; it needs no process group."""
    import torch
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as stock

    inputs = stock._get_param_all_gather_inputs(fsdp_params)
    dtypes, numels, dtype = stock._get_all_gather_input_metadatas(inputs)
    tensors = [tensor.view(dtype) for tensor in chain.from_iterable(inputs)]
    sizes = [tensor.numel() for tensor in tensors]
    buffer = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device)
    torch._foreach_copy_(torch.split(buffer, sizes), tensors)
    return stock.AllGatherResult(buffer, None, None, dtypes, numels, sizes)
