from __future__ import annotations

from collections.abc import Iterator

import pytest

import patches
from tests.helpers.fake_upstream import functions, layers
from tests.helpers.snapshot import Snapshot

OWNERS = (functions, layers.Base, layers.Derived, layers.Unhashable, layers.Holder, layers.Leaf)


@pytest.fixture
def unchanged() -> Iterator[Snapshot]:
    """The fake library before the test. Fails a test that leaves it changed, or leaves a patch active."""
    taken = Snapshot(*OWNERS)
    yield taken
    active, differences = patches.active(), taken.differences()
    taken.restore()
    patches.revert(*active)
    assert active == []
    assert differences == []
