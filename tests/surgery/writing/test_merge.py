"""Adapters merged on disk: PEFT's `merge_and_unload`, from any number of ranks; whole, absent or resumed."""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from typer.testing import CliRunner

import surgery
from surgery.cli import app
from surgery.errors import ConfigError, ExportError
from surgery.telemetry.measurements import Sampler, anonymous_memory
from surgery.telemetry.numbers import say_size
from surgery.writing import merging, output
from tests.helpers.models import save_tiny, tiny_config
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_tokenizer import save_with_tokenizer

WEIGHTS = "adapter_model.safetensors"
TOKENS = torch.arange(5, 25)[None]
EXPERTS = {"num_experts": 6, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
EVERYTHING = ["q_proj", "o_proj", "down_proj", "embed_tokens", "lm_head"]

#: name -> family, changes of it, adapters, and their weights.
CASES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]], list[float]]] = {
    "biases": ("llama", {"attention_bias": True}, [{"target_modules": EVERYTHING, "bias": "all"}], []),
    "lora_bias": ("qwen2", {}, [{"target_modules": ["q_proj"], "lora_bias": True, "bias": "lora_only"}], []),
    "dora": ("llama", {}, [{"target_modules": EVERYTHING, "use_dora": True, "use_rslora": True}], []),
    "conv1d": ("gpt2", {}, [{"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 4}}], []),
    "conv1d dora": ("gpt2", {}, [{"target_modules": ["c_attn", "c_proj"], "use_dora": True}], []),
    "two": ("llama", {}, [{"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "v_proj"], "r": 4}], [0.5, -2]),
    "two doras": ("llama", {}, [{"target_modules": ["q_proj"], "use_dora": True}] * 2, []),
    "whole": ("llama", {}, [{"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}], []),
    "tokens": ("qwen2", {"tie_word_embeddings": True}, [{"trainable_token_indices": [3, 7, 95], "r": 2}], []),
    "experts": ("qwen2_moe", EXPERTS, [{"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}], []),
    "tied, whole head": ("qwen2", {"tie_word_embeddings": True}, [{"modules_to_save": ["lm_head"]}], []),
}  # fmt: skip


def make_adapter(base: Path, folder: Path, seed: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """An adapter with random values in all that is trained."""
    options = {"target_modules": ["q_proj"], "r": 8, "lora_alpha": 16, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in adapted.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05 * parameter.requires_grad)
        adapted.save_pretrained(folder)
    return folder


def by_peft(base: Path, adapters: Sequence[Path], weights: Sequence[float] = ()) -> Any:
    """A model with all `adapters` active, not merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        adapted = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
        for number, adapter in enumerate(adapters[1:], start=1):
            adapted.load_adapter(adapter, adapter_name=str(number))
        if len(adapters) > 1:
            adapted.base_model.set_adapter([*map(str, range(len(adapters)))])
    layers = [module for module in adapted.modules() if hasattr(module, "set_scale")]
    for layer in layers:
        for number, weight in enumerate(weights):
            layer.set_scale(str(number), weight)
    return adapted


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for file in sorted(folder.glob("*.safetensors")) for name, each in load_file(file).items()}


def different(one: Path, other: Path) -> list[str]:
    left, right = tensors(one), tensors(other)
    common = left.keys() & right.keys()
    unequal = (n for n in common if left[n].dtype != right[n].dtype or not torch.equal(left[n], right[n]))
    return sorted({*(left.keys() ^ right.keys()), *unequal})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits  # type: ignore[no-any-return]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ranges of rows even in a tiny weight."""
    monkeypatch.setattr(merging, "CHUNK", 32 * 64)
    monkeypatch.setattr(merging, "ROWS", 32)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("case", CASES)
def test_merged_as_peft_does_and_named_as_the_base(case: str, tmp_path: Path) -> None:
    family, changes, options, weights = CASES[case]
    base = save_tiny(tmp_path / "base", family, **changes)
    adapters = [make_adapter(base, tmp_path / f"a{n}", n, **each) for n, each in enumerate(options)]
    expected = by_peft(base, adapters, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected.merge_and_unload().save_pretrained(tmp_path / "peft")
    surgery.merge(base, adapters, tmp_path / "out", weights=weights)
    assert different(tmp_path / "out", tmp_path / "peft") == []
    tied = config_of(tmp_path / "peft")["tie_word_embeddings"]
    assert config_of(tmp_path / "out").get("tie_word_embeddings", True) == tied


def test_adapters_of_experts_one_by_one_as_transformers_4_had_them(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "mixtral", num_local_experts=3)
    adapter = make_adapter(base, tmp_path / "adapter", 1, target_modules=["q_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "w1", "w2", "w3"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    sizes = {"w1": (64, 112), "w2": (112, 64), "w3": (64, 112)}
    found = load_file(adapter / WEIGHTS)
    for layer, expert, (name, (width, height)) in itertools.product(range(2), range(3), sizes.items()):
        module = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
        found[f"{module}.lora_A.weight"] = torch.randn(8, width) * 0.1
        found[f"{module}.lora_B.weight"] = torch.randn(height, 8) * 0.1
    save_file(found, adapter / WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_peft(base, [adapter]).merge_and_unload().save_pretrained(tmp_path / "peft")
    surgery.merge(base, adapter, tmp_path / "out")
    assert different(tmp_path / "out", tmp_path / "peft") == []
    assert any("experts.2.w1.weight" in name for name in different(tmp_path / "out", base))


@pytest.mark.usefixtures("small_chunks")
def test_adapters_of_experts_are_merged_as_peft_does(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "mixtral", num_local_experts=7)
    adapter = make_adapter(base, tmp_path / "adapter", 1, target_parameters=["gate_up_proj", "down_proj"])
    surgery.merge(base, adapter, tmp_path / "out")
    assert {n for n in tensors(base) if ".experts." in n} <= {*different(tmp_path / "out", base)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_peft(base, [adapter]).merge_and_unload().save_pretrained(tmp_path / "peft")
    assert different(tmp_path / "out", tmp_path / "peft") == []


@pytest.mark.parametrize(
    ("options", "dtype", "is_tied"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, torch.bfloat16, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, torch.bfloat16, False),
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, torch.float32, True),
    ],
)
def test_a_tied_head_becomes_a_tensor_of_its_own_where_it_has_to(
    options: dict[str, Any], dtype: torch.dtype, is_tied: bool, tmp_path: Path
) -> None:
    """PEFT merges into the one tensor that both are, so that the model is another one; here it computes as before."""
    base = save_tiny(tmp_path / "base", "qwen2", dtype=dtype, tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter", 1, dtype, **options)
    surgery.merge(base, adapter, tmp_path / "out")
    assert ("lm_head.weight" in tensors(tmp_path / "out")) is not is_tied
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is is_tied
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert (logits(merged) - logits(by_peft(base, [adapter]))).abs().max() < 0.02


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tokenizer, in several shards."""
    return save_with_tokenizer(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all linear modules of `base`."""
    return make_adapter(base, tmp_path_factory.mktemp("adapter"), 1, target_modules="all-linear")


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two, merged by the command line."""
    out = tmp_path_factory.mktemp("merged") / "out"
    done = CliRunner().invoke(app, ["merge", str(base), str(adapter), str(out), "--max-shard-size", "80KB"])
    assert done.exit_code == 0, done.output
    return out


def test_the_folder_is_a_whole_checkpoint(base: Path, merged: Path) -> None:
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(base).keys()
    assert AutoTokenizer.from_pretrained(merged)("a")["input_ids"]
    assert (merged / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert "adapter 1" in (merged / "README.md").read_text()
    assert "rank 8" in (merged / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.generate(TOKENS, max_new_tokens=4, do_sample=False).shape[1] > TOKENS.shape[1]


def test_packed_bases_and_packed_results(base: Path, adapter: Path, merged: Path, tmp_path: Path) -> None:
    quantized = surgery.quantize(merged, tmp_path / "quantized")
    surgery.merge(base, adapter, tmp_path / "packed", quant=surgery.Quant("nf4"))
    assert different(tmp_path / "packed", quantized) == []
    assert config_of(tmp_path / "packed")["quantization_config"] == config_of(quantized)["quantization_config"]

    # A base that is packed is merged like the one in 16 bits that it stands for.
    small = make_adapter(base, tmp_path / "small", 2, target_modules=["q_proj"])
    base4 = surgery.quantize(base, tmp_path / "base4")
    base16 = surgery.dequantize(base4, tmp_path / "base16")
    surgery.merge(base4, small, tmp_path / "from4")
    surgery.merge(base16, small, tmp_path / "from16")
    assert different(tmp_path / "from4", tmp_path / "from16") == []
    assert "quantization_config" not in config_of(tmp_path / "from4")
    # Packed again, what did not change is as it was.
    surgery.merge(base4, small, tmp_path / "again4", quant=surgery.Quant("nf4"))
    changed = different(tmp_path / "again4", base4)
    assert changed
    assert all("q_proj.weight" in name for name in changed)
    with pytest.raises(ConfigError, match=r"packed already, with 'nf4'"):
        surgery.merge(base4, small, tmp_path / "other", quant=surgery.Quant("fp4"))


def test_another_dtype_is_that_of_every_tensor(base: Path, adapter: Path, tmp_path: Path) -> None:
    surgery.merge(base, adapter, tmp_path / "out", dtype=torch.float32)
    assert {each.dtype for each in tensors(tmp_path / "out").values()} == {torch.float32}
    assert config_of(tmp_path / "out")["dtype"] == "float32"


#: Processes that are killed; `tools/export_trials.py kills` has 20.
KILLS = 8


def merge_on_a_rank(base: Path, adapter: Path, out: Path, most: int) -> None:
    surgery.merge(base, adapter, out, max_shard_bytes=most)


def size_of(file: Path) -> int:
    with suppress(FileNotFoundError):
        return file.stat().st_size
    return 0


def merge_until_killed(base: Path, adapter: Path, out: Path, moments: Connection) -> None:
    """Merge in `KILLS` processes, each killed at a random moment, and a last time; say what each has left."""
    output.FLUSH_BYTES = 0  # all that is written goes to the journal at once
    draw, journal = random.Random(0), out.with_name(f".{out.name}.surgery") / "journal.0"
    for number in range(KILLS):
        before, child, has_ended = size_of(journal), os.fork(), False
        if child == 0:
            merge_on_a_rank(base, adapter, out, 80_000)
            os._exit(0)
        # Every second time from when something is written.
        while number % 2 and not has_ended and size_of(journal) == before:
            has_ended = os.waitpid(child, os.WNOHANG)[0] != 0
            time.sleep(0.0001)
        time.sleep(draw.uniform(0, 0.01 if number % 2 else 0.4))
        if not has_ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        moments.send((contents(out) if out.exists() else None, size_of(journal) > 0))
        if out.exists():
            shutil.rmtree(out)
    merge_on_a_rank(base, adapter, out, 80_000)
    moments.send((contents(out), False))


def test_any_number_of_ranks_and_any_kill_give_the_same_bytes(
    base: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    run_ranks(merge_on_a_rank, 2, base, adapter, tmp_path / "two", 80_000)
    assert contents(tmp_path / "two") == contents(merged)

    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=merge_until_killed, args=(base, adapter, tmp_path / "killed", sender))
    process.start()
    sender.close()  # so that its end is noticed
    moments = []
    for _ in range(KILLS + 1):
        assert receiver.poll(60), f"killed {len(moments)} times, and nothing more"
        moments.append(receiver.recv())
    process.join()
    assert all(found in (None, contents(merged)) for found, _ in moments)
    assert moments[-1][0] is not None
    assert any(has_begun for _, has_begun in moments), "none was killed in the middle"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_only_a_part_of_a_weight_is_in_memory(tmp_path: Path) -> None:
    """PEFT takes five times the bytes of a weight for its merge, here 160 MiB, beside the model."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_hidden_layers": 2}
    config = tiny_config(num_key_value_heads=4, head_dim=128, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    config.save_pretrained(base)
    values = {name: torch.full(each.shape, 0.5, dtype=each.dtype) for name, each in model.state_dict().items()}
    save_file(values, base / "model.safetensors")
    total = sum(each.nbytes for each in values.values())
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["up_proj", "down_proj"])
    ((_, adapted),) = merging.adapt(model, {"default": lora})
    keys = merging.adapter_keys(adapted, "default")
    lora.save_pretrained(str(adapter))
    save_file({key: torch.full(each.shape, 0.01) for key, each in keys.items()}, adapter / WEIGHTS)
    del values, model, adapted, keys
    gc.collect()
    before, seen = anonymous_memory(), [0]
    with Sampler(0.002).calling(lambda: seen.append(anonymous_memory())):
        surgery.merge(base, adapter, tmp_path / "out", report=surgery.Report())
    assert max(seen) - before < 112 << 20 < total // 2, say_size(max(seen) - before)


def refused(tmp_path: Path, base: Path, *arguments: str) -> str:
    """What the command says; nothing is written."""
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["merge", str(base), *arguments[:1], str(out), *arguments[1:]])
    assert done.exit_code == 2, done.output
    assert not out.exists()
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".surgery")] == []
    return " ".join(done.output.split())


def test_what_is_no_adapter_of_this_base_is_refused_before_reading(
    base: Path, adapter: Path, reads: list[str], tmp_path: Path
) -> None:
    def changed(name: str, **settings: Any) -> Path:
        folder = Path(shutil.copytree(adapter, tmp_path / name))
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
        return folder

    weights = load_file(adapter / WEIGHTS)
    first = next(name for name in weights if "q_proj.lora_A" in name)
    lacking, more, pickle, text = (changed(name) for name in ("lacking", "more", "pickle", "text"))
    save_file({n: t for n, t in weights.items() if n != first}, lacking / WEIGHTS)
    save_file({**weights, "base_model.model.other.lora_A.weight": torch.ones(2, 2)}, more / WEIGHTS)
    (pickle / WEIGHTS).rename(pickle / "adapter_model.bin")
    (text / "adapter_config.json").write_text("{")
    wide = save_tiny(tmp_path / "wide", hidden_size=128)
    old, new = "a" * 40, "b" * 40
    cached = Path(shutil.copytree(base, tmp_path / "models--team--tiny" / "snapshots" / old))
    itself = CliRunner().invoke(app, ["merge", str(base), str(adapter), str(adapter), "--overwrite"])
    assert (itself.exit_code, "it is the folder that is read" in " ".join(itself.output.split())) == (2, True)
    cases = [
        (base, [str(changed("rank", r=4))], f"expected {min(weights)} of shape (4, 112)"),
        (wide, [str(adapter)], "found (64, 8)"),
        (base, [str(lacking)], f"expected 1 tensors more: {first}"),
        (base, [str(more)], "found 1 that belong nowhere: base_model.model.other.lora_A.weight"),
        (base, [str(pickle)], "found adapter_model.bin, a pickle"),
        (base, [str(text)], "adapter_config.json cannot be read"),
        (base, [str(changed("kind", peft_type="LOHA"))], "expected peft_type LORA, found 'LOHA'"),
        (base, [str(changed("task", task_type="SEQ_CLS"))], "expected an adapter of a causal language model"),
        (base, [str(changed("init", init_lora_weights="pissa"))], "belongs to base weights that PEFT changed"),
        (base, [str(changed("arrow", use_bdlora={"target_modules_bd_a": ["q"], "nblocks": 2}))], "use_bdlora="),
        (base, [str(changed("tokens", alora_invocation_tokens=[1]))], "with alora_invocation_tokens"),
        (base, [str(changed("future", use_xlora=True))], "use_xlora"),
        (base, [str(changed("number", base_model_name_or_path=5))], "base_model_name_or_path"),
        (base, [str(changed("names", target_modules=["nothing"]))], "PEFT cannot put the adapter"),
        (cached, [str(changed("revision", revision=new, base_model_name_or_path="team/tiny"))], f"found commit {old}"),
        (base, [str(adapter), "--weight", "1", "--weight", "2"], "one for each of 1 adapters, found 2"),
        (base, [str(adapter), "--weight", "nan"], "expected a finite number"),
        (base, [str(changed("dora", use_dora=True)), "--weight", "0.5"], "it has use_dora"),
        (base, [str(tmp_path / "none")], "found nothing at"),
    ]
    for source, arguments, expected in cases:
        assert expected in refused(tmp_path, source, *arguments)
    assert reads == []


def test_values_that_are_not_finite_are_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Of an adapter before anything is written; and where a sum is beyond the dtype."""
    folder, weights = Path(shutil.copytree(adapter, tmp_path / "broken")), load_file(adapter / WEIGHTS)
    name = next(each for each in weights if "1.mlp.up_proj.lora_B" in each)
    save_file({**weights, name: torch.full_like(weights[name], float("inf"))}, folder / WEIGHTS)
    said = refused(tmp_path, base, str(folder))
    assert f"found NaN or infinity in 1 of {len(weights)} tensors: {name}." in said
    save_file({**weights, name: torch.full_like(weights[name], 1e7)}, folder / WEIGHTS)
    with pytest.raises(ExportError, match=r"model.layers.1.mlp.up_proj.weight: expected finite numbers.*float16 holds"):
        surgery.merge(base, folder, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_a_tied_head_that_is_stored_too_keeps_its_name(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "qwen2", shard_size="1GB", tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter", 1, target_modules=["lm_head"])
    found = tensors(base)
    embedding = found["model.embed_tokens.weight"]
    save_file({**found, "lm_head.weight": embedding.clone()}, base / "model.safetensors", metadata={"format": "pt"})
    surgery.merge(base, adapter, tmp_path / "out")
    merged = tensors(tmp_path / "out")
    assert merged.keys() == {*found, "lm_head.weight"}
    assert torch.equal(merged["model.embed_tokens.weight"], embedding)
    assert not torch.equal(merged["lm_head.weight"], embedding)


def test_a_base_in_8_bits_is_merged_like_what_it_stands_for(base: Path, adapter: Path, tmp_path: Path) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float16)
    model.save_pretrained(tmp_path / "base8")
    base16 = surgery.dequantize(tmp_path / "base8", tmp_path / "base16", dtype=torch.float16)
    surgery.merge(tmp_path / "base8", adapter, tmp_path / "from8")
    surgery.merge(base16, adapter, tmp_path / "from16")
    assert different(tmp_path / "from8", tmp_path / "from16") == []
