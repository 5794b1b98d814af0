"""A rank that fails takes the others down with its error, soon, and none of them keeps a patch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.failing import build_or_fail
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks, try_ranks

pytestmark = pytest.mark.distributed

SOON = 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("checkpoint"))


ERRORS = {
    "skeleton": "CheckpointError: Cannot read the model's config",
    "load-truncated": "PassError: pass load failed at model.",
    "load-memory": "PassError: pass load failed at model.layers.0.",
    "patch": "ProbeError: 'bitsandbytes.quant-state-to-noop' was not applied: the probe raised OSError('no disk')",
    "adapt": "PassError: pass adapt failed at the model: OSError: no disk",
}


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("place", ERRORS)
def test_failure_reaches_every_rank_and_they_can_go_on(
    tmp_path: Path, checkpoint: Path, place: str, failing: int
) -> None:
    """All leave together, so that the process group is whole after it: `run_ranks` meets at a barrier."""
    said = run_ranks(build_or_fail, 3, checkpoint, tmp_path, place, failing, True, timeout=SOON)
    assert said[failing].startswith(ERRORS[place])
    for rank in {0, 1, 2} - {failing}:
        assert said[rank].startswith(f"PeerError: rank {failing} failed: {ERRORS[place]}")
        assert f"; rank {failing}; " in said[rank]
    assert all(text.endswith("active []") for text in said)


@pytest.mark.parametrize("failing", [0, 1])
def test_failure_among_collectives_ends_every_rank(tmp_path: Path, checkpoint: Path, failing: int) -> None:
    """FSDP's broadcasts cannot be left in order: the others notice when the failed rank's process has ended."""
    outcomes = try_ranks(build_or_fail, 2, checkpoint, tmp_path, "shard", failing, False, timeout=SOON)
    cause = "PassError: pass shard failed at the model: MemoryError: no memory left to shard"
    assert f"EndedError: {cause}; rank -; active []" in str(outcomes[failing].failure)
    survivor = str(outcomes[1 - failing].failure)
    assert "active []" in survivor
    # Rank 0 holds the store by which it could have told: where it is gone, the connection is all there is to see.
    assert (
        f"EndedError: PeerError: rank 1 failed: {cause}" in survivor
        if failing == 1
        else "EndedError: PassError" in survivor
    )


@pytest.mark.parametrize("failing", [0, 1])
def test_killed_rank_ends_the_others(tmp_path: Path, checkpoint: Path, failing: int) -> None:
    outcomes = try_ranks(build_or_fail, 3, checkpoint, tmp_path, "load-killed", failing, False, timeout=SOON)
    assert outcomes[failing].failure == "the process ended without a result"
    for rank in {0, 1, 2} - {failing}:
        assert "EndedError: PeerError: another rank has ended without a word" in str(outcomes[rank].failure)
        assert "rank None; active []" in str(outcomes[rank].failure)
