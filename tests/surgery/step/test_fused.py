"""Fused 4-bit LoRA layers against PEFT's own: losses, gradients, what is kept, what falls back, what is left behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

import model_surgery_patches as patches
import surgery
from surgery.step import dequantize as dequantizing
from surgery.step import fused
from surgery.step.fuse import PATCH, fuse
from tests.helpers.models import save_tiny

#: Rows that are whole blocks, which bitsandbytes dequantizes right on every CPU.
WHOLE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}

IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), **WHOLE)


def build(checkpoint: Path, *, dtype: torch.dtype = torch.float32, quant: Any = None, **lora: Any) -> Any:
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", **{**options, **lora})
    kind = {} if quant is None else {"quant": quant}
    return surgery.qlora(checkpoint, lora=config, dtype=dtype, report=surgery.Report(), **kind).train()


def train(model: Any, steps: int = 3) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of steps of SGD, and the gradients of the first."""
    torch.manual_seed(1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    losses, gradients = [], {}
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        gradients = gradients or {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The greatest relative distance of two gradients of one name."""
    assert found.keys() == expected.keys()
    return max(float((found[name].double() - g).norm() / g.double().norm()) for name, g in expected.items())


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "rslora": {"use_rslora": True},
    "biases are trained": {"bias": "all"},
    "some layers": {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    "ranks differ": {"rank_pattern": {"k_proj": 2, "down_proj": 8}, "alpha_pattern": {"v_proj": 3}},
    "statistics are sharded": {"quant": surgery.Quant(shard_statistics=True)},
    "one quantization": {"quant": surgery.Quant("fp4", double_quant=False, quant_storage=torch.uint8)},
}


def check_trains_as_peft_does(checkpoint: Path, **options: Any) -> None:
    stock = train(build(checkpoint, **options))
    model = build(checkpoint, **options)
    assert fuse(model) > 0
    losses, gradients = train(model)
    assert losses == pytest.approx(stock[0], rel=1e-6)
    assert distance(gradients, stock[1]) < 2e-6


@pytest.mark.parametrize("case", CASES)
def test_trains_as_peft_does(case: str, llama: Path) -> None:
    check_trains_as_peft_does(llama, **CASES[case])


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "rwkv"])
def test_so_do_layers_with_biases_other_names_and_other_widths(family: str, tmp_path: Path) -> None:
    check_trains_as_peft_does(save_tiny(tmp_path, family, **WHOLE))


@pytest.mark.parametrize("how", ["not reentrant", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpoints_give_the_same_bits(how: str, dropout: float, llama: Path) -> None:
    plain, checkpointed = build(llama, lora_dropout=dropout), build(llama, lora_dropout=dropout)
    for model in (plain, checkpointed):
        fuse(model)
    surgery.checkpoint_activations(checkpointed, reentrant=how == "reentrant")
    losses, gradients = train(checkpointed)
    expected = train(plain)
    assert losses == expected[0]
    found = [gradients[name] for name in gradients]
    assert all(map(torch.equal, found, expected[1].values()))


def test_in_16_bits_it_is_no_further_from_float32_than_peft(llama: Path) -> None:
    exact = train(build(llama), steps=1)[1]
    peft = train(build(llama, dtype=torch.bfloat16), steps=1)[1]
    model = build(llama, dtype=torch.bfloat16)
    fuse(model)
    assert distance(train(model, steps=1)[1], exact) < 1.2 * distance(peft, exact)


def test_adapters_in_float32_beside_weights_in_16_bits(llama: Path) -> None:
    def mixed() -> Any:
        model = build(llama, dtype=torch.bfloat16)
        for parameter in model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        return model

    stock, model = train(mixed(), steps=1), mixed()
    fuse(model)
    losses, gradients = train(model, steps=1)
    assert losses == pytest.approx(stock[0], rel=1e-2)
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    assert distance(gradients, stock[1]) < 0.05


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of each fused product, as they come."""
    found: list[int] = []

    def counted(x: torch.Tensor, layers: Any, choice: Any) -> Any:
        if x.dim() == 3:  # not when the patch is verified
            found.append(len(layers))
        return fused.products(x, layers, choice)

    monkeypatch.setattr("surgery.step.fuse.products", counted)
    return found


def test_layers_that_share_an_input_are_one(llama: Path, made: list[int]) -> None:
    model = build(llama)
    assert fuse(model) == 14
    train(model, steps=1)
    assert made == [3, 1, 2, 1] * 2


def test_a_layer_that_is_given_another_input_goes_its_own_way(llama: Path, made: list[int]) -> None:
    model, stock = build(llama), build(llama)
    fuse(model)
    for each in (model, stock):
        for attention in (module for module in each.modules() if type(module).__name__ == "LlamaAttention"):
            attention.k_proj.register_forward_pre_hook(lambda _module, args: (2 * args[0],))
    losses, gradients = train(model, steps=2)
    expected = train(stock, steps=2)
    assert losses == pytest.approx(expected[0], rel=1e-6)
    assert distance(gradients, expected[1]) < 2e-6
    assert made[:6] == [3, 2, 1, 1, 2, 1], "found out while it first ran: k, with v behind it; then v"
    assert made[12:18] == [1, 1, 1, 1, 2, 1]


def second(model: Any) -> None:
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])


def hooked(model: Any) -> None:
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and hasattr(module, "quant_state"):
            module.register_forward_hook(lambda _module, _args, output: output + 1)


