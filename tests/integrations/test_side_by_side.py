"""Loops of accelerate and TRL's script on two ranks compute the same inside of `surgery.low_memory()`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_tokenizer import VOCABULARY, tiny_tokenizer
from tests.integrations.side_by_side import Run, Script, on_a_rank
from trials.cases import CASES
from trials.runs import unequal_tensors

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]  # a test's fixture runs all scripts

#: Those of `CASES` that run here; tools/compare_scripts.py runs all.
NAMES = (
    "loop, storage bfloat16",
    "loop, storage uint8",
    "loop, storage float32",
    "loop, kbit and mixed precision",
    "loop, model first and kbit",
    "loop, accumulating two batches",
    "loop, offload",
    "loop, HSDP 2 x 1",
    "loop, DDP",
    "trl, evaluating at every second step",
    "trl, --bf16",
)
PLAIN = "trl, storage bfloat16"

Found = list[dict[str, dict[str, Run]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("side_by_side")


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    model = save_tiny(folder / "model", vocab_size=VOCABULARY, max_position_embeddings=256)
    tiny_tokenizer().save_pretrained(model)
    data = folder / "data"
    data.mkdir()
    for name, records in (("train", 24), ("test", 4)):
        lines = [json.dumps({"text": f"the cat said {number} to the dog"}) for number in range(records)]
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    scripts = {name: CASES[name].command(model, data) for name in (*NAMES, PLAIN)}
    given = {name: Script(path=path, arguments=tuple(arguments)) for name, (path, arguments) in scripts.items()}
    return run_ranks(on_a_rank, 2, given, folder, timeout=500)


@pytest.mark.parametrize("name", [name for name in NAMES if not CASES[name].differs])
def test_losses_and_adapters_are_those_of_stock(name: str, found: Found, folder: Path) -> None:
    for rank in found:
        stock, ours = rank[name]["stock"], rank[name]["ours"]
        assert (stock.failure, ours.failure) == (None, None)
        assert len(set(stock.losses)) == len(stock.losses) >= 5, "nothing was learned"
        assert ours.losses == pytest.approx(stock.losses, abs=1e-6)
        assert ours.kinds == stock.kinds
        assert ours.parameter_bytes == [0] != stock.parameter_bytes
    saved = [sorted((folder / name / way).rglob("adapter_model.safetensors")) for way in ("stock", "ours")]
    assert len(saved[0]) == len(saved[1]) > 0
    assert [unequal_tensors(*pair) for pair in zip(*saved, strict=True)] == [[] for _ in saved[0]]


def test_evaluating_in_between_changes_no_loss(found: Found) -> None:
    """Stock trains wrong after its first evaluation on CPUs for which bitsandbytes repacks weights in eval mode."""
    for rank in found:
        evaluated = rank["trl, evaluating at every second step"]["ours"]
        assert evaluated.losses == pytest.approx(rank[PLAIN]["stock"].losses, abs=1e-6)
        assert evaluated.losses[-1] == pytest.approx(rank[PLAIN]["ours"].losses[-1], abs=1e-6)
        assert len(evaluated.evaluations) >= 2
