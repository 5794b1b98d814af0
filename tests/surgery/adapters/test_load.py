"""Saved adapters that do not fit, or are broken: refused before a weight is read, the model as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import patches
import surgery
from surgery.adapters.metadata import Base
from surgery.adapters.save import peft_state
from surgery.cli import app
from surgery.errors import CheckpointError, ConfigError, SurgeryError
from surgery.planning.advice import command
from tests.helpers.models import save_tiny
from tests.helpers.reads import count_reads

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
COMMIT, OTHER = "0123456789" * 4, "abcdef0123" * 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    make(base, folder, r=4, target_modules=["q_proj", "v_proj"])
    return folder


def make(base: Path, folder: Path, **options: Any) -> None:
    with qlora(base, lora=LoraConfig(init_lora_weights=False, **options)) as model:
        surgery.save_adapter(model, folder)


def qlora(base: Path, **options: Any) -> Any:
    return surgery.qlora(base, dtype=torch.float32, report=surgery.Report(), **options)


Damage = Callable[[Path], object]


def say(**changes: Any) -> Damage:
    """Change the configuration."""

    def change(folder: Path) -> None:
        file = folder / CONFIG
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def write(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def edit(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS)

    return edit


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-7])


def pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def model_instead(folder: Path) -> None:
    (folder / CONFIG).rename(folder / "config.json")


DAMAGES: dict[str, tuple[Damage, str]] = {
    "pickle": (pickle, "found adapter_model.bin, a pickle, which could run any code"),
    "truncated": (cut, "adapter_model.safetensors is truncated"),
    "empty": (write(WEIGHTS, b""), "is truncated: it has 0 bytes"),
    "garbage": (write(WEIGHTS, b"\5" + b"\0" * 7 + b"{bad}"), "its header is not valid JSON"),
    "pointer": (write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "found no adapter_model.safetensors"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "found no adapter_config.json"),
    "model": (model_instead, "found no adapter_config.json in .*, but a whole model's config.json"),
    "bad JSON": (write(CONFIG, b'{"r": 4,'), "adapter_config.json cannot be read"),
    "list": (write(CONFIG, b"[]"), "expected a JSON object, found list"),
    "IA3": (say(peft_type="IA3"), "expected peft_type LORA, found 'IA3'"),
    "no type": (say(peft_type=None), "expected peft_type LORA, found None"),
    "later": (say(lora_from_2030={"a": 1}), "found lora_from_2030, which the installed PEFT does not know"),
    "PiSSA": (say(init_lora_weights="pissa"), "belongs to base weights that PEFT changed when it was made"),
    "replicated": (say(layer_replication=[[0, 2], [0, 2]]), "layer_replication=.* is not supported"),
    "text for a number": (say(lora_alpha="much"), "adapter_config.json is not what LoraConfig takes: TypeError"),
    "rank": (say(r=8), rf"expected {Q_PROJ} of shape \(8, 64\), found \(4, 64\) \(8 of 8 tensors"),
    "no rank": (say(r=0), "PEFT cannot .* this adapter|PEFT cannot build"),
    "other names": (say(target_modules=["c_attn"]), "c_attn"),
    "fewer targets": (say(target_modules=["q_proj"]), "found 4 that belong nowhere: .*v_proj"),
    "more targets": (say(target_modules=["q_proj", "v_proj", "o_proj"]), "expected 4 tensors more: .*o_proj"),
    "DoRA": (say(use_dora=True), "expected 4 tensors more: .*lora_magnitude_vector"),
    "4-bit layer": (say(modules_to_save=["up_proj"]), "a layer that goes to 4 bits"),
    "missing": (tensors(lambda held: held.pop(Q_PROJ)), f"expected 1 tensors more: {Q_PROJ}"),
    "unknown": (tensors(lambda held: held.update(x=torch.ones(2))), "found 1 that belong nowhere: x"),
    "shape": (tensors(lambda held: held.update({Q_PROJ: torch.ones(4, 32)})), r"found \(4, 32\) \(1 of 8 tensors"),
    "integers": (tensors(lambda held: held.update({Q_PROJ: held[Q_PROJ].int()})), "expected numbers of floating point"),
    "embedding": (
        tensors(lambda held: held.update({"base_model.model.model.embed_tokens.weight": torch.ones(96, 64)})),
        "Embeddings of the base model are in the file too",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_does_not_fit_is_refused(name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    damage, says = DAMAGES[name]
    damage(folder)
    with pytest.MonkeyPatch.context() as patch:
        seen, read_bytes = count_reads()
        patch.setattr(surgery.checkpoint.Reader, "read_bytes", read_bytes)
        with pytest.raises(SurgeryError, match=says):
            qlora(base, adapter=folder)
    assert seen == []
    result = CliRunner().invoke(app, ["plan", str(base), "--adapter", str(folder)])
    assert result.exit_code == 2, result.output


def test_a_model_stays_as_it_was_where_an_adapter_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    with qlora(base) as plain, qlora(base, adapter=adapter) as adapted:
        modules, state = list(plain.modules()), peft_state(adapted)
        for name, (damage, says) in DAMAGES.items():
            folder = shutil.copytree(adapter, tmp_path / name)
            damage(folder)
            # Which modules a configuration means does not matter where the file has the tensors of what is there.
            for model in (plain,) if name.endswith(("targets", "names")) else (plain, adapted):
                with pytest.raises(SurgeryError, match=f"{says}|expected an adapter with the options of 'default'"):
                    surgery.load_adapter(model, folder)
        infinite = shutil.copytree(adapter, tmp_path / "infinite")
        tensors(lambda held: held[Q_PROJ].view(-1)[-1:].fill_(float("inf")))(infinite)
        for model in (plain, adapted):
            with pytest.raises(CheckpointError, match=f"expected finite numbers in {Q_PROJ}"):
                surgery.load_adapter(model, infinite)
        for wrong in ("", "a.b", "lora"):
            with pytest.raises(ConfigError, match="expected a name for the adapter"):
                surgery.load_adapter(plain, adapter, name=wrong)
        assert list(plain.modules()) == modules
        assert list(adapted.peft_config) == ["default"]
        assert all(torch.equal(tensor, state[key]) for key, tensor in peft_state(adapted).items())
    with pytest.raises(ConfigError, match="found both: the configuration of the adapter decides"):
        qlora(base, adapter=adapter, lora=LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"expected the folder of an adapter, with .* found a file"):
        qlora(base, adapter=adapter / WEIGHTS)
    with pytest.raises(ConfigError, match="or a hub id, found nothing at"):
        qlora(base, adapter=tmp_path / "nowhere")
    assert patches.active() == []


def test_an_adapter_of_another_revision_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A folder of the hub's cache says which commit it is."""
    cached = tmp_path / "models--team--tiny" / "snapshots" / COMMIT
    shutil.copytree(base, cached)
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    say(base_model_name_or_path="team/tiny", revision=OTHER)(folder)
    with pytest.raises(ConfigError, match=f"expected team/tiny at revision {OTHER}, .* found commit {COMMIT}"):
        qlora(cached, adapter=folder)
    with qlora(cached) as model, pytest.raises(ConfigError, match="expected team/tiny at revision"):
        surgery.load_adapter(model, folder)
    result = CliRunner().invoke(app, ["plan", str(cached), "--adapter", str(folder)])
    assert result.exit_code == 2
    say(revision=COMMIT[:8])(folder)
    with qlora(cached, adapter=folder):
        pass
    made = surgery.plan(cached, world_size=1, adapter=folder)
    assert command(made, "m").endswith(f" --adapter {folder}")
    both = CliRunner().invoke(app, ["plan", str(cached), "--adapter", str(folder), "--lora-r", "8"])
    assert (both.exit_code, "expected --adapter without --lora-r" in both.output) == (2, True)


