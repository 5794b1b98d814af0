"""Around a sharded model too, every owner of a patched attribute ends as it was, by identity, on every rank."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.config import FSDP1, FSDP2
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed


class InjectedError(Exception):
    """Raised by the tests."""


def build(checkpoint: Path, shard: FSDP1 | FSDP2) -> Any:
    from peft import LoraConfig

    import patches
    import surgery

    lora = LoraConfig(r=2, target_modules="all-linear")
    model = surgery.qlora(checkpoint, lora=lora, shard=shard, report=surgery.Report())
    if set(patches.select("linear4bit-resident")) - {receipt.id for receipt in patches.active()}:
        raise AssertionError("a resident patch is not there, so that there is less to undo")
    return model


def step(model: Any) -> None:
    model(input_ids=torch.arange(8).view(1, 8)).logits.float().sum().backward()


def trained_and_released(checkpoint: Path, shard: FSDP1 | FSDP2) -> None:
    with build(checkpoint, shard) as model:
        step(model)


def forgotten(checkpoint: Path, shard: FSDP1 | FSDP2) -> None:
    step(build(checkpoint, shard))


def failed_in_block(checkpoint: Path, shard: FSDP1 | FSDP2) -> None:
    with build(checkpoint, shard) as model:
        step(model)
        raise InjectedError


def failed_in_shard(checkpoint: Path, shard: FSDP1 | FSDP2, error: BaseException | None = None) -> None:
    import patches
    from surgery.sharding import fsdp1, fsdp2

    module: Any
    module, name = (fsdp1, "wrap") if isinstance(shard, FSDP1) else (fsdp2, "shard")
    stock = getattr(module, name)

    def wrap(*args: Any, **options: Any) -> Any:
        stock(*args, **options)
        if "torch.meta-param-replacement" not in {receipt.id for receipt in patches.active()}:
            raise AssertionError("nothing was patched, so that there is nothing to undo")
        raise error or InjectedError

    setattr(module, name, wrap)
    try:
        build(checkpoint, shard)
    finally:
        setattr(module, name, stock)


def interrupted_in_shard(checkpoint: Path, shard: FSDP1 | FSDP2) -> None:
    failed_in_shard(checkpoint, shard, KeyboardInterrupt())


JOBS = (trained_and_released, forgotten, failed_in_block, failed_in_shard, interrupted_in_shard)


def left_behind(checkpoint: Path, shard: FSDP1 | FSDP2) -> dict[str, list[str]]:
    """What each job leaves active or changed on this rank, and how it ended."""
    return {job.__name__: _left_by(job, checkpoint, shard) for job in JOBS}


def _left_by(job: Callable[[Path, FSDP1 | FSDP2], None], checkpoint: Path, shard: FSDP1 | FSDP2) -> list[str]:
    import bitsandbytes.nn.modules
    import peft.tuners.tuners_utils
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, _flat_param, _init_utils
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    import patches
    from surgery.comm.ranks import PeerError
    from surgery.errors import PassError
    from tests.helpers.snapshot import Snapshot

    owners = (
        *(Linear4bit, Params4bit, QuantState, bitsandbytes.nn.modules, peft.tuners.tuners_utils, torch.nn.Module),
        *(_init_utils, _flat_param, _flat_param.FlatParamHandle, FullyShardedDataParallel),
        *(_fsdp_param_group, FSDPModule),
    )
    before, ended = Snapshot(*owners), "returned"
    try:
        job(checkpoint, shard)
    except PeerError:
        ended = PassError.__name__  # of the rank that was first: the other may have heard of it already
    except (InjectedError, KeyboardInterrupt, PassError) as error:
        ended = type(error).__name__
    gc.collect()
    return [ended, *(receipt.id for receipt in patches.active()), *before.differences()]


@pytest.mark.parametrize("shard", [FSDP1(), FSDP2()], ids=["fsdp1", "fsdp2"])
def test_nothing_is_left_behind(tmp_path: Path, shard: FSDP1 | FSDP2) -> None:
    for left in run_ranks(left_behind, 2, save_tiny(tmp_path), shard):
        assert left == {
            "trained_and_released": ["returned"],
            "forgotten": ["returned"],
            "failed_in_block": ["InjectedError"],
            "failed_in_shard": ["PassError"],
            "interrupted_in_shard": ["KeyboardInterrupt"],
        }
