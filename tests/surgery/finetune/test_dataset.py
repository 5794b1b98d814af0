"""Datasets: dropped samples, evaluation splits, and what identifies the data."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest

from surgery.errors import ConfigError, DataError
from surgery.finetune.dataset import Dataset, build_dataset, split
from surgery.finetune.encode import Sample
from surgery.finetune.records import Completion, Location, Record, Text
from tests.helpers.tiny_tokenizer import VOCABULARY, tiny_tokenizer

AT = Location(path=Path("data.jsonl"), line=1)
SHORT = Completion(prompt="a", completion="b", at=AT)
LONG_PROMPT = Completion(prompt="a" * 40, completion="b", at=AT)


def build(records: list[Record], **options: Any) -> Dataset:
    return build_dataset(records, tiny_tokenizer(), **{"max_length": 16, "seed": 0, **options})


def numbered(count: int) -> list[Record]:
    return [Text(text=f"{index}", at=AT) for index in range(count)]


def test_samples_cut_off_before_anything_to_learn_are_dropped_and_counted() -> None:
    dataset = build([SHORT, LONG_PROMPT, SHORT, LONG_PROMPT])
    assert (len(dataset.train), dataset.dropped) == (2, 2)


def test_samples_that_are_cut_off_are_counted() -> None:
    long = Text(text="a b c d e f g h i j k l m n o p", at=AT)
    assert build([SHORT, long, LONG_PROMPT]).cut == 2, "one of them is dropped too"
    assert build([SHORT, long], evaluation=[long, SHORT]).cut == 2
    assert build([SHORT, long, long, SHORT], evaluation_fraction=0.5).cut == 2
    assert build([SHORT, SHORT], max_length=3).cut == 0


def test_nothing_to_learn_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data\.jsonl: none of the 1 samples has a token to learn within the first 16"):
        build([LONG_PROMPT])
    with pytest.raises(DataError, match="none of the 1 samples"):
        build([SHORT], evaluation=[LONG_PROMPT])


def test_evaluation_file_is_kept_apart() -> None:
    dataset = build([SHORT, SHORT], evaluation=[SHORT, LONG_PROMPT])
    assert (len(dataset.train), len(dataset.evaluation), dataset.dropped) == (2, 1, 1)


def test_fraction_divides_the_samples_in_file_order_and_by_seed() -> None:
    dataset = build(numbered(100), evaluation_fraction=0.05)
    decode = tiny_tokenizer().decode
    train, held_out = ([int(decode(s.ids[:-1])) for s in part] for part in (dataset.train, dataset.evaluation))
    assert len(held_out) == 5
    assert sorted(train + held_out) == list(range(100))
    assert train == sorted(train)
    assert held_out == sorted(held_out)
    assert build(numbered(100), evaluation_fraction=0.05) == dataset
    assert build(numbered(100), evaluation_fraction=0.05, seed=1) != dataset


def test_split_holds_out_at_least_one_and_leaves_at_least_one() -> None:
    samples = build(numbered(2)).train
    train, held_out = split(samples, fraction=0.01, seed=0)
    assert (len(train), len(held_out)) == (1, 1)
    with pytest.raises(DataError, match=r"holding out 0\.01 of 1 usable samples for evaluation leaves none"):
        split(samples[:1], fraction=0.01, seed=0)


def test_token_beyond_the_embeddings_is_refused() -> None:
    assert build([SHORT], vocab_size=VOCABULARY).dropped == 0
    with pytest.raises(ConfigError, match="the model has only 3 embeddings"):
        build([SHORT], vocab_size=3)


def test_digest_sees_tokens_masks_bounds_and_parts() -> None:
    def sample(ids: list[int], learnt: list[int]) -> Sample:
        return Sample(ids=array("i", ids), learnt=array("b", learnt))

    def digest(train: list[Sample], evaluation: list[Sample]) -> str:
        return Dataset(train=tuple(train), evaluation=tuple(evaluation), dropped=0).digest()

    a, b = sample([1, 2], [0, 1]), sample([3, 4], [0, 1])
    others = {
        digest([a, b], []),
        digest([b, a], []),
        digest([a], [b]),
        digest([sample([1, 2, 3, 4], [0, 1, 0, 1])], []),
        digest([sample([1, 2], [1, 1]), b], []),
    }
    assert len(others) == 5
    assert digest([a, b], []) == digest([sample([1, 2], [0, 1]), b], [])
