"""Fused layers, called as models call them that do other than most: they are as PEFT's."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

import surgery
from surgery.integrations.peft.fused_4bit_lora import specimen
from surgery.step import dequantize, fused
from surgery.step.fuse import _groups, fuse

Call = Callable[[Any, torch.Tensor], Any]


class Layers(nn.Module):
    """What attention and an MLP have."""

    def __init__(self) -> None:
        super().__init__()
        names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
        torch.manual_seed(0)
        for name in names:
            self.add_module(name, specimen())
            values = torch.randn(64, 64)
            base: Any = self.get_submodule(name).base_layer
            base.weight = type(base.weight)(values, requires_grad=False, module=base).to("cpu")
            for parameter in self.get_submodule(name).parameters():
                if parameter.requires_grad:
                    nn.init.normal_(parameter)


@pytest.fixture
def layers() -> Iterator[Layers]:
    model = Layers()
    assert fuse(model) == 6
    yield model
    surgery.release(model)


def changed_between(layers: Any, x: torch.Tensor) -> Any:
    x = x * 1
    q = layers.q_proj(x).detach()
    x.mul_(2)
    return q * layers.k_proj(x) + layers.v_proj(x)


def frozen_keys(layers: Any, x: torch.Tensor) -> Any:
    q = layers.q_proj(x)
    with torch.no_grad():
        k = layers.k_proj(x)
    assert not k.requires_grad
    return q * k + layers.v_proj(x)


def outputs_changed(layers: Any, x: torch.Tensor) -> Any:
    q, k, v = layers.q_proj(x), layers.k_proj(x), layers.v_proj(x)
    q.clamp_(-2, 2)  # as OLMo does
    k.view(-1, 64).mul_(2)
    return layers.down_proj(q * k + v).add_(1)


def some_not_called(layers: Any, x: torch.Tensor) -> Any:
    return layers.q_proj(x) + layers.v_proj(layers.gate_proj(x))


def crossed(layers: Any, x: torch.Tensor) -> Any:
    q, gate = layers.q_proj(x), layers.gate_proj(x)
    return q + gate + layers.k_proj(x=x) + layers.up_proj(x) + layers.v_proj(x)


def product_of_a_checkpoint(layers: Any, x: torch.Tensor) -> Any:
    def gated(x: torch.Tensor) -> Any:
        return silu(layers.gate_proj(x)) * layers.up_proj(x)

    return layers.down_proj(checkpoint(gated, x, use_reentrant=False))


def broadcast_product(layers: Any, x: torch.Tensor) -> Any:
    return layers.down_proj(x.sum(-1, keepdim=True) * x.sin())


def product_changed(layers: Any, x: torch.Tensor) -> Any:
    product = x * x.sin()
    product.add_(1)
    return layers.down_proj(product) + layers.down_proj(x * 2) + layers.down_proj(product * product)


class Stop(torch.autograd.Function):
    """Gives what it is given, and no gradient."""

    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, *_gradients: torch.Tensor) -> None:
        return None


def no_gradient_comes(layers: Any, x: torch.Tensor) -> Any:
    stop: Any = Stop.apply
    return stop(layers.q_proj(x)) + layers.down_proj(x)


def saved_on_the_host(layers: Any, x: torch.Tensor) -> Any:
    with torch.autograd.graph.save_on_cpu():
        product = x.sin() * layers.q_proj(x)
    return layers.down_proj(product)


CALLS: list[Call] = [
    changed_between, frozen_keys, outputs_changed, some_not_called, crossed, product_of_a_checkpoint,
    broadcast_product, product_changed, no_gradient_comes, saved_on_the_host,
]  # fmt: skip


def gradients(layers: Any, call: Call, *, casting: bool = False) -> dict[str, torch.Tensor | None]:
    """What is found, and the gradients of its sum of squares, of two calls; by name."""
    x = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 64).requires_grad_()
    layers.zero_grad()
    for _ in range(2):
        found = call(layers, x)
        with torch.autocast("cpu", torch.bfloat16, enabled=casting):
            torch.autograd.backward(found.square().sum())
    return {"": found.detach(), "x": x.grad, **{name: p.grad for name, p in layers.named_parameters()}}


def require_close(found: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor | None]) -> None:
    for name, value in expected.items():
        own = found[name]
        if value is None or own is None:
            assert value is own is None, name
        else:
            assert float((own - value).norm()) <= 1e-5 * float(value.norm()), name


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_is_as_pefts_in_what_comes_out_and_in_which_parameters_have_gradients(call: Call, layers: Layers) -> None:
    require_close(gradients(layers, call), gradients(Layers(), call))


def test_backward_under_an_autocast_that_forward_was_not_under(layers: Layers) -> None:
    require_close(gradients(layers, outputs_changed, casting=True), gradients(layers, outputs_changed))


def add_one(part: nn.Module) -> None:
    part.register_forward_hook(lambda _part, _args, output: output + 1)


def double_gradient(part: nn.Module) -> None:
    part.register_full_backward_pre_hook(lambda _part, gradients: (2 * gradients[0],))


def compute_twice(part: Any) -> None:
    stock = part.forward
    part.forward = lambda x: 2 * stock(x)


@pytest.mark.parametrize("part", ["base_layer", "lora_B.default", "lora_dropout.default"])
@pytest.mark.parametrize("change", [add_one, double_gradient, compute_twice])
def test_parts_of_a_layer_do_what_they_do_beside_their_class(
    change: Callable[[Any], None], part: str, layers: Layers
) -> None:
    found = []
    for each in (layers, Layers()):
        change(each.get_submodule(f"q_proj.{part}"))
        found.append(gradients(each, outputs_changed))
    require_close(*found)


def test_so_does_every_module_with_hooks_of_all(layers: Layers) -> None:
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _args, output: output + 1 if isinstance(module, nn.Identity) else None
    )
    try:
        require_close(gradients(layers, outputs_changed), gradients(Layers(), outputs_changed))
    finally:
        handle.remove()


def test_weights_that_are_kept_are_let_go_of_at_release() -> None:
    layers: Any = Layers()
    with pytest.raises(surgery.ConfigError, match="expected 0 or more"):
        fuse(layers, dequantized_bytes=-1)
    fuse(layers, dequantized_bytes=1 << 20)
    layers.q_proj(torch.ones(2, 64))
    workspace = weakref.ref(_groups[layers.q_proj].shared.workspace)
    assert workspace() is not None
    surgery.release(layers)
    assert workspace() is None


def test_a_second_backward_is_refused_as_torch_refuses_it(layers: Any) -> None:
    loss = layers.q_proj(torch.ones(2, 64)).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_what_nobody_asks_for_is_dropped_and_not_computed_again(layers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def counted(x: torch.Tensor, adapted: Any, choice: Any) -> Any:
        counts.append(len(adapted))
        return fused.products(x, adapted, choice)

    monkeypatch.setattr("surgery.step.fuse.products", counted)
    for _ in range(2):
        layers.q_proj(torch.ones(2, 64))
        layers.down_proj(torch.ones(2, 64))
    assert counts == [3, 1, 1, 1]


def test_threads_do_not_take_each_others_products(layers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is held up between its products, and between a weight and what is computed of it."""
    memory = torch.empty(64, 64)
    turn = threading.Barrier(2)

    def shared_memory(packed: torch.Tensor, state: Any, _memory: Any) -> torch.Tensor:
        return memory.copy_(dequantize.functional().dequantize_4bit(packed.view(-1, 1), state))

    stock = nn.functional.linear

    def late(*args: Any) -> torch.Tensor:
        other.wait(0.01)
        return stock(*args)

    other = threading.Event()
    monkeypatch.setattr(dequantize, "_dequantize", shared_memory)
    monkeypatch.setattr(nn.functional, "linear", late)
    inputs = [torch.full((2, 64), value) for value in (1.0, 2.0)]
    expected = [[getattr(Layers(), name)(x).detach() for name in ("q_proj", "k_proj", "v_proj")] for x in inputs]
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def run(number: int) -> None:
        for name in ("q_proj", "k_proj", "v_proj"):
            turn.wait()
            found[number].append(getattr(layers, name)(inputs[number]).detach())

    threads = [threading.Thread(target=run, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, outputs in found.items():
        assert all(map(torch.allclose, outputs, expected[number]))
