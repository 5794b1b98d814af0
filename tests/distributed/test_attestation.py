"""Attestation across ranks: clean where nothing was changed; where something was, it is named, on every rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from surgery import FSDP1, FSDP2
from surgery.attestation.differences import Attestation
from tests.distributed.attesting import (
    LAYER,
    ON_FOUR,
    ON_TWO,
    Caught,
    Place,
    Setup,
    clean_all,
    gathered_as_on_cuda,
    planted_all,
)
from tests.distributed.cases import ODD
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed

SETUPS = [*ON_TWO, *ON_FOUR]
BY_NAME = {setup.name: setup for setup in SETUPS}

#: Setup, place, rank, whether the model was attested before; the ranks that are named.
Planting = tuple[str, Place, int, bool, tuple[int, ...]]
PLANTINGS: list[Planting] = [
    ("fsdp2", "shard", 1, False, (1,)),
    ("fsdp2", "absmax", 1, False, (1,)),
    ("fsdp2", "blocksize", 0, False, (0,)),
    ("fsdp2", "gathered", 1, False, (1,)),
    ("fsdp2-replicated", "shard", 0, False, (0,)),
    ("fsdp2-replicas-only", "shard", 1, False, (1,)),
    ("fsdp2-kept-after-forward", "gathered", 0, True, (0,)),
    ("fsdp1", "shard", 1, False, (0, 1)),  # both hold bytes of the one page, which their flat parameter cuts anywhere
    ("fsdp1", "shard", 1, True, (1,)),
    ("fsdp1", "absmax", 0, True, (0,)),
    ("fsdp1", "gathered", 1, False, (1,)),
    ("fsdp1-orig-params", "shard", 0, True, (0,)),
    ("fsdp1-no-shard", "shard", 1, False, (1,)),
    ("ddp", "shard", 1, False, (1,)),
    ("unsharded", "shard", 1, False, (1,)),
    ("fsdp2-hybrid", "shard", 3, False, (3,)),
    ("fsdp2-hybrid", "gathered", 2, False, (2,)),
    ("fsdp1-hybrid", "shard", 2, False, (2,)),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("attested"))


@pytest.fixture(scope="module")
def clean(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Attestation]]]:
    output = tmp_path_factory.mktemp("adapters")
    by_world = {
        2: run_ranks(clean_all, 2, checkpoint, ON_TWO, output),
        4: run_ranks(clean_all, 4, checkpoint, ON_FOUR, output),
    }
    return {setup.name: [found[setup.name] for found in by_world[2 if setup in ON_TWO else 4]] for setup in SETUPS}


@pytest.fixture(scope="module")
def caught(checkpoint: Path) -> dict[Planting, list[Caught]]:
    found: dict[Planting, list[Caught]] = {}
    for world, setups in ((2, ON_TWO), (4, ON_FOUR)):
        cases = [planting for planting in PLANTINGS if BY_NAME[planting[0]] in setups]
        arguments = [(BY_NAME[name], *rest) for name, *rest, _ in cases]
        by_rank = run_ranks(planted_all, world, checkpoint, arguments)
        found |= {case: [of_rank[number] for of_rank in by_rank] for number, case in enumerate(cases)}
    return found


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_clean_from_start_to_saved(setup: Setup, clean: dict[str, list[dict[str, Attestation]]]) -> None:
    for found in clean[setup.name]:
        assert list(found) == ["start", "forward", "training", "trained", "saved"]
        assert [each.where for each in found.values()] == ["at rest", "in forward", "in forward", "at rest", "at rest"]
        assert [len(each.layers) for each in found.values()] == [14, 14, 3, 14, 3]
        assert LAYER in found["start"].layers
        assert found["start"].nbytes == 33792
        assert found["forward"].calls == 14
        assert found["training"].calls == 3


def test_the_digest_is_the_same_however_a_model_is_sharded(clean: dict[str, list[dict[str, Attestation]]]) -> None:
    usual = [setup for setup in SETUPS if not setup.quant]
    for stage in ("start", "forward", "trained", "saved"):
        assert len({found[stage].digest for setup in usual for found in clean[setup.name]}) == 1
    other = clean["fsdp2-single-quant-fp32"][0]["start"]
    assert other.digest != clean["fsdp2"][0]["start"].digest
    assert other.nbytes == clean["fsdp2"][0]["start"].nbytes


def test_three_ranks_cut_odd_weights_anywhere(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "odd", **ODD)
    setups = [
        Setup(name="fsdp2", shard=FSDP2()),
        Setup(name="fsdp2-uint8", shard=FSDP2(), quant={"quant_storage": torch.uint8}),
        Setup(name="fsdp2-replicated", shard=FSDP2(), placement="replicated"),
        Setup(name="fsdp1", shard=FSDP1()),
    ]
    ranks = run_ranks(clean_all, 3, checkpoint, setups, tmp_path / "adapters")
    for stage in ("start", "forward", "trained"):
        assert len({found[setup.name][stage].digest for found in ranks for setup in setups}) == 1


@pytest.mark.parametrize("planting", PLANTINGS, ids=lambda planting: "-".join(map(str, planting[:4])))
def test_what_was_planted_is_named_on_every_rank(planting: Planting, caught: dict[Planting, list[Caught]]) -> None:
    _, place, _, attested_before, ranks = planting
    for found in caught[planting]:
        (difference,) = found.differences
        assert difference.layer == LAYER
        assert difference.ranks == ranks
        assert f"{LAYER}, {difference.where}, rank" in found.message
        assert "1 of 14 attested layers is not what was quantized" in found.message
        assert found.clean == 2 + attested_before
        if place == "shard":
            assert (difference.where, difference.pages, difference.of_pages) == ("at rest", 1, 1)
            assert "1 of 1 pages of 64 KiB" in found.message
        elif place == "gathered":
            assert (difference.where, difference.words, difference.of_words) == ("in forward", 4, 1792)
            assert "4 of 1,792 words of 16 bits" in found.message
        else:
            assert difference.where == "quant_state"
            assert difference.what.startswith(place)
    assert len({found.message for found in caught[planting]}) == 1


def test_an_inexact_gather_is_caught_word_for_word_and_the_patch_passes(checkpoint: Path) -> None:
    for caught, words, attestation in run_ranks(gathered_as_on_cuda, 2, checkpoint):
        changed = {name: count for name, count in words.items() if count}
        assert changed, "no packed word is a NaN"
        assert {each.where for each in caught.differences} == {"in forward"}
        assert {each.layer for each in caught.differences} == changed.keys()
        for rank in (0, 1):
            of_rank = [each for each in caught.differences if each.ranks == (rank,)]
            counted = {each.layer: each.words for each in of_rank if each.words is not None}
            assert counted == dict(list(changed.items())[: len(counted)])
            assert len(counted) == min(4, len(changed))
        assert "patches check torch.fsdp2-bit-exact-gather" in caught.message
        assert attestation.calls == 14
