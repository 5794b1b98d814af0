"""Loops of accelerate and TRL's script on two ranks compute the same inside of `surgery.low_memory()`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_tokenizer import VOCABULARY, tiny_tokenizer
from tests.integrations.data import write_data
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
    "loop, DDP",
    "trl, evaluating at every second step",
    "trl, --bf16",
    "loop, HSDP 2 x 2",
    "trl, one process",
)
PLAIN = "trl, storage bfloat16"

Found = dict[str, list[dict[str, Run]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("side_by_side")


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    model = save_tiny(folder / "model", vocab_size=VOCABULARY, max_position_embeddings=256)
    tiny_tokenizer().save_pretrained(model)
    data = write_data(folder / "data")
    names = (*NAMES, PLAIN)
    found: Found = {}
    for ranks in sorted({CASES[name].ranks for name in names}):
        chosen = {name: CASES[name].command(model, data) for name in names if CASES[name].ranks == ranks}
        scripts = {name: Script(path=path, arguments=tuple(given)) for name, (path, given) in chosen.items()}
        seen = run_ranks(on_a_rank, ranks, scripts, folder, timeout=200)
        found |= {name: [rank[name] for rank in seen] for name in chosen}
    return found


@pytest.mark.parametrize("name", [name for name in NAMES if not CASES[name].differs])
def test_losses_and_adapters_are_those_of_stock(name: str, found: Found, folder: Path) -> None:
    for rank in found[name]:
        stock, ours = rank["stock"], rank["ours"]
        assert (stock.failure, ours.failure) == (None, None)
        assert len(set(stock.losses)) > 1, "nothing was learned"
        assert ours.losses == pytest.approx(stock.losses, abs=1e-6)
        assert ours.kinds == stock.kinds
        assert ours.parameter_bytes == [0] != stock.parameter_bytes
    saved = [sorted((folder / name / way).rglob("adapter_model.safetensors")) for way in ("stock", "ours")]
    assert len(saved[0]) == len(saved[1]) > 0
    assert [unequal_tensors(*pair) for pair in zip(*saved, strict=True)] == [[] for _ in saved[0]]


def test_evaluating_in_between_changes_no_loss(found: Found) -> None:
    """Stock trains wrong after its first evaluation on CPUs for which bitsandbytes repacks weights in eval mode."""
    for evaluated, plain in zip(found["trl, evaluating at every second step"], found[PLAIN], strict=True):
        assert evaluated["ours"].losses == pytest.approx(plain["stock"].losses, abs=1e-6)
        assert len(evaluated["ours"].evaluations) >= 2
