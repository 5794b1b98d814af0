"""An adapter saved from shards is whole, and loads where nothing of this project is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery.config import DDP, FSDP1, FSDP2
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_tokenizer import save_with_tokenizer

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a model is sharded (None: one process) when its adapter is saved."""

    name: str
    shard: DDP | FSDP1 | FSDP2 | None
    checkpointing: bool = False


SHARDED = [
    Way(name="units", shard=FSDP1()),
    Way(name="units-checkpointing", shard=FSDP1(), checkpointing=True),
    Way(name="orig-params", shard=FSDP1(use_orig_params=True)),
    Way(name="no-shard", shard=FSDP1(strategy="no-shard")),
    Way(name="shard-grad-op", shard=FSDP1(strategy="shard-grad-op", use_orig_params=True)),
    Way(name="fsdp2", shard=FSDP2()),
    Way(name="fsdp2-checkpointing", shard=FSDP2(), checkpointing=True),
    Way(name="fsdp2-kept-after-forward", shard=FSDP2(reshard_after_forward=False)),
    Way(name="fsdp2-replicas", shard=FSDP2(mesh=(2, 1))),
    Way(name="fsdp2-cpu-offload", shard=FSDP2(cpu_offload=True)),
    Way(name="ddp", shard=DDP()),
    Way(name="ddp-checkpointing", shard=DDP(), checkpointing=True),
]
WHOLE = [Way(name="whole", shard=None), Way(name="whole-checkpointing", shard=None, checkpointing=True)]

RELOAD = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
norms = {}
for folder in sys.argv[2:]:
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder)
    norms[folder] = {n: p.double().norm().item() for n, p in model.named_parameters() if "lora_" in n}
print("LOADED", json.dumps(norms))
"""

Norms = dict[str, float]


def build(checkpoint: Path, way: Way) -> Any:
    from peft import LoraConfig

    import surgery

    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear")
    model = surgery.qlora(checkpoint, lora=lora, shard=way.shard, dtype=torch.float32, report=surgery.Report())
    if way.checkpointing:
        surgery.checkpoint_activations(model)
    return model


def train(model: Any) -> None:
    """Two steps, and an evaluation: a forward after which no backward frees what was gathered."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model(input_ids=ids)


def norms(state: dict[str, torch.Tensor]) -> Norms:
    return {name: tensor.double().norm().item() for name, tensor in state.items()}


def save_all(checkpoint: Path, root: Path, ways: list[Way]) -> dict[str, Norms]:
    """By way: norms of the whole adapter parameters as they were in memory when they were saved."""
    import patches
    import surgery

    found = {}
    for way in ways:
        with build(checkpoint, way) as model:
            train(model)
            found[way.name] = norms(surgery.adapter_state(model))
            surgery.save_adapter(model, root / way.name)
        assert patches.active() == []
    return found


