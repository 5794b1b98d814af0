"""A model that is sharded by us is handed to accelerate and Trainer, and needs no context."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

import patches
import surgery
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("sharded") / "model")


def anew() -> None:
    """Have accelerate forget how it was configured."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)


def build(checkpoint: Path, shard: Any, **lora: Any) -> Any:
    torch.manual_seed(0)
    adapters = LoraConfig(task_type="CAUSAL_LM", **lora) if lora else None
    return surgery.qlora(checkpoint, shard=shard, lora=adapters, report=surgery.Report())


def accelerator(version: int | None, **options: Any) -> Accelerator:
    policy = {"auto_wrap_policy": "transformer_based_wrap", "state_dict_type": "FULL_STATE_DICT"}
    ram = {"cpu_ram_efficient_loading": False, "sync_module_states": False} if version == 1 else {}
    plugin = version and FullyShardedDataParallelPlugin(fsdp_version=version, **policy, **ram, **options)
    return Accelerator(cpu=True, fsdp_plugin=plugin or None)


def steps(prepare: Accelerator, model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    ids = torch.randint(4, 90, (2, 8), generator=torch.Generator().manual_seed(dist.get_rank()))
    losses = []
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        prepare.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss := loss.detach())
        losses.append(loss.item())
    return losses


def prepared(checkpoint: Path, version: int | None, shard: Any) -> list[float]:
    """Losses of two steps of a loop of accelerate, after which rank 0 has what it saves."""
    anew()
    prepare = accelerator(version)
    with build(checkpoint, shard, target_modules="all-linear") as built:
        optimizer = torch.optim.SGD([p for p in built.parameters() if p.requires_grad], lr=0.5)
        model, optimizer = prepare.prepare(built, optimizer)
        assert not isinstance(getattr(model, "module", None), nn.parallel.DistributedDataParallel)
        losses = steps(prepare, model, optimizer)
        state = prepare.get_state_dict(model)
    assert len([name for name in state if "lora_" in name]) == (0 if version and dist.get_rank() else 28)
    return losses


def in_any_sharding(checkpoint: Path) -> dict[str, Any]:
    said: dict[str, Any] = {}
    with patches.transaction("accelerate.fsdp-on-cpu"):
        said["DDP"] = prepared(checkpoint, None, surgery.DDP())
        said["FSDP1"] = prepared(checkpoint, 1, surgery.FSDP1())
        said["FSDP2"] = prepared(checkpoint, 2, surgery.FSDP2())
        said["HSDP"] = prepared(checkpoint, 2, surgery.FSDP2(mesh=(1, 2)))
        said["whole"] = prepared(checkpoint, None, None)
        for name, version, shard in (
            ("no fsdp", None, surgery.FSDP2()),
            ("no fsdp, FSDP1", None, surgery.FSDP1()),
            ("fsdp 1", 1, surgery.FSDP2()),
            ("fsdp 2", 2, surgery.FSDP1()),
        ):
            with pytest.raises(surgery.ConfigError) as caught:
                prepared(checkpoint, version, shard)
            said[name] = str(caught.value)
    assert not patches.active()
    return said


def test_accelerate_trains_what_is_sharded_already_or_says_what_to_configure(checkpoint: Path) -> None:
    for said in run_ranks(in_any_sharding, 2, checkpoint):
        for name in ("FSDP1", "FSDP2", "HSDP", "whole"):
            assert said[name] == pytest.approx(said["DDP"], abs=1e-5), name
        assert "fsdp=True and fsdp_config={'version': 2}" in said["no fsdp"]
        assert "fsdp=True and fsdp_config={'version': 1}" in said["no fsdp, FSDP1"]
        assert "fsdp=True and fsdp_config={'version': 2}" in said["fsdp 1"]
        assert "shard=surgery.FSDP2()" in said["fsdp 2"]


#: Options of adapters, all saved with an inactive adapter beside them.
SAVED: dict[str, dict[str, Any]] = {
    "all linear": {"target_modules": "all-linear"},
    "modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
}


