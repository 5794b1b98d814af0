"""Steps of FSDP2 as CUDA graphs need them: what is regular, what is settled, and what a failure midway leaves."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from surgery.sharding.fsdp2_steps import Fsdp2Steps

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class HaltError(Exception):
    """Raised in the middle of a step."""


class Block(nn.Module):
    """A frozen layer, and one that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.trained = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what both make of `x`."""
        return x + torch.tanh(self.frozen(x) + self.trained(x))


def halt(*_args: object) -> None:
    """Fail, as a hook."""
    raise HaltError


def gradients(model: Any) -> list[torch.Tensor]:
    """Gradients of one step, those of this rank."""
    model.zero_grad()
    model(X).square().sum().backward()
    found = [p.grad.to_local().clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def steps_after_failures() -> dict[str, Any]:
    """What differs after a forward, and after a backward, that have failed midway; and what is regular when."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(Block(), Block(), nn.Linear(8, 4))
    for block in model[:2]:
        fully_shard(block)
    fully_shard(model)
    expected = gradients(model)
    steps = Fsdp2Steps(model)
    found: dict[str, Any] = {"regular": steps.is_regular(), "gradients": len(expected)}
    for name, register in (
        ("forward", model[1].register_forward_hook),
        ("backward", model[0].register_full_backward_hook),
    ):
        handle = register(halt)
        found[f"halted in {name}"] = _halts(model)
        handle.remove()
        steps.reset()
        steps.renew()
        found[f"equal after {name}"] = all(map(torch.equal, gradients(model), expected))
    with torch.no_grad():
        model(X)
    found["gathered by evaluation"] = _gathered(model)
    steps.settle()
    found["settled"] = not _gathered(model)
    model.set_requires_gradient_sync(False)
    found["regular without reduction"] = steps.is_regular()
    model(X).sum().backward()
    model.set_requires_gradient_sync(True)
    found["regular with gradients that wait"] = steps.is_regular()
    model(X).sum().backward()
    found["regular again"] = steps.is_regular()
    return found


def _halts(model: nn.Module) -> bool:
    try:
        model(X.requires_grad_()).sum().backward()
    except HaltError:
        return True
    finally:
        X.requires_grad_(requires_grad=False)
    return False


def _gathered(model: nn.Module) -> bool:
    return any(not hasattr(parameter, "device_mesh") for parameter in model.parameters())
