"""Activation checkpointing: the same gradients, the blocks that are wrapped, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper, CheckpointWrapper

from surgery.errors import ConfigError
from surgery.model.checkpointing import checkpoint_activations


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, hidden: torch.Tensor, *, scale: float) -> torch.Tensor:
        self.calls += 1
        return hidden + torch.tanh(self.linear(hidden)) * scale


class Model(nn.Module):
    """Two blocks over a frozen embedding, as adapters leave it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 8).requires_grad_(False)
        self.blocks = nn.ModuleList([Block(), Block()])

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
    assert sum(isinstance(module, ActivationWrapper) for module in model.modules()) == (4 if offload else 2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_evaluation_runs_blocks_once_and_without_a_warning(reentrant: bool) -> None:
    model = Model()
    blocks = list(model.blocks)
    checkpoint_activations(model, reentrant=reentrant)
    with torch.no_grad():
        assert not model(IDS).requires_grad
    assert [block.calls for block in blocks] == [1, 1]


def test_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no ModuleList of blocks"):
        checkpoint_activations(nn.Linear(2, 2))


def test_reentrant_without_embeddings_is_refused() -> None:
    model = Model()
    del model.embed
    with pytest.raises(ConfigError, match="needs an embedding layer; use non-reentrant"):
        checkpoint_activations(model, reentrant=True)
