"""What the tests of the recipe share: a good checkpoint, and how much of it was read."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.checkpoint import Reader
from tests.helpers.reads import count_reads
from tests.helpers.tiny_tokenizer import save_with_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tokenizer, in several shards; not to be changed."""
    return save_with_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that any reader has read so far, in order."""
    seen, spy = count_reads()
    monkeypatch.setattr(Reader, "read_bytes", spy)
    return seen