def reload(base: Path, folders: list[Path]) -> dict[str, Norms]:
    """What a fresh process with plain PEFT loads from each folder, by its name."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RELOAD, str(base), *map(str, folders)],
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
    )
    loaded: dict[str, Norms] = json.loads(done.stdout.partition("LOADED ")[2])
    return {Path(folder).name: found for folder, found in loaded.items()}


@dataclass(frozen=True, kw_only=True)
class Saved:
    folder: Path
    on_rank0: dict[str, Norms]
    on_rank1: dict[str, Norms]
    loaded: dict[str, Norms]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("adapters")
    on_rank0, on_rank1 = run_ranks(save_all, 2, base, folder, SHARDED)
    alone = save_all(base, folder, WHOLE)
    loaded = reload(base, [folder / way.name for way in [*SHARDED, *WHOLE]])
    return Saved(folder=folder, on_rank0={**on_rank0, **alone}, on_rank1=on_rank1, loaded=loaded)


@pytest.mark.parametrize("way", [*SHARDED, *WHOLE], ids=lambda way: way.name)
def test_saved_adapter_has_every_key_and_loads_with_plain_peft(way: Way, saved: Saved) -> None:
    expected, loaded = saved.on_rank0[way.name], saved.loaded[way.name]
    assert len(expected) == 28
    assert saved.on_rank1.get(way.name, {}) == {}
    assert loaded == pytest.approx(expected)
    assert all(value > 0 for value in loaded.values())
    assert sorted(file.name for file in (saved.folder / way.name).iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("way", [*SHARDED, *WHOLE], ids=lambda way: way.name)
def test_saved_config_names_the_base_and_the_task(way: Way, saved: Saved, base: Path) -> None:
    config = json.loads((saved.folder / way.name / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(base), None)
    assert (config["task_type"], config["auto_mapping"], config["inference_mode"]) == ("CAUSAL_LM", None, True)


def test_nothing_else_is_left(saved: Saved) -> None:
    assert {path.name for path in saved.folder.iterdir()} == {way.name for way in [*SHARDED, *WHOLE]}


def reserve_and_save(checkpoint: Path, folder: Path) -> tuple[str, list[str], str]:
    """What a rank is told of a place that cannot be; what is in one that can, while it is kept and after saving."""
    import surgery

    with pytest.raises(surgery.SurgeryError) as caught, surgery.reserve(folder / "file" / "adapter"):
        pass
    with surgery.reserve(folder / "adapter"), build(checkpoint, Way(name="fsdp2", shard=FSDP2())) as model:
        kept = sorted(path.name for path in (folder / "adapter").iterdir())
        surgery.save_adapter(model, folder / "adapter", training={"Data": {"poems": 7}})
    with pytest.raises(surgery.SurgeryError) as refused, surgery.reserve(folder / "adapter", overwrite=False):
        pass
    return f"{caught.type.__name__}: {caught.value}", kept, f"{refused.type.__name__}: {refused.value}"


def test_reserved_place_is_rank_0s_and_every_rank_is_told(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (lost, kept, refused), (lost_too, _, refused_too) = run_ranks(reserve_and_save, 2, base, tmp_path)
    assert lost.startswith("ConfigError: the output folder")
    assert "Not a directory" in lost
    assert lost_too.startswith(f"PeerError: rank 0 failed: {lost}")
    assert kept == [".surgery-lock", ".surgery-staged"]
    assert refused.startswith(f"ConfigError: {tmp_path / 'adapter'} already has an adapter")
    assert refused_too == f"PeerError: rank 0 failed: {refused}"
    assert "| poems | 7 |" in (tmp_path / "adapter" / "README.md").read_text()
    assert not list((tmp_path / "adapter").glob(".surgery*"))


def save_and_restore(checkpoint: Path, way: Way) -> tuple[Any, dict[str, torch.Tensor], Norms]:
    """torch's own full state dict, the adapter, and its norms after it was lost and set from that state dict."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    import surgery

    with build(checkpoint, way) as model:
        train(model)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        adapter = surgery.adapter_state(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.zero_()
        set_model_state_dict(
            model,
            {name: tensor for name, tensor in state.items() if "lora_" in name},
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False),
        )
        return state, adapter, norms(surgery.adapter_state(model))


@pytest.mark.parametrize("way", [way for way in SHARDED if way.name in ("fsdp2", "fsdp2-checkpointing")])
def test_state_dict_of_torch_has_the_adapter_and_packed_weights(base: Path, way: Way) -> None:
    (state, adapter, restored), (elsewhere, _, _) = run_ranks(save_and_restore, 2, base, way)
    assert elsewhere == {}
    assert len(adapter) == 28
    for name, tensor in adapter.items():
        assert torch.equal(state[name], tensor), name
    assert restored == norms(adapter)
    with build(base, WHOLE[0]) as model:
        frozen = {name: parameter.data for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert len(frozen) == 14 + 5 + 2  # packed weights, norms, embeddings and head
    for name, data in frozen.items():
        assert torch.equal(state[name].view(torch.uint8), data.view(torch.uint8)), name
