"""Activation checkpointing: the same gradients, the blocks that are wrapped, and what is refused."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    checkpoint_wrapper,
)
from transformers import LlamaForCausalLM

from surgery.errors import ConfigError
from surgery.model.tree import unwrapped
from surgery.step.checkpointing import checkpoint_activations
from surgery.step.offload import _Lane
from tests.helpers.models import tiny_config


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.dropout = nn.Dropout(dropout)
        self.calls = 0

    def forward(self, hidden: torch.Tensor, *, scale: float) -> torch.Tensor:
        self.calls += 1
        return hidden + self.dropout(torch.tanh(self.linear(hidden))) * scale


class Model(nn.Module):
    """Blocks over a frozen embedding, as adapters leave it."""

    def __init__(self, blocks: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 8).requires_grad_(False)
        self.blocks = nn.ModuleList([Block(dropout) for _ in range(blocks)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden, scale=0.5)
        return hidden.square().mean()


IDS = torch.tensor([[0, 1, 4]])


def gradients(model: nn.Module) -> list[torch.Tensor]:
    torch.autograd.backward(model(IDS))
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_and_blocks_run_again(reentrant: bool, offload: bool) -> None:
    expected = gradients(Model())
    model = Model()
    blocks = list(model.blocks)
    assert checkpoint_activations(model, reentrant=reentrant, offload=offload) is model
    found = gradients(model)
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert [block.calls for block in blocks] == [2, 2]
    assert sum(isinstance(module, CheckpointWrapper) for module in model.modules()) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_evaluation_runs_blocks_once_and_without_a_warning(reentrant: bool) -> None:
    model = Model()
    blocks = list(model.blocks)
    checkpoint_activations(model, reentrant=reentrant)
    with torch.no_grad():
        assert not model(IDS).requires_grad
    assert [block.calls for block in blocks] == [1, 1]


OPTIONS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize("second", OPTIONS)
@pytest.mark.parametrize("first", OPTIONS)
def test_a_second_call_decides_and_the_same_one_changes_nothing(
    first: tuple[bool, bool], second: tuple[bool, bool]
) -> None:
    expected = gradients(Model())
    model, other = Model(), Model()
    blocks = list(model.blocks)
    for each, (reentrant, offload) in ((model, first), (model, second), (other, second)):
        checkpoint_activations(each, reentrant=reentrant, offload=offload)
    once, twice = (
        [
            [module.checkpoint_impl, module.checkpoint_fn.func.options]
            for module in each.modules()
            if isinstance(module, CheckpointWrapper)
        ]
        for each in (other, model)
    )
    assert once == twice
    assert len(twice) == 2
    assert len(model.embed._forward_hooks) == len(other.embed._forward_hooks) == second[0]
    assert all(torch.equal(one, other) for one, other in zip(gradients(model), expected, strict=True))
    assert [block.calls for block in blocks] == [2, 2]
    made = [module.checkpoint_fn for module in model.modules() if isinstance(module, CheckpointWrapper)]
    checkpoint_activations(model, reentrant=second[0], offload=second[1])
    assert made == [module.checkpoint_fn for module in model.modules() if isinstance(module, CheckpointWrapper)]


def test_a_block_that_is_new_is_wrapped_beside_the_others() -> None:
    model = checkpoint_activations(Model())
    model.blocks.append(Block())  # type: ignore[operator, union-attr]
    checkpoint_activations(model)
    gradients(model)
    assert [unwrapped(block).calls for block in model.blocks] == [2, 2, 2]  # type: ignore[union-attr]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("theirs", [CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT])
def test_blocks_in_a_checkpoint_of_torch_are_computed_twice_or_refused(theirs: Any, reentrant: bool) -> None:
    model = Model()
    block = model.blocks[1]
    model.blocks[1] = checkpoint_wrapper(block, theirs)
    if reentrant or theirs is CheckpointImpl.REENTRANT:
        with pytest.raises(ConfigError, match=r"Block is wrapped by torch's checkpoint_wrapper already.*three times"):
            checkpoint_activations(model, reentrant=reentrant)
        assert not isinstance(model.blocks[0], CheckpointWrapper)
        return
    gradients(checkpoint_activations(model))
    assert block.calls == 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("theirs", [False, True])
def test_blocks_that_transformers_recomputes_are_computed_twice_or_refused(theirs: bool, reentrant: bool) -> None:
    """Whether it was switched on before or, as by a trainer, after."""
    model: Any = LlamaForCausalLM(tiny_config()).train()
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    switch_on, switch_off = getattr(model, f"{name}_enable"), getattr(model, f"{name}_disable")
    calls: list[object] = []
    model.model.layers[1].input_layernorm.register_forward_pre_hook(lambda *_: calls.append(None))

    def step() -> int:
        calls.clear()
        torch.autograd.backward(model(input_ids=IDS, labels=IDS, use_cache=False).loss)
        return len(calls)

    is_refused = theirs or reentrant
    switch_on({"use_reentrant": theirs})
    if is_refused:
        with pytest.raises(ConfigError, match="by transformers already, and would be computed three times"):
            checkpoint_activations(model, reentrant=reentrant)
        switch_off()
    checkpoint_activations(model, reentrant=reentrant)
    assert step() == 2
    switch_on({"use_reentrant": theirs})
    if is_refused:
        with pytest.raises(ConfigError, match="LlamaDecoderLayer is recomputed by transformers too, and would be"):
            step()
    else:
        assert step() == 2
    model.eval()(input_ids=IDS)


def test_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no ModuleList of blocks"):
        checkpoint_activations(nn.Linear(2, 2))


def test_reentrant_without_embeddings_is_refused() -> None:
    model = Model()
    del model.embed
    with pytest.raises(ConfigError, match="needs an embedding layer; use non-reentrant"):
        checkpoint_activations(model, reentrant=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_drops_the_same_again_and_draws_no_further(reentrant: bool) -> None:
    expected = gradients(Model(dropout=0.5))
    drawn = torch.rand(())
    model = checkpoint_activations(Model(dropout=0.5), reentrant=reentrant)
    assert all(torch.equal(one, other) for one, other in zip(gradients(model), expected, strict=True))
    assert torch.equal(torch.rand(()), drawn)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_states_of_generators_are_set_for_blocks_that_draw_alone(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint_activations(Model(dropout=dropout))
    states = []

    class Watched:
        def get_state(self) -> torch.Tensor:
            return torch.get_rng_state()

        def set_state(self, state: torch.Tensor) -> None:
            states.append(state)
            torch.set_rng_state(state)

    monkeypatch.setattr("surgery.step.checkpointing._generators", lambda _first: [Watched()])
    gradients(model)
    assert len(states) == (4 if dropout else 0)  # for each block what it was, and back
    model.eval()
    gradients(model)
    assert len(states) == (4 if dropout else 0)


class Slow:
    """A device whose copies are made as late as they may be: when something waits for them."""

    def __init__(self) -> None:
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.copies: list[int] = []
        self.made: list[torch.Tensor] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.pending.append((target, source))
        self.copies.append(target.nbytes)

    def wait(self) -> None:
        for target, source in self.pending:
            target.copy_(source)
        self.pending.clear()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    """Copies on a stream of its own, on a CPU: targets hold garbage until they are waited for."""
    found, settle = Slow(), _Lane.settle

    def waiting(lane: _Lane) -> None:
        found.wait()
        settle(lane)

    make = torch.empty

    def garbage(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **{**kwargs, "pin_memory": False})
        found.made.append(tensor)
        return tensor.fill_(99)

    monkeypatch.setattr("surgery.step.offload.leaves", lambda _device: True)
    monkeypatch.setattr(_Lane, "copy", lambda _lane, target, source: found.copy(target, source))
    monkeypatch.setattr(_Lane, "settle", waiting)
    monkeypatch.setattr("surgery.step.offload.torch.empty", garbage)
    return found


def buffers(slow: Slow) -> list[int]:
    return [each.nbytes for each in slow.made if each.dtype == torch.uint8]


def steps(model: nn.Module, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of every step, each of two micro-batches."""
    found = []
    for ids in batches:
        model.zero_grad()
        for part in (ids, ids.flip(1)):
            torch.autograd.backward(model(part))
        found += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return found