def test_a_branch_is_the_commit_that_the_cache_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--team--tiny"
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    (repository / "snapshots" / COMMIT / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(COMMIT)
    says, file = Base(name="team/tiny", revision="v1"), tmp_path / CONFIG
    says.check_revision(Base(name="team/tiny", revision=COMMIT), file)
    says.check_revision(Base(name="team/other", revision=OTHER), file)
    with pytest.raises(ConfigError, match=rf"at revision v1 \(commit {COMMIT}\).* found commit {OTHER}"):
        says.check_revision(Base(name="team/tiny", revision=OTHER), file)
    with pytest.raises(ConfigError, match=r"nothing here says which commit that is.*revision='v2'"):
        Base(name="team/tiny", revision="v2").check_revision(Base(name="team/tiny", revision=OTHER), file)


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "rsLoRA, patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "norm"]},
    "biases": {"bias": "lora_only", "lora_bias": True},
    "DoRA": {"use_dora": True},
    "token indices": {"trainable_token_indices": [1, 5, 7]},
    "every bias": {"bias": "all"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_kind_of_adapter_is_loaded(name: str, tmp_path: Path) -> None:
    """Begun from, added, and in place: the file's values, and plain PEFT's logits."""
    base = save_tiny(tmp_path / "base", "llama", attention_bias=True)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **CONFIGURATIONS[name]}
    with qlora(base, lora=LoraConfig(**options)) as model:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01) if parameter.requires_grad else None
        surgery.save_adapter(model, tmp_path / "adapter")
    file, ids = load_file(tmp_path / "adapter" / WEIGHTS), torch.arange(3, 90)[None]

    def check(model: Any) -> None:
        state = peft_state(model)
        assert state.keys() == file.keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in file.items())
        assert torch.equal(model(input_ids=ids).logits, expected)

    with torch.no_grad():
        with qlora(base) as model:
            expected = PeftModel.from_pretrained(model, tmp_path / "adapter")(input_ids=ids).logits
        with qlora(base, adapter=tmp_path / "adapter") as model:
            trained = {fqn for fqn, parameter in model.named_parameters() if parameter.requires_grad}
            check(model)
            for parameter in model.parameters():
                parameter.zero_() if parameter.requires_grad else None
            surgery.load_adapter(model, tmp_path / "adapter")
            check(model)
            assert not any(parameter.requires_grad for parameter in model.parameters())
            surgery.load_adapter(model, tmp_path / "adapter", trainable=True)
            assert trained == {fqn for fqn, parameter in model.named_parameters() if parameter.requires_grad}
        with qlora(base) as model:
            check(surgery.load_adapter(model, tmp_path / "adapter"))


def test_a_second_adapter_of_packed_experts_is_added_beside_the_first(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    first, second = tmp_path / "first", tmp_path / "second"
    make(base, first, r=4, target_modules="all-linear")
    assert (
        "| targets | k_proj, o_proj, q_proj, v_proj, experts.down_proj, experts.gate_up_proj |"
        in (first / "README.md").read_text()
    )
    both = ["experts.gate_up_proj", "experts.down_proj"]  # PEFT wants the same parameters in all adapters
    make(base, second, r=2, target_modules=["q_proj"], target_parameters=both)
    with qlora(base, adapter=second) as model:
        wanted = logits(model)
    with qlora(base, adapter=first) as model:
        alone = logits(model)
        surgery.load_adapter(model, second, name="second")
        assert torch.equal(logits(model), wanted)
        model.set_adapter("default")
        assert torch.equal(logits(model), alone)
    with qlora(base) as bare:
        assert torch.equal(logits(surgery.load_adapter(bare, second, trainable=True)), wanted)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(12).view(1, 12)).logits
    return found
