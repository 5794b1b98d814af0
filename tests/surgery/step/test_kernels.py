"""Kernels by name. Liger's own need a GPU; those of the stand-in are applied in its manner, and compute in torch."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.llama import modeling_llama

import patches
import surgery
from surgery.integrations.low_memory import asked_kernels
from surgery.step.kernels import chosen_kernels, use_kernels
from tests.helpers.models import TINY, save_tiny, tiny_config
from tests.helpers.ranks import run_ranks
from tests.surgery.step.kernel_ranks import IDS, STANDIN, adapter, gradients_of, on_ranks, step

#: Calls of kernels in one forward with a loss, of two layers.
ONCE = {"norm": 5, "mlp": 2, "rotary": 2, "loss": 1}

CPU = torch.device("cpu")

Build = Callable[..., Any]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """What the kernels of the stand-in have been called, on a CPU, as in Triton's interpreter."""
    monkeypatch.syspath_prepend(str(STANDIN))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    loaded = {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] == "liger_kernel"}
    import liger_kernel

    liger_kernel.CALLS.clear()
    yield liger_kernel.CALLS
    for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
        del sys.modules[name]
    sys.modules.update(loaded)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", dtype=torch.float32)


@pytest.fixture
def build(folder: Path) -> Iterator[Build]:
    """Makes the model of `folder`, the same each time, until the test ends."""
    made = []

    def build(**options: Any) -> Any:
        torch.manual_seed(1)
        made.append(surgery.qlora(folder, **{"lora": adapter(), "dtype": torch.float32, "device": CPU} | options))
        return made[-1]

    yield build
    for model in made:
        surgery.release(model)


def process() -> dict[tuple[str, ...], object]:
    """Everything that Liger would change for all models."""
    spaces: dict[str, Any] = {"modeling": modeling_llama, "nn": nn, "functional": nn.functional}
    found = {(name, each): value for name, space in spaces.items() for each, value in vars(space).items()}
    classes = {name: value for (_, name), value in found.items() if isinstance(value, type)}
    return found | {(name, each): value for name, kind in classes.items() for each, value in vars(kind).items()}


def value(loss: torch.Tensor) -> float:
    return float(loss.detach())


def ids_of_liger() -> list[str]:
    return sorted(entry.id for entry in patches.audit() if entry.id.startswith("liger."))


class TestNames:
    def test_each_once_in_one_order(self, calls: dict[str, int]) -> None:
        assert chosen_kernels(" liger,fused, liger,") == chosen_kernels(["liger", "fused"]) == ("fused", "liger")
        assert chosen_kernels(None) == chosen_kernels("") == chosen_kernels(()) == ()

    @pytest.mark.parametrize("value", ["ligr", ["fused", "triton"], [1], True, 2])
    def test_others_are_refused(self, value: Any) -> None:
        with pytest.raises(surgery.ConfigError, match="expected names among fused, liger, found"):
            chosen_kernels(value)

    def test_what_is_not_installed_or_does_not_run_here_is_refused_before_anything_is_read(
        self,
        folder: Path,
        build: Build,
        reads: list[str],
        monkeypatch: pytest.MonkeyPatch,
        calls: dict[str, int],
    ) -> None:
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(surgery.ConfigError, match="run on GPUs"):
            build(kernels="liger")
        with pytest.raises(surgery.ConfigError, match="run on GPUs"), surgery.low_memory(kernels="liger"):
            surgery.fill(AutoModelForCausalLM.from_pretrained(folder))
        monkeypatch.setattr("surgery.step.kernels.find_spec", lambda _: None)
        with pytest.raises(surgery.ConfigError, match=r"pip install .model-surgery\[kernels\]"):
            build(kernels="liger")
        with pytest.raises(surgery.ConfigError, match="not installed"):
            surgery.low_memory(kernels="liger")
        assert reads == []


