from __future__ import annotations

import gc
import json
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import patches
import surgery
from families.compare import differences
from tests.helpers.models import save_in_8_bits, save_tiny, tiny_config

STORAGES = (torch.bfloat16, torch.uint8, torch.float32)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    from transformers.utils import logging as upstream

    upstream.disable_progress_bar()
    yield
    upstream.enable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", tie_word_embeddings=True)


def four_bits(storage: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=storage,
        **options,
    )


def load(path: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.bfloat16, "quantization_config": four_bits(), **options}
    if options["quantization_config"] is None:
        del options["quantization_config"]
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **options)


def bound(path: Path, how: Callable[..., Any] = load, **options: Any) -> Any:
    with surgery.low_memory():
        model = how(path, **options)
    assert all(parameter.is_meta for parameter in model.parameters()), "nothing is read"
    return model


def assert_same(path: Path, how: Callable[..., Any] = load, **options: Any) -> Any:
    wanted, model = how(path, **options), bound(path, how, **options)
    model = surgery.fill(model)
    assert list(differences(model, wanted)) == []
    assert type(model).__name__ == type(wanted).__name__
    assert model.training == wanted.training
    assert model.config.to_dict() == wanted.config.to_dict()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(model.train()(ids).logits, wanted.train()(ids).logits)
    surgery.release(model)
    return model


class TestFilled:
    @pytest.mark.parametrize("storage", STORAGES)
    def test_as_stock_in_every_storage(self, folder: Path, storage: torch.dtype) -> None:
        assert_same(folder, quantization_config=four_bits(storage))

    @pytest.mark.parametrize(
        "options",
        [
            {"quantization_config": None},
            {"quantization_config": None, "dtype": "auto"},
            {"quantization_config": None, "dtype": torch.float32},
            {"dtype": torch.float32},
            {"dtype": torch.float16},
            {"attn_implementation": "eager"},
            {"device_map": {"": "cpu"}},
            {"device_map": "auto"},
            {"quantization_config": "skips"},
        ],
        ids=str,
    )
    def test_as_stock_with_options_of_from_pretrained(self, folder: Path, options: dict[str, Any]) -> None:
        if options.get("quantization_config") == "skips":
            options = {"quantization_config": four_bits(llm_int8_skip_modules=["down_proj", "lm_head"])}
        assert_same(folder, **options)

    def test_as_stock_from_a_subfolder_and_a_variant(self, folder: Path, tmp_path: Path) -> None:
        load(folder, quantization_config=None).save_pretrained(tmp_path / "inner", variant="fp16")
        assert_same(tmp_path, subfolder="inner", variant="fp16")

    def test_as_stock_with_names_of_another_model(self, tmp_path: Path) -> None:
        path = save_tiny(tmp_path / "renamed", shard_size="1GB")
        weights = load_file(path / "model.safetensors")
        renamed = {name.replace("mlp.", "feed_forward."): value for name, value in weights.items()}
        save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
        assert_same(path, key_mapping={r"feed_forward\.": "mlp."})

    def test_what_is_said_of_loading_is_as_stock(self, tmp_path: Path) -> None:
        path = save_tiny(tmp_path / "more", shard_size="1GB")
        weights = load_file(path / "model.safetensors")
        save_file({**weights, "of.no.use": torch.zeros(1)}, path / "model.safetensors", metadata={"format": "pt"})
        wanted = load(path, output_loading_info=True)[1]
        with surgery.low_memory():
            found = load(path, output_loading_info=True)[1]
        assert found == wanted
        assert "of.no.use" in found["unexpected_keys"]

    def test_with_a_dtype_and_frozen_weights_as_they_are_by_then(self, folder: Path) -> None:
        model = bound(folder)
        model.model.norm.weight.data = model.model.norm.weight.data.float()
        model.model.norm.weight.requires_grad = False
        model = surgery.fill(model)
        assert model.model.norm.weight.dtype == torch.float32
        assert not model.model.norm.weight.requires_grad
        surgery.release(model)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_a_checkpoint_that_is_packed_already(self, bits: int, folder: Path, tmp_path: Path) -> None:
        if bits == 8:
            save_in_8_bits(folder, tmp_path / "packed")
        else:
            load(folder, quantization_config=four_bits(torch.uint8)).save_pretrained(tmp_path / "packed")
        model = bound(tmp_path / "packed", quantization_config=None)
        assert all(parameter.is_meta for parameter in model.parameters())
        model = surgery.fill(model)
        assert list(differences(model, load(tmp_path / "packed", quantization_config=None))) == []
        surgery.release(model)

    def test_two_at_once_each_with_its_own_weights(self, folder: Path, tmp_path: Path) -> None:
        other = save_tiny(tmp_path / "other", seed=1)
        with surgery.low_memory():
            models = [load(folder), load(other)]
        filled = [surgery.fill(model) for model in reversed(models)]
        for model, path in zip(filled, (other, folder), strict=True):
            assert list(differences(model, load(path))) == []
            surgery.release(model)

    def test_an_optimizer_made_before_trains_what_is_filled(self, folder: Path) -> None:
        model = bound(folder, quantization_config=None)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model = surgery.fill(model)
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, model.parameters()))


