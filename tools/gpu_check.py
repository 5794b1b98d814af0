"""Check this project on real GPUs: exactness against upstream, an 8B model loaded and trained, FSDP2's all-gather.

    PYTHONPATH=. torchrun --nproc-per-node 2 tools/gpu_check.py --work /dev/shm/gpu_check --json gpu.json
    PYTHONPATH=. torchrun --nproc-per-node 2 tools/gpu_check.py --device cpu --small

Run from the root of a checkout, on one host, with any number of ranks. `--work` needs 15 GB for the 8B model. A part
that fails is recorded with its error, and the next one runs; the exit code is 1 if any has failed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import warnings
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gpu_checks.attest import check_attest
from gpu_checks.exactness import check_exactness, write_reference
from gpu_checks.experts import check_experts
from gpu_checks.findings import WHOLE, Findings, Outcome, attempt
from gpu_checks.gather import check_gather
from gpu_checks.job import Job, joined
from gpu_checks.training import check_training

PARTS = {
    "exactness": check_exactness,
    "training": check_training,
    "gather": check_gather,
    "attest": check_attest,
    "experts": check_experts,
}
UPSTREAM = ("bitsandbytes", "transformers", "peft", "accelerate")


def main() -> int:
    """Run the selected parts; returns the exit code."""
    options = _parse()
    job = _job(options)
    job.work.mkdir(parents=True, exist_ok=True)
    _set_up(job)
    imports = attempt(_import_upstream)
    reference: Outcome | None = None
    if "exactness" in options.parts and job.rank == 0:
        reference = attempt(partial(write_reference, job))
    with joined(job) as ranks:
        findings = Findings(file=options.json.resolve() if job.rank == 0 else None, environment=_environment(job))
        findings.add("start", "imports", ranks.gather(imports))
        by_rank = [outcome for outcome in ranks.gather(reference) if outcome is not None]
        if by_rank:
            findings.add("start", "reference", by_rank)
        for part in options.parts:
            outcome = attempt(partial(PARTS[part], job, ranks, findings))
            findings.add(part, WHOLE, ranks.gather(outcome))
    if job.rank == 0:
        findings.print_summary()
    return 1 if findings.failures() else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=Path("build/gpu_check"), help="folder for checkpoints")
    parser.add_argument("--json", type=Path, default=Path("build/gpu_check.json"), help="file for what was found")
    parser.add_argument("--small", action="store_true", help="a tiny model in the place of the 8B")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    return parser.parse_args()


def _job(options: argparse.Namespace) -> Job:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return Job(
        rank=int(os.environ.get("RANK", "0")),
        world=int(os.environ.get("WORLD_SIZE", "1")),
        device=torch.device("cuda", local) if options.device == "cuda" else torch.device("cpu"),
        work=options.work.resolve(),
        small=options.small,
    )


def _set_up(job: Job) -> None:
    """Set full float32 precision, kernels that do not depend on the batch size, and a short log."""
    torch.backends.cuda.matmul.allow_tf32 = False
    if job.on_cuda:
        torch.cuda.set_device(job.device)
    warnings.simplefilter("ignore")


def _import_upstream() -> dict[str, Any]:
    for name in UPSTREAM:
        importlib.import_module(name)
    from transformers.utils import logging

    logging.disable_progress_bar()
    return {}


def _environment(job: Job) -> dict[str, Any]:
    versions = {name: metadata.version(name) for name in ("torch", *UPSTREAM, "wrapt")}
    device = torch.cuda.get_device_name(job.device) if job.on_cuda else platform.processor() or "CPU"
    return {"ranks": job.world, "device": device, "python": platform.python_version(), **versions}


if __name__ == "__main__":
    sys.exit(main())