BATCHES = [torch.randint(5, (1, length), generator=torch.Generator().manual_seed(length)) for length in (3, 7, 7, 2)]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [False, True])
def test_offloaded_inputs_give_the_same_over_steps_of_any_length(slow: Slow, reentrant: bool, dropout: float) -> None:
    expected = steps(Model(4, dropout), BATCHES)
    model = checkpoint_activations(Model(4, dropout), reentrant=reentrant, offload=True)
    found = steps(model, BATCHES)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    # The input of the last of four blocks stays; three go and come back, in each of two micro-batches.
    assert slow.copies == [8 * 4 * ids.numel() for ids in BATCHES for _ in range(2 * 2 * 3)]
    assert buffers(slow) == [8 * 4 * 3] * 3 + [8 * 4 * 7] * 3  # the longer ones are used again


def test_an_input_is_on_its_way_while_the_block_after_it_is_computed(slow: Slow) -> None:
    model = Model(4)
    underway: list[int] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: underway.append(len(slow.pending)))
    gradients(checkpoint_activations(model, offload=True))
    # Forward: that of the block itself, to the host, but for the last. Backward, last block first: that of the next.
    assert underway == [1, 1, 1, 0, 1, 1, 1, 0]


def test_memory_of_inputs_on_the_host_is_free_on_the_device(slow: Slow) -> None:
    model = checkpoint_activations(Model(4), offload=True)
    inputs: list[weakref.ref[torch.Tensor]] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.register_forward_pre_hook(lambda _module, args: inputs.append(weakref.ref(args[0])))
    loss = model(BATCHES[0])
    assert [each() for each in inputs] == [None] * 4
    torch.autograd.backward(loss)