class TestLoadedAsWithout:
    """What cannot be bound is loaded by transformers, and one line says why."""

    def check(self, caplog: pytest.LogCaptureFixture, said: str, path: Path, **options: Any) -> None:
        wanted = load(path, **options)
        with caplog.at_level(logging.WARNING, logger="surgery"), surgery.low_memory():
            found = load(path, **options)
        assert list(differences(found, wanted)) == []
        assert [said in record.message for record in caplog.records if record.name == "surgery"] == [True]
        with pytest.raises(surgery.ConfigError, match="has its weights already"):
            surgery.fill(found)

    def test_in_eight_bits(self, caplog: pytest.LogCaptureFixture, folder: Path) -> None:
        from transformers import BitsAndBytesConfig

        with caplog.at_level(logging.WARNING, logger="surgery"), surgery.low_memory():
            model = load(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
        assert not any(parameter.is_meta for parameter in model.parameters())
        assert "Bnb8BitHfQuantizer is not a way to store weights here" in caplog.text

    def test_with_a_weight_that_is_not_there(self, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
        path = save_tiny(tmp_path / "less", shard_size="1GB", tie_word_embeddings=False)
        weights = load_file(path / "model.safetensors")
        del weights["model.norm.weight"]  # which is initialized to ones
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        self.check(caplog, "model.norm.weight", path)

    def test_with_sizes_that_may_differ(self, caplog: pytest.LogCaptureFixture, folder: Path) -> None:
        self.check(caplog, "ignore_mismatched_sizes", folder, ignore_mismatched_sizes=True)

    def test_from_pickles(self, caplog: pytest.LogCaptureFixture, folder: Path, tmp_path: Path) -> None:
        torch.save(load(folder, quantization_config=None).state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        self.check(caplog, "not in safetensors files", tmp_path)

    def test_from_a_state_dict(self, caplog: pytest.LogCaptureFixture, folder: Path) -> None:
        from transformers import LlamaForCausalLM

        weights = load(folder, quantization_config=None).state_dict()
        with caplog.at_level(logging.WARNING, logger="surgery"), surgery.low_memory():
            model = LlamaForCausalLM.from_pretrained(None, config=tiny_config(), state_dict=weights)
        assert not any(parameter.is_meta for parameter in model.parameters())
        assert "state_dict" in caplog.text

    def test_with_rows_that_fill_no_element_of_the_storage(
        self, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        path = save_tiny(tmp_path / "odd", hidden_size=12, intermediate_size=6, num_attention_heads=2)
        with caplog.at_level(logging.WARNING, logger="surgery"), surgery.low_memory():
            model = load(path, quantization_config=four_bits(torch.float32))
        assert not any(parameter.is_meta for parameter in model.parameters()) or caplog.text == ""


class TestWaiting:
    @pytest.mark.parametrize(
        "use",
        [
            lambda model: model(torch.zeros(1, 1, dtype=torch.long)),
            lambda model: model.generate(torch.zeros(1, 1, dtype=torch.long), max_new_tokens=1),
            lambda model: model.state_dict(),
            lambda model: model.to("cpu"),
            lambda model: model.resize_token_embeddings(100),
            pickle.dumps,
        ],
    )
    def test_use_is_refused_and_says_what_to_do(self, folder: Path, use: Callable[[Any], Any]) -> None:
        model = bound(folder)
        with pytest.raises(surgery.NotFilledError, match=r"surgery\.fill\(model\)"):
            use(model)

    def test_methods_that_were_taken_before_it_was_filled_are_those_of_the_model_after(self, folder: Path) -> None:
        model, ids = bound(folder), torch.zeros(1, 1, dtype=torch.long)
        forward, state_dict = model.forward, model.state_dict
        with pytest.raises(surgery.NotFilledError):
            forward(ids)
        with surgery.fill(model) as filled:
            assert torch.equal(forward(ids).logits, filled(ids).logits)
            assert state_dict().keys() == filled.state_dict().keys()

    @pytest.mark.parametrize(
        ("targets", "options"),
        [("all-linear", {}), (["q_proj", "up_proj"], {"use_dora": True, "trainable_token_indices": [3, 7]})],
        ids=["plain", "made of weights"],
    )
    def test_adapters_are_those_of_stock(self, folder: Path, targets: Any, options: dict[str, Any]) -> None:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        models = []
        for made in (load, bound):
            torch.manual_seed(0)
            model = prepare_model_for_kbit_training(made(folder), use_gradient_checkpointing=False)
            models.append(get_peft_model(model, LoraConfig(r=4, target_modules=targets, **options)))
        filled = surgery.fill(models[1])
        assert list(differences(filled, models[0])) == []
        surgery.release(filled)

    @pytest.mark.parametrize("way", ["peft", "transformers", "from_pretrained"])
    def test_a_saved_adapter_is_loaded_as_by_stock(self, folder: Path, tmp_path: Path, way: str) -> None:
        from peft import LoraConfig, PeftModel, get_peft_model

        options = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(load(folder), options).save_pretrained(tmp_path)

        def adapted(path: Path) -> Any:
            return load(tmp_path if way == "from_pretrained" else path)

        with surgery.low_memory():
            models = [adapted(folder)]
        models.append(adapted(folder))
        for index, model in enumerate(models):
            if way == "peft":
                models[index] = PeftModel.from_pretrained(model, str(tmp_path))
            elif way == "transformers":
                model.load_adapter(str(tmp_path))
        filled = surgery.fill(models[0])
        assert list(differences(filled, models[1])) == []
        surgery.release(filled)

    def test_adapters_that_change_weights_are_refused(self, folder: Path) -> None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(bound(folder), LoraConfig(r=4, target_modules=["q_proj"]))
        with pytest.raises(surgery.NotFilledError, match=r"olora.*outside of surgery\.low_memory"):
            model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="olora"))

    def test_a_saved_module_is_refused_since_filling_would_overwrite_it(self, folder: Path, tmp_path: Path) -> None:
        from peft import LoraConfig, PeftModel, get_peft_model

        options = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"])
        get_peft_model(load(folder), options).save_pretrained(tmp_path)
        with pytest.raises(surgery.NotFilledError, match="modules_to_save"):
            PeftModel.from_pretrained(bound(folder), str(tmp_path))
        with pytest.raises(surgery.NotFilledError, match="modules_to_save"):
            bound(folder).load_adapter(str(tmp_path))

    @pytest.mark.parametrize("how", ["in place", "another"])
    def test_values_that_filling_would_overwrite_are_refused(self, folder: Path, how: str) -> None:
        model = bound(folder)
        if how == "in place":
            nn.init.constant_(model.model.norm.weight, 2.0)
        else:
            model.model.norm.weight = nn.Parameter(torch.ones(model.config.hidden_size))
        with pytest.raises(surgery.ConfigError, match=r"model\.norm\.weight \(1 in all\) got values"):
            surgery.fill(model)

    def test_filling_twice_is_refused(self, folder: Path) -> None:
        with surgery.fill(bound(folder)) as model, pytest.raises(surgery.ConfigError, match="low_memory"):
            surgery.fill(model)

    def test_a_copy_is_bound_too(self, folder: Path) -> None:
        import copy

        model = bound(folder)
        twin = copy.deepcopy(model)
        first, second = surgery.fill(twin), surgery.fill(model)
        assert list(differences(first, second)) == []
        assert not {id(parameter) for parameter in first.parameters()} & set(map(id, second.parameters()))
        surgery.release(first)
        surgery.release(second)

    def test_patches_go_with_the_last_model(self, folder: Path) -> None:
        before = patches.active()
        model = bound(folder)
        assert "accelerate.fill-sharded" in {each.patch.id for each in patches.active()}
        del model
        gc.collect()
        assert patches.active() == before


def test_a_function_may_be_decorated(folder: Path) -> None:
    @surgery.low_memory()
    def made() -> nn.Module:
        return load(folder)

    assert all(parameter.is_meta for parameter in made().parameters())
    assert not any(parameter.is_meta for parameter in load(folder).parameters())


def test_a_function_that_runs_after_its_call_is_refused() -> None:
    def generated() -> Iterator[None]:
        yield

    async def awaited() -> None: ...

    for function in (generated, awaited):
        with pytest.raises(surgery.ConfigError, match=r"with surgery\.low_memory"):
            surgery.low_memory()(function)


def test_sequence_classification_with_its_head(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config(num_labels=3), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert "score.weight" in json.dumps(sorted(load_file(tmp_path / "model.safetensors")))

    def classifier(path: Path, **options: Any) -> Any:
        options = {"dtype": torch.bfloat16, "quantization_config": four_bits(), **options}
        return AutoModelForSequenceClassification.from_pretrained(path, **options)

    wanted, found = classifier(tmp_path), surgery.fill(bound(tmp_path, classifier))
    assert list(differences(found, wanted)) == []
    surgery.release(found)
