"""The smallest adapted model whose parameters are parametrized, as `bitsandbytes.nn.parametrize` does with experts."""

from __future__ import annotations

from typing import Any

__all__ = ["adapted_parametrized"]


def adapted_parametrized(*, names: tuple[str, ...] = ("a",)) -> Any:
    """A `LoraModel` around two experts whose parameters `names` are parametrized and adapted; nothing is zero.

    The last of `names` has the outermost wrapper, `.model[0]`. Random numbers go on as if it had not been built.
    """
    import torch
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel
    from torch import nn

    class Doubled(nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return 2 * values

    experts = nn.Module()
    for name in names:
        experts.register_parameter(name, nn.Parameter(torch.ones(2, 2, 2, device="cpu"), requires_grad=False))
        nn.utils.parametrize.register_parametrization(experts, name, Doubled())
    config: Any = LoraConfig(r=1, target_modules=[], target_parameters=[f"0.{name}" for name in names])
    with torch.random.fork_rng(devices=()):
        made: Any = LoraModel(nn.Sequential(experts), config, "default")
    for parameter in made.parameters():
        if parameter.requires_grad:
            nn.init.ones_(parameter)
    return made