def test_two_forwards_before_backward_in_either_order_and_twice(slow: Slow) -> None:
    plain, model = Model(3), checkpoint_activations(Model(3), offload=True)
    for order in (1, -1):
        for each in (plain, model):
            each.zero_grad()
            for loss in [each(ids) for ids in BATCHES[:2]][::order]:
                torch.autograd.backward(loss, retain_graph=True)
                torch.autograd.backward(loss)
        same = zip(plain.parameters(), model.parameters(), strict=True)
        assert all(one.grad is other.grad is None or torch.equal(one.grad, other.grad) for one, other in same)  # type: ignore[arg-type]
    assert len(buffers(slow)) == 4


def test_a_step_that_fails_leaves_its_buffers_to_the_next(slow: Slow) -> None:
    model = checkpoint_activations(Model(3), offload=True)
    expected = gradients(Model(3))

    def fail(*_: object) -> None:
        raise ValueError("in the middle")

    def in_forward() -> None:
        with pytest.raises(ValueError, match="middle"):
            model(IDS)

    def in_backward() -> None:
        loss = model(IDS)
        handles.append(inner.register_forward_pre_hook(fail))
        with pytest.raises(ValueError, match="middle"):
            torch.autograd.backward(loss)

    inner = model.blocks[1]._checkpoint_wrapped_module  # type: ignore[union-attr]
    handles = [inner.register_forward_pre_hook(fail)]  # type: ignore[operator]
    failing: tuple[Callable[[], None], ...] = (in_forward, in_backward, in_backward)
    for each in failing:
        each()
        handles.pop().remove()
        model.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(gradients(model), expected, strict=True))
    assert len(buffers(slow)) == 2


def test_two_models_at_once_and_copies_of_one_share_nothing(slow: Slow) -> None:
    model = checkpoint_activations(Model(3), offload=True)
    gradients(model)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    losses = [each(IDS) for each in (model, *others)]
    for each, loss in zip((model, *others), losses, strict=True):
        each.zero_grad()
        torch.autograd.backward(loss)
    expected = gradients(Model(3))
    for each in (model, *others):
        found = [parameter.grad for parameter in each.parameters() if parameter.grad is not None]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(buffers(slow)) == 3 * 2
    with torch.no_grad():
        model(IDS)
    assert len(slow.copies) == 4 * 2 * 2


def test_an_input_that_is_changed_in_place_is_refused(slow: Slow) -> None:
    model = Model(3)
    model.blocks[1].register_forward_hook(lambda _module, args, output: (args[0].detach().add_(1), output)[1])
    with pytest.raises(RuntimeError, match="changed its input in place"):
        checkpoint_activations(model, offload=True)(IDS)
