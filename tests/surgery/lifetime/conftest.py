"""Every test here starts and ends with nothing patched."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import bitsandbytes.nn.modules
import peft.tuners.tuners_utils
import pytest
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from torch.distributed.fsdp import _init_utils

import patches
from tests.helpers.snapshot import Snapshot
from tests.surgery.lifetime.behaviour import assert_stock

OWNERS = (
    Linear4bit,
    Params4bit,
    QuantState,
    nn.Module,
    bitsandbytes.nn.modules,
    _init_utils,
    peft.tuners.tuners_utils,
)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Collecting looks at what the tests make, and not at a million objects of the libraries each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[Snapshot]:
    """Before and after every test here: nothing is patched, and every owner holds the very objects that it held."""
    gc.collect()
    assert patches.active() == []
    snapshot = Snapshot(*OWNERS)
    yield snapshot
    gc.collect()
    assert_stock(snapshot)