FALLBACKS: dict[str, tuple[dict[str, Any], Callable[[Any], object]]] = {
    "two active adapters": ({}, second),
    "none": ({}, lambda model: model.base_model.disable_adapter_layers()),
    "dora": ({"use_dora": True}, lambda model: None),
    "a bias of lora": ({"lora_bias": True}, lambda model: None),
    "hooks inside": ({}, hooked),
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("name", FALLBACKS)
def test_what_it_is_not_for_is_pefts(name: str, llama: Path, made: list[int], caplog: pytest.LogCaptureFixture) -> None:
    options, change = FALLBACKS[name]
    found = []
    for is_fused in (False, True):
        model = build(llama, **options)
        torch.manual_seed(5)
        change(model)
        if is_fused:
            assert fuse(model) == 14
        with nullcontext() if name != "none" else torch.no_grad():
            found.append(model(input_ids=IDS, labels=IDS).loss)
    assert made == []
    assert torch.equal(*found)
    assert ("none has one active adapter" in caplog.text) == (name != "hooks inside")


def test_adapters_by_sample_and_evaluation_are_pefts(llama: Path, made: list[int]) -> None:
    model = build(llama)
    stock = build(llama).eval()(input_ids=IDS, labels=IDS, adapter_names=["default", "__base__"]).loss
    fuse(model)
    assert torch.equal(model.eval()(input_ids=IDS, labels=IDS, adapter_names=["default", "__base__"]).loss, stock)
    with torch.no_grad():
        model(input_ids=IDS)
    assert made == []


def test_a_graph_may_be_kept_and_run_again(llama: Path) -> None:
    model = build(llama)
    fuse(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    loss.backward()
    twice = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.allclose(2 * a, b) for a, b in zip(once, twice, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def kept(model: nn.Module) -> int:
    """Bytes of all tensors that backward waits for, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(input_ids=IDS, labels=IDS).loss
    total = sum(size for pointer, size in found.items() if pointer not in own)
    del loss
    return total


def test_no_more_is_kept_than_by_peft(llama: Path) -> None:
    model, stock = build(llama), build(llama)
    fuse(model)
    assert kept(model) <= kept(stock)


def test_the_product_of_a_gated_mlp_is_not_kept_but_computed_again(llama: Path) -> None:
    model, stock = build(llama), build(llama)
    fuse(model)
    alive = {}
    for each in (model, stock):
        given: list[weakref.ref[torch.Tensor]] = []
        for name, module in each.named_modules():
            if name.endswith("down_proj"):
                module.register_forward_pre_hook(lambda _module, args, given=given: given.append(weakref.ref(args[0])))
        loss = each(input_ids=IDS, labels=IDS).loss
        alive[each] = [reference() is not None for reference in given]
        loss.backward()
    assert alive[model] == [False, False]
    assert alive[stock] == [True, True]
    gradients = ({name: p.grad for name, p in each.named_parameters() if p.grad is not None} for each in alive)
    assert distance(*gradients) < 2e-6


def test_what_is_kept_is_freed_by_backward_and_not_when_the_loss_is_dropped(llama: Path) -> None:
    model = build(llama)
    fuse(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    nodes, pending = [], [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in nodes:
            nodes.append(node)
            pending += [following for following, _ in node.next_functions]
    held = [node.kept for node in nodes if type(node).__name__ == "_ProductsBackward"]
    assert len(held) == 8
    assert all(held)
    loss.backward()
    assert not any(held)


@pytest.fixture
def dequantized(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the weights that are dequantized, as they come."""
    found: list[torch.Size] = []
    stock = dequantizing._dequantize

    def counted(packed: torch.Tensor, state: Any, memory: Any) -> torch.Tensor:
        found.append(state.shape)
        return stock(packed, state, memory)

    monkeypatch.setattr(dequantizing, "_dequantize", counted)
    return found


def test_weights_within_a_budget_are_dequantized_once(llama: Path, dequantized: list[torch.Size]) -> None:
    model, other = build(llama), build(llama)
    fuse(other)
    expected = train(other)
    budget = 4 * (64 * 64 + 32 * 64 + 32 * 64)
    fuse(model, dequantized_bytes=budget)
    dequantized.clear()  # of what verified the patch
    losses, gradients = train(model)
    assert losses == expected[0]
    assert all(map(torch.equal, gradients.values(), expected[1].values()))
    assert len(dequantized) == 3 + 3 * 2 * 11, "q, k and v of block 0 once, the others in each forward and backward"


def test_recomputing_leaves_out_the_last_product_of_a_block(llama: Path, dequantized: list[torch.Size]) -> None:
    model = build(llama)
    fuse(model)
    dequantized.clear()  # of what verified the patch
    surgery.checkpoint_activations(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    assert len(dequantized) == 14
    dequantized.clear()
    loss.backward()
    assert len(dequantized) == 2 * (6 + 7) - 3, "the embedding needs no gradient, so q, k and v of block 0 give none"


def test_release_leaves_nothing(llama: Path, made: list[int]) -> None:
    from peft.tuners.lora import bnb

    before = vars(bnb.Linear4bit)["forward"]
    model, other = build(llama), build(llama)
    fuse(model)
    assert PATCH in {receipt.id for receipt in patches.active()}
    train(other, steps=1)
    assert made == [], "another model is none of its business"
    surgery.release(model)
    train(model, steps=1)
    assert made == []
    assert PATCH not in {receipt.id for receipt in patches.active()}
    assert vars(bnb.Linear4bit)["forward"] is before
