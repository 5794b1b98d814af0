"""A user's own `patches` beside a script: surgery works, warns once, and names both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, os, sys, warnings
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig

import patches as mine
import surgery
import model_surgery_patches as patches

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")
lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        with surgery.qlora(sys.argv[1], lora=lora, shard=surgery.FSDP2() if world > 1 else None) as model:
            active = {receipt.id for receipt in patches.active()}
            loss = model(input_ids=torch.arange(16).view(2, 8), labels=torch.arange(16).view(2, 8)).loss.item()
warned = [str(each.message) for each in caught if issubclass(each.category, surgery.ShadowedPatchesWarning)]
found = {"mine": mine.MINE, "active": sorted(active), "left": len(patches.active()), "loss": loss, "warned": warned}
Path(f"rank{rank}.json").write_text(json.dumps(found))
if world > 1:
    dist.destroy_process_group()
"""

CASES = {
    "plainly": ("patches.py", (), 1),
    "torchrun": (
        "patches/__init__.py",
        ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
        2,
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize(("shadow", "launcher", "ranks"), CASES.values(), ids=CASES)
def test_models_are_built_beside_a_file_called_patches(
    tiny: Path, tmp_path: Path, shadow: str, launcher: tuple[str, ...], ranks: int
) -> None:
    file = tmp_path / shadow
    file.parent.mkdir(exist_ok=True)
    file.write_text("MINE = True\n")
    (tmp_path / "train.py").write_text(SCRIPT)
    ran = subprocess.run(
        [sys.executable, *launcher, "train.py", str(tiny)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    for rank in range(ranks):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert (found["mine"], found["left"]) == (True, 0)
        assert "bitsandbytes.linear4bit-apply" in found["active"]
        assert found["loss"] > 0
        (warned,) = found["warned"]
        assert f"`import patches` leads to {file} here" in warned
        assert f"which is {ROOT / 'patches' / '__init__.py'}" in warned
        assert "`import model_surgery_patches as patches`" in warned
