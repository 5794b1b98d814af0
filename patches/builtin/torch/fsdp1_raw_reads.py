"""`torch.fsdp1-raw-reads`: when FSDP1 compares a module's parameters, it reads the tensors that it stored."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

from ...registry import REGISTRY

__all__ = ["read_raw", "reading_raw"]


class _Reading(threading.local):
    """Flag, per thread, that FSDP1's comparison is running: backward passes run in threads of their own."""

    raw = False


_READING: Final = _Reading()


def reading_raw() -> bool:
    """Whether FSDP1 is reading the attribute, to compare it with the very tensor that it stored."""
    return _READING.raw


def stored_tensor_is_compared() -> bool:
    """Whether FSDP1 raises when it reads another object than the tensor that it stored."""
    import torch
    from torch.distributed.fsdp._flat_param import FlatParamHandle, HandleShardingStrategy

    stored = torch.zeros(1)
    module = SimpleNamespace(weight=stored.clone())
    flat_param = SimpleNamespace(
        grad=None,
        size=stored.size,
        _sharded_size=stored.shape,
        _fqns=["weight"],
        _params=[stored],
        _tensors=[stored],
        _shard_param_infos=[(True, 0, 1, 0, 0)],
        _param_infos=[("weight", module, "")],
        _shared_param_infos=[],
    )
    # Not made with its constructor, which needs a process group.
    handle: Any = FlatParamHandle.__new__(FlatParamHandle)
    handle.flat_param = flat_param
    handle._unsharded_flat_param_for_skipped_views = stored
    handle._sharding_strategy = HandleShardingStrategy.SHARD_GRAD_OP
    try:
        handle._writeback_orig_params()
    except AssertionError:
        return True
    return False


def check_reads_are_raw() -> None:
    """Raise RuntimeError if the flag is not set inside the call, or stays set after it."""
    if not read_raw(reading_raw, None, (), {}) or reading_raw():
        raise RuntimeError("FSDP1's comparison is not told apart from other readers of a weight")


def _a_4bit_layer(handle: Any, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> object:
    """The first quantized layer of a flat parameter, which stands for all: they belong to one model."""
    modules = (module for _, module, _ in handle.flat_param._param_infos)
    return next((module for module in modules if getattr(module, "quant_state", None) is not None), None)


@REGISTRY.register(
    "torch.fsdp1-raw-reads",
    target="torch.distributed.fsdp._flat_param:FlatParamHandle._writeback_orig_params",
    reason=(
        "with use_orig_params=True FSDP1 compares, by identity, what a module holds with the plain tensor that it put "
        "there, and takes the Params4bit that every other reader needs for a changed parameter"
    ),
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/fsdp/_flat_param.py",
    requires={"torch": ">=2.1"},
    subject=_a_4bit_layer,
    probe=stored_tensor_is_compared,
    verify=check_reads_are_raw,
)
def read_raw(wrapped: Callable[..., Any], _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the comparison with `reading_raw()` true in this thread."""
    _READING.raw = True
    try:
        return wrapped(*args, **kwargs)
    finally:
        _READING.raw = False
