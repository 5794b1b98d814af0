"""What is patched when: nothing after a failure, a model's own layers while it lives, nothing once it is released."""

from __future__ import annotations

import copy
import gc
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import bitsandbytes.nn.modules
import peft.tuners.tuners_utils
import pytest
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import _init_utils

import patches
import surgery
from surgery import lifetime, recipe
from surgery.checkpoint import Reader
from surgery.passes.adapt import Adapt
from surgery.passes.load import Load
from surgery.passes.quantize import Quantize
from surgery.passes.relocate import Relocate
from surgery.passes.replace import Replace
from surgery.passes.skeleton import Skeleton
from tests.helpers.snapshot import Snapshot

OWNERS = (
    Linear4bit,
    Params4bit,
    QuantState,
    nn.Module,
    bitsandbytes.nn.modules,
    _init_utils,
    peft.tuners.tuners_utils,
)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Collecting looks at what the tests make, and not at a million objects of the libraries each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[Snapshot]:
    """Before and after every test here: nothing is patched, and every owner holds the very objects that it held."""
    gc.collect()
    assert patches.active() == []
    snapshot = Snapshot(*OWNERS)
    yield snapshot
    gc.collect()
    assert_stock(snapshot)


def assert_stock(before: Snapshot) -> None:
    """Nothing is patched, and no owner has an attribute that it had not, or another one."""
    assert patches.active() == []
    assert before.differences() == []


def build(checkpoint: Path, **options: Any) -> nn.Module:
    lora = LoraConfig(r=2, target_modules="all-linear")
    return surgery.qlora(checkpoint, report=surgery.Report(), **{"lora": lora, **options})


def run(model: nn.Module) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.arange(8).view(1, 8)).logits
    return logits


def layers_of(model: nn.Module) -> list[Linear4bit]:
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def square(model: nn.Module) -> list[Linear4bit]:
    """Layers of the one shape that `stock_layers` has: what bitsandbytes does on a CPU depends on it."""
    return [layer for layer in layers_of(model) if (layer.in_features, layer.out_features) == (64, 64)]


def stock_layers(count: int) -> list[Linear4bit]:
    """Quantized by bitsandbytes alone."""
    make: Any = Linear4bit
    kind = {"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4", "quant_storage": torch.bfloat16}
    return [make(64, 64, **kind).to("cpu") for _ in range(count)]


OBSERVED = 3


def behaviour(layers: list[Linear4bit]) -> dict[str, Any]:
    """What a user can see of the patches, each on a layer of its own, which is spoiled by it."""
    emptied, plain, evaluated = layers[:OBSERVED]
    emptied.weight = Params4bit(emptied.weight.data.to("meta"), requires_grad=False, **vars(emptied.weight))
    emptied.to_empty(device="cpu")
    plain.weight = stored = nn.Parameter(plain.weight.data, requires_grad=False)
    read = plain.weight
    plain.train()(_input_of(plain))
    with torch.no_grad():
        evaluated.eval()(_input_of(evaluated))
    return {
        "weight after to_empty": type(emptied.weight).__name__,
        "plain weight reads as": type(read).__name__,
        "forward replaces a plain weight": plain._parameters["weight"] is not stored,
        "evaluation repacks": bool(getattr(evaluated.quant_state, "packing_format_for_cpu", False)),
    }


def _input_of(layer: Linear4bit) -> torch.Tensor:
    return torch.ones(1, layer.in_features, dtype=torch.bfloat16)


PATCHED = {
    "weight after to_empty": "Params4bit",
    "plain weight reads as": "Params4bit",
    "forward replaces a plain weight": False,
    "evaluation repacks": False,
}


def test_build_patches_are_undone_and_resident_ones_act_on_its_layers(tiny: Path) -> None:
    with build(tiny) as model:
        active = {receipt.id: receipt.scope_text for receipt in patches.active()}
        assert active.keys() >= set(recipe.RESIDENT_PATCHES)
        assert not active.keys() & {*recipe.BUILD_PATCHES, "bitsandbytes.quant-state-to-noop"}
        assert set(active.values()) == {f"{len(layers_of(model))} instances"}


def test_stock_layers_beside_it_behave_as_stock(tiny: Path) -> None:
    before = behaviour(stock_layers(OBSERVED))
    assert before != PATCHED
    older = stock_layers(OBSERVED)
    with build(tiny) as model:
        assert behaviour(older) == before
        assert behaviour(stock_layers(OBSERVED)) == before
        assert behaviour(square(model)) == PATCHED
    assert behaviour(stock_layers(OBSERVED)) == before


def test_two_models_are_released_apart(tiny: Path) -> None:
    first, second = build(tiny), build(tiny)
    surgery.release(first)
    assert behaviour(square(first)) == behaviour(stock_layers(OBSERVED))
    assert behaviour(square(second)) == PATCHED
    surgery.release(second)


def release(model: nn.Module) -> None:
    surgery.release(model)


def leave_block(model: nn.Module) -> None:
    with model as entered:  # type: ignore[attr-defined]  # what `qlora` adds to the class
        assert entered is model


def forget(model: nn.Module) -> None:
    """The caller drops its own reference."""


@pytest.mark.parametrize("end", [release, leave_block, forget])
@pytest.mark.parametrize("adapted", [True, False])
def test_ways_to_end(tiny: Path, unchanged: Snapshot, end: Callable[[nn.Module], None], adapted: bool) -> None:
    options = {} if adapted else {"lora": None}
    model = build(tiny, **options)
    assert patches.active() != []
    assert unchanged.differences() != []
    end(model)
    del model
    gc.collect()
    assert_stock(unchanged)


