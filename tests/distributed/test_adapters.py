"""An adapter saved from shards is whole, and loads where nothing of this project is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed

SHARDS: dict[str, dict[str, Any]] = {
    "units": {},
    "orig-params": {"use_orig_params": True},
    "no-shard": {"strategy": "no-shard"},
    "shard-grad-op": {"strategy": "shard-grad-op", "use_orig_params": True},
}

RELOAD = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(base, sys.argv[2])
print("LOADED", json.dumps({n: p.double().norm().item() for n, p in model.named_parameters() if "lora_" in n}))
"""


def train_and_save(checkpoint: Path, output: Path, shard: dict[str, Any], checkpointing: bool) -> dict[str, float]:
    """Two steps, then save; norms of the whole adapter parameters as they were in memory."""
    from peft import LoraConfig

    import patches
    import surgery

    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear")
    with surgery.qlora(
        checkpoint, lora=lora, shard=surgery.FSDP1(**shard), dtype=torch.float32, report=surgery.Report()
    ) as model:
        if checkpointing:
            surgery.checkpoint_activations(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for step in range(2):
            ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        before = surgery.adapter_state(model)
        surgery.save_adapter(model, output)
    assert patches.active() == []
    return {name: tensor.double().norm().item() for name, tensor in before.items()}


@pytest.mark.parametrize(("name", "checkpointing"), [*((n, False) for n in SHARDS), ("units", True)])
def test_saved_adapter_has_every_key_and_loads_with_plain_peft(tmp_path: Path, name: str, checkpointing: bool) -> None:
    base = save_tiny(tmp_path / "base")
    output = tmp_path / "adapter"
    on_rank0, on_rank1 = run_ranks(train_and_save, 2, base, output, SHARDS[name], checkpointing)
    assert len(on_rank0) == 28
    assert on_rank1 == {}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RELOAD, str(base), str(output)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    loaded = json.loads(done.stdout.partition("LOADED ")[2])
    assert loaded == pytest.approx(on_rank0)
    assert all(value > 0 for value in loaded.values())
    assert sorted(file.name for file in output.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
