"""Whole jobs on two ranks: like stock TRL, resumed as if never interrupted, attested, traced; and jobs that differ."""

from __future__ import annotations

import json
import os
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import patches
from surgery.errors import ConfigError, SurgeryError
from surgery.finetune.callbacks import Progress
from surgery.finetune.job import run
from surgery.finetune.parser import parse
from surgery.finetune.summary import Summary
from surgery.tracing.folder import read_ranks
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed

STEPS = 4


def words(checkpoint: Path, data: Path, output: Path, *more: object) -> list[str]:
    options = ["--max-steps", STEPS, "--save-steps", 2, "--gradient-accumulation-steps", 2, "--learning-rate", 1e-2]
    options += ["--lora-r", 4, "--max-length", 64, "--warmup-steps", 0]
    return list(map(str, [checkpoint, "--data", data, "--output", output, *options, *more]))


def finetune(*arguments: Any, preferences: bool = False) -> tuple[Summary, str]:
    out = StringIO()
    summary = run(parse(words(*arguments), preferences=preferences), console=Console(file=out))
    assert patches.active() == []
    return summary, out.getvalue()


def interrupt(*arguments: Any) -> None:
    """Both ranks are interrupted once the third step is logged, and a checkpoint is there."""
    stock = Progress.on_log

    def on_log(self: Progress, args: Any, state: Any, control: Any, **more: Any) -> None:
        stock(self, args, state, control, **more)
        if state.global_step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "on_log", on_log)
        with pytest.raises(KeyboardInterrupt):
            run(parse(words(*arguments)), console=Console(file=StringIO()))
    assert patches.active() == []


