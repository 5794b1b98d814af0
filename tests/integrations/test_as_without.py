"""What happens to `surgery.low_memory()` on libraries that its patches were not written for: nothing, and one line."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import model_surgery_patches as patches
import surgery
from patches.versions import installed_version
from surgery.integrations.low_memory import BUNDLE
from tests.helpers.models import save_tiny
from tests.helpers.snapshot import Snapshot


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Check that every owner of a target has in the end what it had before."""
    from accelerate import Accelerator
    from accelerate import accelerator as of_accelerate
    from transformers import PreTrainedModel, Trainer

    snapshot = Snapshot(PreTrainedModel, Trainer, Accelerator, of_accelerate)
    yield
    gc.collect()
    assert snapshot.differences() == []


def test_a_seam_of_another_signature(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = _losses(folder)
    with monkeypatch.context() as changed:
        changed.setattr("accelerate.accelerator.fsdp2_prepare_model", lambda accelerator, model, mesh: model)
        with surgery.low_memory():
            assert _active() == []
            found = _losses(folder)
    assert found == expected
    (line,) = _lines(caplog)
    assert "accelerate.fill-sharded" in line
    assert "mesh" in line


@pytest.mark.parametrize("distribution", ["accelerate", "transformers"])
def test_a_release_out_of_the_window(
    distribution: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A later release that has rewritten a seam. One that has it unchanged is known by its source, and patched."""
    from accelerate import accelerator
    from transformers import PreTrainedModel

    load = PreTrainedModel._load_pretrained_model

    def other(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None) -> Any:
        return load(model, state_dict, checkpoint_files, load_config, expected_keys)

    seams: dict[str, tuple[Any, str, Any, str]] = {
        "accelerate": (accelerator, "fsdp2_prepare_model", lambda accelerator, model: model, "accelerate.fill-sharded"),
        "transformers": (
            PreTrainedModel, "_load_pretrained_model", staticmethod(other), "transformers.bind-at-load"
        ),
    }  # fmt: skip
    owner, name, function, patch_id = seams[distribution]
    libraries = ("accelerate", "transformers", "peft", "torch", "bitsandbytes")
    versions = {library: installed_version(library) for library in libraries}
    expected = _losses(folder)
    with monkeypatch.context() as changed:
        changed.setattr("patches.versions.installed_version", {**versions, distribution: "99"}.get)
        changed.setattr(owner, name, function)
        with surgery.low_memory():
            assert _active() == []
            found = _losses(folder)
    assert found == expected
    (line,) = _lines(caplog)
    assert patch_id in line


def test_a_known_release_is_patched(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Show that the tests above would see a patch."""
    with surgery.low_memory():
        assert _active() == sorted(BUNDLE.members)
        model = _load(folder)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert _lines(caplog) == []


def _active() -> list[str]:
    return sorted(row.id for row in patches.audit() if row.id in BUNDLE.members)


def _lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if record.name.startswith("surgery")]
    assert all(record.levelno == logging.WARNING for record in records)
    return [record.getMessage() for record in records]


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16)


def _losses(folder: Path) -> list[float]:
    """Train adapters for three steps in a loop of accelerate."""
    from accelerate import Accelerator
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model: Any = get_peft_model(_load(folder), LoraConfig(r=4, target_modules="all-linear"))
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1.0)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for seed in range(3):
        ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(seed))
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
