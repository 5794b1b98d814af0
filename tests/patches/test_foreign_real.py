"""What real libraries patch in each other, and that nothing is found where nothing is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# In a process of its own: this one has the tests' own patches, and whatever the other tests have loaded.
PROGRAM = """
import json, sys, time
import torch, transformers, peft, accelerate, bitsandbytes
from transformers import monkey_patching
from transformers.models.llama import modeling_llama
import patches

def find(*packages):
    return json.loads(patches.foreign(*packages, timeout=300).to_json())

class Quiet(torch.nn.Module):
    def forward(self, x):
        return x

def written_by_hand(self, x):
    return x

monkey_patching.register_patch_mapping({"LlamaMLP": Quiet})
stock = torch.nn.LayerNorm.forward
torch.nn.LayerNorm.forward = written_by_hand
with monkey_patching.apply_patches(), accelerate.init_empty_weights(include_buffers=False):
    before = dict(sys.modules)
    result = {"patched": find("torch", "transformers")}
torch.nn.LayerNorm.forward = stock

packages = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
start = time.process_time()
result["clean"] = find(*packages)
result["seconds"] = time.process_time() - start
result["imported"] = [name for name in sys.modules if name not in before and name.split(".")[0] in packages]
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    program = tmp_path_factory.mktemp("program") / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program)]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment(), timeout=600)
    return {**json.loads(ran.stdout.splitlines()[-1]), "program": str(program)}


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def test_five_libraries_have_nothing_when_what_they_patched_is_undone(result: dict[str, Any]) -> None:
    assert result["clean"] == {"patches": [], "unchecked": {}}


def test_looking_imports_nothing_of_them(result: dict[str, Any]) -> None:
    assert result["imported"] == []


def test_what_three_of_them_patch_is_found_with_its_source(result: dict[str, Any]) -> None:
    found = {one["target"]: one for one in result["patched"]["patches"]}
    replaced = found["transformers.models.llama.modeling_llama:LlamaMLP"]
    assert (replaced["kind"], replaced["how"]) == ("class", "class")
    assert replaced["defined_at"] == [f"{result['program']}:{line_of('def forward(self, x)')}"]
    registering = found["torch.nn.modules.module:Module.register_parameter"]
    assert (registering["kind"], registering["how"]) == ("method", "function")
    assert "/accelerate/big_modeling.py:" in registering["defined_at"][0]
    assert registering["owner"].startswith("accelerate ")
    by_hand = found["torch.nn.modules.normalization:LayerNorm.forward"]
    assert by_hand["defined_at"] == [f"{result['program']}:{line_of('def written_by_hand')}"]
    assert by_hand["owner"] == ""


def test_it_takes_this_process_little_time(result: dict[str, Any]) -> None:
    # The clean process takes as long as the imports do; this one's own share may not add to that.
    assert result["seconds"] < 6


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(PROGRAM.splitlines(), 1) if text in line)
