"""A format and a sharding of one file each, and one line to register it, are right everywhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.quantizers import base
from surgery.quantizers.base import QuantFormat
from surgery.sharding.base import strategy_for
from tests.helpers.models import save_in_8_bits, save_tiny
from tests.helpers.ranks import run_ranks
from tests.surgery.seams.everywhere import Everywhere
from tests.surgery.seams.loads import failing_states, norms, trained, trained_each
from tests.surgery.seams.one_byte import OneByte, OneByteFormat

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

LAYERS = 14  # two blocks of seven


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("seams") / "model")


@pytest.mark.parametrize("quant", [OneByte(), OneByte(by_row=True)], ids=["blocks", "rows"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_format_of_one_byte_a_value_is_right_in_every_sharding(
    world_size: int, quant: OneByte, checkpoint: Path
) -> None:
    expected = norms(checkpoint, quant, ["one process"])
    shardings = ["FSDP1", "FSDP1 with original parameters", "FSDP2", "DDP", "everywhere"]
    for found in run_ranks(norms, world_size, checkpoint, quant, shardings):
        assert len(found) == 2 * len(shardings) - 1
        for name, (norm, layers, digest) in found.items():
            wanted, _, of_one = expected[f"one process, {name.rpartition(', ')[2]}"]
            assert norm == pytest.approx(wanted, rel=1e-3), name
            assert (layers, digest) == (LAYERS, of_one), name


def test_the_shardings_train_as_one_process(checkpoint: Path, tmp_path: Path) -> None:
    int8 = save_in_8_bits(checkpoint, tmp_path / "int8")
    stored = {"nf4": (checkpoint, surgery.Quant()), "none": (checkpoint, None), "int8": (int8, surgery.Quant())}
    shards: dict[str, Any] = {"DDP": surgery.DDP(), "FSDP1": surgery.FSDP1(), "FSDP2": surgery.FSDP2()}
    cases = {f"{s}, {q}": (path, shard, quant) for s, shard in shards.items() for q, (path, quant) in stored.items()}
    cases["everywhere, nf4"] = checkpoint, Everywhere(), surgery.Quant()
    cases["everywhere, int8"] = int8, Everywhere(), surgery.Quant()
    alone = {q: trained(path, None, quant) for q, (path, quant) in stored.items()}
    first, second = run_ranks(trained_each, 2, cases)
    for name, (losses, adapters) in first.items():
        wanted, wanted_adapters = alone[name.rpartition(", ")[2]]
        assert len(set(wanted)) == 4, "nothing was learned"
        assert losses == pytest.approx(wanted, abs=1e-6 if name.endswith("int8") else 2e-5), name
        assert second[name][0] == losses
        assert second[name][1] == {}
        assert adapters.keys() == wanted_adapters.keys(), name
        for key, value in adapters.items():
            torch.testing.assert_close(value, wanted_adapters[key], atol=2e-4, rtol=1e-3, msg=f"{name}: {key}")


def test_a_sharding_that_nobody_registered_is_refused() -> None:
    with pytest.raises(surgery.ConfigError, match=r"shard: expected None or one of .*FSDP2.*; got 'fsdp'"):
        strategy_for("fsdp")


class Denied(OneByteFormat):
    """Its modules are not what it says that it makes."""

    @classmethod
    def is_quantized(cls, module: nn.Module) -> bool:
        return False


class InMemory(OneByteFormat):
    """Its modules are not on meta."""

    def replacement(self, module: Any) -> nn.Module:
        return super().replacement(module).to_empty(device="cpu")


class Opaque(OneByteFormat):
    """Its states are objects of which nobody knows anything."""

    def states(self, statistics: Any, shapes: Any, dtypes: Any) -> list[Any]:
        return [{"statistics": each} for each in statistics]


class Missing(QuantFormat):
    """Nothing is defined."""


WRONG: dict[type[QuantFormat], str] = {
    Denied: "Denied.replacement made a OneByteLinear of model.layers.0.self_attn.q_proj, which is_quantized denies",
    InMemory: "weight in memory: make it on meta",
    Opaque: "Opaque.state_tensors: expected a tensor for a state, found a dict",
    Missing: "Missing must define replacement, is_quantized, layout and quantize",
}


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_what_a_format_gets_wrong_is_said(
    kind: type[QuantFormat], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(base._FORMATS, OneByte, (kind,))
    with pytest.raises(surgery.PassError, match=re.escape(WRONG[kind])):
        surgery.qlora(checkpoint, quant=OneByte(), report=surgery.Report())


def test_options_of_a_format_that_is_not_imported_are_refused(checkpoint: Path) -> None:
    with pytest.raises(surgery.ConfigError, match=r"got 'nf4'\. A format of your own is known once a module"):
        surgery.qlora(checkpoint, quant="nf4", report=surgery.Report())


def test_a_format_that_fails_on_one_rank_ends_all(checkpoint: Path) -> None:
    first, second = run_ranks(failing_states, 2, checkpoint, ["FSDP1", "FSDP2"], timeout=60)
    assert [message.partition(" at ")[0] for message in second] == ["pass exchange failed"] * 2
    assert first == [f"rank 1 failed: PassError: {message}" for message in second]
