"""Seams with other libraries: every patch knows which releases it is for, and what does not fit is not applied."""

from __future__ import annotations

import gc
import logging
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner

import patches
import surgery
from families.compare import differences
from patches.drift import parse_signature
from patches.registry import REGISTRY
from tests.helpers.models import save_tiny

POINTS = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]["entry-points"]

#: Patches of defects that the installed release does not have any more.
MENDED = {"transformers.causal-while-recorded"}
IDS = sorted(name for name in POINTS["patches.registry"] if "." in name and name not in MENDED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize("name", IDS)
def test_a_patch_knows_its_releases_and_tries_its_defect_and_its_effect(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    patch = REGISTRY.get(name)
    assert patch.requires
    assert all("<" in window for window in patch.requires.values()), "a release that nobody has looked at is outside"
    assert patch.fingerprint
    assert parse_signature(patch.signature).parameters
    assert patch.probe is not None
    assert patch.verify is not None

    found = patches.verdict(patch, fresh=True)  # imports the library
    assert (found.kind, found.drift) == ("needed", ())
    drawn = torch.get_rng_state()
    capfd.readouterr()
    began = time.process_time()
    assert patch.probe()
    assert time.process_time() - began < 1
    with patches.transaction(patch) as transaction:
        assert name in {receipt.id for receipt in transaction.receipts}
    assert torch.equal(torch.get_rng_state(), drawn)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", MENDED)
def test_a_patch_of_an_earlier_release_is_left_out(name: str) -> None:
    assert patches.verdict(REGISTRY.get(name), fresh=True).kind == "obsolete"
    with patches.transaction(name) as transaction:
        assert not transaction.receipts


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=quantization)


class Changes:
    """Ways in which an installed library differs from the one that a patch was written for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def declare(self, name: str, **fields: Any) -> None:
        self.monkeypatch.setitem(REGISTRY._patches, name, replace(REGISTRY.get(name), **fields))

    def move_window(self, name: str) -> None:
        """A release after the window; without fingerprint, since the same source would be known to be right."""
        self.declare(name, requires=dict.fromkeys(REGISTRY.get(name).requires, "<0.1"), fingerprint=())

    def change_signature(self, name: str, owner: type) -> None:
        attribute = str(REGISTRY.get(name).target).rpartition(".")[2]
        stock = vars(owner)[attribute]

        def changed(self: Any, *args: Any, later: Any = None, **kwargs: Any) -> Any:
            return stock(self, *args, **kwargs)

        self.monkeypatch.setattr(owner, attribute, changed)

    def break_verification(self, name: str) -> None:
        def fail() -> None:
            raise RuntimeError("no effect here")

        self.declare(name, verify=fail)

    def break_probe(self, name: str) -> None:
        def fail() -> bool:
            raise RuntimeError("no such attribute")

        self.declare(name, probe=fail)


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> Changes:
    return Changes(monkeypatch)


@pytest.mark.parametrize(
    "difference",
    [
        ("transformers.bind-at-load", Changes.move_window, "is not in <0.1"),
        ("accelerate.fill-sharded", Changes.move_window, "is not in <0.1"),
        (
            "accelerate.fill-replicated",
            lambda changes, name: changes.change_signature(name, Accelerator),
            "its signature has changed",
        ),
        (
            "peft.adapters-of-meta",
            lambda changes, name: changes.change_signature(name, BaseTuner),
            "its signature has changed",
        ),
        ("accelerate.optimizer-of-meta", Changes.break_probe, "no such attribute"),
        ("transformers.wait-when-loaded", Changes.break_verification, "no effect here"),
    ],
    ids=lambda difference: difference[0],
)
def test_one_patch_that_does_not_fit_leaves_a_script_as_without(
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    changes: Changes,
    difference: tuple[str, Callable[[Changes, str], None], str],
) -> None:
    name, change, said = difference
    wanted, before = load(folder), patches.active()
    change(changes, name)
    with caplog.at_level(logging.WARNING, logger="surgery"), surgery.low_memory():
        assert patches.active() == before
        found = load(folder)
    (line,) = [record.message for record in caplog.records if record.name == "surgery"]
    assert "everything runs as without it" in line
    assert name in line
    assert said in line
    assert "\n" not in line
    assert list(differences(found, wanted)) == []


def losses(path: Path) -> list[float]:
    """Losses of two steps of adapters of a model in 4 bits."""
    torch.manual_seed(0)
    lora, ids = LoraConfig(r=4, target_modules="all-linear"), torch.arange(24).view(2, 12)
    with surgery.qlora(path, lora=lora, report=surgery.Report()) as model:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        found = []
        for _ in range(2):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    return found


def test_a_filled_model_trains_without_the_patches_that_do_not_fit(
    folder: Path, caplog: pytest.LogCaptureFixture, changes: Changes, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, before = losses(folder), patches.active()
    assert caplog.messages == []
    changes.move_window("accelerate.already-sharded")
    changes.change_signature("peft.adapters-of-sharded", BaseTuner)
    changes.break_verification("accelerate.no-second-wrapper")
    REGISTRY.get("accelerate.adapter-state")
    monkeypatch.delattr(Accelerator, "get_state_dict")
    with caplog.at_level(logging.WARNING, logger="surgery"):
        assert losses(folder) == wanted
    (line,) = [record.message for record in caplog.records if record.name == "surgery"]
    for name, said in {
        "accelerate.already-sharded": "is not in <0.1",
        "peft.adapters-of-sharded": "its signature has changed",
        "accelerate.no-second-wrapper": "no effect here",
        "accelerate.adapter-state": "get_state_dict",
    }.items():
        assert name in line
        assert said in line
    assert "\n" not in line
    gc.collect()
    assert patches.active() == before
