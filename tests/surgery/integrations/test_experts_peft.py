"""Adapters of experts in 4 bits through PEFT: its keys, its configuration, and gradients of its own."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from surgery.adapters.attach import adapted_by_peft, adapting, appearing_real, draws_later
from surgery.adapters.deferred import Drawing, Undrawn
from surgery.adapters.rehearsal import check_quantized
from surgery.errors import ConfigError
from surgery.integrations.peft import all_linear_of_experts
from surgery.quantizers.experts import IMPLEMENTATION, fused_parameters
from surgery.quantizers.grouped import experts_forward
from tests.helpers.experts import packed_experts
from tests.helpers.models import tiny_config

IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
MOE = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, IMPLEMENTATION, experts_forward)
    all_linear_of_experts._say.cache_clear()


def models(family: str = "olmoe", dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, Any]:
    """A tiny model with packed experts, and one with the values that these have."""
    torch.manual_seed(0)
    config = tiny_config(family, **{**MOE, **changes})
    packed = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain = copy.deepcopy(packed)
    for fqn, module in list(packed.named_modules()):
        if fused_parameters(module):
            for model, experts in zip((packed, plain), packed_experts(module, storage=dtype), strict=True):
                model.set_submodule(fqn, experts)
    return packed, plain


def adapted(model: Any, **options: Any) -> Any:
    """`model`, adapted by PEFT with values that make a difference; as surgery does where experts are packed."""
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": BOTH, **options})
    with adapting(model):
        made = get_peft_model(model, config)
    shake(made)
    return made


def shake(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_gradients_are_those_of_stock_peft_over_the_same_values(family: str) -> None:
    """gpt-oss stores weights transposed, has biases, and gates of its own."""
    packed, plain = (adapted(each) for each in models(family))
    found, wanted = gradients(packed), gradients(plain)
    assert {name: grad.shape for name, grad in found.items()} == {name: grad.shape for name, grad in wanted.items()}
    assert len(found) == 8
    assert max(distance(found[name], wanted[name]) for name in wanted) < 1e-6
    packed.eval(), plain.eval()
    with torch.no_grad():
        first, second = packed(IDS).logits, packed(IDS).logits
        assert torch.equal(first, second)
        torch.testing.assert_close(first, plain(IDS).logits, rtol=1e-5, atol=1e-5)
        with packed.disable_adapter(), plain.disable_adapter():
            assert torch.equal(packed(IDS).logits, plain(IDS).logits)
        assert torch.equal(packed(IDS).logits, first)


def test_several_adapters_are_what_they_are_in_peft(tmp_path: Path) -> None:
    packed, plain = (adapted(each) for each in models())
    for model in (packed, plain):
        second = LoraConfig(r=3, lora_alpha=9, target_modules=[], target_parameters=BOTH, use_rslora=True)
        with adapting(model):
            model.add_adapter("second", second)
        shake(model)

    def agree() -> torch.Tensor:
        found, wanted = gradients(packed), gradients(plain)
        assert found.keys() == wanted.keys()
        assert max(distance(found[name], wanted[name]) for name in wanted) < 1e-6
        logits: torch.Tensor = packed(IDS).logits
        return logits

    alone = agree()
    for model in (packed, plain):
        model.base_model.set_adapter(["default", "second"])
    both = agree()
    for model in (packed, plain):
        model.set_adapter("second")
    other = agree()
    assert not torch.equal(alone, both)
    assert not torch.equal(other, both)
    for model in (packed, plain):
        model.set_adapter("default")
        model.delete_adapter("second")
    assert torch.equal(agree(), alone)

    packed.save_pretrained(tmp_path, save_embedding_layers=False)
    stock = PeftModel.from_pretrained(plain.unload(), str(tmp_path))
    torch.testing.assert_close(stock(IDS).logits, alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="mixed adapter batches"):
        packed.eval()(IDS, adapter_names=["default", "default"])


def test_dropout_is_for_each_adapter_and_only_in_training() -> None:
    packed, _plain = models()
    model = adapted(packed, lora_dropout=0.5)
    experts = model.base_model.model.model.layers[0].mlp.experts
    config = LoraConfig(r=4, target_modules=[], target_parameters=BOTH, lora_dropout=0.25)
    with adapting(model):
        model.add_adapter("second", config)
    shake(model)
    assert [experts.lora_dropout[name].p for name in ("default", "second")] == [0.5, 0.25]
    assert config.lora_dropout == 0.25
    model.eval()
    calm = model(IDS).logits
    assert torch.equal(model(IDS).logits, calm)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    assert all(grad.isfinite().all() for grad in gradients(model).values())


def test_merging_is_refused_before_anything_is_merged_and_unloading_works() -> None:
    packed, _plain = models()
    with torch.no_grad():
        bare = packed(IDS).logits
    model = adapted(packed, target_modules=["q_proj"])
    wanted = model(IDS).logits
    experts = model.base_model.model.model.layers[0].mlp.experts
    with adapting(model):
        for merge in (model.merge_adapter, model.merge_and_unload, experts.merge):
            with pytest.raises(ConfigError, match="surgery merge"):
                merge()
        assert torch.equal(model(IDS).logits, wanted)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(IDS).logits, wanted)
        assert torch.equal(model.unload()(IDS).logits, bare)


QWEN = {"decoder_sparse_step": 1, "mlp_only_layers": [0], "head_dim": 16}


def said(caplog: pytest.LogCaptureFixture) -> str:
    """The one thing that surgery has said since the last time."""
    (line,) = [record.message for record in caplog.records if record.name == "surgery"]
    caplog.clear()
    return line


def test_all_linear_is_what_was_asked_for_and_reads_the_same_in_stock_peft(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first layer is dense: what PEFT would take for parts of experts is left out, and named."""
    packed, plain = models("qwen3_moe", **QWEN)
    model = adapted(packed, target_modules="all-linear", target_parameters=None)
    line = said(caplog)
    assert "not the router" in line
    assert "experts.down_proj, experts.gate_up_proj" in line
    assert "mlp.down_proj, mlp.gate_proj, mlp.up_proj neither" in line
    made = model.peft_config["default"]
    assert made.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert made.target_parameters == set(BOTH)
    assert not made.rank_pattern
    adapters = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert not [name for name in adapters if ".gate." in name or "layers.0.mlp" in name]
    assert len([name for name in adapters if "layers.1.mlp.experts" in name]) == 4
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    stock = PeftModel.from_pretrained(plain, str(tmp_path))
    assert {name for name, _ in stock.named_parameters() if "lora_" in name} == adapters
    torch.testing.assert_close(stock(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_all_linear_leaves_out_what_is_excluded_and_adapts_experts_of_every_family(
    caplog: pytest.LogCaptureFixture,
) -> None:
    packed, _plain = models("gpt_oss")
    options = {"target_modules": "all-linear", "target_parameters": None}
    model = adapted(packed, **options, exclude_modules=r"model\.layers\.0\.(mlp\.experts|self_attn\.q_proj)")
    assert "layers.1.mlp.experts.down_proj" in said(caplog)
    found = model.peft_config["default"].target_parameters
    assert found == {"model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"}
    held = {name.split(".")[4] for name, _ in model.named_parameters() if "q_proj.lora_" in name}
    assert held == {"1"}
    without = adapted(models("gpt_oss")[0], **options, exclude_modules=["experts"], rank_pattern={"q_proj": 2})
    assert "experts (none: they are excluded), all at rank 4, but for those of rank_pattern" in said(caplog)
    assert not without.peft_config["default"].target_parameters


def test_layers_that_parameters_are_not_chosen_by_are_named(caplog: pytest.LogCaptureFixture) -> None:
    packed, _plain = models()
    options = {"target_modules": ["q_proj"], "layers_to_transform": [1]}
    named = adapted(copy.deepcopy(packed), **options, target_parameters=["layers.1.mlp.experts.down_proj"])
    assert not [record for record in caplog.records if record.name == "surgery"]
    every = adapted(packed, **options)
    assert "PEFT adapts experts.down_proj, experts.gate_up_proj of every layer" in said(caplog)
    found = [
        {name.split(".")[4] for name, _ in each.named_parameters() if "experts" in name and "lora_" in name}
        for each in (named, every)
    ]
    assert found == [{"1"}, {"0", "1"}]


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # PEFT looks at modules alone
def test_adapters_of_16_bit_experts_are_those_of_peft_which_is_said(caplog: pytest.LogCaptureFixture) -> None:
    _packed, plain = models("qwen3_moe", **QWEN)
    config = LoraConfig(r=4, target_modules="all-linear")
    with adapting(plain):
        model = adapted_by_peft(plain, config, torch.float32)
    line = said(caplog)
    assert "gate.weight" in line
    assert "gate_up_proj at rank 8 instead of 4" in line
    assert line.count("gate_up_proj") == 1
    assert any(".gate.lora_A" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_a_tuner_other_than_lora_is_left_to_peft(targets: Any, caplog: pytest.LogCaptureFixture) -> None:
    packed, plain = models()
    found = []
    for model in (packed, plain):
        torch.manual_seed(1)
        with adapting(model):
            tuned: Any = get_peft_model(model, LoHaConfig(r=2, target_modules=targets, init_weights=False))
        found.append((tuned(IDS).logits, gradients(tuned)))
    assert not [record for record in caplog.records if record.name == "surgery"]
    (mine, grads), (theirs, wanted) = found
    assert grads.keys() == wanted.keys()
    assert any("q_proj" in name for name in grads)
    assert torch.equal(mine, theirs)


def test_values_are_drawn_later_as_peft_draws_them() -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=BOTH, init_lora_weights="gaussian")
    assert draws_later(lora)
    packed, plain = models()
    drawn = torch.Generator().manual_seed(7).get_state()
    with adapting(packed), appearing_real(packed), Undrawn() as undrawn:
        late = adapted_by_peft(packed, lora, torch.bfloat16)
    values = undrawn.take(late)
    assert all(p.is_meta for p in late.parameters() if p.requires_grad)
    drawing = Drawing(
        deferred=values,
        rng_state=drawn,
        rows=lambda rows: range(rows // 2, rows),
        device=torch.device("cpu"),
        stop=threading.Event(),
    )
    drawing.run()
    with torch.random.fork_rng(devices=()):
        torch.set_rng_state(drawn)
        wanted = adapted_by_peft(plain, lora, torch.bfloat16)
    for initial, found in zip(values.parameters, drawing.values, strict=True):
        ((module, name),) = initial.places
        fqn = next(fqn for fqn, each in late.named_modules() if each is module)
        whole = wanted.get_submodule(fqn).get_parameter(name).detach()
        assert torch.equal(found, whole[len(whole) // 2 :])


def test_a_parameter_that_is_storage_is_refused() -> None:
    packed, _plain = models()
    experts = {module for module in packed.modules() if hasattr(module, "packed_stacks")}
    check_quantized(adapted(packed), experts)
    packed, _plain = models()
    experts = {module for module in packed.modules() if hasattr(module, "packed_stacks")}
    model = adapted(packed, target_parameters=["experts.down_proj_statistics"])
    with pytest.raises(ConfigError, match=r"down_proj_statistics goes to 4 bits"):
        check_quantized(model, experts)
