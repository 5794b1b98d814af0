"""Linear layers whose statistics are a parameter compute, and can be copied, as those with a state of their own."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig

import surgery
from surgery.config import Quant
from surgery.errors import QuantizerError
from tests.helpers.models import save_tiny

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), num_hidden_layers=1)


def loaded(folder: Path, lora: LoraConfig | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    return surgery.qlora(folder, quant=Quant(**options), lora=lora, device=torch.device("cpu"), report=surgery.Report())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
def test_logits_and_gradients_have_the_bits_of_a_state_on_every_rank(
    folder: Path, double_quant: bool, storage: torch.dtype
) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    found = []
    for shard_statistics in (False, True):
        options = {"double_quant": double_quant, "quant_storage": storage, "shard_statistics": shard_statistics}
        model = loaded(folder, lora, **options)
        output = model(input_ids=IDS, labels=IDS)
        output.loss.backward()
        found.append([output.logits, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(found[0]) == 5
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_layer_is_compiled_as_one_graph(folder: Path, double_quant: bool) -> None:
    layer: Any = loaded(folder, shard_statistics=True, double_quant=double_quant).model.layers[0].mlp.down_proj
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    (found, gradient), (expected, wanted) = (
        (y, *torch.autograd.grad(y.float().square().sum(), x)) for y in (compiled(x), layer(x))
    )
    assert found.equal(expected)
    assert gradient.equal(wanted)


def test_a_copy_has_statistics_of_its_own_and_so_has_what_was_pickled(folder: Path) -> None:
    """bitsandbytes copies the state of a weight without telling of what else is copied."""
    model = loaded(folder, shard_statistics=True)
    wanted = model(IDS).logits
    file = io.BytesIO()
    torch.save(model, file)
    others = [copy.deepcopy(model), torch.load(io.BytesIO(file.getvalue()), weights_only=False)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_statistics"):
                parameter.zero_()
    assert not torch.equal(model(IDS).logits, wanted)
    for other in others:
        for layer in other.modules():
            if isinstance(layer, Linear4bit):
                held: Any = layer
                assert held.quant_state is held.weight.quant_state
                assert held.quant_state.layer is layer
        assert torch.equal(other(IDS).logits, wanted)


def test_statistics_that_were_cast_are_refused(folder: Path) -> None:
    """Of the same size: nothing else would tell."""
    model = loaded(folder, shard_statistics=True, quant_storage=torch.float16)
    with pytest.raises(QuantizerError, match=r"in torch\.float16, found them cast to torch\.bfloat16"):
        model.bfloat16()(IDS)
