"""Ranks with different patches are told so, alike, before anything is built."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist

import patches
import surgery
from surgery.comm.comparison import same_on_every_rank
from surgery.comm.ranks import Ranks, current_ranks
from surgery.errors import ConfigError
from surgery.model.consistency import environment
from tests.helpers.declare import FUNCTIONS, LAYERS, declare
from tests.helpers.fake_upstream import layers
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")

pytestmark = pytest.mark.distributed

SCALE = declare("everywhere", f"{FUNCTIONS}:scale")
FORWARD = declare("here-only", f"{LAYERS}:Base.forward")
TO = declare("on-instances", f"{LAYERS}:Unhashable.to")


def compare() -> str:
    """What this rank is told about its patches; empty if they are the same everywhere."""
    try:
        same_on_every_rank(current_ranks(), "environment", environment(CPU), device=CPU)
    except ConfigError as error:
        return str(error)
    return ""


def on_each_rank() -> dict[str, str]:
    first = dist.get_rank() == 0
    said = {"none": compare()}
    with contextlib.ExitStack() as stack:
        apply = [SCALE, FORWARD] if first else [FORWARD, SCALE]
        for patch in apply:
            stack.enter_context(patches.transaction(patch, reason="a test"))
        said["any order"] = compare()
    with patches.transaction(SCALE, *([FORWARD] if first else []), reason="a test"):
        said["one more on rank 0"] = compare()
        with pytest.raises(ConfigError, match="differ in patches"):
            surgery.qlora("/nowhere", shard=surgery.FSDP1(), device=CPU, report=surgery.Report())
    instance = layers.Unhashable(1)
    with patches.transaction(SCALE, reason="a test"):
        scope = patches.transaction(TO, reason="a test", on=[instance]) if first else contextlib.nullcontext()
        with scope:
            said["instances"] = compare()
    with patches.transaction(*([SCALE] if first else [FORWARD]), reason="a test"):
        said["others"] = compare()
    said["afterwards"] = compare()
    return said


def test_two_ranks() -> None:
    on_rank0, on_rank1 = run_ranks(on_each_rank, 2)
    assert on_rank0 == on_rank1
    same = {"none", "any order", "instances", "afterwards"}
    assert {case for case, text in on_rank0.items() if not text} == same
    assert f"fake.here-only {LAYERS}:Base.forward" in on_rank0["one more on rank 0"]
    assert "is active on rank 0, not there on rank 1" in on_rank0["one more on rank 0"]
    assert "fake.everywhere" not in on_rank0["one more on rank 0"]
    assert "is active on rank 0, not there on rank 1" in on_rank0["others"]
    assert "is not there on rank 0, active on rank 1" in on_rank0["others"]


def test_one_process_has_nobody_to_differ_from() -> None:
    with patches.transaction(SCALE, reason="a test"):
        same_on_every_rank(Ranks(), "environment", environment(CPU), device=CPU)
    assert patches.active() == []