def files_of_both(checkpoint: Path, folder: Path) -> None:
    """Save as accelerate and PEFT do, with our state dict and with stock's."""
    gathered: list[int] = []
    redistribute = DTensor.redistribute

    def counting(self: DTensor, *args: Any, **options: Any) -> DTensor:
        gathered.append(self.numel())
        return redistribute(self, *args, **options)

    DTensor.redistribute = counting  # type: ignore[method-assign]
    with patches.transaction("accelerate.fsdp-on-cpu"):
        for name, lora in SAVED.items():
            anew()
            with build(checkpoint, surgery.FSDP2(), **lora) as model:
                # Added when the model is sharded.
                model.add_adapter("second", LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False))
                prepare = accelerator(2)
                prepare.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
                gathered.clear()
                states = {"ours": prepare.get_state_dict(model)}
                adapters = [p.numel() for name, p in model.named_parameters() if "lora_" in name or "to_save" in name]
                assert sum(gathered) <= sum(adapters) + 96 * 64, name  # and the embeddings
                patches.disable("accelerate.adapter-state")
                states["stock"] = prepare.get_state_dict(model)
                for whose, state in states.items() if dist.get_rank() == 0 else ():
                    model.save_pretrained(folder / whose / name, state_dict=state)


def test_what_is_saved_is_what_stock_saves(checkpoint: Path, tmp_path: Path) -> None:
    run_ranks(files_of_both, 2, checkpoint, tmp_path)
    stock = {file.relative_to(tmp_path / "stock"): load_file(file) for file in tmp_path.glob("stock/**/*.safetensors")}
    assert len(stock) == 2 * len(SAVED)
    for name, expected in stock.items():
        found = load_file(tmp_path / "ours" / name)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert tensor.dtype == found[key].dtype
            assert torch.equal(tensor, found[key]), (name, key)


def late_and_on_meta(checkpoint: Path) -> dict[str, Any]:
    said: dict[str, Any] = {}
    with patches.transaction("accelerate.fsdp-on-cpu"):
        for name, mesh in (("FSDP2", None), ("HSDP", (1, 2))):
            anew()
            prepare = accelerator(2)
            with build(checkpoint, surgery.FSDP2(mesh=mesh)) as base:
                torch.manual_seed(dist.get_rank())  # each rank would draw values of its own
                model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
                layer = model.base_model.model.model.layers[0].mlp.down_proj
                said[name, "shapes"] = [
                    tuple(layer.lora_A.default.weight.shape),
                    tuple(layer.lora_B.default.weight.shape),
                ]
                optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
                steps(prepare, *prepare.prepare(model, optimizer))
                said[name, "trained"] = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        anew()
        with torch.device("meta"):
            plain = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
        prepare = Accelerator(cpu=True, fsdp_plugin=plugin)
        with patches.transaction("accelerate.optimizer-of-meta", on=[plain]):
            model, optimizer = prepare.prepare(plain, torch.optim.AdamW(plain.parameters()))
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert all(ours is theirs for ours, theirs in zip(model.parameters(), held, strict=True))
    return said


def test_adapters_that_come_late_and_optimizers_that_come_early(checkpoint: Path) -> None:
    first, second = run_ranks(late_and_on_meta, 2, checkpoint)
    for name in ("FSDP2", "HSDP"):
        assert first[name, "shapes"] == [(4, 112), (64, 4)]
        for ours, theirs in zip(first[name, "trained"], second[name, "trained"], strict=True):
            assert torch.equal(ours, theirs)


def resumed(checkpoint: Path, folder: Path) -> None:
    """Trainer, straight and from its checkpoint, with adapters of which the second rank has no row."""
    from transformers import Trainer, TrainingArguments

    rows = torch.randint(4, 90, (16, 8), generator=torch.Generator().manual_seed(0)).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]
    with patches.transaction("accelerate.fsdp-on-cpu"):
        for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
            ends = []
            for resume in (None, str(folder / kind / "checkpoint-2")):
                anew()
                arguments = TrainingArguments(
                    output_dir=str(folder / kind),
                    fsdp=True,
                    fsdp_config={"version": 2, "state_dict_type": kind},
                    use_cpu=True,
                    max_steps=3,
                    save_steps=2,
                    learning_rate=1e-2,
                    per_device_train_batch_size=2,
                    report_to=[],
                    disable_tqdm=True,
                    dataloader_pin_memory=False,
                )
                with build(checkpoint, surgery.FSDP2(), target_modules="all-linear", r=1) as model:
                    Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=resume)
                    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
                    ends.append({name: p.full_tensor().detach() for name, p in named.items()})
            for name, value in ends[0].items():
                assert torch.equal(value, ends[1][name]), (kind, name)


def test_trainer_resumes_exactly(checkpoint: Path, tmp_path: Path) -> None:
    run_ranks(resumed, 2, checkpoint, tmp_path)
    saved = torch.load(tmp_path / "FULL_STATE_DICT/checkpoint-2/pytorch_model_fsdp.bin")
    assert len(saved) == 28
    assert all(".lora_" in name for name in saved)
