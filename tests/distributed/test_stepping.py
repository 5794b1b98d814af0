"""Steps of FSDP2 on real ranks, as CUDA graphs need them."""

from __future__ import annotations

from tests.distributed.stepping import steps_after_failures
from tests.helpers.ranks import run_ranks


def test_a_step_that_failed_midway_leaves_nothing_and_what_waits_is_known() -> None:
    for found in run_ranks(steps_after_failures, 2):
        assert found.pop("gradients") > 0
        assert found == {
            "regular": True,
            "halted in forward": True,
            "equal after forward": True,
            "halted in backward": True,
            "equal after backward": True,
            "gathered by evaluation": True,
            "settled": True,
            "regular without reduction": False,
            "regular with gradients that wait": False,
            "regular again": True,
        }
