"""On any CPU, under `bitsandbytes.cpu-dequantize-flat`, a model multiplies by the weights that its packed data and the
code table give; without it a model equals stock, and says which of its weights are not right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM

import patches
import surgery
from surgery.telemetry.measurements import group_names
from tests.helpers.lookup import look_up, require_looked_up
from tests.helpers.models import save_tiny
from tests.helpers.whole_blocks import right_kernels
from tests.surgery.lifetime.behaviour import run

#: Rows of 48, 80, 96 and 112 values: multiples of 16, and of no block size.
WIDTHS: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 80, "head_dim": 24, "num_attention_heads": 2}
WHOLE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 2}
QUANTS = (
    surgery.Quant("nf4"),
    surgery.Quant("fp4", blocksize=128, double_quant=False, quant_storage=torch.float32),
    surgery.Quant("nf4", quant_storage=torch.uint8),
)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("odd"), **WIDTHS)


def by_table(folder: Path, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A plain model of transformers with the values of the 4-bit weights of `model`, each near the checkpoint's."""
    plain: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            weight = plain.get_parameter(f"{name}.weight")
            found = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            require_looked_up(found, layer.weight.data, layer.quant_state, weight)
            weight.data = look_up(layer.weight.data, layer.quant_state).to(dtype)
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_logits_in_training_and_evaluation(odd: Path, quant: surgery.Quant, dtype: torch.dtype) -> None:
    report = surgery.Report()
    with right_kernels(), surgery.qlora(odd, quant=quant, dtype=dtype, report=report) as model:
        expected = run(by_table(odd, model, dtype).eval())
        assert torch.equal(run(model.train()), expected)
        with torch.no_grad():
            assert torch.equal(run(model.eval()), expected)
    assert report.misread == {}


def test_magnitudes_of_misread_weights_are_refused(odd: Path) -> None:
    """Those of the right weights are not what forward divides by, unless it reads the right ones."""
    lora = LoraConfig(r=2, target_modules=["down_proj"], use_dora=True)

    def build() -> nn.Module:
        return surgery.qlora(odd, lora=lora, placement="rank0-cpu", dtype=torch.float32, report=surgery.Report())

    if str(patches.verdict("bitsandbytes.cpu-dequantize-flat")) == "needed":
        with pytest.raises(surgery.ConfigError, match=r"use_dora: .*down_proj\.weight \(2 in all\) for another weight"):
            build()
    with right_kernels(), build() as model:
        layer: Any = next(module for name, module in model.named_modules() if name.endswith("down_proj"))
        norms = look_up(layer.base_layer.weight, layer.base_layer.quant_state).norm(dim=1)
        assert torch.allclose(layer.lora_magnitude_vector["default"].weight, norms, rtol=1e-6)


def test_gradients_and_merging(odd: Path) -> None:
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    with right_kernels(), surgery.qlora(odd, lora=lora, dtype=torch.float32, report=surgery.Report()) as model:
        layer: Any = next(module for name, module in model.named_modules() if name.endswith("down_proj"))
        base, x = layer.base_layer, torch.randn(2, 3, 80, requires_grad=True)
        weight, change = look_up(base.weight, base.quant_state), layer.get_delta_weight("default").detach()
        layer(x).sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, (weight + change).sum(0).expand_as(x))
        with pytest.warns(UserWarning, match="rounding errors"):
            layer.merge()
        merged = look_up(base.weight, base.weight.quant_state)
        assert (merged - weight - change).abs().mean() < 0.2 * (weight + change).abs().mean()


def test_without_the_patch_a_model_says_which_weights_are_misread(
    odd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = surgery.Report(show_progress=True)
    with surgery.qlora(odd, dtype=torch.float32, report=report) as model:
        wrong = [
            f"{name}.weight"
            for name, layer in model.named_modules()
            if isinstance(layer, Linear4bit)
            and not torch.equal(
                bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.quant_state),
                look_up(layer.weight.data, layer.quant_state),
            )
        ]
    assert report.misread == group_names(wrong)
    assert ("dequantized wrongly by bitsandbytes on this CPU" in capsys.readouterr().err) == bool(wrong)


def test_rows_of_whole_blocks_are_not_named(tmp_path: Path) -> None:
    report = surgery.Report()
    with surgery.qlora(save_tiny(tmp_path, **WHOLE), report=report):
        assert report.misread == {}
