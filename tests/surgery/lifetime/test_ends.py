"""Resident patches act on a model's own layers while it lives, and on nothing once it is released."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import patches
import surgery
from tests.helpers.snapshot import Snapshot
from tests.surgery.lifetime.behaviour import (
    OBSERVED,
    PATCHED,
    assert_stock,
    behaviour,
    build,
    layers_of,
    run,
    square,
    stock_layers,
)


def test_build_patches_are_undone_and_resident_ones_act_on_its_layers(tiny: Path) -> None:
    with build(tiny) as model:
        active = {receipt.id: receipt.scope_text for receipt in patches.active()}
        assert active.keys() >= set(patches.select("linear4bit-resident"))
        assert not active.keys() & set(patches.select("qlora-build"))
        assert set(active.values()) == {f"{len(layers_of(model))} instances", f"where around a {type(model).__name__}"}


def test_stock_layers_beside_it_behave_as_stock(tiny: Path) -> None:
    before = behaviour(stock_layers(OBSERVED))
    assert before != PATCHED
    older = stock_layers(OBSERVED)
    with build(tiny) as model:
        assert behaviour(older) == before
        assert behaviour(stock_layers(OBSERVED)) == before
        assert behaviour(square(model)) == PATCHED
    assert behaviour(stock_layers(OBSERVED)) == before


def test_two_models_are_released_apart(tiny: Path) -> None:
    first, second = build(tiny), build(tiny)
    surgery.release(first)
    assert behaviour(square(first)) == behaviour(stock_layers(OBSERVED))
    assert behaviour(square(second)) == PATCHED
    surgery.release(second)


def release(model: nn.Module) -> None:
    surgery.release(model)


def leave_block(model: nn.Module) -> None:
    with model as entered:  # type: ignore[attr-defined]  # what `qlora` adds to the class
        assert entered is model


def forget(model: nn.Module) -> None:
    """The caller drops its own reference."""


@pytest.mark.parametrize("end", [release, leave_block, forget])
@pytest.mark.parametrize("adapted", [True, False])
def test_ways_to_end(tiny: Path, unchanged: Snapshot, end: Callable[[nn.Module], None], adapted: bool) -> None:
    options = {} if adapted else {"lora": None}
    model = build(tiny, **options)
    assert patches.active() != []
    assert unchanged.differences() != []
    end(model)
    del model
    gc.collect()
    assert_stock(unchanged)


def test_releasing_again_or_what_was_never_patched_is_harmless(tiny: Path) -> None:
    with build(tiny) as model:
        surgery.release(model)
        surgery.release(model)
    surgery.release(nn.Linear(2, 2))
    assert run(model).isfinite().all()
