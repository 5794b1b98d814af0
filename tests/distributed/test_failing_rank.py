"""A rank that fails takes the others down with its error, soon, and none of them keeps a patch or a thread."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.failing import all_fail, fail
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks, try_ranks

pytestmark = pytest.mark.distributed


CLEAN = "; active []; threads []"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("checkpoint"))


#: Failures that leave no rank in a collective.
ERRORS = {
    "skeleton": "CheckpointError: Cannot read the model's config",
    "load-truncated": "PassError: pass read failed at model.",
    "load-changed": "CheckpointError: The checkpoint file ",
    "load-memory": "PassError: pass read failed at model.layers.0.",
    "adapt": "PassError: pass adapt failed at the model: OSError: no disk",
    "install": "PassError: pass install failed at the model: MemoryError: no memory left to install",
}
SHARD = "PassError: pass shard failed at the model: MemoryError: no memory left to shard"


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("sharding", ["fsdp1", "fsdp2"])
def test_failure_reaches_every_rank_and_they_can_go_on(
    tmp_path: Path, checkpoint: Path, sharding: str, failing: int
) -> None:
    """All leave together, so that the process group is whole after it."""
    # FSDP2 shards what is on meta, with no other rank: FSDP1 broadcasts.
    errors = ERRORS if sharding == "fsdp1" else {**ERRORS, "shard": SHARD}
    by_rank = run_ranks(all_fail, 3, checkpoint, tmp_path, tuple(errors), failing, sharding)
    for place, error in errors.items():
        said = [rank[place] for rank in by_rank]
        assert said[failing].startswith(error)
        for rank in {0, 1, 2} - {failing}:
            assert said[rank].startswith(f"PeerError: rank {failing} failed: {error}")
            assert f"; rank {failing}; " in said[rank]
        assert all(text.endswith(CLEAN) for text in said), said


#: Failures that leave others in a collective: these notice when the process has ended.
AMONG_COLLECTIVES = {
    ("exchange", "fsdp1"): "pass exchange failed at model.layers.",
    ("exchange", "fsdp2"): "pass exchange failed at model.layers.",
    ("relocate", "fsdp1"): "pass relocate failed at model.embed_tokens: MemoryError: no memory left to relocate",
    ("relocate", "fsdp2"): "pass relocate failed at model.embed_tokens: MemoryError: no memory left to relocate",
    ("shard", "fsdp1"): "pass shard failed at the model: MemoryError: no memory left to shard",
    ("patch", "fsdp1"): "'bitsandbytes.quant-state-to-noop' was not applied: the probe raised OSError('no disk')",
}


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(("place", "sharding"), AMONG_COLLECTIVES)
def test_failure_among_collectives_ends_every_rank(
    tmp_path: Path, checkpoint: Path, place: str, sharding: str, failing: int
) -> None:
    outcomes = try_ranks(fail, 2, checkpoint, tmp_path, place, failing, sharding)
    cause, survivor = AMONG_COLLECTIVES[place, sharding], str(outcomes[1 - failing].failure)
    assert cause in str(outcomes[failing].failure)
    assert CLEAN in str(outcomes[failing].failure)
    assert CLEAN in survivor
    # Rank 0 holds the store by which it could have told: where it is gone, the connection may be all there is to see.
    assert (f"EndedError: PeerError: rank {failing} failed: " in survivor and cause in survivor) or failing == 0
    assert "EndedError: P" in survivor


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("sharding", ["fsdp1", "fsdp2"])
def test_killed_rank_ends_the_others(tmp_path: Path, checkpoint: Path, sharding: str, failing: int) -> None:
    outcomes = try_ranks(fail, 3, checkpoint, tmp_path, "load-killed", failing, sharding)
    assert outcomes[failing].failure == "the process ended without a result"
    for rank in {0, 1, 2} - {failing}:
        assert "EndedError: PeerError: " in str(outcomes[rank].failure)
        assert "has ended without a word" in str(outcomes[rank].failure)
        assert CLEAN in str(outcomes[rank].failure)


@pytest.mark.parametrize("sharding", ["fsdp1", "fsdp2"])
def test_interrupt_of_one_rank_ends_the_others(tmp_path: Path, checkpoint: Path, sharding: str) -> None:
    """Ctrl-C while the other thread loads: that thread ends first."""
    on_rank0, on_rank1 = try_ranks(fail, 2, checkpoint, tmp_path, "interrupt", 1, sharding)
    assert f"EndedError: KeyboardInterrupt: ; rank -{CLEAN}" in str(on_rank1.failure)
    assert f"EndedError: PeerError: rank 1 failed: KeyboardInterrupt: ; rank 1{CLEAN}" in str(on_rank0.failure)