class TestLiger:
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_losses_and_gradients_are_stocks(self, build: Build, calls: dict[str, int], *, checkpointing: bool) -> None:
        stock, model = build(), build(kernels="liger")
        if checkpointing:
            for each in (stock, model):
                surgery.checkpoint_activations(each)
        for _ in range(2):
            assert step(model) == pytest.approx(step(stock), abs=1e-6)
        found, wanted = gradients_of(model), gradients_of(stock)
        assert found.keys() == wanted.keys()
        assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) < 1e-6
        again = {"norm": 4, "mlp": 2, "rotary": 2, "loss": 0} if checkpointing else dict.fromkeys(ONCE, 0)
        assert calls == {name: 2 * (ONCE[name] + again[name]) for name in ONCE}

    def test_another_model_and_the_process_stay_stock_and_release_undoes_all(
        self, build: Build, calls: dict[str, int]
    ) -> None:
        before = process()
        other, model = build(), build(kernels="liger")
        names = {name: set(vars(module)) for name, module in other.named_modules()}
        assert {name: set(vars(module)) for name, module in model.named_modules()} == names
        changed = {name for name, value in process().items() if value is not before.get(name)}
        ours = {(f"Llama{each}", "forward") for each in ("ForCausalLM", "MLP", "RMSNorm", "Attention")}
        assert {each for each in changed if each[0].startswith("Llama")} == ours
        assert {each for each in changed if each[0] in ("modeling", "nn", "functional")} == set()
        step(other)
        assert not calls
        entries = [entry for entry in patches.audit() if entry.id.startswith("liger.")]
        scopes = {entry.id.rpartition(".")[2].partition("-norm")[0]: str(entry.scope) for entry in entries}
        assert scopes == {
            "llama-for-causal-lm": "1 instance",
            "llama-attention": "2 instances",
            "llama-mlp": "2 instances",
            "llama-rms": "2 instances",  # of three and of two, by what Liger sets on them
        }
        assert {entry.reason for entry in entries} == {"Liger's kernels in a LlamaForCausalLM"}
        surgery.release(model)
        step(model)
        assert (ids_of_liger(), dict(calls)) == ([], {})
        assert {name for name, value in process().items() if value is not before.get(name)} == set()

    def test_logits_come_without_labels_and_in_evaluation(self, build: Build, calls: dict[str, int]) -> None:
        stock, model = build(), build(kernels="liger")
        inputs: list[torch.Size] = []
        model.lm_head.register_forward_pre_hook(lambda _, given: inputs.append(given[0].shape))
        assert model(input_ids=IDS, labels=IDS).logits is None
        assert inputs == [(2, 12, 64)], "hooks of the head, by which FSDP2 gathers it, run around the loss"
        assert torch.allclose(model(input_ids=IDS).logits, stock(input_ids=IDS).logits, atol=1e-5)
        found, wanted = (each.eval()(input_ids=IDS, labels=IDS) for each in (model, stock))
        assert torch.allclose(found.logits, wanted.logits, atol=1e-5)
        assert value(found.loss) == pytest.approx(value(wanted.loss), abs=1e-6)
        assert calls["loss"] == 1

    def test_the_loss_counts_items_and_takes_shifted_labels(self, build: Build, calls: dict[str, int]) -> None:
        stock, model = build(lora=None), build(lora=None, kernels="liger")
        labels = IDS.masked_fill(IDS % 5 == 0, -100)
        for more in ({"labels": labels}, {"labels": labels, "num_items_in_batch": 100}):
            losses = [value(each(input_ids=IDS, **more).loss) for each in (model, stock)]
            assert losses[0] == pytest.approx(losses[1], abs=1e-6)
        shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        found = model(input_ids=IDS, shift_labels=shifted).loss
        assert value(found) == pytest.approx(value(stock(input_ids=IDS, labels=labels).loss), abs=1e-6)

    def test_copies_and_pickles_are_stock(self, build: Build, calls: dict[str, int]) -> None:
        model = build(lora=None, quant=None, kernels="liger")
        norm = model.model.norm
        for made in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
            made(torch.ones(1, 64))
        assert not calls
        norm(torch.ones(1, 64))
        assert calls == {"norm": 1}

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # as it does by itself
    def test_compiled_blocks_are_stock_in_one_graph(self, build: Build, calls: dict[str, int]) -> None:
        stock, model = build(), build(kernels="liger")
        surgery.checkpoint_activations(model)
        surgery.compile_blocks(model, backend="eager")
        assert step(model) == pytest.approx(step(stock), abs=1e-6)
        assert dict(calls) == {"norm": 1, "loss": 1}, "of what is outside of the blocks"

    def test_patches_end_with_the_model(self, build: Build, calls: dict[str, int]) -> None:
        with build(kernels="liger"):
            assert ids_of_liger() != []
        assert ids_of_liger() == []

    @pytest.mark.parametrize(
        "lora",
        [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}],
    )
    def test_an_adapted_head_keeps_the_stock_loss(
        self, build: Build, lora: dict[str, Any], folder: Path, calls: dict[str, int], caplog: pytest.LogCaptureFixture
    ) -> None:
        model = build(lora=LoraConfig(r=2, task_type="CAUSAL_LM", **lora), kernels="liger")
        assert model(input_ids=IDS, labels=IDS).logits is not None
        assert calls == {name: count for name, count in ONCE.items() if name != "loss"}
        assert "LlamaForCausalLM computes its loss without Liger's kernel: its lm_head is of class" in caplog.text
        planned = surgery.plan(folder, world_size=1, lora=LoraConfig(r=2, task_type="CAUSAL_LM", **lora))
        assert planned.inventory.stock_loss

    @pytest.mark.parametrize(
        ("family", "said"),
        [
            ("qwen2", "Liger has no kernels for Qwen2ForCausalLM"),
            ("mistral", "MistralForCausalLM runs without Liger's kernels: Unsupported model type"),
        ],
    )
    def test_a_family_that_liger_does_not_know_runs_as_without(
        self, family: str, said: str, calls: dict[str, int], caplog: pytest.LogCaptureFixture
    ) -> None:
        model = AutoModelForCausalLM.from_config(tiny_config(family))
        module = sys.modules[type(model).__module__]
        before = dict(vars(module))
        use_kernels(model, ("liger",))
        assert model(input_ids=IDS, labels=IDS).logits is not None
        assert (ids_of_liger(), dict(calls), vars(module)) == ([], {}, before)
        assert said in caplog.text

    def test_a_model_that_takes_more_than_text_keeps_the_stock_loss(
        self, tmp_path: Path, calls: dict[str, int], caplog: pytest.LogCaptureFixture
    ) -> None:
        config = tiny_config("llava", text_config=TINY, vision_config=TINY)
        model = AutoModelForImageTextToText.from_config(config)
        model.save_pretrained(tmp_path)
        use_kernels(model, ("liger",))
        assert model(input_ids=IDS, labels=IDS).logits is not None
        assert calls == {name: count for name, count in ONCE.items() if name != "loss"}
        assert "its loss without Liger's kernel: it takes more than text" in caplog.text
        planned = surgery.plan(
            tmp_path, world_size=1, lora=adapter(), model=lambda: AutoModelForImageTextToText.from_config(config)
        )
        assert planned.inventory.stock_loss
        surgery.release(model)

    def test_experts_stay_and_what_is_written_onto_a_class_is_this_models(
        self, calls: dict[str, int], caplog: pytest.LogCaptureFixture
    ) -> None:
        config = tiny_config("mixtral", num_local_experts=2)
        model, other = AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(config)
        use_kernels(model, ("liger",))
        assert [each(input_ids=IDS, labels=IDS).logits is None for each in (model, other)] == [True, False]
        assert calls == {"loss": 1}
        assert "without Liger's kernels run: MixtralExperts" in caplog.text
        surgery.release(model)

    def test_a_model_without_layers_to_fuse_says_so(self, build: Build, caplog: pytest.LogCaptureFixture) -> None:
        build(kernels="fused", quant=None)
        assert "runs without fused layers" in caplog.text

    def test_a_module_that_is_no_model_of_transformers_runs_as_without(self, caplog: pytest.LogCaptureFixture) -> None:
        use_kernels(nn.Linear(2, 2), ("liger",))
        assert "Liger has no kernels for Linear" in caplog.text


