"""`peft.adapter-keys-under-wrappers`, with torch's own checkpoint wrapper; FSDP is in the distributed
tests."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft.tuners.tuners_utils as upstream
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import patches
from patches.builtin.peft.adapter_keys_under_wrappers import keys_are_lost_under_wrapper

from .four_bit import unchanged

ID = "peft.adapter-keys-under-wrappers"
EXPECTED = {f"base_model.model.blocks.{i}.proj.lora_{matrix}.weight" for i in range(2) for matrix in "AB"}


class Model(nn.Module):
    def __init__(self, *, wrapped: bool = False) -> None:
        super().__init__()
        self.config = {"model_type": "custom"}
        blocks = (nn.Sequential(OrderedDict(proj=nn.Linear(4, 4))) for _ in range(2))
        self.blocks = nn.ModuleList(checkpoint_wrapper(block) if wrapped else block for block in blocks)


def adapted(model: Model) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["proj"]))  # type: ignore[arg-type]


def wrapped_after() -> Any:
    model = adapted(Model())
    blocks = model.base_model.model.blocks
    for index, block in enumerate(blocks):
        blocks[index] = checkpoint_wrapper(block)
    return model


def saved_keys(model: Any, directory: Path) -> set[str]:
    model.save_pretrained(directory)
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        return set(file.keys())


def test_stock_peft_saves_nothing_silently(tmp_path: Path) -> None:
    assert saved_keys(wrapped_after(), tmp_path) == set()
    assert keys_are_lost_under_wrapper()


def test_every_key_is_saved_beside_a_stock_model(tmp_path: Path) -> None:
    covered, stock = wrapped_after(), wrapped_after()
    with unchanged(upstream), patches.transaction(patches.on(ID, [covered.base_model]), reason="test"):
        assert saved_keys(stock, tmp_path / "stock") == set()
    with unchanged(upstream), patches.transaction(ID, reason="test"):
        assert saved_keys(covered, tmp_path / "covered") == EXPECTED


def test_adapter_of_an_already_wrapped_model_stays_trainable() -> None:
    """PEFT freezes what its prefixes do not name, and compares them with names that have the wrappers in
    them."""
    expected = {name for name, p in adapted(Model(wrapped=True)).named_parameters() if p.requires_grad}
    with patches.transaction(ID, reason="test"):
        model = adapted(Model(wrapped=True))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert len(expected) == len(EXPECTED)
