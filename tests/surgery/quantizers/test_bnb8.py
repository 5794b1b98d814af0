"""Checkpoints in 8 bits of bitsandbytes are read as they are, and train, merge and save as upstream's."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_dequant
from bitsandbytes.nn import Int8Params, Linear8bitLt
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError
from surgery.quantizers.bnb8 import Bnb8bit
from tests.helpers.models import save_in_8_bits, save_tiny

IDS = torch.arange(24).view(2, 12)
W, SCB, FORMAT = "layer.weight", "layer.SCB", "layer.weight_format"

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32: of a checkpoint that is packed already, upstream casts nothing to another dtype."""
    root = tmp_path_factory.mktemp("int8")
    return save_in_8_bits(save_tiny(root / "plain", request.param, dtype=torch.float32), root / "packed", threshold=5.0)


def stock(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def ours(folder: Path, **options: Any) -> Any:
    return surgery.qlora(folder, dtype=torch.float32, report=surgery.Report(), **options)


def losses(model: Any) -> list[float]:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    found = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS, attention_mask=torch.ones_like(IDS)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_one_process_trains_and_merges_as_upstream(folder: Path) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    wanted = get_peft_model(stock(folder), lora)
    torch.manual_seed(0)
    with ours(folder, lora=lora) as model:
        assert surgery.attest(model).digest
        assert losses(model) == pytest.approx(losses(wanted), abs=1e-6)
        assert surgery.attest(model).digest
        with pytest.warns(UserWarning, match="Merge lora module to 8-bit"):
            merged, expected = model.merge_and_unload(), wanted.merge_and_unload()
    states = merged.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        # Two adapters that differ in the last bit may round to neighbours.
        torch.testing.assert_close(
            value.float(), states[1][name].float(), atol=1.0 if "int8" in str(value.dtype) else 1e-5, rtol=1e-5
        )


def test_adapters_are_drawn_as_for_upstreams_layers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    drawn = []
    for block in (nullcontext(), surgery.low_memory()):
        with block:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "c_attn"]))
        drawn.append([p.detach() for p in adapted.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))
    surgery.release(model)


def test_what_is_saved_again_is_what_was_read(folder: Path, tmp_path: Path) -> None:
    with ours(folder) as model:
        assert model.config.quantization_config.llm_int8_threshold == 5.0
        assert {type(m) for m in model.modules() if isinstance(m, Linear8bitLt)} == {Linear8bitLt}
        model.save_pretrained(tmp_path / "again")
    read, again = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert read.keys() == again.keys()
    assert all(torch.equal(read[name], again[name]) for name in read)


def test_without_quantization_weights_are_dequantized_as_upstream(folder: Path) -> None:
    wanted = {name: value.float() for name, value in stock(folder).dequantize().named_parameters()}
    with ours(folder, quant=None) as model:
        for name, value in model.named_parameters():
            is_turned = type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D" and value.dim() == 2
            assert torch.equal(value.T if is_turned else value, wanted[name]), name


def test_a_plan_reads_each_byte_once(folder: Path) -> None:
    plan = surgery.plan(folder, world_size=2)
    tensors = load_file(folder / "model.safetensors")
    held = sum(value.nbytes for name, value in tensors.items() if not name.endswith("weight_format"))
    assert sum(plan.of_rank(rank).bytes_read for rank in range(2)) == held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", [None, torch.int8])
