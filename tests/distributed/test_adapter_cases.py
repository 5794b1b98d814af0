"""Every adapter that PEFT can make is exact and comes out whole, or is refused before a weight is read.

The same models, adapters and batches as in stock transformers, bitsandbytes and PEFT in one process. What comes of each
is the table of `docs/adapters.md`; `SURGERY_REWRITE_DOCS=1` writes it anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import surgery
from tests.distributed.adapter_cases import (
    CASES,
    SHARDINGS,
    STEPS,
    Case,
    Found,
    make_checkpoints,
    on_this_rank,
    reloaded,
    stock,
)
from tests.helpers.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"

#: Lines of the page between which the table is.
BEGIN, END = "<!-- table -->", "<!-- end of the table -->"

#: What stock cannot do either, or does without heed of what it was asked for, is refused in every column.
NEVER = {
    "llama-PiSSA",
    "llama-a-pattern-that-matches-nothing",
    "llama-patterns-that-overlap",
    "llama-token-indices-of-what-is-saved-whole",
    "mixtral-rank-pattern-beside-that-of-PEFT",
    "llama-layers-to-transform-out-of-range",
    "llama-exclude-modules-that-match-nothing",
    "llama-a-target-that-matches-nothing",
    "llama-modules-to-save--a-4-bit-layer",
    "llama-modules-to-save--a-block",
    "llama-modules-to-save-that-match-nothing",
    "llama-token-indices-out-of-range",
    "llama-target-parameters-of-a-4-bit-layer",
    "mixtral-one-of-two-fused-experts--names",
    "mixtral-target-parameters-that-match-nothing",
    "mixtral-experts-with-dropout",
    "mixtral-4bit-modules-to-save--experts",
    "mixtral-4bit-experts-with-DoRA",
    "llama-layer-replication",
    "llama-QALoRA",
    "llama-nothing-to-train",
    "llama-AdaLoRA",
    "llama-IA3",
    "llama-VeRA",
    "llama-prompt-tuning",
    "llama-several-adapters",
}

Results = dict[str, dict[str, Found]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, Found]:
    """By case, what stock finds; of those that are refused everywhere nobody asks."""
    return {case.key: stock(root, case) for case in CASES if case.key not in NEVER}


@pytest.fixture(scope="module")
def found(root: Path) -> Results:
    """By column and case, what rank 0 finds; adapters are in a folder by column and case."""
    keys = [case.key for case in CASES]
    results = {}
    for column, shard in SHARDINGS.items():
        out = root / "out" / column
        if shard is None:
            results[column] = on_this_rank(root, out, column, keys)
            continue
        mine, others = run_ranks(on_this_rank, 2, root, out, column, keys, timeout=600)
        assert {key: each.refusal for key, each in mine.items()} == {key: o.refusal for key, o in others.items()}
        results[column] = mine
    return results


@pytest.mark.parametrize("column", SHARDINGS)
def test_losses_are_those_of_stock(column: str, found: Results, expected: dict[str, Found]) -> None:
    trained = {key: each for key, each in found[column].items() if not each.refusal}
    assert len(trained) >= 25
    for key, each in trained.items():
        assert expected[key].refusal == "", key
        assert len(each.losses) == STEPS
        assert each.losses == pytest.approx(expected[key].losses, abs=1e-5), key


@pytest.mark.parametrize("column", SHARDINGS)
def test_plain_peft_reloads_what_was_trained(
    column: str, found: Results, expected: dict[str, Found], root: Path
) -> None:
    for case in CASES:
        each = found[column][case.key]
        if each.refusal:
            assert not (root / "out" / column / case.key).exists()
            continue
        logits = reloaded(root, case, root / "out" / column / case.key)
        wanted, start = expected[case.key].logits, expected[case.key].start
        assert wanted is not None
        assert start is not None
        assert each.logits is not None
        moved = (wanted - start).abs().max()
        assert moved > 0.05, f"{case.key} was not trained"
        # Over experts stock PEFT adds the factors to the weight, and rounds otherwise.
        assert (each.logits - logits).abs().max() < (3e-5 if case.quant.experts else 1e-5), (
            f"{case.key} is not what was trained"
        )
        assert (wanted - logits).abs().max() < 1e-4 * moved, f"{case.key} is not what stock trains"


@pytest.mark.parametrize("column", SHARDINGS)
def test_what_is_refused_has_not_read_a_weight(column: str, found: Results) -> None:
    refused = {key: each for key, each in found[column].items() if each.refusal}
    assert set(refused) >= NEVER
    assert {key: each.reads for key, each in refused.items() if each.reads} == {}
    assert all(each.refusal.startswith(("ConfigError: ", "SelectorError: ")) for each in refused.values())


def test_one_process_refuses_nothing_else(found: Results) -> None:
    assert {key for key, each in found["one process"].items() if each.refusal} == NEVER


@pytest.mark.parametrize(("column", "world_size"), [("one process", 1), ("FSDP2", 2)])
def test_the_plan_counts_what_is_trained(column: str, world_size: int, found: Results, root: Path) -> None:
    """Its gradients and the optimizer's states too, and of shards; and it refuses what the loader refuses."""
    for case in CASES:
        each = found[column][case.key]
        if each.refusal:
            with pytest.raises(surgery.ConfigError) as caught:
                plan_of(root, case, world_size)
            assert str(caught.value) == each.refusal.partition(": ")[2]
            continue
        plan = plan_of(root, case, world_size)
        step = plan.of_rank(0).train
        assert step is not None
        assert step.adapters == step.gradients == step.optimizer // 2 == each.trainable, case.key


def plan_of(root: Path, case: Case, world_size: int) -> surgery.MemoryPlan:
    return surgery.plan(
        root / case.model, world_size=world_size, quant=case.quant, lora=case.config(), dtype=torch.float32
    )


def test_the_page_has_these_results(found: Results) -> None:
    table = "\n".join(_table(found))
    head, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    page = f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}"
    if os.environ.get("SURGERY_REWRITE_DOCS"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page


def _table(found: Results) -> list[str]:
    lines = [
        f"| model | adapters | {' | '.join(SHARDINGS)} |",
        f"|---|---|{'---|' * len(SHARDINGS)}",
        *(
            f"| {case.model} | {case.name} | {' | '.join(_cell(found[c][case.key]) for c in SHARDINGS)} |"
            for case in CASES
        ),
    ]
    reasons: dict[str, list[str]] = {}
    for case in CASES:
        for said in {_reason(found[column][case.key]): None for column in SHARDINGS if found[column][case.key].refusal}:
            reasons.setdefault(said, []).append(f"{case.model}, {case.name}")
    said_of = [f"| {'; '.join(cases)} | {said} |" for said, cases in reasons.items()]
    return [*lines, "", "What is said where one is refused:", "", "| adapters | refusal |", "|---|---|", *said_of]


def _cell(found: Found) -> str:
    return "refused" if found.refusal else "exact"


def _reason(found: Found) -> str:
    return found.refusal.partition(": ")[2].replace("|", "\\|").replace("*", "\\*")
