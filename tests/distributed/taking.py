"""Adapters loaded on ranks: begun from, loaded in place, added, switched, trained on from, and refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import surgery
from surgery.adapters.save import peft_state
from surgery.config import DDP, FSDP1, FSDP2
from surgery.checkpoint import Reader, TensorEntry

__all__ = ["WAYS", "Taken", "logits", "take_all"]

#: Ways to share a model, and where weights wait.
WAYS: dict[str, dict[str, Any]] = {
    "FSDP2": {"shard": FSDP2()},
    "FSDP2 replicated": {"shard": FSDP2(), "placement": "replicated"},
    "FSDP1": {"shard": FSDP1()},
    "FSDP1 use_orig_params": {"shard": FSDP1(use_orig_params=True, strategy="shard-grad-op")},
    "DDP": {"shard": DDP()},
}

STEPS = 2


def ids(step: int) -> torch.Tensor:
    return torch.randint(3, 96, (6, 8), generator=torch.Generator().manual_seed(step))


def logits(model: nn.Module) -> torch.Tensor:
    """Of the same batch on each rank, without a backward that would free what was gathered."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids(0)).logits
        return found


def train(model: nn.Module, steps: range) -> None:
    """SGD on this rank's part of each batch."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    surgery.adapter_state(model)  # after an evaluation FSDP2 would give the optimizer what is gathered
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in steps:
        part = ids(step).chunk(world_size)[rank]
        model(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@contextmanager
def built(checkpoint: Path, **options: Any) -> Iterator[Any]:
    options = {"dtype": torch.float32, "report": surgery.Report(), **options}
    with surgery.qlora(checkpoint, **options) as model:
        yield model


def refusal(act: Callable[[], object]) -> str:
    """The error that `act` raises."""
    try:
        act()
    except surgery.errors.SurgeryError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


@dataclass(kw_only=True)
class Taken:
    """What one rank has seen of one way; states are rank 0's, by PEFT's keys.

    begun, in_place: after qlora(adapter=), and after load_adapter into what was trained. logits: of these two.
    straight, resumed: after training that never stopped, and after one that was saved and begun from. nbytes: that were
    read of the adapter. moved: whether torch's generator has moved. refused: errors by what was tried.
    """

    begun: dict[str, torch.Tensor]
    in_place: dict[str, torch.Tensor]
    logits: list[torch.Tensor]
    straight: dict[str, torch.Tensor]
    resumed: dict[str, torch.Tensor]
    nbytes: int
    moved: bool
    refused: dict[str, str] = field(default_factory=dict)


@contextmanager
def counting() -> Iterator[list[int]]:
    """A list of the bytes that are read of adapters, by the reads of a block, which are as ever."""
    seen: list[int] = []
    stock = Reader.read_bytes

    def read_bytes(reader: Reader, entry: TensorEntry, out: memoryview, *, start: int = 0) -> None:
        if entry.file.name == "adapter_model.safetensors":
            seen.append(len(out))
        stock(reader, entry, out, start=start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "read_bytes", read_bytes)
        yield seen


def take(checkpoint: Path, adapter: Path, broken: Path, work: Path, way: dict[str, Any]) -> Taken:
    """Everything that is done with one adapter in one way."""
    stands = torch.get_rng_state()
    with counting() as seen, built(checkpoint, adapter=adapter, **way) as model:
        moved = not torch.equal(stands, torch.get_rng_state())
        nbytes = sum(seen)
        begun, found = peft_state(model), [logits(model)]
        train(model, range(2))
        surgery.save_adapter(model, work)
        train(model, range(2, 4))
        straight = peft_state(model)
        refused = {
            name: refusal(partial(surgery.load_adapter, model, other if dist.get_rank() == 1 else adapter))
            for name, other in (("truncated on rank 1", broken), ("another on rank 1", work))
        }
        untouched = peft_state(model)
        assert all(torch.equal(untouched[key], tensor) for key, tensor in straight.items())
        logits(model)  # after which FSDP may keep weights gathered
        surgery.load_adapter(model, adapter, trainable=True)
        in_place = peft_state(model)
        found.append(logits(model))
        if type(way["shard"]) is not FSDP2:
            refused["a second one"] = refusal(
                lambda: surgery.load_adapter(model, adapter, name="second", trainable=True)
            )
    with built(checkpoint, adapter=work, **way) as model:
        train(model, range(2, 4))
        resumed = peft_state(model)
    return Taken(
        begun=begun,
        in_place=in_place,
        logits=found,
        straight=straight,
        resumed=resumed,
        nbytes=nbytes,
        moved=moved,
        refused=refused,
    )


def take_all(checkpoint: Path, adapter: Path, broken: Path, work: Path) -> dict[str, Taken]:
    """Every way on this rank, one after the other."""
    return {name: take(checkpoint, adapter, broken, work / name, way) for name, way in WAYS.items()}
