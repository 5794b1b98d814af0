from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import patches
from tests.helpers.declare import declare

pytestmark = pytest.mark.usefixtures("unchanged")


def halve(x: torch.Tensor) -> torch.Tensor:
    return x / 2


class Block(torch.nn.Module):
    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1

    @classmethod
    def shifted(cls, x: torch.Tensor) -> torch.Tensor:
        return x - 1

    @staticmethod
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.doubled(self.shifted(self.inner(halve(x))))


def hundredfold(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs) * 100


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


TARGETS = ["halve", "Block.inner", "Block.shifted", "Block.doubled"]


@pytest.mark.parametrize("scoped", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_compiled_and_eager_agree_under_a_traced_patch(target: str, scoped: bool) -> None:
    block, x = Block(), torch.arange(4.0)
    subject = None if target == "Block.inner" else (lambda instance, args, kwargs: block)
    patch = declare("a", f"{__name__}:{target}", wrapper=hundredfold, traced=True, subject=subject)
    stock = block(x)
    with patches.transaction(patch, reason="a test", on=[block] if scoped else None):
        patched = block(x)
        compiled = torch.compile(block, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), patched)
        assert not torch.equal(patched, stock)


def test_an_uncovered_instance_compiles_to_stock() -> None:
    covered, other, x = Block(), Block(), torch.arange(4.0)
    patch = declare("a", f"{__name__}:Block.inner", wrapper=hundredfold, traced=True)
    stock = other(x)
    with patches.transaction(patch, reason="a test", on=[covered]):
        assert torch.equal(torch.compile(other, backend="eager", fullgraph=True)(x), stock)
