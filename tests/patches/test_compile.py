from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import patches
from tests.helpers.declare import declare

pytestmark = pytest.mark.usefixtures("unchanged")

X = torch.arange(4.0)


def halve(x: torch.Tensor) -> torch.Tensor:
    return x / 2


class Child(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 3


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = Child()
        self.offset = 5.0

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1

    @classmethod
    def shifted(cls, x: torch.Tensor) -> torch.Tensor:
        return x - 1

    @staticmethod
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @property
    def factor(self) -> float:
        return 7.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.child(self.doubled(self.shifted(self.inner(halve(x))))) * self.factor + self.offset


def tenfold(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs) * 10


TARGETS = ["halve", "Model.inner", "Model.shifted", "Model.doubled", "Model.factor", "Model.offset", "Child.forward"]


def patch_of(target: str, model: Model, *, scoped: bool) -> tuple[patches.Patch, list[Any] | None]:
    """The patch, and the instances to limit it to."""
    owned = target not in ("halve", "Model.shifted", "Model.doubled")
    decides = model.child if target == "Child.forward" else model
    patch = declare(
        "a",
        f"{__name__}:{target}",
        wrapper=tenfold,
        kind="attribute" if target == "Model.offset" else "auto",
        subject=None if owned else (lambda instance, args, kwargs: model),
    )
    return patch, [decides] if scoped else None


def compiled(model: Model) -> Any:
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("scoped", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_compiled_equals_eager(target: str, scoped: bool) -> None:
    model, other = Model(), Model()
    stock = model(X)
    patch, on = patch_of(target, model, scoped=scoped)
    with patches.transaction(patch, reason="a test", on=on):
        patched = model(X)
        assert not torch.equal(patched, stock)
        assert torch.equal(compiled(model)(X), patched)
        # Where the subject is always `model`, what others call is in scope too.
        expected = other(X)
        assert torch.equal(compiled(other)(X), expected)
        assert torch.equal(expected, stock) == (scoped and patch.subject is None)


@pytest.mark.parametrize("scoped", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_applied_and_undone_after_compilation(target: str, scoped: bool) -> None:
    model = Model()
    run = compiled(model)
    stock = run(X)
    patch, on = patch_of(target, model, scoped=scoped)
    for _ in range(2):
        with patches.transaction(patch, reason="a test", on=on) as tx:
            assert torch.equal(run(X), model(X))
            assert not torch.equal(run(X), stock)
            patches.disable("fake.a")
            assert torch.equal(run(X), stock)
            patches.enable("fake.a")
            assert not torch.equal(run(X), stock)
            tx.commit()
        patches.revert("fake.a")
        assert torch.equal(run(X), stock)


def test_a_second_scope_is_traced_too() -> None:
    first, second = Model(), Model()
    patch, _ = patch_of("Model.inner", first, scoped=True)
    run = compiled(second)
    with patches.transaction(patch, reason="a test", on=[first]):
        stock = run(X)
        with patches.transaction(patch, reason="a test", on=[second]):
            assert torch.equal(run(X), first(X))
        assert torch.equal(run(X), stock)


@pytest.mark.parametrize("target", ["Model.inner", "Model.factor", "Model.offset", "Child.forward"])
def test_objects_are_told_apart_by_whether_they_are_covered_alone(target: str) -> None:
    graphs, models = CompileCounter(), [Model() for _ in range(4)]
    run = torch.compile(lambda model, x: model(x), backend=graphs, fullgraph=True)
    patch, _ = patch_of(target, models[0], scoped=True)
    covered = [model.child if target == "Child.forward" else model for model in models[:3]]
    with patches.transaction(patch, reason="a test", on=covered[:2]) as transaction:
        for _ in range(2):
            assert [run(model, X).equal(model(X)) for model in models] == [True] * 4
            assert graphs.frame_count == 2
        transaction.receipts[0].extend(covered[2:])
        assert torch.equal(run(models[2], X), models[0](X))


def test_a_copy_rewritten_after_compilation_is_traced_anew() -> None:
    patch = declare("a", f"{__name__}:halve", wrapper=tenfold, aliases="rewrite")
    model = Model()
    run = compiled(model)
    stock = run(X)
    with patches.transaction(patch, reason="a test"):
        assert torch.equal(run(X), model(X))
        assert not torch.equal(run(X), stock)
    assert torch.equal(run(X), stock)


def count_compilations(change: Any) -> int:
    model, graphs = Model(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    run = torch.compile(model, backend=backend)
    run(X)
    change(model)
    run(X)
    return len(graphs)


def test_graphs_are_kept_where_nothing_that_they_see_changes() -> None:
    def apply_untraced(model: Model) -> None:
        with patches.transaction(declare("a", "math:floor"), reason="a test"):
            pass

    assert count_compilations(apply_untraced) == 1


def test_graphs_are_dropped_where_it_does() -> None:
    def apply_traced(model: Model) -> None:
        with patches.transaction(patch_of("Model.inner", model, scoped=False)[0], reason="a test"):
            pass

    assert count_compilations(apply_traced) == 2


WITHOUT_DYNAMO = """
import sys, patches
patch = patches.Patch(id="a.b", target="json:dumps", wrapper=lambda w, i, a, k: "!", reason="a test")
with patches.transaction(patch, reason="a test"):
    import json
    assert json.dumps(1) == "!"
assert not [name for name in sys.modules if name.partition(".")[0] == "torch"]
"""


WHILE_COMPILING = """
import sys, threading, torch, patches

def elsewhere(x):
    return x

class Model(torch.nn.Module):
    def forward(self, x):
        return x + 1

patch = patches.Patch(id="a.b", target="__main__:elsewhere", wrapper=lambda w, i, a, k: w(*a, **k), reason="a test")
patched = patches.transaction(patch, reason="a test")
patched.__enter__()
owners = [torch.nn.Identity()]
if sys.argv[1] == "collected":
    patches.keep(patched.receipts, owners[0])
    patched.commit()
graphs = []

def backend(graph, inputs):
    graphs.append(graph)
    if len(graphs) == 2:
        owners.clear() if sys.argv[1] == "collected" else patched.__exit__(None, None, None)
        assert (patches.active() == []) == (sys.argv[1] == "left")
    return graph.forward

model, x = Model(), torch.arange(4.0)
model.compile(backend=backend, dynamic=False)
assert torch.equal(model(x), x + 1) and torch.equal(model(x[:2]), x[:2] + 1)
for thread in threading.enumerate():
    if thread.name == "patches-later":
        thread.join()
assert torch.equal(model(x), x + 1) and len(graphs) == 3 and not patches.active()
"""


@pytest.mark.parametrize("how", ["left", "collected"])
def test_a_change_while_this_thread_compiles_drops_graphs_once_it_is_done(how: str) -> None:
    """What is being filled must not be freed; a model that is collected meanwhile keeps its patches until then."""
    ran = subprocess.run(
        [sys.executable, "-c", WHILE_COMPILING, how],
        env=os.environ | {"MALLOC_PERTURB_": "165"},  # what is freed is overwritten
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr


def test_torch_is_not_imported_for_it() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_DYNAMO], check=False, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
