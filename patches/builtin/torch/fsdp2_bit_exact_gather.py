"""`torch.fsdp2-bit-exact-gather`: FSDP2 gathers packed 4-bit weights without changing a bit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from patches.registry import REGISTRY

if TYPE_CHECKING:
    import torch
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import AllGatherResult

__all__ = ["gather_as_integers"]


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


def check_gathers_exactly() -> None:
    """Raises RuntimeError where a 4-bit weight of any bit pattern is another after the wrapper, or of another dtype."""
    for dtype in _half_types():
        stored = _all_patterns().view(dtype)
        gathered = gather_as_integers(_copy_in, None, ([_specimen(stored)],), {}).all_gather_output
        if gathered.dtype != dtype or not _same_bits(gathered, stored):
            raise RuntimeError(f"packed weights stored as {dtype} are still changed when FSDP2 copies them")


def _group(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The parameters that are gathered together."""
    parameters: list[Any] = args[0] if args else kwargs["fsdp_params"]
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
    verify=check_gathers_exactly,
)
def gather_as_integers(
    wrapped: Callable[..., AllGatherResult], _instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AllGatherResult:
    """Start the all-gather of a group of parameters; one with a 4-bit layer and 16-bit storage travels as integers.

    The same bytes, in as many copies and buffers of the same size. What is returned is as stock, in the dtype of the
    group (bytes, where there are several), so that what follows takes the same way as without the patch.
    """
    group = _group(args, kwargs)
    if _a_4bit_layer(None, args, kwargs) is None or not any(map(_is_half, group)):
        return wrapped(*args, **kwargs)
    whole = _WholeGroup(group)
    result = wrapped([whole], *args[1:], **kwargs) if args else wrapped(**{**kwargs, "fsdp_params": [whole]})
    return whole.as_stock(result)


class _WholeGroup:
    """A group of parameters as the one that FSDP2 is given to gather: as much of an FSDPParam as it then asks for.

    One parameter may have many inputs, since tensor subclasses do.
    """

    param_dtype = None
    offload_to_cpu = False

    def __init__(self, group: list[Any]) -> None:
        self._group = group

    @property
    def all_gather_inputs(self) -> list[torch.Tensor]:
        """This rank's shards, viewed as integers. To be read in the stream that copies, as FSDP2 does."""
        import torch
        from torch.distributed.fsdp._fully_shard import _fsdp_collectives as stock

        inputs = _inputs_of(self._group)
        self._dtypes, self._numels, self._dtype = stock._get_all_gather_input_metadatas(inputs)
        shards = list(chain.from_iterable(inputs))
        # NCCL has no integers of 16 bits, and those of 32 are faster to copy.
        self._integer = torch.int32
        try:
            return [shard.view(torch.int32) for shard in shards]
        except RuntimeError:  # one is no whole number of them, or does not begin at one
            self._integer = torch.uint8
            return [shard.view(torch.uint8) for shard in shards]

    def as_stock(self, result: AllGatherResult) -> AllGatherResult:
        """The result of gathering this, as that of gathering the parameters one by one."""
        sizes = result.all_gather_input_split_sizes
        return result._replace(
            all_gather_output=result.all_gather_output.view(self._dtype),
            param_all_gather_input_dtypes=self._dtypes,
            param_all_gather_input_numels=self._numels,
            all_gather_input_split_sizes=[size * self._integer.itemsize // self._dtype.itemsize for size in sizes],
        )


def _inputs_of(group: list[Any]) -> list[list[torch.Tensor]]:
    """What each parameter contributes, in its own dtype.

    Read from it where nothing is to be converted. Found out for the group at once, this takes less time than FSDP2
    takes to ask one by one, and about makes up for the views.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as stock

    if _gathers_what_it_holds(group):
        return [[parameter._sharded_param_data] for parameter in group]
    return stock._get_param_all_gather_inputs(group)


def _gathers_what_it_holds(group: list[Any]) -> bool:
    """Whether no parameter is cast, moved from the CPU, or gathered by an extension of its own."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState

    # All parameters of a group are in the same state, and offloaded or not.
    if group[0].sharded_state != ShardedState.SHARDED or group[0].offload_to_cpu:
        return False
    return all(parameter.param_dtype is None and "_extensions_data" not in vars(parameter) for parameter in group)


def _is_half(parameter: Any) -> bool:
    """Whether a parameter is gathered in a dtype whose NaN the copy rewrites."""
    return (parameter.param_dtype or parameter.orig_dtype) in _half_types()


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
    from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState

    return SimpleNamespace(
        param_dtype=None,
        orig_dtype=stored.dtype,
        offload_to_cpu=False,
        sharded_state=ShardedState.SHARDED,
        _sharded_param_data=stored,
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
