"""The cases of the exactness tests, on the devices of this job."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

import patches
from gpu_checks.findings import Findings, attempt
from gpu_checks.job import Job, Ranks
from tests.distributed.cases import CASES, OFFLOADED, ON_TWO, save_models
from tests.distributed.exactness import Case, Result, ours, require_equal, stock, train

__all__ = ["check_exactness", "write_reference"]

REFERENCE = "reference.pt"


#: With one rank FSDP1 does not shard, and its second forward of tied parameters with use_orig_params then fails, even
#: without this project ("as_params=True type(prim_param)=<class 'torch.Tensor'>", torch 2.13).
NOT_ON_ONE_RANK = {"tied-orig-params"}


def _cases(job: Job) -> list[Case]:
    """The cases that this job can run: offloading parameters to the CPU needs another device."""
    cases = [*CASES, *(OFFLOADED if job.on_cuda else ()), *(ON_TWO if job.world == 2 else ())]
    return [case for case in cases if job.world > 1 or case.name not in NOT_ON_ONE_RANK]


def write_reference(job: Job) -> dict[str, Any]:
    """Write tiny checkpoints, and the results of upstream alone on them in one process, for all ranks to read.

    To be called on rank 0 before the process group exists, since upstream's training would join it.
    """
    (job.work / REFERENCE).unlink(missing_ok=True)
    checkpoints = save_models(job.work / "exactness")
    bases = {case.base: case for case in _cases(job)}
    expected = {
        base: train(stock(checkpoints[case.model], case, job.device), job.device) for base, case in bases.items()
    }
    torch.save((checkpoints, expected), job.work / REFERENCE)
    return {"cases": len(_cases(job)), "bases": len(expected)}


def check_exactness(job: Job, ranks: Ranks, findings: Findings) -> None:
    """Train every case on all ranks; each compares its results with the reference from the same type of device."""
    checkpoints, expected = torch.load(job.work / REFERENCE, weights_only=False)
    for case in _cases(job):
        outcome = attempt(partial(_compare, job, checkpoints[case.model], case, expected[case.base]))
        findings.add("exactness", case.name, ranks.gather(outcome))


def _compare(job: Job, checkpoint: Path, case: Case, expected: Result) -> dict[str, float]:
    with ours(checkpoint, case, job.device) as model:
        found = train(model, job.device, accumulation=case.accumulation)
    if patches.active():
        raise AssertionError(f"patches are left: {patches.active()}")
    require_equal(found, expected)
    losses = zip(found.losses, expected.losses, strict=True)
    gradients = (
        (got[name] - wanted[name]).norm() / wanted[name].norm()
        for got, wanted in zip(found.gradients, expected.gradients, strict=True)
        for name in wanted
    )
    return {"loss_error": max(abs(a - b) / abs(b) for a, b in losses), "gradient_error": float(max(gradients))}
