"""Adapters loaded on ranks: begun from, loaded in place, added, switched, trained on from, and refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import surgery
from surgery.adapters.save import peft_state
from surgery.checkpoint import Reader, TensorEntry
from surgery.config import DDP, FSDP1, FSDP2

__all__ = ["WAYS", "Added", "Files", "Taken", "add", "logits", "take_all"]

#: Ways to share a model, and where weights wait, on 2 ranks and on 3.
WAYS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "FSDP2 replicated": {"shard": FSDP2(), "placement": "replicated"},
        "FSDP1": {"shard": FSDP1()},
        "DDP": {"shard": DDP()},
    },
    3: {
        "FSDP2": {"shard": FSDP2()},
        "FSDP1 use_orig_params": {"shard": FSDP1(use_orig_params=True, strategy="shard-grad-op")},
    },
}


@dataclass(frozen=True, kw_only=True)
class Files:
    """Folders: a model; adapters with a whole module, without, and made of weights; one truncated; a place to work."""

    model: Path
    adapter: Path
    plain: Path
    second: Path
    derived: Path
    truncated: Path
    work: Path


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


def take(files: Files, name: str, way: dict[str, Any]) -> Taken:
    """Everything that is done with one adapter in one way."""
    adapter, work, stands = files.adapter, files.work / name, torch.get_rng_state()
    with counting() as seen, built(files.model, adapter=adapter, **way) as model:
        moved = not torch.equal(stands, torch.get_rng_state())
        nbytes = sum(seen)
        begun, found = peft_state(model), [logits(model)]
        train(model, range(2))
        surgery.save_adapter(model, work)
        train(model, range(2, 4))
        straight = peft_state(model)
        refused = {
            name: refusal(partial(surgery.load_adapter, model, other if dist.get_rank() == 1 else adapter))
            for name, other in (("truncated on rank 1", files.truncated), ("another on rank 1", work))
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
    with built(files.model, adapter=work, **way) as model:
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


def take_all(files: Files) -> dict[str, Taken]:
    """Every way on this rank, one after the other."""
    return {name: take(files, name, way) for name, way in WAYS[dist.get_world_size()].items()}


@dataclass(kw_only=True)
class Added:
    """What one rank has seen of adapters that were added to a sharded model; states are rank 0's.

    logits: by what is active. states: by what was active when they were taken. refused: errors by what was tried.
    """

    logits: dict[str, torch.Tensor]
    states: dict[str, dict[str, torch.Tensor]]
    refused: dict[str, str]


def add(files: Files) -> Added:
    """Two adapters on a model under FSDP2 that had none; one evaluated under DDP; one of a model that waits."""
    found, states = {}, {}
    with built(files.model, shard=FSDP2()) as base:
        found["none"] = logits(base)
        model = surgery.load_adapter(base, files.plain)
        found["plain"], states["plain"] = logits(model), peft_state(model)
        surgery.load_adapter(model, files.second, name="second", trainable=True)
        found["second"] = logits(model)
        train(model, range(2))
        states["second, trained"] = peft_state(model)
        model.set_adapter("default")
        found["plain again"] = logits(model)
        with model.disable_adapter():
            found["disabled"] = logits(model)
        refused = {"modules_to_save": refusal(lambda: surgery.load_adapter(model, files.adapter, name="third"))}
        assert list(model.peft_config) == ["default", "second"]
    with built(files.model, adapter=files.second, shard=FSDP2()) as model:
        train(model, range(2))
        states["second, begun from"] = peft_state(model)
    with built(files.model, adapter=files.derived, shard=FSDP2()) as model:
        found["derived"], states["derived"] = logits(model), peft_state(model)
    with built(files.model, adapter=files.second, shard=DDP()) as model:
        surgery.load_adapter(model, files.plain, name="first")
        found["plain under DDP"] = logits(model)
    with built(files.model, adapter=files.plain, shard=FSDP2(), dtype=torch.bfloat16) as model:
        states["plain in bfloat16"] = peft_state(model)
    with surgery.low_memory():
        quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.float32)
        bound = AutoModelForCausalLM.from_pretrained(files.model, dtype=torch.float32, quantization_config=quantized)
    model = surgery.load_adapter(bound, files.derived, trainable=True)
    with surgery.fill(model, shard=FSDP2()) as filled:
        states["derived, filled"] = peft_state(filled)
    return Added(logits=found, states=states, refused=refused)
