"""`torch.fsdp2-bit-exact-gather`: FSDP2 gathers packed 4-bit weights without changing a bit."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from ...registry import REGISTRY

if TYPE_CHECKING:
    import torch
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import AllGatherResult

__all__ = ["gather_as_integers"]


def copying_changes_bits() -> bool:
    """Whether the copy into FSDP2's buffer changes a bit pattern of bfloat16 or float16.

    Tried with all 65,536 patterns of each dtype, on this process's accelerator or else on the CPU.
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
    """Raise RuntimeError if the wrapper changes any bit pattern of a 4-bit weight, or its dtype."""
    for dtype in _half_types():
        stored = _all_patterns().view(dtype)
        group = [_specimen(stored)]
        # Twice: the first gather computes what the second takes from the cache.
        results = [gather_as_integers(_copy_in, None, (group,), {}) for _ in range(2)]
        for gathered in (result.all_gather_output for result in results):
            if gathered.dtype != dtype or not _same_bits(gathered, stored):
                raise RuntimeError(f"packed weights stored as {dtype} are still changed when FSDP2 copies them")


def _group(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The FSDPParams of the group to gather, from the arguments of the call."""
    parameters: list[Any] = args[0] if args else kwargs["fsdp_params"]
    return parameters


def _a_4bit_layer(_instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """The first quantized layer of a group, which stands for all: they belong to one model."""
    for parameter in _group(args, kwargs):
        module: object = parameter._module_info.module
        # `__dict__`, since attribute lookup is slow for a missing quant_state, and most groups of most models have
        # none. A loop, since `next` with a generator takes twice as long, and this runs in every gather.
        if module.__dict__.get("quant_state") is not None:
            return module
    return None


@REGISTRY.register(
    "torch.fsdp2-bit-exact-gather",
    target="torch.distributed.fsdp._fully_shard._fsdp_param_group:foreach_all_gather",
    reason=(
        "on CUDA, FSDP2 copies a group of parameters that are all bfloat16 or all float16 as numbers, which rewrites "
        "every NaN: packed 4-bit weights stored so (bnb_4bit_quant_storage) are not what was quantized, silently"
    ),
    # The cause in torch, and its effect on 4-bit weights.
    upstream=(
        "https://github.com/pytorch/pytorch/issues/159333 "
        "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1945"
    ),
    requires={"torch": ">=2.6"},
    subject=_a_4bit_layer,
    probe=copying_changes_bits,
    verify=check_gathers_exactly,
)
def gather_as_integers(
    wrapped: Callable[..., AllGatherResult], _instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AllGatherResult:
    """Start the all-gather of a group of parameters; gather a group with a 4-bit layer and 16-bit storage as integers.

    Bytes, copies and buffer sizes are the same as in the stock gather. So is the result, in the dtype of the group
    (bytes, if there are several dtypes), so that the code that follows runs as it does without the patch.
    """
    group = _group(args, kwargs)
    whole = _known(group) or _found_out(group)
    if whole is None:
        return wrapped(*args, **kwargs)
    result = wrapped([whole], *args[1:], **kwargs) if args else wrapped(**{**kwargs, "fsdp_params": [whole]})
    return whole.as_stock(result)


def _found_out(group: list[Any]) -> _Integers | _WholeGroup | None:
    """The object to gather in place of the group; None without a 4-bit layer or 16-bit storage."""
    if _a_4bit_layer(None, (group,), {}) is None or not any(map(_is_half, group)):
        return None
    return _remembered(group) or _WholeGroup(group)


class _Integers:
    """The all-gather inputs of a group, viewed as integers.

    FSDP2 takes it for a group of one parameter with many inputs, as tensor subclasses have them. It has only those
    attributes of an FSDPParam that FSDP2 then reads.
    """

    param_dtype = None
    offload_to_cpu = False

    def __init__(self, inputs: list[list[torch.Tensor]]) -> None:
        from torch.distributed.fsdp._fully_shard import _fsdp_collectives as stock

        self._dtypes, self._numels, self._dtype = stock._get_all_gather_input_metadatas(inputs)
        self.all_gather_inputs = _as_integers(list(chain.from_iterable(inputs)))
        sizes = [integers.numel() * integers.itemsize for integers in self.all_gather_inputs]
        self._sizes = [size // self._dtype.itemsize for size in sizes]

    def as_stock(self, result: AllGatherResult) -> AllGatherResult:
        """Convert the result of gathering this object to the result of gathering the parameters one by one.

        The lists in it are shared with this object: FSDP2 only reads them.
        """
        gathered = result.all_gather_output.view(self._dtype)
        # By position, since `_replace` takes twice as long.
        changed = gathered, *result[1:3], self._dtypes, self._numels, self._sizes, *result[6:]
        return type(result)._make(changed)


class _WholeGroup:
    """A group whose inputs FSDP2 makes in each gather: by a cast, a move from the CPU, or an extension."""

    param_dtype = None
    offload_to_cpu = False

    def __init__(self, group: list[Any]) -> None:
        self._group = group

    @property
    def all_gather_inputs(self) -> list[torch.Tensor]:
        """The inputs as integers. To be read in the copy stream, as FSDP2 does."""
        from torch.distributed.fsdp._fully_shard import _fsdp_collectives as stock

        self._integers = _Integers(stock._get_param_all_gather_inputs(self._group))
        return self._integers.all_gather_inputs

    def as_stock(self, result: AllGatherResult) -> AllGatherResult:
        """Convert the result of the gather, like `_Integers.as_stock`."""
        return self._integers.as_stock(result)


class _Known(_Integers):
    """Cached integer views of a group whose shards are its gather inputs, valid while the group holds those shards.

    Checking this is faster than FSDP2's own loop over the parameters.

    It references the memory of the shards, not the shards, which may reference the model: a view in another dtype has
    no `_base`. It must not outlive them, since that would use more memory: `forget` is called once one is collected.
    """

    def __init__(self, group: list[Any], shards: list[torch.Tensor], forget: Callable[[object], object]) -> None:
        super().__init__([[shard] for shard in shards])
        self._state = group[0].sharded_state
        self._watched = [weakref.ref(shard, forget) for shard in shards]
        self._ids = list(map(id, shards))
        self._bytes = [shard.nbytes for shard in shards]

    def is_of(self, group: list[Any]) -> bool:
        """Whether gathering the group now would read exactly the bytes of these integers.

        A shard that FSDP2 replaces is another tensor object. `shard.data = ...` and `set_` keep the object, so its
        memory is compared as well: same address, same number of bytes, contiguous.
        """
        import torch

        first, shards, ask = group[0], _shards(group), torch.Tensor
        return (
            # One list per property: a loop over the shards takes twice as long.
            list(map(id, shards)) == self._ids
            and first.sharded_state is self._state
            and not first.offload_to_cpu
            and not [one for one in group if one.param_dtype is not None or "_extensions_data" in one.__dict__]
            and list(map(ask.data_ptr, shards)) == list(map(ask.data_ptr, self.all_gather_inputs))
            and [shard.nbytes for shard in shards] == self._bytes
            and all(map(ask.is_contiguous, shards))
        )


#: `id` of the first shard of a group -> cache entry of the group, while all of its shards live.
_KNOWN: Final[dict[int, _Known]] = {}


def _known(group: list[Any]) -> _Known | None:
    """The cache entry from an earlier gather, if it is still valid."""
    import torch

    if torch.compiler.is_compiling():  # a graph must not depend on memory addresses
        return None
    known = _KNOWN.get(id(group[0]._sharded_param_data))
    return known if known is not None and known.is_of(group) else None


def _remembered(group: list[Any]) -> _Known | None:
    """A new cache entry for the group; None if its inputs are not simply the shards that it holds."""
    import torch

    if torch.compiler.is_compiling() or not _gathers_what_it_holds(group):
        return None
    shards = _shards(group)
    key = id(shards[0])
    # The weak reference's callback argument serves as the default of `pop`, for an entry that is gone already.
    known = _Known(group, shards, forget=partial(_KNOWN.pop, key))
    # A dispatch mode may turn plain tensors into something else.
    if not all(map(_is_memory, [*shards, *known.all_gather_inputs])):
        return None
    _KNOWN[key] = known
    return known


def _shards(group: list[Any]) -> list[torch.Tensor]:
    return [parameter._sharded_param_data for parameter in group]


def _is_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor is simply a range of memory: not a subclass, and not on meta."""
    import torch

    return type(tensor) is torch.Tensor and (tensor.data_ptr() != 0 or tensor.numel() == 0)


def _as_integers(shards: list[torch.Tensor]) -> list[torch.Tensor]:
    """View the shards as integers over the same memory. NCCL has no 16-bit integers, and 32-bit ones copy faster."""
    import torch

    try:
        return [shard.view(torch.int32) for shard in shards]
    except RuntimeError:  # a shard's size or offset is not a multiple of 32 bits
        return [shard.view(torch.uint8) for shard in shards]


def _gathers_what_it_holds(group: list[Any]) -> bool:
    """Whether each parameter's input is its shard: not cast, moved from the CPU, or made by an extension."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState

    # All parameters of a group are in the same state, and offloaded or not.
    if group[0].sharded_state != ShardedState.SHARDED or group[0].offload_to_cpu:
        return False
    return all(parameter.param_dtype is None and "_extensions_data" not in vars(parameter) for parameter in group)


def _is_half(parameter: Any) -> bool:
    """Whether a parameter is gathered in a dtype whose NaNs the copy rewrites."""
    return (parameter.param_dtype or parameter.orig_dtype) in _half_types()


def _half_types() -> tuple[torch.dtype, torch.dtype]:
    import torch

    return torch.bfloat16, torch.float16


def _all_patterns() -> torch.Tensor:
    """Every 16-bit pattern as int16, `(65536,)`, on the accelerator or else the CPU."""
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    return torch.equal(one.view(torch.int16), other.view(torch.int16))


def _specimen(stored: torch.Tensor) -> Any:
    """A stand-in for the FSDPParam of a 4-bit weight, with `stored` as this rank's shard."""
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
    """Run foreach_all_gather's steps before communication, with FSDP2's own decisions; needs no process group."""
    import torch
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as stock

    inputs = stock._get_param_all_gather_inputs(fsdp_params)
    dtypes, numels, dtype = stock._get_all_gather_input_metadatas(inputs)
    tensors = [tensor.view(dtype) for tensor in chain.from_iterable(inputs)]
    sizes = [tensor.numel() for tensor in tensors]
    buffer = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device)
    torch._foreach_copy_(torch.split(buffer, sizes), tensors)
    return stock.AllGatherResult(buffer, None, None, dtypes, numels, sizes)
