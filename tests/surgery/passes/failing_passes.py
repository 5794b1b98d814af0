"""Passes that fail, on one rank, wherever a pass can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import surgery

PLACES = ("replace", "adapt", "install", "shard", "values", "tensor", "converted values", "converted tensor")

#: A weight that is read by ranges, and one that is merged or transposed for the model.
PLAIN, CONVERTED = "model.layers.1.mlp.up_proj.weight", "transformer.h.1.mlp.c_fc.weight"


class Failing(surgery.Pass):
    """Fails at `place` on rank 1."""

    name = "failing"

    def __init__(self, place: str) -> None:
        self.place = place
        self.after = place if place in PLACES[:4] else "replace"  # type: ignore[misc]  # of this object

    def run(self, model: nn.Module) -> nn.Module:
        self._fail(self.after)
        return model

    def see_values(self, target: Any, start: int, values: torch.Tensor) -> None:
        if target.fqn in (PLAIN, CONVERTED):
            self._fail("values")

    def see_tensor(self, buffer: Any) -> None:
        if buffer.target.fqn in (PLAIN, CONVERTED):
            self._fail("tensor")

    def _fail(self, where: str) -> None:
        if self.place.removeprefix("converted ") == where and dist.get_rank() == 1:
            raise ValueError(f"on purpose, at {where}")


def build(checkpoints: dict[str, Path], shard: Any, places: list[str]) -> dict[str, str]:
    """By place: what `qlora` raised on this rank."""
    from peft import LoraConfig

    found = {}
    for place in places:
        checkpoint = checkpoints["gpt2" if place.startswith("converted") else "llama"]
        lora = LoraConfig(r=4, target_modules="all-linear")
        try:
            surgery.release(
                surgery.qlora(checkpoint, lora=lora, shard=shard, report=surgery.Report(), passes=(Failing(place),))
            )
            found[place] = "nothing"
        except surgery.SurgeryError as error:
            found[place] = f"{type(error).__name__}: {error}"
        dist.barrier()
    return found
