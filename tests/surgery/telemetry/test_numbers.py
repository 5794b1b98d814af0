"""Sizes as people write them."""

from __future__ import annotations

import pytest

from surgery.errors import ConfigError
from surgery.telemetry.numbers import parse_size, say_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 << 30), ("80 GB", 80 * 10**9), ("1.5mib", 3 << 19), (" 2TiB ", 2 << 40), ("512kb", 512_000)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["24", "GiB", "-1GiB", "24 apples", "0GiB", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "said"),
    [(0, "0 B"), (1023, "1,023 B"), (1 << 20, "1.00 MiB"), (10 << 30, "10.0 GiB"), (1 << 40, "1,024 GiB")],
)
def test_sizes_are_said(size: int, said: str) -> None:
    assert say_size(size) == said
