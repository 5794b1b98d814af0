"""Exporting a model on one rank, by every way of sharing it, also where a rank fails."""

from __future__ import annotations

import hashlib
import resource
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import surgery
from surgery.config import DDP, FSDP1, FSDP2, Placement, Quant
from tests.helpers.whole_blocks import right_kernels

__all__ = ["ADAPTERS", "IDS", "Case", "Done", "Failed", "built", "export_all", "fail_and_go_on", "loss_of"]

SEED = 5
IDS = torch.arange(3, 51).view(4, 12)

ADAPTERS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [0, 3]}},
    "saved": {"target_modules": ["v_proj", "up_proj"], "modules_to_save": ["lm_head", "norm"]},
    "conv1d": {"target_modules": ["c_attn", "c_fc"], "use_rslora": True},
    "experts": {"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "k_proj"]},
}

#: What is exported, by the name of the folder.
FORMS: dict[str, dict[str, Any]] = {
    "merged": {},
    "merged-nf4": {"dtype": "nf4"},
    "base": {"merged": False},
    "base-fp32": {"merged": False, "dtype": torch.float32, "max_shard_bytes": 50_000},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model: the name of its checkpoint, its adapter, how it is shared and packed, and what is exported."""

    base: str = "llama"
    adapter: str = "linear"
    shard: DDP | FSDP1 | FSDP2 | None = None
    placement: Placement | None = None
    quant: Quant | None = field(default_factory=Quant)
    forms: Sequence[str] = tuple(FORMS)


@dataclass(kw_only=True)
class Done:
    """What one rank has: digests of files by form, losses before the exports and after them, and logits before."""

    files: dict[str, dict[str, str]]
    losses: tuple[float, float]
    logits: torch.Tensor


def adapter_of(name: str) -> Any:
    """One of `ADAPTERS`; B is drawn too."""
    from peft import LoraConfig

    return LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **ADAPTERS[name])


def digests(folder: Path) -> dict[str, str]:
    """The digests of what an export has written, by file name."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@contextmanager
def built(folder: Path, case: Case) -> Iterator[Any]:
    """The adapted model of a case, in evaluation mode."""
    torch.manual_seed(SEED)
    with surgery.qlora(
        folder / case.base,
        quant=case.quant,
        lora=adapter_of(case.adapter),
        shard=case.shard,
        placement=case.placement,
        report=surgery.Report(),
    ) as model:
        yield model.eval()


def loss_of(model: Any) -> tuple[float, torch.Tensor]:
    """The loss, and the logits."""
    with torch.no_grad(), right_kernels():
        found = model(input_ids=IDS, labels=IDS)
    return float(found.loss), found.logits.float()


def export_all(folder: Path, out: Path, cases: dict[str, Case]) -> dict[str, Done]:
    """Every case on this rank, one after the other; exports are in `out / name / form`. folder: of the checkpoints."""
    return {name: export_one(folder, out / name, case) for name, case in cases.items()}


def export_one(folder: Path, out: Path, case: Case) -> Done:
    """One case, exported, and trained after that."""
    with built(folder, case) as model:
        before, logits = loss_of(model)
        for form in case.forms:
            surgery.export(model, out / form, **FORMS[form])
        surgery.save_adapter(model, out / "adapter")
        after, _ = loss_of(model)
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
    files = {form: digests(out / form) for form in case.forms}
    return Done(files=files, losses=(before, after), logits=logits)


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """A block in which this process can write no file beyond `limit` bytes, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@dataclass(kw_only=True)
class Failed:
    """What one rank has found where exports fail: what each has raised, losses before and after, and the last files."""

    errors: list[str]
    losses: tuple[float, float]
    files: dict[str, str]


def fail_and_go_on(folder: Path, out: Path, case: Case) -> Failed:
    """Exports that fail: on the last rank's full disk, since one has a value that is not finite, where one is already.

    The second one goes on where the first has stopped.
    """
    errors = []
    with built(folder, case) as model:
        before, _ = loss_of(model)
        is_last = dist.get_rank() == dist.get_world_size() - 1
        with small_files(30_000 if is_last else resource.RLIM_INFINITY):
            errors.append(error_of(model, out / "failed"))
        assert not (out / "failed").exists()
        dist.barrier()
        surgery.export(model, out / "failed")
        errors.append(error_of(model, out / "failed"))
        after, _ = loss_of(model)
        next(parameter for parameter in model.parameters() if parameter.requires_grad).data.fill_(float("nan"))
        errors.append(error_of(model, out / "poisoned"))
    return Failed(errors=errors, losses=(before, after), files=digests(out / "failed"))


def error_of(model: Any, directory: Path) -> str:
    """The kind and the message of what an export raises."""
    try:
        surgery.export(model, directory)
    except surgery.SurgeryError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"
