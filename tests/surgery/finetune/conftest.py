"""What the tests of jobs share: a tiny checkpoint with a tokenizer, and data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.tiny_tokenizer import save_with_tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # All rows are whole blocks, which every CPU dequantizes right.
    folder = tmp_path_factory.mktemp("checkpoint")
    return save_with_tokenizer(folder, bos=True, max_position_embeddings=128, intermediate_size=128)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "train.jsonl"
    rows = [
        {"prompt": f"what does cat {n} say?", "completion": " the cat sat on the mat" * (1 + n % 3)} for n in range(20)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