def test_releasing_again_or_what_was_never_patched_is_harmless(tiny: Path) -> None:
    with build(tiny) as model:
        surgery.release(model)
        surgery.release(model)
    surgery.release(nn.Linear(2, 2))
    assert run(model).isfinite().all()


class InjectedError(Exception):
    """Raised by the tests."""


ERRORS = [InjectedError("injected"), KeyboardInterrupt()]

PLACES: list[tuple[type, str, int]] = [
    (Skeleton, "build_on_meta", 1),
    (Replace, "run", 1),
    (Reader, "read_into", 4),
    (Load, "run_layer", 4),
    (Quantize, "run_layer", 4),
    (Relocate, "run_layer", 4),
    (Adapt, "run", 1),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0].__name__}.{place[1]}")
def test_failure_in_any_pass(
    tiny: Path,
    unchanged: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    place: tuple[type, str, int],
    error: BaseException,
) -> None:
    owner, name, nth = place
    stock, calls, active = getattr(owner, name), [0], []

    def fails(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth:
            active.extend(patches.active())
            raise error
        return stock(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        with pytest.raises(BaseException) as caught:  # noqa: PT011  # its kind is asserted below
            build(tiny)
    assert caught.value is error or caught.value.__cause__ is error
    assert isinstance(error, KeyboardInterrupt) is isinstance(caught.value, KeyboardInterrupt)
    assert (active != []) is (owner is Adapt)
    assert_stock(unchanged)


def test_failure_after_the_last_pass(tiny: Path, unchanged: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: nn.Module) -> None:
        assert len(patches.active()) >= len(recipe.RESIDENT_PATCHES)
        raise InjectedError("injected")

    monkeypatch.setattr(recipe, "as_context_manager", fails)
    with pytest.raises(InjectedError):
        build(tiny)
    assert_stock(unchanged)


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_failure_in_the_block(tiny: Path, unchanged: Snapshot, error: BaseException) -> None:
    def job() -> None:
        with build(tiny) as model:
            run(model).sum().backward()
            raise error

    with pytest.raises(type(error)):
        job()
    assert_stock(unchanged)


class Interrupter:
    """Raises KeyboardInterrupt at the n-th line run of where the recipe ends: in `QLoRA.run` and `surgery.lifetime`."""

    def __init__(self, at: int) -> None:
        self.left = at

    @contextmanager
    def armed(self) -> Iterator[None]:
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        is_end = code is recipe.QLoRA.run.__code__ or code.co_filename == lifetime.__file__
        return self._line if is_end else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self._line


def interrupted_at(line: int, checkpoint: Path) -> bool:
    """Whether building was interrupted there, and not complete before; a complete model is released."""
    try:
        with Interrupter(line).armed():
            model = build(checkpoint, lora=None, model=lambda: nn.Sequential(nn.Linear(64, 64, bias=False)))
    except KeyboardInterrupt:
        return True
    surgery.release(model)
    return False


def test_interrupt_at_any_line_of_the_end(tmp_path: Path, unchanged: Snapshot) -> None:
    save_file({"0.weight": torch.ones(64, 64)}, tmp_path / "model.safetensors")
    line = 1
    while interrupted_at(line, tmp_path):
        gc.collect()
        assert_stock(unchanged)
        line += 1
    assert line > 12


def deep_copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("duplicate", [deep_copied, saved_and_loaded])
def test_copy_is_not_patched(tiny: Path, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    stock = behaviour(stock_layers(OBSERVED))
    with build(tiny) as model:
        other = duplicate(model)
        assert isinstance(model, PeftModel)
        assert type(model) is not PeftModel
        assert type(other) is PeftModel
        assert not hasattr(other, "__enter__")
        assert torch.equal(run(model.train()), run(other.train()))
        layers = square(other)
        for layer in layers:  # pickling has lost the class, which `behaviour` starts from
            data, state = layer.weight.data, layer.quant_state
            layer.weight = Params4bit(data, requires_grad=False, quant_state=state, bnb_quantized=True, module=layer)
        assert behaviour(layers) == stock
        assert behaviour(square(model)) == PATCHED


def test_copy_outlives_the_model(tiny: Path, unchanged: Snapshot) -> None:
    model = build(tiny)
    other = saved_and_loaded(model)
    expected = run(model)
    del model
    gc.collect()
    assert_stock(unchanged)
    assert torch.equal(run(other.train()), expected)


@pytest.mark.parametrize("adapted", [True, False])
def test_random_numbers_are_those_of_a_stock_build(tiny: Path, adapted: bool) -> None:
    """Probes and verifications draw none: the adapters, and what comes after, are those that PEFT alone would make."""
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    torch.manual_seed(0)
    stock = get_peft_model(base, lora, autocast_adapter_dtype=False) if adapted else base
    after = torch.rand(4)
    torch.manual_seed(0)
    with build(tiny, lora=lora if adapted else None) as model:
        assert torch.equal(torch.rand(4), after)
        expected = {name: p for name, p in stock.named_parameters() if "lora_" in name}
        found = {name: p for name, p in model.named_parameters() if "lora_" in name}
        assert found.keys() == expected.keys()
        assert len(found) == (28 if adapted else 0)
        for name, parameter in expected.items():
            torch.testing.assert_close(found[name], parameter.to(torch.bfloat16), rtol=0, atol=0)
