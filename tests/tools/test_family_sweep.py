"""`tools/family_sweep.py`: every eighth family equals stock; a difference, a crash and a hang are said."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from families.check import check
from families.compare import differences, different_losses
from families.outcome import Outcome
from families.page import page
from families.pool import outcomes

ROOT = Path(__file__).parents[2]

#: Upstream's warnings are of its models, of which there are many.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("family", list(NAMES)[::8])
def test_a_family_is_exact_or_refused(family: str) -> None:
    outcome = check(family, shard=False)
    assert outcome.verdict != "differs", outcome.why


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["deepseek_v3", "bert"])
def test_two_ranks_are_one_process(family: str) -> None:
    """A mixture of experts whose routers stay in float32; a head with a bias that its parent has too."""
    outcome = check(family, shard=True)
    assert (outcome.verdict, outcome.sharded) == ("exact", "exact"), outcome.why


def test_a_change_of_any_kind_is_a_difference() -> None:
    def model(seed: int = 0, **changes: torch.Tensor) -> nn.Module:
        torch.manual_seed(seed)
        module = nn.BatchNorm1d(3)
        nn.init.normal_(module.weight)
        for name, value in changes.items():
            setattr(module, name, value)
        return module

    assert list(differences(model(), model())) == []
    (bits,) = differences(model(seed=1), model())
    assert bits.startswith("parameters: off by ")
    (dtype,) = differences(model(running_var=torch.ones(3).double()), model())
    assert dtype == "buffers: torch.float64 here, torch.float32 in stock: running_var"
    (shape,) = differences(model(running_var=torch.ones(4)), model())
    assert shape == "buffers: (4,) here, (3,) in stock: running_var"
    frozen = model()
    frozen.requires_grad_(requires_grad=False)
    (trained,) = differences(frozen, model())
    assert trained == "trained on one side only: bias, weight"
    bare = model()
    del bare.bias
    assert "parameters: of stock alone: bias" in list(differences(bare, model()))


def test_losses_that_are_not_finite_differ() -> None:
    assert list(different_losses([1.0, 2.0], [1.0, 2.0], 0.0)) == []
    assert len(list(different_losses([1.0, float("nan")], [1.0, 2.0], 1e-5))) == 1


def endings(family: str, shard: bool) -> Outcome:
    if family == "crashes":
        os.abort()
    if family == "hangs":
        time.sleep(600)
    return Outcome(family=family, verdict="exact", sharded="exact" if shard else "")


def test_a_crash_and_a_hang_are_rows() -> None:
    families = [("crashes", False), ("hangs", False), ("runs", True)]
    found = {each.family: each for each in outcomes(families, endings, jobs=3, limit=10)}
    assert found["runs"].verdict == "exact"
    assert found["runs"].sharded == "exact"
    assert found["crashes"].verdict == found["hangs"].verdict == "differs"
    assert found["crashes"].why == "the process ended by itself"
    assert found["hangs"].why == "not done after 10 s"


def test_the_page_names_every_family() -> None:
    found = [
        Outcome(family="llama", verdict="exact", quantized=14, adapters=28, sharded="exact"),
        Outcome(family="falcon", verdict="refused", why="a | b"),
    ]
    text = page(found)
    assert "| `llama` | exact | 14 | 28 |  | exact |  |" in text
    assert r"| `falcon` | refused |  |  |  |  | a \| b |" in text
    assert text.index("`falcon`") < text.index("`llama`")
    assert f"torch {torch.__version__.partition('+')[0]}" in text


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "tools" / "family_sweep.py", "--families", "lama"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode != 0
    assert "no causal language model of the installed transformers: lama" in ran.stderr
