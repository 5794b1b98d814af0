"""Around a sharded model too, every owner of a patched attribute ends as it was, by identity, on every rank."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed


class InjectedError(Exception):
    """Raised by the tests."""


def build(checkpoint: Path) -> Any:
    from peft import LoraConfig

    import surgery

    lora = LoraConfig(r=2, target_modules="all-linear")
    return surgery.qlora(checkpoint, lora=lora, shard=surgery.FSDP1(), report=surgery.Report())


def step(model: Any) -> None:
    model(input_ids=torch.arange(8).view(1, 8)).logits.float().sum().backward()


def trained_and_released(checkpoint: Path) -> None:
    with build(checkpoint) as model:
        step(model)


def forgotten(checkpoint: Path) -> None:
    step(build(checkpoint))


def failed_in_block(checkpoint: Path) -> None:
    with build(checkpoint) as model:
        step(model)
        raise InjectedError


def failed_in_shard(checkpoint: Path, error: BaseException | None = None) -> None:
    import patches
    from surgery.passes import shard

    stock = shard.wrap

    def wrap(*args: Any, **options: Any) -> Any:
        stock(*args, **options)
        if "torch.fsdp1-sync-on-cpu" not in {receipt.id for receipt in patches.active()}:
            raise AssertionError("nothing was patched, so that there is nothing to undo")
        raise error or InjectedError

    shard.wrap = wrap
    try:
        build(checkpoint)
    finally:
        shard.wrap = stock


def interrupted_in_shard(checkpoint: Path) -> None:
    failed_in_shard(checkpoint, KeyboardInterrupt())


JOBS = (trained_and_released, forgotten, failed_in_block, failed_in_shard, interrupted_in_shard)


def left_behind(checkpoint: Path) -> dict[str, list[str]]:
    """What each job leaves active or changed on this rank, and how it ended."""
    return {job.__name__: _left_by(job, checkpoint) for job in JOBS}


def _left_by(job: Callable[[Path], None], checkpoint: Path) -> list[str]:
    import bitsandbytes.nn.modules
    import peft.tuners.tuners_utils
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit
    from torch.distributed.fsdp import FullyShardedDataParallel, _flat_param, _init_utils

    import patches
    from surgery.distributed.exchange import PeerError
    from surgery.errors import PassError
    from tests.helpers.snapshot import Snapshot

    owners = (
        *(Linear4bit, Params4bit, QuantState, bitsandbytes.nn.modules, peft.tuners.tuners_utils, torch.nn.Module),
        *(_init_utils, _flat_param, _flat_param.FlatParamHandle, FullyShardedDataParallel),
    )
    before, ended = Snapshot(*owners), "returned"
    try:
        job(checkpoint)
    except PeerError:
        ended = PassError.__name__  # of the rank that was first: the other may have heard of it already
    except (InjectedError, KeyboardInterrupt, PassError) as error:
        ended = type(error).__name__
    gc.collect()
    return [ended, *(receipt.id for receipt in patches.active()), *before.differences()]


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    for left in run_ranks(left_behind, 2, save_tiny(tmp_path), timeout=120):
        assert left == {
            "trained_and_released": ["returned"],
            "forgotten": ["returned"],
            "failed_in_block": ["InjectedError"],
            "failed_in_shard": ["PassError"],
            "interrupted_in_shard": ["KeyboardInterrupt"],
        }
