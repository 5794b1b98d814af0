"""A step of a model of ours takes no more calls of Python than that of stock transformers, PEFT and bitsandbytes.

Launching is the bound of a short step, and Python of launching. Calls are the same in each run; seconds are not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import surgery
from surgery.quantizers.bnb import Bnb4bit
from tests.helpers.models import save_tiny

BLOCKS = 4


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny", num_hidden_layers=BLOCKS, dtype=torch.float32, intermediate_size=128)


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def stock(checkpoint: Path) -> Any:
    quant = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=quant, dtype=torch.float32)
    return get_peft_model(model, lora(), autocast_adapter_dtype=False)


def step(model: Any) -> None:
    tokens = torch.arange(4).view(1, 4)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


def calls(model: Any) -> int:
    """Python functions that are called in a step after the first."""
    made: list[CodeType] = []

    def note(frame: Any, event: str, _: object) -> None:
        if event == "call":
            made.append(frame.f_code)

    model.train()
    step(model)
    sys.setprofile(note)
    try:
        step(model)
    finally:
        sys.setprofile(None)
    return len(made)


def test_a_step_takes_no_more_calls_than_stock(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not `keep-packing`, whose attribute bitsandbytes reads on a CPU only.
    monkeypatch.setattr(Bnb4bit, "resident_patches", ("bitsandbytes.linear4bit-apply",))
    expected = calls(stock(checkpoint))
    with surgery.qlora(checkpoint, lora=lora(), dtype=torch.float32, report=surgery.Report()) as model:  # type: ignore[attr-defined]
        assert calls(model) <= 1.01 * expected
