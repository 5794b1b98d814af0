"""Loops of accelerate and TRL's script on two ranks compute the same inside of `surgery.low_memory()`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_tokenizer import save_with_tokenizer
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

#: `PLAIN` from the checkpoint of the other way.
RESUMED, SAVED = "trl, resumed", 3

Found = dict[str, list[dict[str, Run]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("side_by_side")


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    model = save_with_tokenizer(folder / "model", max_position_embeddings=256)
    data = write_data(folder / "data")
    names = (*NAMES, PLAIN)
    found: Found = {}
    for ranks in sorted({CASES[name].ranks for name in names}):
        chosen = {name: CASES[name].command(model, data) for name in names if CASES[name].ranks == ranks}
        scripts = {name: Script(path=path, arguments=tuple(given)) for name, (path, given) in chosen.items()}
        if PLAIN in chosen:
            path, given = chosen[PLAIN]
            newest = str(folder / PLAIN / "{other}" / f"checkpoint-{SAVED}")
            scripts[RESUMED] = Script(path=path, arguments=(*given, "--resume_from_checkpoint", newest))
        seen = run_ranks(on_a_rank, ranks, scripts, folder, timeout=200)
        found |= {name: [rank[name] for rank in seen] for name in scripts}
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


@pytest.mark.parametrize("way", ["stock", "ours"])
def test_a_checkpoint_of_one_resumes_under_the_other(way: str, found: Found, folder: Path) -> None:
    for resumed, straight in zip(found[RESUMED], found[PLAIN], strict=True):
        assert resumed[way].failure is None
        assert len(straight["stock"].losses) > SAVED
        assert resumed[way].losses == pytest.approx(straight["stock"].losses[SAVED:], abs=1e-6)
    name = "adapter_model.safetensors"
    assert unequal_tensors(folder / PLAIN / "stock" / name, folder / RESUMED / way / name) == []
