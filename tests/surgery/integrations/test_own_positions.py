"""Positions that a model counts: nobody looks for packed samples in them, and what a caller gives is looked at."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, masking_utils
from transformers import modeling_flash_attention_utils as flash

import patches
import surgery
from surgery.integrations.transformers.causal_while_recorded import leave_out_mask
from surgery.step import positions
from surgery.step.positions import trust_own_positions
from tests.helpers.models import save_tiny

IDS = torch.arange(3, 15).view(1, 12)
PACKED = torch.tensor([[*range(5), *range(7)]])


class Looks:
    """read: how often position ids were looked at, for packed samples. found: how often there were some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forget()
        stock_all, stock_mask = torch.Tensor.all, masking_utils.packed_sequence_mask_function

        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.read += tensor.shape == (len(IDS),)
            return stock_all(tensor, *args, **kwargs)

        def found(mask: torch.Tensor) -> Any:
            self.found += 1
            return stock_mask(mask)

        monkeypatch.setattr(torch.Tensor, "all", read)
        monkeypatch.setattr(masking_utils, "packed_sequence_mask_function", found)

    def forget(self) -> None:
        self.read = self.found = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def model(folder: Path) -> Iterator[Any]:
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    model.config.use_cache = False
    yield model
    surgery.release(model)


def test_positions_that_nobody_gives_are_not_read(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch)
    wanted = [model(input_ids=IDS, labels=IDS).loss, model(input_ids=IDS, labels=IDS, position_ids=PACKED).loss]
    assert (looks.read, looks.found) == (2, 1)
    before = patches.active()
    trust_own_positions(model)
    looks.forget()  # the patches have tried themselves
    assert torch.equal(model(input_ids=IDS, labels=IDS).loss, wanted[0])
    assert (looks.read, looks.found) == (0, 0)
    assert torch.equal(model(input_ids=IDS, labels=IDS, position_ids=PACKED).loss, wanted[1])
    assert torch.equal(model(IDS, None, PACKED, labels=IDS).loss, wanted[1])
    assert (looks.read, looks.found) == (2, 2)
    surgery.release(model)
    assert patches.active() == before
    model(input_ids=IDS)
    assert looks.read == 3
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_other_models_and_copies_are_asked_as_ever(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = copy.deepcopy(model)
    trust_own_positions(model)
    trust_own_positions(model)  # twice is once
    looks = Looks(monkeypatch)

    def interrupted(*_args: object) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[0].register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=IDS)
    handle.remove()
    model(input_ids=IDS)
    other(input_ids=IDS, position_ids=PACKED)
    assert (looks.read, looks.found) == (1, 1)
    assert positions._calls.stack == []


def test_layers_of_flash_attention_do_not_read_them_either(model: Any) -> None:
    given: list[Any] = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _module, _args, kwargs: given.append(kwargs["position_ids"]), with_kwargs=True
    )
    trust_own_positions(model)
    model(input_ids=IDS)
    model(input_ids=IDS, position_ids=PACKED)
    own, packed = given
    assert flash._is_packed_sequence(own, batch_size=1) is False  # also outside of the call, as when it is recomputed
    assert bool(flash._is_packed_sequence(packed, batch_size=1))


def test_a_mask_is_left_out_where_upstream_leaves_it_out() -> None:
    stock = masking_utils._ignore_causal_mask_sdpa
    for shape in product((1, 4, 8), (4, 8), (0, 4), (0,), (None, 2, 6, 8)):
        for padding in (None, torch.ones(1, 8).bool(), torch.tensor([[True] * 3 + [False] * 5])):
            assert leave_out_mask(stock, None, (padding, *shape), {}) == stock(padding, *shape)
    assert not leave_out_mask(lambda *_args: False, None, (torch.ones(1, 4), 4, 4, 0, 0), {})
    assert leave_out_mask(lambda *_args: False, None, (None, 4, 4), {"q_offset": 0, "kv_offset": 0})
