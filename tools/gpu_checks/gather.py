"""FSDP2's all-gather of packed 4-bit weights: the words that it changes without the patch, and the patch's cost."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import patches
from gpu_checks.findings import Findings, attempt
from gpu_checks.job import Job, Ranks
from tests.helpers.models import tiny_config

__all__ = ["check_gather"]

PATCH = "torch.fsdp2-bit-exact-gather"

#: Sizes of the model unless `small`.
SIZES: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}
TOKENS, FEW_TOKENS = 1024, 64
LORA_RANK = 16
BATCHES = 4

#: Timed in turn, in every order: one step of each of the three arms is a triple. "again" is stock a second time, and
#: shows the difference between two equal arms. The first triples are not counted.
ARMS = ("stock", "patched", "again")
WARMUP_TRIPLES = 4
TRIPLES_OF_STEPS, TRIPLES_OF_GATHERS, FEW_TRIPLES = 150, 60, 6
GATHERS = 50
RESAMPLES = 2000


def check_gather(job: Job, ranks: Ranks, findings: Findings) -> None:
    """Shard a model packed as bfloat16 with stock FSDP2, then compare it with itself unsharded, and time its steps.

    Fails if stock FSDP2 is exact although the probe finds the defect, or the other way round; and if a word, or the
    last bit of a loss, changes with the patch.
    """
    built = attempt(lambda: {"model": _model(job)})
    model = built.pop("model", None)
    findings.add("gather", "model", ranks.gather(built))
    if any(outcome["error"] for outcome in findings.parts["gather"]["model"]):
        return
    layers = _layers(model)
    exactness = ranks.gather(attempt(partial(_compare_with_unsharded, job, model, layers)))
    findings.add("gather", "exactness", exactness)
    gathers = ranks.gather(attempt(partial(_time_gathers, job, model, layers)))
    findings.add("gather", "gather-time", gathers)
    steps = ranks.gather(attempt(partial(_time_steps, job, model, layers)))
    findings.add("gather", "step-time", steps)
    if job.rank == 0:
        print("\n".join(f"gather: {outcome[0]}" for outcome in (exactness, gathers, steps)))


def _model(job: Job) -> nn.Module:
    """Build a Llama with random weights, equal on all ranks, all in bfloat16: 4-bit layers, adapters, norms."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config() if job.small else tiny_config(**SIZES)
    with job.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, _quantized(module, job.device))
    model.is_loaded_in_4bit = True
    lora = LoraConfig(r=LORA_RANK, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model.train(), lora, autocast_adapter_dtype=False)


def _quantized(linear: nn.Linear, device: torch.device) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        quant_storage=torch.bfloat16,
    )
    layer.weight = Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", quant_storage=torch.bfloat16, module=layer
    )
    return layer.to(device)  # quantizes it


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if getattr(module, "quant_state", None) is not None]


def _shard(job: Job, model: nn.Module) -> None:
    """Shard by decoder block, as accelerate does."""
    mesh = init_device_mesh(job.device.type, (job.world,))
    for block in filter(_is_block, model.modules()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _is_block(module: nn.Module) -> bool:
    # By its ending: FSDP2 prefixes the name of the class.
    return type(module).__name__.endswith("LlamaDecoderLayer")


def _compare_with_unsharded(job: Job, model: nn.Module, layers: list[nn.Module]) -> dict[str, Any]:
    """Shard `model`, and compare its packed words in forward, and its losses, with those before."""
    packed = {layer: _words(layer).clone() for layer in layers}
    expected = _losses(job, model)
    _shard(job, model)
    verdict = patches.verdict(PATCH)
    with _counting_changes(packed) as stock_changes:
        stock = _losses(job, model)
    with _patched(layers, count_calls=True) as tx, _counting_changes(packed) as changes:
        losses = _losses(job, model)
    found = {
        "verdict": str(verdict),
        "words": sum(words.numel() for words in packed.values()),
        "changed_stock": int(stock_changes) // BATCHES,
        "changed_patched": int(changes) // BATCHES,
        "losses_unsharded": expected,
        "losses_stock": stock,
        "losses_patched": losses,
        "gathers_patched": tx.receipts[0].calls,
    }
    # With one rank FSDP2 gathers nothing.
    if job.world > 1 and bool(found["changed_stock"]) != (found["verdict"] == "needed"):
        raise AssertionError(f"the verdict of the patch does not tell what stock FSDP2 does: {found}")
    if found["changed_patched"] or losses != expected:
        raise AssertionError(f"with the patch, expected no changed word and the losses of the unsharded model: {found}")
    if job.world > 1 and not found["gathers_patched"]:
        raise AssertionError(f"the patch was never called: {found}")
    return found


def _words(layer: nn.Module) -> torch.Tensor:
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]  # a 4-bit layer has one
    return weight.detach().view(-1).view(torch.int16)


