"""`torch.fsdp2-reshard-at-once`: FSDP2 puts the shards of a group back in one loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...registry import REGISTRY
from ._fsdp2_groups import a_4bit_layer, as_one
from ._fsdp2_specimen import gathered_group, outcome

__all__ = ["reshard_at_once"]


def is_called_for_each() -> bool:
    """Whether FSDP2 calls functions of each parameter that it shards again.

    Raises RuntimeError if a group for which they are called once for all ends otherwise.
    """
    stock, patched = _outcomes()
    if stock != patched:
        raise RuntimeError(f"expected a group that is sharded at once to be as in stock FSDP2, {stock}; found {patched}")
    return True


def check_is_as_stock() -> None:
    """Raise RuntimeError if a group that the wrapper has sharded again is not as FSDP2 leaves it."""
    is_called_for_each()


def _outcomes() -> tuple[Any, Any]:
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    wait, to_sharded = FSDPParamGroup.wait_for_unshard, FSDPParamGroup._to_sharded

    def at_once(group: Any) -> None:
        reshard_at_once(lambda: to_sharded(group), group, (), {})

    return outcome(wait, to_sharded, gathered_group()), outcome(wait, at_once, gathered_group())


@REGISTRY.register(
    "torch.fsdp2-reshard-at-once",
    target="torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup._to_sharded",
    reason=(
        "FSDP2 calls 7 Python functions for each parameter that it shards again, adapters too: with hundreds of them "
        "the host takes longer to free a block than the GPU to use it"
    ),
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py",
    requires={"torch": ">=2.6"},
    signature="(self)",
    subject=lambda group, _args, _kwargs: a_4bit_layer(group.fsdp_params),
    probe=is_called_for_each,
    verify=check_is_as_stock,
    on_unknown="skip",
    on_drift="skip",
)
def reshard_at_once(
    wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Shard a group again, and do what FSDP2 does to each parameter in one loop.

    Groups whose parameters are not alike are stock.
    """
    as_one(wrapped, instance, args, kwargs)
