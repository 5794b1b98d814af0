"""Patched functions in the hands of torch: compiled callers, copied models, workers of a DataLoader."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, default_collate

import patches
from tests.helpers.declare import declare

pytestmark = pytest.mark.usefixtures("unchanged")

X = torch.arange(4.0)
COLLATE = "torch.utils.data._utils.collate:default_collate"


def halve(x: torch.Tensor) -> torch.Tensor:
    return x / 2


def scale(x: torch.Tensor, by: float = 2.0, *, shift: float = 1.0) -> torch.Tensor:
    return x * by + shift


class Base(torch.nn.Module):
    def inherited(self, x: torch.Tensor, offset: float = 3.0) -> torch.Tensor:
        return x + offset


class Block(Base):
    def inner(self, x: torch.Tensor, offset: float = 1.0) -> torch.Tensor:
        return x + offset

    @classmethod
    def shifted(cls, x: torch.Tensor, *, by: float = 1.0) -> torch.Tensor:
        return x - by

    @staticmethod
    def doubled(x: torch.Tensor, times: float = 2.0) -> torch.Tensor:
        return x * times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inherited(self.doubled(self.shifted(self.inner(scale(halve(x))))))


def hundredfold(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs) * 100


def passing(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs)


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


TARGETS = ["halve", "scale", "Block.inner", "Block.shifted", "Block.doubled", "Block.inherited", "Base.inherited"]


@pytest.mark.parametrize("wrapper", [hundredfold, passing])
@pytest.mark.parametrize("target", TARGETS)
def test_a_compiled_caller_runs_the_patch(target: str, wrapper: Any) -> None:
    """With defaults and without, before and after the patch."""
    block = Block()
    run = torch.compile(block, backend="eager", fullgraph=True)
    stock = block(X)
    assert torch.equal(run(X), stock)
    with patches.transaction(declare("a", f"{__name__}:{target}", wrapper=wrapper), reason="a test"):
        patched = block(X)
        assert torch.equal(run(X), patched)
        assert torch.equal(patched, stock) == (wrapper is passing)
    assert torch.equal(run(X), stock)


def test_what_replaces_a_function_is_compiled() -> None:
    def stand_in(x: torch.Tensor, by: float = 5.0, *, shift: float = 0.0) -> torch.Tensor:
        return x * by + shift

    patch = patches.Patch(id="fake.a", target=f"{__name__}:scale", replace=stand_in, reason="a test")
    block = Block()
    run = torch.compile(block, backend="eager", fullgraph=True)
    stock = run(X)
    with patches.transaction(patch):
        assert torch.equal(run(X), block(X))
        assert not torch.equal(run(X), stock)
    assert torch.equal(run(X), stock)


def test_a_scoped_patch_is_compiled_for_its_instances_alone() -> None:
    covered, other = Block(), Block()
    stock = other(X)
    patch = declare("a", f"{__name__}:Block.inner", wrapper=hundredfold)
    with patches.transaction(patch, reason="a test", on=[covered]):
        assert torch.equal(torch.compile(other, backend="eager", fullgraph=True)(X), stock)
        assert torch.equal(torch.compile(covered, backend="eager", fullgraph=True)(X), covered(X))
        assert not torch.equal(covered(X), stock)


@pytest.mark.parametrize("target", ["torch.nn.functional:gelu", "torch.nn.functional:relu"])
def test_an_encoder_that_took_a_patched_activation_copies(target: str) -> None:
    """`TransformerEncoder` makes deep copies of its layer, and each keeps the activation that it was given."""
    name = target.rpartition(":")[2]
    calls: list[str] = []

    def counting(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        calls.append(name)
        return wrapped(*args, **kwargs)

    def encoder() -> torch.nn.TransformerEncoder:
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=name, batch_first=True)
        return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    x = torch.ones(1, 3, 8)
    stock = encoder()(x)
    with patches.transaction(declare("a", target, wrapper=counting), reason="a test"):
        taken = encoder()
        assert torch.equal(copy.deepcopy(taken)(x), stock)
        assert len(calls) == 2
    assert getattr(functional, name).__name__ == name
    made = [taken, copy.deepcopy(taken), pickle.loads(pickle.dumps(taken))]
    assert all(torch.equal(one(x), stock) for one in made)
    assert len(calls) == 2


def test_workers_take_a_patched_function_to_collate_with() -> None:
    with patches.transaction(declare("a", COLLATE, wrapper=passing), reason="a test"):
        from torch.utils.data._utils import collate

        loader: Any = DataLoader(
            range(4), batch_size=2, num_workers=1, multiprocessing_context="spawn", collate_fn=collate.default_collate
        )
        assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]
        loader = DataLoader(range(4), batch_size=2, collate_fn=default_collate)
        assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]


def test_a_model_that_keeps_its_original_forward_copies() -> None:
    """As accelerate does: `module._original_forward = module.forward`, a bound method."""
    block = Block()
    stock = block(X)
    with patches.transaction(declare("a", f"{__name__}:Block.forward", wrapper=hundredfold), reason="a test"):
        block._original_forward = block.forward
        copied, pickled = copy.deepcopy(block), pickle.loads(pickle.dumps(block))
        for one in (copied, pickled):
            assert one._original_forward.__self__ is one
            assert torch.equal(one._original_forward(X), stock * 100)
    assert torch.equal(copy.deepcopy(block)._original_forward(X), stock)
