"""Attestation of a model sharded by FSDP2: its cost, and whether it finds stock FSDP2's changes and a planted bit."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import patches
import surgery
from gpu_checks.findings import Findings, attempt
from gpu_checks.job import Job, Ranks
from gpu_checks.training import make_checkpoint
from surgery.quantizers.digest import page_sums, records_of
from surgery.sharding.base import strategy_of

__all__ = ["check_attest"]

TOKENS, FEW_TOKENS = 1024, 64
LORA_RANK = 16
REPEATS = 5

#: The patch without which FSDP2 changes packed words.
GATHER = "torch.fsdp2-bit-exact-gather"

#: Layers that an evaluation of `surgery finetune --attest` watches.
SAMPLE = 8


def check_attest(job: Job, ranks: Ranks, findings: Findings) -> None:
    """Attest an 8B model (a tiny one if `small`), time it, and attest again with its patches removed.

    Fails if a clean model is not attested, if stock FSDP2 changes words unnoticed, or if a bit flipped on the last rank
    is not found and named on every rank.
    """
    made = ranks.gather(attempt(partial(make_checkpoint, job)))
    findings.add("attest", "checkpoint", made)
    if made[0]["error"]:
        return
    built = attempt(lambda: {"model": _model(job, made[0]["folder"])})
    model: Any = built.pop("model", None)
    findings.add("attest", "model", ranks.gather(built))
    if any(outcome["error"] for outcome in findings.parts["attest"]["model"]):
        return
    with model:
        for name, check in (("cost", _cost), ("planted-bit", _find_a_planted_bit), ("stock-gather", _stock_gather)):
            outcomes = ranks.gather(attempt(partial(check, job, model)))
            findings.add("attest", name, outcomes)
            if job.rank == 0:
                print(f"attest: {name} {outcomes[0]}")


def _model(job: Job, folder: str) -> nn.Module:
    from peft import LoraConfig

    return surgery.qlora(
        folder,
        lora=LoraConfig(r=LORA_RANK, target_modules="all-linear"),
        shard=surgery.FSDP2(),
        device=job.device,
        report=surgery.Report(device=job.device),
    )


def _cost(job: Job, model: nn.Module) -> dict[str, Any]:
    """Milliseconds of the first attestation, which exchanges the recorded digests, of later ones, and of forwards."""
    first = _milliseconds(job, lambda: surgery.attest(model))
    pieces = [shard.piece for shard in strategy_of(model).shards(model, records_of(model)).values()]
    forward = partial(_forward, job, model)
    forward()
    found = surgery.attest(model)
    return {
        "layers": len(found.layers),
        "nbytes": found.nbytes,
        "digest": found.digest,
        "first_ms": first,
        "attest_ms": _median(job, lambda: surgery.attest(model)),
        "digest_of_shards_ms": _median(job, lambda: page_sums(pieces)),
        "forward_ms": _median(job, forward),
        "forward_sampled_ms": _median(job, lambda: _watched(model, forward, SAMPLE)),
        "forward_all_ms": _median(job, lambda: _watched(model, forward, None)),
    }


def _watched(model: nn.Module, forward: Callable[[], object], layers: int | None) -> int:
    with surgery.attesting(model, layers) as watch:
        forward()
    return watch.calls


@torch.no_grad()
def _forward(job: Job, model: Any) -> None:
    generator = torch.Generator().manual_seed(job.rank)
    shape = (1, FEW_TOKENS if job.small else TOKENS)
    model(input_ids=torch.randint(3, model.config.vocab_size, shape, generator=generator).to(job.device))


def _median(job: Job, action: Callable[[], object]) -> float:
    return statistics.median(_milliseconds(job, action) for _ in range(REPEATS))


def _milliseconds(job: Job, action: Callable[[], object]) -> float:
    _wait(job)
    start = time.perf_counter()
    action()
    _wait(job)
    return round(1000 * (time.perf_counter() - start), 3)


def _wait(job: Job) -> None:
    if job.on_cuda:
        torch.cuda.synchronize(job.device)


def _find_a_planted_bit(job: Job, model: nn.Module) -> dict[str, Any]:
    """Flip a bit in the middle of the last layer's shard, on the last rank; flip it back."""
    module, record = list(records_of(model).items())[-1]
    data = strategy_of(model).shards(model, [module])[module].piece.data.detach().view(-1).view(torch.uint8)
    place, mask = data.numel() // 2, 64 if job.rank == job.world - 1 else 0
    data[place] ^= mask
    found = _error(lambda: surgery.attest(model))
    data[place] ^= mask
    surgery.attest(model)
    named = [(each.layer, each.where, each.ranks, each.pages) for each in found.differences] if found else []
    if named != [(record.fqn, "at rest", (job.world - 1,), 1)]:
        raise AssertionError(f"expected {record.fqn} on rank {job.world - 1} to be named, found {named}")
    return {"message": str(found)}


def _error(action: Callable[[], object]) -> surgery.AttestationError | None:
    try:
        action()
    except surgery.AttestationError as error:
        return error
    return None


def _stock_gather(job: Job, model: nn.Module) -> dict[str, Any]:
    """Run forwards with all of this project's patches but the gather's, then with all, after releasing the model."""
    layers = list(records_of(model))
    forward = partial(_forward, job, model)
    verdict = str(patches.verdict(GATHER))
    surgery.release(model)
    with patches.transaction("linear4bit-resident", on=layers, reason="a check of stock FSDP2"):
        found = _error(lambda: _watched(model, forward, None))
    with patches.transaction("qlora-resident", on=layers, reason="a check of FSDP2 as patched", force=True):
        calls = _watched(model, forward, None)
    differences = found.differences if found else ()
    # With one rank FSDP2 gathers nothing.
    if job.world > 1 and bool(differences) != (verdict == "needed"):
        raise AssertionError(f"the verdict of the patch is {verdict}, but attestation found: {found}")
    mine = [each for each in differences if each.ranks == (job.rank,)]
    return {
        "verdict": verdict,
        "layers_differing": len(mine),
        "words_of_the_first": [(each.layer, each.words, each.of_words) for each in mine if each.words is not None],
        "layers_exact_with_the_patch": calls,
        "message": str(found) if found else "",
    }