@pytest.mark.filterwarnings("ignore:.*cast from")
def test_a_sharded_layer_multiplies_by_the_weight_that_it_has_now(
    dtype: torch.dtype, storage: torch.dtype | None
) -> None:
    quant = Bnb8bit(surgery.Quant8(threshold=6.0, quant_storage=storage), dtype=dtype)
    layer: Any = quant.replacement(nn.Linear(48, 20, device="meta"))
    bias, x = torch.randn(20), torch.randn(3, 48, dtype=dtype)
    layer.bias = nn.Parameter(bias.to(layer.bias.dtype), requires_grad=False)
    layer.weight = nn.Parameter(torch.zeros(layer.weight.shape, dtype=layer.weight.dtype), requires_grad=False)
    for seed in range(2):
        values = torch.randint(-127, 128, (20, 48), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
        statistics = torch.rand(20) + seed
        whole = Linear8bitLt(48, 20, has_fp16_weights=False, threshold=6.0)
        whole.weight = Int8Params(values, requires_grad=False, CB=values, SCB=statistics.clone())
        whole.bias = nn.Parameter(bias.to(layer.bias.dtype), requires_grad=False)
        layer.weight.data.view(-1).view(torch.int8).copy_(values.view(-1))
        quant.set_state(layer, "weight", statistics)
        for is_training in (True, False):
            found, wanted = (_applied(each.train(is_training), x.clone().requires_grad_()) for each in (layer, whole))
            assert all(map(torch.equal, found, wanted))
    assert layer.state.CB is None, "nothing is kept"
    assert vars(layer)["quant_state"] is statistics, "FSDP2 gathers bit for bit the groups that have one"


def _applied(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = layer(x)
    out.square().sum().backward()
    assert x.grad is not None
    return out, x.grad


def packed() -> Tensors:
    values = torch.randint(-127, 128, (6, 10), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    return {W: values, SCB: torch.linspace(0.1, 3, 6), FORMAT: torch.tensor(0, dtype=torch.uint8)}


def save(tensors: Tensors, folder: Path, **config: Any) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config:
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def test_dequantized_by_ranges_as_bitsandbytes(tmp_path: Path) -> None:
    tensors = packed()
    del tensors[FORMAT]  # as early versions saved
    save(tensors, tmp_path)
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16, "": torch.float16}.items():
        (tmp_path / "config.json").write_text(json.dumps({"dtype": name}))
        checkpoint = Checkpoint.open(tmp_path)
        wanted = int8_vectorwise_dequant(tensors[W], tensors[SCB]).view(-1).to(dtype)
        with checkpoint.reader() as reader:
            for start, stop in ((0, 60), (7, 33), (59, 60)):
                found = checkpoint.packed[W].dequantize(reader.read_range, start, stop)
                assert torch.equal(found, wanted[start:stop])
                assert found.dtype == dtype


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: t.pop(SCB), f"there is {FORMAT}, and no tensor {SCB}"),
        (lambda t: t.pop(W), f"there is .*, and no tensor {W}"),
        (lambda t: t.update({W: t[W].float()}), "expected int8 of shape .* found float32"),
        (lambda t: t.update({W: t[W].view(-1).clone()}), r"expected int8 of shape .* found int8 of shape \(60,\)"),
        (lambda t: t.update({SCB: t[SCB][:5].clone()}), "one for each of 6 rows of .*found float32 of shape"),
        (lambda t: t.update({SCB: t[SCB].half()}), "to be float32.*found float16"),
        (lambda t: t.update({FORMAT: torch.tensor(2, dtype=torch.uint8)}), "is not stored row by row"),
        (lambda t: t.update({FORMAT: torch.zeros(2, dtype=torch.uint8)}), "is not stored row by row"),
        (lambda t: t.update({f"{W}.absmax": torch.ones(1)}), "expected one .*quant_state.bitsandbytes__nf4"),
    ],
)
def test_broken_ones_are_refused_before_a_weight_is_read(
    damage: Callable[[Tensors], object], says: str, tmp_path: Path
) -> None:
    tensors = packed()
    damage(tensors)
    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open(save(tensors, tmp_path))


BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_8bit": True}


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        (
            packed(),
            {"load_in_4bit": True},
            "in 4 bits of bitsandbytes by its config.json, and its tensors are packed in 8",
        ),
        ({W: torch.ones(2, 2)}, BITSANDBYTES, "in 8 bits of bitsandbytes .* none of its tensors is"),
        (packed(), {**BITSANDBYTES, "llm_int8_threshold": "6"}, "llm_int8_threshold .* found '6'"),
        (packed(), {"quant_method": "fp8"}, "quantized already, in fp8"),
    ],
)
def test_a_config_of_other_weights_is_refused(
    tensors: Tensors, config: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open(save(tensors, tmp_path, **config))


def test_options_that_do_not_fit_are_refused(folder: Path) -> None:
    plain = folder.parent / "plain"
    for path, options, says in (
        (folder, {"quant": surgery.Quant(blocksize=128)}, "asked for 4 bits .* packed already, in 8 bits"),
        (folder, {"compute_dtype": torch.bfloat16}, "compute_dtype=torch.bfloat16 with weights in 8 bits"),
        (plain, {"quant": surgery.Quant8()}, "Quant8 is for checkpoints whose weights are packed already"),
    ):
        with pytest.raises(surgery.ConfigError, match=says):
            ours(path, **options)
    with pytest.raises(surgery.ConfigError, match="threshold must be"):
        surgery.Quant8(threshold=-1.0)
