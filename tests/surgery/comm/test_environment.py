"""Ranks and world sizes as a launcher sets them, and what is refused in their place."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from surgery.comm.environment import launched_rank, launched_world_size, local_rank
from surgery.errors import ConfigError

VARIABLES: dict[str, Callable[[], int | None]] = {
    "RANK": launched_rank,
    "WORLD_SIZE": launched_world_size,
    "LOCAL_RANK": local_rank,
}


@pytest.mark.parametrize("name", VARIABLES)
def test_each_variable_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = VARIABLES[name]
    monkeypatch.delenv(name, raising=False)
    assert read() is None
    for text, number in (("", None), ("0", 0), ("12", 12)):
        monkeypatch.setenv(name, text)
        assert read() == number


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("text", ["two", "-1", "²", "1_0", " 1", "1" * 5000])
def test_anything_else_is_refused_by_name(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=f"expected {name} to be a number, found '.{{0,80}}: correct or unset it"):
        VARIABLES[name]()