def stock(checkpoint: Path, data: Path, output: Path) -> list[float]:
    """Losses of TRL and accelerate by hand, and the adapter that they save."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(output), max_steps=STEPS, gradient_accumulation_steps=2, per_device_train_batch_size=1,
        learning_rate=1e-2, max_length=64, lr_scheduler_type="cosine", logging_steps=1, report_to="none", use_cpu=True,
        save_strategy="no", dataloader_pin_memory=False, disable_tqdm=True, fsdp=True,
        fsdp_config={"version": 2, "activation_checkpointing": True}, activation_checkpointing=False,
    )  # fmt: skip
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16,
    )  # fmt: skip
    # Without the second, stock saves an adapter that has no keys.
    with patches.transaction("accelerate.fsdp-on-cpu", "peft.adapter-keys-under-wrappers", reason="no GPU"):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=quantization, dtype=torch.bfloat16)
        lora = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        rows = load_dataset("json", data_files=str(data), split="train")
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
        trainer.train()
        trainer.save_model()
    return [each["loss"] for each in trainer.state.log_history if "loss" in each]


def everything(checkpoint: Path, data: Path, folder: Path) -> dict[str, Any]:
    """What this rank has seen of jobs, one after another."""
    evaluation = ("--eval-data", data, "--attest", "--trace", folder / "trace")
    straight, said = finetune(checkpoint, data, folder / "straight", *evaluation)
    cached = ("--packed-cache", folder / "cache")
    interrupt(checkpoint, data, folder / "resumed", *cached)
    waiting = ("--activation-offloading", *cached)
    resumed, _ = finetune(checkpoint, data, folder / "resumed", "--resume-from-checkpoint", *waiting)
    pairs = folder / "pairs.jsonl"
    preferred, _ = finetune(checkpoint, pairs, folder / "dpo", "--max-steps", 2, *waiting, preferences=True)
    # Nothing is learnt, so that what is saved is what was loaded.
    still = ("--lora-r", 16, "--learning-rate", 0, "--max-steps", 1, "--adapter")
    finetune(checkpoint, data, folder / "whole", "--max-steps", 1, "--lora-modules-to-save", "lm_head")
    finetune(checkpoint, data, folder / "whole-again", *still, folder / "whole")
    begun, _ = finetune(checkpoint, pairs, folder / "dpo-again", *still, folder / "straight", preferences=True)
    return {
        "straight": straight,
        "said": said,
        "resumed": resumed,
        "preferred": preferred,
        "begun": begun,
        "stock": stock(checkpoint, data, folder / "stock"),
    }


def test_jobs(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    pair = {"prompt": "what does the cat say?", "chosen": " the cat sat", "rejected": " the dog ate the cake"}
    (tmp_path / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 20)
    found, elsewhere = run_ranks(everything, 2, checkpoint, data, tmp_path)
    straight = found["straight"]
    losses = list(straight.losses.values())
    assert losses == pytest.approx(found["stock"], abs=1e-6)
    assert losses[-1] < losses[0]
    assert straight.losses == elsewhere["straight"].losses
    assert [each.step for each in straight.evaluations] == [0, STEPS]
    assert straight.evaluations[-1].loss < straight.evaluations[0].loss
    assert (straight.sharding, straight.samples) == ("FSDP2", {"train": 20, "evaluation": 20})

    adapter = load_file(tmp_path / "straight" / "adapter_model.safetensors")
    torch.testing.assert_close(adapter, load_file(tmp_path / "stock" / "adapter_model.safetensors"), rtol=0, atol=1e-6)

    resumed = found["resumed"]
    assert resumed.resumed_after == 2
    assert resumed.losses == pytest.approx(straight.losses, abs=1e-6)
    torch.testing.assert_close(
        load_file(tmp_path / "resumed" / "adapter_model.safetensors"), adapter, rtol=0, atol=1e-6
    )

    assert found["preferred"].losses[1] == pytest.approx(0.6931, abs=0.003)
    assert len(load_file(tmp_path / "dpo" / "adapter_model.safetensors")) == len(adapter)

    whole = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.weight" in whole
    for folder, expected in (("whole-again", whole), ("dpo-again", adapter)):
        again = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert again.keys() == expected.keys()
        assert all(torch.equal(again[key], tensor) for key, tensor in expected.items()), folder
    assert found["begun"].losses[1] == pytest.approx(0.6931, abs=0.003)  # the reference is what was loaded

    assert straight.attestation is not None
    assert [(check.when, check.where, check.layers) for check in straight.attestation.checks] == [
        ("start", "at rest", 14), ("step 1", "in forward", 8), ("end", "at rest", 14),
    ]  # fmt: skip
    traces = read_ranks(tmp_path / "trace")
    assert {"bind", "prepare", "train", "save"} <= {phase.name for phase in traces[1].phases}

    written = json.loads((tmp_path / "straight" / "summary.json").read_text())
    assert (written["world_size"], len(written["memory"]), written["patches_left"]) == (2, 2, [])
    assert {"transformers.bind-at-load", "accelerate.fill-sharded"} <= {row["id"] for row in written["patches"]}
    for text in (
        "Samples: 20 to train on, 20 to evaluate on, 4 a step; ranks: 2, on cpu",
        "Attestation: 14 layers are what was quantized",
        f"step {STEPS}/{STEPS}",
        "Patches still active: none",
        f"Try it: surgery generate {checkpoint} --adapter {tmp_path / 'straight'} --prompt",
    ):
        assert text in found["said"]
    assert elsewhere["said"] == ""
    card = (tmp_path / "straight" / "README.md").read_text()
    assert "sources | train.jsonl" in card
    assert f"{straight.evaluations[-1].loss:.4f} after step {STEPS}" in card

    AutoTokenizer.from_pretrained(tmp_path / "straight")
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "straight").state_dict()
    for name, tensor in adapter.items():
        torch.testing.assert_close(loaded[name.replace(".weight", ".default.weight")], tensor.float(), rtol=0, atol=0)


def differing(checkpoint: Path, folder: Path) -> list[str]:
    """What this rank is told where it has other options, then other data."""
    rank = dist.get_rank()
    os.chdir(folder / f"rank{rank}")
    data = Path("train.jsonl")
    said = []
    for more in (("--learning-rate", 1 + rank), ()):
        with pytest.raises(ConfigError) as caught:
            finetune(checkpoint, data, folder / "out", *more)
        said.append(str(caught.value))
    if rank == 1:
        data.unlink()
    try:
        finetune(checkpoint, data, folder / "out")
    except SurgeryError as error:
        said.append(f"{type(error).__name__}: {error}")
    return said


def test_ranks_that_differ_refuse(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    for rank, pet in enumerate(("cat", "dog")):
        (tmp_path / f"rank{rank}").mkdir()
        (tmp_path / f"rank{rank}" / "train.jsonl").write_text(data.read_text().replace("cat 7", f"{pet} 7"))
    found = run_ranks(differing, 2, checkpoint, tmp_path)
    for by_options, by_data, _ in found:
        assert "the ranks differ in options" in by_options
        assert "learning_rate is 1.0 on rank 0, 2.0 on rank 1" in by_options
        assert "the ranks differ in data" in by_data
    missing = "train.jsonl: cannot be read: No such file or directory"
    assert [said[2] for said in found] == [f"PeerError: rank 1 failed: DataError: {missing}", f"DataError: {missing}"]
    assert not (tmp_path / "out").exists()