class TestLowMemory:
    def test_a_model_remembers_the_kernels_of_its_block(self, folder: Path, calls: dict[str, int]) -> None:
        with surgery.low_memory(kernels="liger"), surgery.low_memory():
            assert asked_kernels() == ("liger",)
            model: Any = AutoModelForCausalLM.from_pretrained(folder)
        assert (asked_kernels(), ids_of_liger()) == ((), [])
        model = surgery.fill(model).train()
        model(input_ids=IDS, labels=IDS)
        assert calls == ONCE
        surgery.release(model)

    @pytest.mark.parametrize("none", ["", ()])
    def test_a_block_may_ask_for_none_in_one_that_asks_for_some(self, none: Any) -> None:
        with surgery.low_memory(kernels="fused"), surgery.low_memory(kernels=none):
            assert asked_kernels() == ()

    def test_a_model_that_is_loaded_as_without_runs_so(self, folder: Path, calls: dict[str, int]) -> None:
        with surgery.low_memory(kernels="liger"):
            model: Any = AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
        assert model.train()(input_ids=IDS, labels=IDS).logits is not None
        assert not calls

    def test_the_command_line_asks_for_them(self, calls: dict[str, int]) -> None:
        from surgery.run import low_memory

        with low_memory(kernels="liger"):
            assert asked_kernels() == ("liger",)
        with pytest.raises(surgery.ConfigError, match="found 'ligr'"), low_memory(kernels="ligr"):
            raise AssertionError("refused before")


class TestAttention:
    def test_it_is_transformers_choice_or_by_name(self, build: Build) -> None:
        assert build(attention="eager").config._attn_implementation == "eager"
        assert build().config._attn_implementation == "sdpa"

    @pytest.mark.parametrize("name", ["flash_attention_2", "slow"])
    def test_what_is_not_to_be_had_is_refused_before_anything_is_read(
        self, build: Build, reads: list[str], name: str
    ) -> None:
        with pytest.raises(surgery.ConfigError, match=f"attention='{name}' is not to be had here"):
            build(attention=name)
        with pytest.raises(surgery.ConfigError, match="found model= as well"):
            build(attention=name, model=lambda: nn.Linear(2, 2))
        assert reads == []


@pytest.mark.distributed
def test_sharded_as_in_one_process_and_the_same_on_every_rank(
    folder: Path, build: Build, calls: dict[str, int]
) -> None:
    model = build()
    wanted = [step(model, learn=True) for _ in range(3)]
    assert wanted[2] != wanted[0], "nothing was learned"
    for found, refusal in run_ranks(on_ranks, 2, folder):
        assert "kernels" in refusal
        for name, (losses, counted) in found.items():
            assert losses == pytest.approx(wanted, abs=1e-5), name
            assert counted == {kernel: 3 * count for kernel, count in ONCE.items()}, name
