"""Attestation in one process: which layers, what is compared, and what is said."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit

import surgery
from surgery.quantizers.digest import records_of
from tests.distributed.exactness import lora

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

LAYER = "model.layers.0.self_attn.k_proj"


@pytest.fixture
def model(tiny: Path) -> Iterator[Any]:
    with surgery.qlora(tiny, lora=lora(), report=surgery.Report()) as built:
        yield built


def module_of(model: Any, fqn: str = LAYER) -> Any:
    return model.get_submodule(f"base_model.model.{fqn}.base_layer")


def run(model: Any) -> None:
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5]]))


def flip(layer: Any) -> None:
    """Change a bit of its packed weight, or change it back."""
    layer.weight.data.view(torch.uint8)[6] ^= 64


def test_all_layers_in_the_order_of_the_model(model: Any) -> None:
    found = surgery.attest(model)
    assert len(found.layers) == 14
    assert found.layers[:2] == ("model.layers.0.self_attn.q_proj", LAYER)
    assert found.nbytes == sum(layer.weight.nbytes for layer in model.modules() if isinstance(layer, Linear4bit))
    assert (found.where, found.calls, len(found.digest)) == ("at rest", 0, 16)
    assert surgery.attest(model).digest == found.digest


def test_a_sample_is_drawn_with_its_seed(model: Any) -> None:
    samples = {surgery.attest(model, 3, seed=seed).layers for seed in range(6)}
    assert all(len(layers) == 3 for layers in samples)
    assert len(samples) > 1
    assert surgery.attest(model, 3, seed=5).layers == surgery.attest(model, 3, seed=5).layers
    assert len(surgery.attest(model, 1000).layers) == 14


def test_named_layers(model: Any) -> None:
    assert surgery.attest(model, [LAYER]).layers == (LAYER,)
    with pytest.raises(surgery.SelectorError, match=r"such as model\.layers\.0.*found model\.layer\.9") as caught:
        surgery.attest(model, ["model.layer.9", LAYER])
    assert caught.value.patterns == ("model.layer.9",)
    with pytest.raises(surgery.SelectorError, match="found none"):
        surgery.attest(model, [])
    with pytest.raises(surgery.ConfigError, match="expected 1 layer or more to attest, found 0"):
        surgery.attest(model, 0)


def test_a_model_of_which_nothing_was_recorded(model: Any) -> None:
    stock = torch.nn.Sequential(Linear4bit(64, 64), module_of(model))
    with pytest.raises(surgery.ConfigError, match="found 2 layers, of 1 of which nothing was recorded"):
        surgery.attest(stock)
    with pytest.raises(surgery.ConfigError, match="expected quantized layers, found none"):
        surgery.attest(torch.nn.Linear(2, 2))
    with pytest.raises(surgery.ConfigError, match="not a copy"):
        surgery.attest(copy.deepcopy(model))


def test_nothing_is_written_onto_the_layers(model: Any) -> None:
    before = {layer: set(vars(layer)) for layer, _ in records_of(model)}
    surgery.attest(model)
    with surgery.attesting(model):
        run(model)
    assert {layer: set(vars(layer)) for layer, _ in records_of(model)} == before
    assert not any(layer._forward_pre_hooks for layer, _ in records_of(model))


@pytest.mark.parametrize(
    "name", ["absmax", "offset", "code", "state2.absmax", "state2.code"], ids=lambda name: name.replace(".", "-")
)
def test_every_tensor_of_quant_state_is_compared(model: Any, name: str) -> None:
    outer, _, inner = name.rpartition(".")
    state = module_of(model).quant_state
    owner = getattr(state, outer) if outer else state
    changed = getattr(owner, inner).clone()  # codes are shared by all layers
    changed.view(-1).view(torch.uint8)[-1] ^= 1
    setattr(owner, inner, changed)
    with pytest.raises(
        surgery.AttestationError, match=rf"{LAYER}, quant_state, rank 0: {name}, 1 of 1 pages"
    ) as caught:
        surgery.attest(model)
    assert [(each.layer, each.where, each.ranks) for each in caught.value.differences] == [(LAYER, "quant_state", (0,))]


def test_a_tensor_of_quant_state_that_is_gone_or_longer(model: Any) -> None:
    state = module_of(model).quant_state
    state.absmax = torch.cat([state.absmax, state.absmax.repeat(4000)])
    with pytest.raises(surgery.AttestationError, match=r"absmax, 2 of 1 pages"):
        surgery.attest(model)
    state.absmax = None
    with pytest.raises(surgery.AttestationError, match=r"absmax, 1 of 1 pages"):
        surgery.attest(model)


def test_settings_of_quant_state_are_compared(model: Any) -> None:
    module_of(model).quant_state.quant_type = "fp4"
    with pytest.raises(surgery.AttestationError, match="quant_type is 'fp4', was 'nf4'"):
        surgery.attest(model)


def test_what_is_not_sampled_is_not_looked_at(model: Any) -> None:
    flip(module_of(model))
    surgery.attest(model, ["model.layers.1.mlp.up_proj"])
    with pytest.raises(surgery.AttestationError, match="1 of 1 attested layers is not what was quantized"):
        surgery.attest(model, [LAYER])


def test_a_long_list_is_cut_short_in_the_message_alone(model: Any) -> None:
    for layer, _ in records_of(model):
        flip(layer)
    with pytest.raises(surgery.AttestationError, match="14 of 14 attested layers are not") as caught:
        surgery.attest(model)
    assert "and 4 more" in str(caught.value)
    assert len(caught.value.differences) == 14


def test_weights_are_watched_in_every_forward(model: Any) -> None:
    with surgery.attesting(model, [LAYER, "model.layers.1.mlp.up_proj"]) as watch:
        run(model)
        run(model)
        assert watch.attestation is None
    assert watch.calls == 4
    assert watch.attestation is not None
    assert (watch.attestation.where, watch.attestation.calls) == ("in forward", 4)


def watched(model: Any, *actions: Callable[[], object]) -> None:
    """Do `actions` while all layers are watched."""
    with surgery.attesting(model):
        for action in actions:
            action()


def test_a_weight_that_is_wrong_in_one_forward_only(model: Any) -> None:
    forward, change = partial(run, model), partial(flip, module_of(model))
    with pytest.raises(surgery.AttestationError, match=f"{LAYER}, in forward, rank 0: 1 of 512 words") as caught:
        watched(model, forward, change, forward, change, forward)
    assert [each.where for each in caught.value.differences] == ["in forward"]
    surgery.attest(model)


def test_a_weight_that_stays_wrong_is_wrong_at_rest_too(model: Any) -> None:
    with pytest.raises(surgery.AttestationError) as caught:
        watched(model, partial(flip, module_of(model)), partial(run, model))
    found = {each.where: each for each in caught.value.differences}
    assert found.keys() == {"in forward", "at rest"}
    assert found["in forward"].words == 0, "as the shard has it"
    assert "something wrote to the shards" in str(caught.value)


def test_words_are_counted_for_a_few_layers_only(model: Any) -> None:
    changes = [partial(flip, layer) for layer, _ in records_of(model)]
    with pytest.raises(surgery.AttestationError) as caught:
        watched(model, *changes, partial(run, model), *changes)
    assert [each.words for each in caught.value.differences] == [1, 1, 1, 1, *(None for _ in range(10))]
    assert {(each.pages, each.of_pages) for each in caught.value.differences} == {(1, 1)}


def test_a_block_in_which_nothing_runs_attests_nothing(model: Any) -> None:
    with pytest.raises(surgery.AttestationError, match="none of 14 layers ran in the block") as caught:
        watched(model)
    assert caught.value.differences == ()


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_exception_in_the_block_goes_through_and_hooks_are_gone(model: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        watched(model, partial(run, model), partial(flip, module_of(model)), interrupt)
    assert not any(layer._forward_pre_hooks for layer, _ in records_of(model))