@contextlib.contextmanager
def _counting_changes(packed: dict[nn.Module, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Count the words that differ from the packed ones over all forwards in the block, in a tensor that is updated."""
    device = next(iter(packed.values())).device
    changes = torch.zeros((), dtype=torch.int64, device=device)

    def compare(layer: nn.Module, _inputs: object) -> None:
        changes.add_((_words(layer) != packed[layer]).sum())

    hooks = [layer.register_forward_pre_hook(compare) for layer in packed]
    try:
        yield changes
    finally:
        for hook in hooks:
            hook.remove()


def _patched(layers: list[nn.Module], *, count_calls: bool = False) -> patches.Transaction:
    """Apply the patch by force, so that it also runs on a CPU, where it is not needed."""
    return patches.transaction(PATCH, on=layers, reason="a check on this device", force=True, count_calls=count_calls)


def _batch(job: Job, model: Any, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(job.rank + job.world * number)
    shape = (1, FEW_TOKENS if job.small else TOKENS)
    return torch.randint(3, model.config.vocab_size, shape, generator=generator).to(job.device)


def _losses(job: Job, model: nn.Module) -> list[float]:
    """Losses on this rank's own batches; forward only, since some backward kernels sum in no fixed order."""
    with torch.no_grad():
        batches = [_batch(job, model, number) for number in range(BATCHES)]
        return [model(input_ids=ids, labels=ids).loss.item() for ids in batches]


def _time_gathers(job: Job, model: nn.Module, layers: list[nn.Module]) -> dict[str, Any]:
    """Time repeated unsharding of one block, which is steadier than a step, of which it is a small part."""
    block = next(module for module in model.modules() if _is_block(module))
    triples = FEW_TRIPLES if job.small else TRIPLES_OF_GATHERS
    return _compare_arms(layers, partial(_seconds_of_a_gather, job, block), triples)


def _time_steps(job: Job, model: nn.Module, layers: list[nn.Module]) -> dict[str, Any]:
    """Time training steps of the whole model on one batch of this rank's own."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    seconds = partial(_seconds_of_a_step, job, model, optimizer, _batch(job, model, 0))
    return _compare_arms(layers, seconds, FEW_TRIPLES if job.small else TRIPLES_OF_STEPS)


def _compare_arms(layers: list[nn.Module], seconds: Callable[[], float], triples: int) -> dict[str, Any]:
    """Medians by arm, and of the ratios within each triple, since machines drift, with 95 % intervals of the latter."""
    orders = list(itertools.permutations(ARMS))
    timed: list[dict[str, float]] = []
    for number in range(WARMUP_TRIPLES + triples):
        timed.append({})
        for arm in orders[number % len(orders)]:
            with _arm(arm, layers):
                timed[-1][arm] = seconds()
    counted = timed[WARMUP_TRIPLES:]
    return {
        **{f"{arm}_ms": round(1000 * statistics.median(found[arm] for found in counted), 4) for arm in ARMS},
        "triples": triples,
        **_ratio("ratio", [found["patched"] / found["stock"] for found in counted]),
        **_ratio("ratio_of_stock_to_itself", [found["again"] / found["stock"] for found in counted]),
    }


@contextlib.contextmanager
def _arm(arm: str, layers: list[nn.Module]) -> Iterator[None]:
    """Run the block with or without the patch. Every arm applies and undoes it, so that all start with equal caches."""
    with _patched(layers):
        if arm == "patched":
            yield
            return
    yield


def _ratio(name: str, ratios: list[float]) -> dict[str, Any]:
    """The median of the ratios, and its 95 % bootstrap interval."""
    values = torch.tensor(ratios, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = values[torch.randint(len(ratios), (RESAMPLES, len(ratios)), generator=generator)]
    bounds = drawn.quantile(0.5, dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return {
        name: round(values.quantile(0.5).item(), 4),
        f"{name}_95_percent": [round(bound, 4) for bound in bounds.tolist()],
    }


def _seconds_of_a_gather(job: Job, block: Any) -> float:
    dist.barrier()
    _wait(job)
    start = time.perf_counter()
    for _ in range(GATHERS):
        block.unshard()
        block.reshard()
    _wait(job)
    return (time.perf_counter() - start) / GATHERS


def _seconds_of_a_step(job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    dist.barrier()
    _wait(job)
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    _wait(job)
    return time.perf_counter() - start


def _wait(job: Job) -> None:
    if job.on_cuda:
        torch.cuda.synchronize(job.device)
