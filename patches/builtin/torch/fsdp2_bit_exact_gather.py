"""`torch.fsdp2-bit-exact-gather`: FSDP2 gathers packed 4-bit weights without changing a bit."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

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
        group = [_specimen(stored)]
        # Twice: the first time all is found out, the second time it is known.
        results = [gather_as_integers(_copy_in, None, (group,), {}) for _ in range(2)]
        for gathered in (result.all_gather_output for result in results):
            if gathered.dtype != dtype or not _same_bits(gathered, stored):
                raise RuntimeError(f"packed weights stored as {dtype} are still changed when FSDP2 copies them")


def _group(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The parameters that are gathered together."""
    parameters: list[Any] = args[0] if args else kwargs["fsdp_params"]
    return parameters


def _a_4bit_layer(_instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """The first quantized layer of a group: all of its layers belong to one model."""
    for parameter in _group(args, kwargs):
        module: object = parameter._module_info.module
        # `__dict__`, since a module without quant_state takes its time to say so, and most groups of most models have
        # none. A loop, since `next` with a generator takes twice as long, and this is asked of every gather.
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
    # The cause, in torch, and what it does to 4-bit weights.
    upstream=(
        "https://github.com/pytorch/pytorch/issues/159333 "
        "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1945"
    ),
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
    whole = _known(group) or _found_out(group)
    if whole is None:
        return wrapped(*args, **kwargs)
    result = wrapped([whole], *args[1:], **kwargs) if args else wrapped(**{**kwargs, "fsdp_params": [whole]})
    return whole.as_stock(result)


def _found_out(group: list[Any]) -> _Integers | _WholeGroup | None:
    """What is to be gathered in the place of the group; None where it has no 4-bit layer, or no 16-bit storage."""
    if _a_4bit_layer(None, (group,), {}) is None or not any(map(_is_half, group)):
        return None
    return _remembered(group) or _WholeGroup(group)


class _Integers:
    """What the parameters of a group contribute, viewed as integers.

    To FSDP2 it is a group of one parameter with many inputs, which tensor subclasses have: as much of an FSDPParam as
    it then asks for.
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
        """The result of gathering this, as that of gathering the parameters one by one.

        Its lists are this object's own: FSDP2 only reads them.
        """
        gathered = result.all_gather_output.view(self._dtype)
        # By position, since `_replace` takes twice as long.
        changed = gathered, *result[1:3], self._dtypes, self._numels, self._sizes, *result[6:]
        return type(result)._make(changed)


class _WholeGroup:
    """A group of which FSDP2 makes the inputs in each gather: cast, moved from the CPU, or made by an extension."""

    param_dtype = None
    offload_to_cpu = False

    def __init__(self, group: list[Any]) -> None:
        self._group = group

    @property
    def all_gather_inputs(self) -> list[torch.Tensor]:
        """To be read in the stream that copies, as FSDP2 does."""
        from torch.distributed.fsdp._fully_shard import _fsdp_collectives as stock

        self._integers = _Integers(stock._get_param_all_gather_inputs(self._group))
        return self._integers.all_gather_inputs

    def as_stock(self, result: AllGatherResult) -> AllGatherResult:
        """As `_Integers.as_stock`."""
        return self._integers.as_stock(result)


class _Known(_Integers):
    """The integers of a group that gathers what it holds, to be used again for as long as they are what it holds.

    Making sure of that takes less time than FSDP2 takes to ask the parameters one by one.

    Holds the memory of the shards, not the shards, which may lead to the model: a view in another dtype has no `_base`.
    And not for longer than they live, which would be to use more memory: `forget` is called once one of them is gone.
    """

    def __init__(self, group: list[Any], shards: list[torch.Tensor], forget: Callable[[object], object]) -> None:
        super().__init__([[shard] for shard in shards])
        self._state = group[0].sharded_state
        self._watched = [weakref.ref(shard, forget) for shard in shards]
        self._ids = list(map(id, shards))
        self._bytes = [shard.nbytes for shard in shards]

    def is_of(self, group: list[Any]) -> bool:
        """Whether gathering the group as it is now would read the very bytes that these integers are.

        FSDP2 makes another tensor where it replaces a shard, which shows. With `shard.data = ...` and `set_` it would
        be the same, so what counts is its memory, compared now: where a shard begins, the integers begin; it has as
        many bytes; there are no gaps in it.
        """
        import torch

        first, shards, ask = group[0], _shards(group), torch.Tensor
        return (
            # All answers as a list, for each question: a loop over the shards takes twice as long.
            list(map(id, shards)) == self._ids
            and first.sharded_state is self._state
            and not first.offload_to_cpu
            and not [one for one in group if one.param_dtype is not None or "_extensions_data" in one.__dict__]
            and list(map(ask.data_ptr, shards)) == list(map(ask.data_ptr, self.all_gather_inputs))
            and [shard.nbytes for shard in shards] == self._bytes
            and all(map(ask.is_contiguous, shards))
        )


#: `id` of the first shard of a group -> what is known of the group, while all of its shards live.
_KNOWN: Final[dict[int, _Known]] = {}


def _known(group: list[Any]) -> _Known | None:
    """What an earlier gather has found out, if it is still so."""
    import torch

    if torch.compiler.is_compiling():  # a graph must not depend on where things are in memory
        return None
    known = _KNOWN.get(id(group[0]._sharded_param_data))
    return known if known is not None and known.is_of(group) else None


def _remembered(group: list[Any]) -> _Known | None:
    """What is known of the group from now on; None where its inputs are not just the shards that it holds."""
    import torch

    if torch.compiler.is_compiling() or not _gathers_what_it_holds(group):
        return None
    shards = _shards(group)
    key = id(shards[0])
    # `pop` is given a reference to what is gone, and returns it where nothing is known any more.
    known = _Known(group, shards, forget=partial(_KNOWN.pop, key))
    # A dispatch mode may make something else of plain tensors.
    if not all(map(_is_memory, [*shards, *known.all_gather_inputs])):
        return None
    _KNOWN[key] = known
    return known


def _shards(group: list[Any]) -> list[torch.Tensor]:
    return [parameter._sharded_param_data for parameter in group]


def _is_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor is nothing but a range of memory: it is no subclass, and not on meta."""
    import torch

    return type(tensor) is torch.Tensor and (tensor.data_ptr() != 0 or tensor.numel() == 0)


def _as_integers(shards: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same memory. NCCL has no integers of 16 bits, and those of 32 are faster to copy."""
    import torch

    try:
        return [shard.view(torch.int32) for shard in shards]
    except RuntimeError:  # one is no whole number of them, or does not begin at one
        return [shard.view(torch.uint8) for shard in shards]


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
