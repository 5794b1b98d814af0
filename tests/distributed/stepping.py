"""Steps of FSDP2 as CUDA graphs need them: what is regular, what is settled, and what a failure midway leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

import surgery
from surgery.sharding.base import strategy_of

IDS = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(0))


class HaltError(Exception):
    """Raised in the middle of a step."""


def halt(*_args: object) -> None:
    """A hook."""
    raise HaltError


def gradients(model: Any) -> list[torch.Tensor]:
    """This rank's, of one step."""
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    found = [p.grad.to_local().clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def steps_after_failures(checkpoint: Path) -> dict[str, Any]:
    """What differs after a forward, and after a backward, that have failed midway; and what is regular when."""
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model: Any = surgery.qlora(checkpoint, lora=lora, shard=surgery.FSDP2(), report=surgery.Report()).train()
    expected = gradients(model)
    steps = strategy_of(model).steps(model)
    blocks = [each for each in model.modules() if type(each).__name__.endswith("DecoderLayer")]
    found: dict[str, Any] = {"regular": steps.is_regular(), "gradients": len(expected)}
    for name, register in (
        ("forward", blocks[-1].register_forward_hook),
        ("backward", blocks[0].register_full_backward_hook),
    ):
        handle = register(halt)
        found[f"halted in {name}"] = _halts(model)
        handle.remove()
        steps.reset()
        steps.renew()
        found[f"equal after {name}"] = all(map(torch.equal, gradients(model), expected))
    with torch.no_grad():
        model(input_ids=IDS)
    found["gathered by evaluation"] = _gathered(model)
    steps.settle()
    found["settled"] = not _gathered(model)
    model.set_requires_gradient_sync(False)
    found["regular without reduction"] = steps.is_regular()
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.set_requires_gradient_sync(True)
    found["regular with gradients that wait"] = steps.is_regular()
    model(input_ids=IDS, labels=IDS).loss.backward()
    found["regular again"] = steps.is_regular()
    return found


def _halts(model: nn.Module) -> bool:
    try:
        model(input_ids=IDS, labels=IDS).loss.backward()
    except HaltError:
        return True
    return False


def _gathered(model: nn.Module) -> bool:
    return any(not hasattr(parameter, "device_mesh") for parameter in model.parameters())
