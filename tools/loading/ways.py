"""The ways of loading to compare, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from loading.bare import read_bytes
from loading.case import Case, Trainee
from loading.options import WAYS
from loading.ours import load_ours
from loading.seed import load_seed
from loading.stock import load_stock
from surgery.config import FSDP1, FSDP2

__all__ = ["LOADERS"]

#: Way -> the function that loads, and returns a Trainee (None for the bare read). `unsharded` is for one rank.
LOADERS: Mapping[str, Callable[[Case], Trainee | None]] = {
    "read": read_bytes,
    "sharded": partial(load_ours, placement="sharded", shard=FSDP2()),
    "packed": partial(load_ours, placement="sharded", shard=FSDP2(), packed=True),
    "unsharded": partial(load_ours, placement="replicated", shard=None),
    "rank0-cpu": partial(load_ours, placement="rank0-cpu", shard=FSDP1()),
    "replicated": partial(load_ours, placement="replicated", shard=FSDP1()),
    "replicated-fsdp2": partial(load_ours, placement="replicated", shard=FSDP2()),
    "seed": load_seed,
    "accelerate-fsdp1": partial(load_stock, fsdp=1),
    "accelerate-fsdp2": partial(load_stock, fsdp=2),
}

assert tuple(LOADERS) == WAYS
