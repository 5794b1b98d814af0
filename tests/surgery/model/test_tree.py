"""The ends of a language model: what is gathered by itself before and after its blocks."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from surgery.model.tree import decoder_blocks, ends_of, modules_of, sites
from tests.helpers.models import tiny_config


def ends(model: nn.Module) -> tuple[str | None, list[str]]:
    names = {module: name for name, module in model.named_modules()}
    embedding, tail = ends_of(model, decoder_blocks(model))
    return None if embedding is None else names[embedding], [names[module] for module in tail]


def llama(*, tied: bool) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(tiny_config("llama", tie_word_embeddings=tied))
    model.tie_weights()  # type: ignore[operator]
    return model


def test_ends_of_a_decoder() -> None:
    assert ends(llama(tied=False)) == ("model.embed_tokens", ["model.norm", "lm_head"])
    assert ends(llama(tied=True)) == (None, ["model.norm", "model.embed_tokens", "lm_head"])


def test_an_end_that_shares_a_parameter_with_the_rest_is_none() -> None:
    """The bias of BERT's head is its parent's too, and one parameter cannot be in two groups."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = AutoConfig.for_model("bert", vocab_size=96, is_decoder=True, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias
    assert ends(model) == (None, [])


def test_an_embedding_that_the_rest_uses_is_none_and_the_others_stay() -> None:
    model = llama(tied=False)
    model.model.register_parameter("memory", model.model.embed_tokens.weight)  # type: ignore[union-attr, operator]
    assert ends(model) == (None, ["model.norm", "lm_head"])


def test_modules_are_met_in_the_order_of_torch_and_shared_ones_once() -> None:
    shared = nn.Sequential(nn.Linear(1, 1))
    model = nn.Module()
    model.first = nn.ModuleList([shared, nn.Sequential(nn.Linear(1, 1), shared)])
    model.none = None
    model.last = shared[0]
    assert modules_of(model) == list(model.modules())
    assert [site.fqn for site in sites(model)] == [name for name, _ in model.named_modules()]
    assert [site.aliases for site in sites(model)][:3] == [(), (), ("first.1.1",)]
    assert [site.fqn for site in decoder_blocks(model)] == ["first.0", "first.1"]
