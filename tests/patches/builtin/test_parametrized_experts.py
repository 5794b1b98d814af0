"""Adapters of PEFT over experts that bitsandbytes has put into 4 bits by parametrization."""

from __future__ import annotations

import copy
from typing import Any

import peft.tuners.lora.layer as layers
import peft.tuners.lora.model as models
import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import LoraConfig, get_peft_model
from torch import nn

import patches

from .four_bit import unchanged

LEFT, LOST, MERGE = "peft.factors-proxy-left-behind", "peft.adapter-lost-in-cache", "peft.merge-of-parametrized"
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(4, 128, 64, generator=drawn) / 8)
        self.down = nn.Parameter(torch.randn(4, 64, 128, generator=drawn) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.einsum("ti,eoi->eto", x, self.up).sigmoid()
        return torch.einsum("eti,eoi->to", hidden, self.down)


def adapted(*, in_4_bits: bool, **options: Any) -> Any:
    """Adapted experts; those that are not in 4 bits have the values of those that are."""
    packed, plain = Experts(), Experts()
    for name in ("up", "down"):
        replace_parameter_4bit(packed, name)
        plain.get_parameter(name).data = getattr(packed, name).detach().clone()
    model: Any = nn.Sequential(packed if in_4_bits else plain)
    names = ["0.up", "0.down"]
    model = get_peft_model(model, LoraConfig(r=2, **{"target_modules": [], "target_parameters": names, **options}))
    for wrapper in wrappers(model).values():
        for place, factor in enumerate((wrapper.lora_A, wrapper.lora_B)):
            weight = factor["default"].weight
            weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(place)) / 8
    return model


def wrappers(model: Any) -> dict[str, Any]:
    """By the parameter: PEFT nests those of parametrized parameters in another order."""
    return {each.parameter_name: each for each in model.modules() if isinstance(each, layers.ParamWrapper)}


def trained(model: Any) -> list[torch.Tensor]:
    """The output, and the gradients of both factors of both parameters."""
    model.zero_grad()
    output = model(X)
    output.square().sum().backward()
    found = [
        factor["default"].weight
        for each in sorted(wrappers(model).items())
        for factor in (each[1].lora_A, each[1].lora_B)
    ]
    return [output.detach(), *(parameter.grad for parameter in found)]


def test_each_forward_has_both_adapters_once() -> None:
    with unchanged(layers.ParamWrapper), patches.transaction(LEFT, LOST, reason="test"):
        model, plain = adapted(in_4_bits=True), adapted(in_4_bits=False)
        with torch.no_grad():
            bare = Experts()
            for name in ("up", "down"):
                replace_parameter_4bit(bare, name)
            wanted = bare(X)
        for _ in range(2):
            for found, expected in zip(trained(model), trained(plain), strict=True):
                torch.testing.assert_close(found, expected)
            with torch.no_grad(), model.disable_adapter():
                assert torch.equal(model(X), wanted)
        for found, expected in zip(trained(copy.deepcopy(model)), trained(plain), strict=True):
            torch.testing.assert_close(found, expected)
        with pytest.raises(RuntimeError, match="einsum"):
            model(X[:, :3])
        torch.testing.assert_close(model(X), plain(X))
        assert torch.equal(model.unload()(X), wanted)


def test_merging_is_refused_with_nothing_merged() -> None:
    with unchanged(models.LoraModel), patches.transaction(LEFT, LOST, MERGE, reason="test"):
        model, plain = adapted(in_4_bits=True), adapted(in_4_bits=False)
        with torch.no_grad():
            wanted = model(X)
            for merge in (model.merge_adapter, model.merge_and_unload):
                with pytest.raises(ValueError, match="parametrized"):
                    merge()
            assert torch.equal(model(X), wanted)
            torch.testing.assert_close(plain.merge_and_unload()(X), wanted)


@pytest.mark.filterwarnings("ignore:Could not find any LoRA parametrization")
@pytest.mark.parametrize("left_out", [LEFT, LOST])
def test_without_one_of_them_the_second_forward_is_another(left_out: str) -> None:
    with patches.transaction(*({LEFT, LOST} - {left_out}), reason="test"), torch.no_grad():
        model, plain = adapted(in_4_bits=True), adapted(in_4_bits=False)
        model(X)
        assert not torch.allclose(model(X), plain(X))
