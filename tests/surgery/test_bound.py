"""A model is bound to a checkpoint first, changed as its user likes, and filled with what it has become."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn

import patches
import surgery
from surgery.step.compiling import _Compiled
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks
from tests.surgery.binding import IDS, bind, bound_and_adapted, emptied, logits, lora, on_meta, replaced


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream makes the folder that it saves to before it asks for the weights."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("bound") / "model")


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> torch.Tensor:
    with surgery.qlora(checkpoint, report=surgery.Report()) as model:
        return logits(model)


def test_nothing_is_read_before_it_is_filled(checkpoint: Path, expected: torch.Tensor) -> None:
    bound = bind(checkpoint)
    assert bound.report.bytes_read == 0
    assert all(parameter.is_meta for parameter in bound.model.parameters())
    with bound.fill() as model:
        assert model is bound.model
        assert bound.report.bytes_read > 0
        assert torch.equal(logits(model), expected)
        surgery.attest(model)
    assert not patches.active()


KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "gpt2": {},
    "mixtral": {"num_local_experts": 4},
    "gptj": {"rotary_dim": 8, "n_head": 4},
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    return {name: save_tiny(root / name, name.split()[0], **changes) for name, changes in KINDS.items()}


@pytest.mark.parametrize("build", [on_meta, emptied, replaced], ids=lambda build: build.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_whoever_has_built_the_model(kind: str, build: Callable[[Path], Any], kinds: dict[str, Path]) -> None:
    with surgery.qlora(kinds[kind], report=surgery.Report()) as model:
        wanted, buffers = logits(model.eval()), dict(model.named_buffers())
    with surgery.bind(build(kinds[kind]), kinds[kind], report=surgery.Report()).fill() as filled:
        assert torch.equal(logits(filled.eval()), wanted)
        for name, buffer in filled.named_buffers():
            assert torch.equal(buffer, buffers[name]), name
        surgery.attest(filled)


def test_a_plain_module_with_the_checkpoints_names(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 64))
    save_file(dict(source.state_dict()), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 64))
    filled = surgery.bind(model, tmp_path, quant=None, report=surgery.Report()).fill()
    x = torch.randn(3, 64)
    assert torch.equal(filled(x), source(x))


def test_adapters_that_peft_has_added_on_meta_keep_their_values(checkpoint: Path) -> None:
    torch.manual_seed(3)
    with surgery.qlora(checkpoint, lora=lora(), report=surgery.Report()) as model:
        wanted = logits(model)
    torch.manual_seed(3)
    bound = bind(checkpoint)
    adapted = get_peft_model(bound.model, lora(), autocast_adapter_dtype=False)
    with bound.fill(adapted) as model:
        assert isinstance(model, PeftModel)
        assert torch.equal(logits(model), wanted)
        assert model.peft_config["default"].base_model_name_or_path == str(checkpoint)


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_bound_and_adapted_on_two_ranks(checkpoint: Path) -> None:
    torch.manual_seed(0)
    bound = bind(checkpoint)
    model = get_peft_model(bound.model, lora(), autocast_adapter_dtype=False)
    with bound.fill(model) as filled:
        wanted = logits(filled)
    found = run_ranks(bound_and_adapted, 2, checkpoint, ["FSDP1", "FSDP2", "DDP", "replicated FSDP2"])
    for of_rank in found:
        for name, (first, layers, loss) in of_rank.items():
            assert layers == 14, name
            assert torch.equal(first, wanted), name
            assert loss == pytest.approx(found[0]["DDP"][2], abs=1e-3), name


def test_a_cast_between_counts(checkpoint: Path) -> None:
    bound = bind(checkpoint)
    model = prepare_model_for_kbit_training(bound.model, use_gradient_checkpointing=False)
    assert model.model.norm.weight.dtype == torch.float32
    with bound.fill(model) as filled:
        assert filled.model.norm.weight.dtype == torch.float32
        assert filled.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        assert filled.model.norm.weight.abs().sum() > 0


def test_a_whole_cast_spares_packed_weights(checkpoint: Path) -> None:
    bound = bind(checkpoint)
    nn.Module.float(bound.model)
    with bound.fill() as filled:
        assert filled.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        assert filled.model.embed_tokens.weight.dtype == torch.float32
        surgery.attest(filled)


def test_what_requires_a_gradient_by_then_does(checkpoint: Path) -> None:
    bound = bind(checkpoint)
    bound.model.requires_grad_(False)
    bound.model.model.norm.weight.requires_grad = True
    with bound.fill() as filled:
        assert [name for name, p in filled.named_parameters() if p.requires_grad] == ["model.norm.weight"]


def test_tied_between(checkpoint: Path) -> None:
    bound = bind(checkpoint)
    bound.model.lm_head.weight = bound.model.model.embed_tokens.weight
    with bound.fill() as filled:
        assert filled.lm_head.weight is filled.model.embed_tokens.weight
        assert not filled.lm_head.weight.is_meta


def test_wrapped_in_activation_checkpointing_between(checkpoint: Path, expected: torch.Tensor) -> None:
    bound = bind(checkpoint)
    surgery.checkpoint_activations(bound.model)
    with bound.fill() as filled:
        assert torch.equal(logits(filled), expected)


EARLY: dict[str, Callable[[Any], object]] = {
    "forward": lambda model: model(input_ids=IDS),
    "state_dict": lambda model: model.state_dict(),
    "load_state_dict": lambda model: model.load_state_dict({}),
    "a move": lambda model: nn.Module.to(model, "cpu"),
    "a move to meta": lambda model: nn.Module.to(model, "meta"),
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "resizing": lambda model: model.resize_token_embeddings(200),
    "generate": lambda model: model.generate(IDS, max_new_tokens=1),
    "saving": lambda model: model.save_pretrained("nowhere"),
}


@pytest.mark.parametrize("use", EARLY.values(), ids=EARLY)
def test_a_bound_model_used_too_early_says_what_to_call(
    use: Callable[[Any], object],
    checkpoint: Path,
    expected: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # transformers writes a config before it asks for weights
    bound = bind(checkpoint)
    with pytest.raises(surgery.NotFilledError, match=r"fill\(\) of what surgery.bind\(\) returned"):
        use(bound.model)
    with bound.fill() as filled:
        assert torch.equal(logits(filled), expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model(input_ids=IDS),
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_adapter(),
        lambda model: model.unload(),
        lambda model: model.save_pretrained("nowhere"),
        lambda model: model.to("cpu"),
    ],
    ids=["forward", "merge_and_unload", "merge_adapter", "unload", "saving", "a move"],
)
def test_so_does_peft_around_it(
    use: Callable[[Any], object], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # PEFT writes a README before it asks for weights
    bound = bind(checkpoint)
    adapted = get_peft_model(bound.model, lora())
    with pytest.raises(surgery.NotFilledError):
        use(adapted)


def test_other_models_are_left_alone_meanwhile(checkpoint: Path) -> None:
    bind(checkpoint)
    other = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    other(torch.randn(1, 8))
    other.merge_and_unload()


def test_a_bound_model_that_is_dropped_leaves_nothing(checkpoint: Path) -> None:
    import gc

    bound = bind(checkpoint)
    assert patches.active()
    del bound
    gc.collect()
    assert not patches.active()


def test_twice_filled_is_refused(checkpoint: Path) -> None:
    bound = bind(checkpoint)
    with bound.fill(), pytest.raises(surgery.ConfigError, match="found one that is filled"):
        bound.fill()


def test_a_block_in_which_nothing_can_be_computed_is_refused(checkpoint: Path) -> None:
    with torch.device("meta"), pytest.raises(surgery.ConfigError, match="call it behind the block"):
        surgery.bind(on_meta(checkpoint), checkpoint)


def test_twice_bound_is_refused(checkpoint: Path) -> None:
    with pytest.raises(surgery.ConfigError, match="this model is bound already"):
        surgery.bind(bind(checkpoint).model, checkpoint)


def test_another_model_is_refused(checkpoint: Path) -> None:
    with pytest.raises(surgery.ConfigError, match="expected a module around the bound model"):
        bind(checkpoint).fill(nn.Linear(2, 2))


def test_a_model_in_memory_is_refused(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(surgery.ConfigError, match=r"expected a model on meta, found model\.embed_tokens\.weight"):
        surgery.bind(model, checkpoint)


def test_a_refused_fill_can_be_tried_again(checkpoint: Path, expected: torch.Tensor) -> None:
    bound = bind(checkpoint)
    with pytest.raises(surgery.ConfigError, match="needs a process group"):
        bound.fill(shard=surgery.FSDP2())
    with bound.fill() as filled:
        assert torch.equal(logits(filled), expected)


class Failing(surgery.Pass):
    name = "failing"

    def see_tensor(self, buffer: Any) -> None:
        raise ValueError("on purpose")


def test_a_fill_that_failed_leaves_a_model_that_waits(checkpoint: Path, expected: torch.Tensor) -> None:
    bound = bind(checkpoint)
    with pytest.raises(surgery.PassError, match=r"pass failing failed at model\.embed_tokens\.weight"):
        bound.fill(passes=(Failing(),))
    with pytest.raises(surgery.NotFilledError):
        bound.model(input_ids=IDS)
    with bound.fill() as filled:
        assert torch.equal(logits(filled), expected)


class After(surgery.Pass):
    name = "after"
    after = "adapt"
    model: Any = None

    def run(self, model: Any) -> Any:
        self.model = model
        return model


def test_a_pass_after_adapters_sees_those_that_were_there(checkpoint: Path) -> None:
    bound, after = bind(checkpoint), After()
    with bound.fill(get_peft_model(bound.model, lora()), passes=(after,)):
        assert isinstance(after.model, PeftModel)


def test_adapters_that_are_made_of_weights(checkpoint: Path) -> None:
    """Magnitudes and rows are those that PEFT takes from a model that has its weights."""
    options = LoraConfig(target_modules=["q_proj", "up_proj"], use_dora=True, trainable_token_indices=[3, 95])
    bound = bind(checkpoint)
    adapted = get_peft_model(bound.model, options)
    with bound.fill(adapted) as filled, bind(checkpoint).fill() as stock:
        expected = dict(get_peft_model(stock, options).named_parameters())
        found = {name: parameter for name, parameter in filled.named_parameters() if name.count("lora_mag")}
        found |= {name: parameter for name, parameter in filled.named_parameters() if name.count("tokens_delta")}
        assert len(found) == 5
        assert all(torch.equal(parameter, expected[name]) for name, parameter in found.items())
        (original,) = (buffer for name, buffer in filled.named_buffers() if name.count("tokens_original"))
        assert torch.equal(original, filled.get_input_embeddings().token_adapter.base_layer.weight[[3, 95]])


def test_magnitudes_that_were_loaded_stay(checkpoint: Path, tmp_path: Path) -> None:
    with bind(checkpoint).fill() as stock:
        adapted = get_peft_model(stock, LoraConfig(target_modules=["q_proj"], use_dora=True))
        adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_magnitude_vector["default"].weight.data.fill_(3)
        adapted.save_pretrained(tmp_path)
    bound = bind(checkpoint)
    with bound.fill(PeftModel.from_pretrained(bound.model, str(tmp_path))) as filled:
        layers = filled.base_model.model.model.layers
        assert (layers[0].self_attn.q_proj.lora_magnitude_vector["default"].weight == 3).all()


class FailingLate(surgery.Pass):
    name = "failing late"
    after = "install"

    def run(self, model: nn.Module) -> nn.Module:
        raise ValueError("on purpose")


def test_a_fill_that_failed_late_is_not_tried_again(checkpoint: Path) -> None:
    bound = bind(checkpoint)
    with pytest.raises(surgery.PassError, match="on purpose"):
        bound.fill(passes=(FailingLate(),))
    with pytest.raises(surgery.ConfigError, match="build and bind it anew"):
        bound.fill()


@pytest.mark.distributed
def test_what_is_wrong_on_one_rank_ends_all(checkpoint: Path) -> None:
    first, second = run_ranks(_wrong_on_one, 2, checkpoint, timeout=60)
    assert "expected a module around the bound model" in second[0]
    assert first[0].startswith("rank 1 failed: ConfigError: fill: expected a module")
    assert all("the ranks differ in what is to be filled" in of_rank[1] for of_rank in (first, second))


def _wrong_on_one(checkpoint: Path) -> list[str]:
    import torch.distributed as dist

    def said(fill: Callable[[], object]) -> str:
        try:
            fill()
        except surgery.SurgeryError as error:
            dist.barrier()
            return str(error)
        return ""

    bound = bind(checkpoint)
    outer = said(lambda: bound.fill(nn.Linear(2, 2) if dist.get_rank() else None, shard=surgery.FSDP2()))
    if dist.get_rank():
        del bound.model.model.layers[1]
    return [outer, said(lambda: bound.fill(shard=surgery.FSDP2()))]


@pytest.mark.distributed
def test_adapters_that_a_sharding_cannot_train_are_refused_and_another_can(checkpoint: Path) -> None:
    for said in run_ranks(_shared_by_dora, 2, checkpoint):
        assert said.startswith("use_dora")


def _shared_by_dora(checkpoint: Path) -> str:
    bound = bind(checkpoint)
    adapted = get_peft_model(bound.model, LoraConfig(target_modules=["q_proj"], layers_to_transform=[0]))
    adapted.peft_config["default"].use_dora = True
    try:
        bound.fill(adapted, shard=surgery.FSDP1())
    except surgery.ConfigError as error:
        adapted.peft_config["default"].use_dora = False
        with bound.fill(adapted, shard=surgery.FSDP2()) as filled:
            logits(filled)
        return str(error)
    return ""


def test_an_adapter_is_read_into_blocks_that_are_wrapped_in_checkpoints(checkpoint: Path) -> None:
    """As a trainer reads one that goes on: before the model has weights."""
    with surgery.qlora(checkpoint, lora=lora(), report=surgery.Report()) as trained:
        trained.save_pretrained("adapter")
        expected = logits(trained)
    bound = bind(checkpoint)
    model: Any = surgery.checkpoint_activations(get_peft_model(bound.model, lora(), autocast_adapter_dtype=False))
    model.load_adapter("adapter", "default", is_trainable=True, autocast_adapter_dtype=False)
    with bound.fill(model):
        assert torch.equal(logits(model), expected)


def test_what_needs_weights_is_done_once_they_are_there(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    bound = bind(checkpoint)
    kind = type(bound.model.model.layers[0])
    assert surgery.capture(surgery.compile_blocks(bound.model)) is bound.model
    assert type(bound.model.model.layers[0]) is kind
    assert caplog.text == ""
    with bound.fill() as model:
        assert isinstance(model.model.layers[0], _Compiled)
        assert "without CUDA graphs: parameters are on cpu" in caplog.text
    assert type(model.model.layers[0]) is kind
