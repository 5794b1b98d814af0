"""Initial values of adapters that are drawn later are those that PEFT draws at once."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from surgery.adapters.attach import draws_later
from surgery.adapters.deferred import DeferredValues, Drawing, Undrawn
from surgery.comm.ranks import StoppedError
from surgery.sharding.partition import chunk

SEED = 5


class Model(nn.Module):
    """What PEFT has adapters for: linear layers with a bias and without, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 9)
        self.second = nn.Linear(9, 6, bias=False)


LORAS: dict[str, dict[str, Any]] = {
    "default": {},
    "as upstream's layers are made": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "rank-stabilized": {"use_rslora": True, "rank_pattern": {"second": 5}, "alpha_pattern": {"first": 3}},
    "biased": {"target_modules": ["first"], "lora_bias": True, "bias": "all"},
    "dropout": {"lora_dropout": 0.3},
}


def lora_of(name: str) -> LoraConfig:
    return LoraConfig(r=4, **{"target_modules": ["embedding", "first", "second"], **LORAS[name]})


def adapted_at_once(lora: LoraConfig, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Adapters by name, and the state of the generator after."""
    torch.manual_seed(SEED)
    model: Any = get_peft_model(Model().to(dtype), lora, autocast_adapter_dtype=False)
    return {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}, torch.get_rng_state()


def adapted_later(lora: LoraConfig, dtype: torch.dtype) -> tuple[Any, DeferredValues, torch.Tensor]:
    """The model, what is to be drawn, and the state to draw from; the base draws first, as at once."""
    torch.manual_seed(SEED)
    base, state = Model().to(dtype), torch.get_rng_state()
    with Undrawn() as undrawn:
        model = get_peft_model(base, lora, autocast_adapter_dtype=False)
    assert torch.equal(torch.get_rng_state(), state)
    return model, undrawn.take(model), state


def drawn(deferred: DeferredValues, state: torch.Tensor, *, shards: int = 1, shard: int = 0) -> Drawing:
    drawing = Drawing(
        deferred=deferred,
        rng_state=state,
        rows=lambda rows: chunk(range(rows), shards, shard),
        device=torch.device("cpu"),
        stop=threading.Event(),
    )
    drawing.run()
    return drawing


def names_of(model: nn.Module, deferred: DeferredValues) -> list[str]:
    """FQNs of the parameters that are drawn, in their order."""
    parameters = {parameter: name for name, parameter in model.named_parameters()}
    return [parameters[initial.places[0][0]._parameters[initial.places[0][1]]] for initial in deferred.parameters]  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LORAS)
def test_values_and_generator_are_those_of_upstream(name: str, dtype: torch.dtype) -> None:
    expected, after = adapted_at_once(lora_of(name), dtype)
    model, deferred, state = adapted_later(lora_of(name), dtype)
    drawing = drawn(deferred, state)
    found = dict(zip(names_of(model, deferred), drawing.values, strict=True))
    assert found.keys() == expected.keys()
    for fqn, value in expected.items():
        assert found[fqn].dtype == value.dtype == model.get_parameter(fqn).dtype
        assert torch.equal(found[fqn], value), fqn
    drawing.go_on()
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_ranks_keep_the_rows_of_their_shard(shards: int) -> None:
    lora = lora_of("as upstream's layers are made")
    expected, _ = adapted_at_once(lora, torch.float32)
    model, deferred, state = adapted_later(lora, torch.float32)
    parts = [drawn(deferred, state, shards=shards, shard=shard).values for shard in range(shards)]
    for fqn, *of_ranks in zip(names_of(model, deferred), *parts, strict=True):
        assert torch.equal(torch.cat(of_ranks), expected[fqn]), fqn
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in of_ranks)


def test_what_is_not_drawn_takes_no_memory_and_is_on_meta_in_the_model() -> None:
    with Undrawn():
        assert nn.Linear(1000, 1000).weight.untyped_storage().nbytes() == 4
    model, deferred, _ = adapted_later(lora_of("default"), torch.float32)
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert sorted(names_of(model, deferred)) == sorted(adapters)
    assert all(p.is_meta and p.requires_grad for p in adapters.values())
    assert not any(p.is_meta for name, p in model.named_parameters() if "lora_" not in name)


def test_another_generator_is_left_alone() -> None:
    _, deferred, state = adapted_later(lora_of("default"), torch.float32)
    torch.manual_seed(SEED + 1)
    stands = torch.get_rng_state()
    drawn(deferred, state).go_on()
    assert torch.equal(torch.get_rng_state(), stands)


def test_values_that_are_read_before_they_are_drawn_raise() -> None:
    with Undrawn():
        linear = nn.Linear(4, 4)
        with pytest.raises(NotImplementedError, match="not drawn yet"):
            linear.weight.norm()
        cast = linear.weight.detach().to(torch.float64)
        cast.normal_()  # a tensor of its own by now
        with pytest.raises(NotImplementedError, match="after a copy was made"), torch.no_grad():
            linear.weight.zero_()


def test_drawing_stops_where_it_is_not_wanted_any_more() -> None:
    _, deferred, state = adapted_later(lora_of("default"), torch.float32)
    drawing = Drawing(
        deferred=deferred, rng_state=state, rows=range, device=torch.device("cpu"), stop=threading.Event()
    )
    drawing.stop.set()
    with pytest.raises(StoppedError):
        drawing.run()


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"modules_to_save": ["second"]},
        {"init_lora_weights": "orthogonal"},
        {"trainable_token_indices": [1]},
        {"layer_replication": [(0, 1)]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_adapters_that_may_look_at_values_are_drawn_at_once(options: dict[str, Any]) -> None:
    assert not draws_later(LoraConfig(target_modules=["first"], **options))


@pytest.mark.parametrize("name", LORAS)
def test_plain_adapters_are_drawn_later(name: str) -> None:
    assert draws_later(lora_of(name))
