"""A reference model of DPO that was bound while it was loaded is filled as the model that is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.distributed.tensor import DTensor

import patches
import surgery
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_tokenizer import VOCABULARY, tiny_tokenizer


def losses(checkpoint: Path, folder: Path) -> list[float]:
    """Losses of DPO with a reference model beside the base that it equals, both in 4 bits, sharded by FSDP2."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from trl import DPOConfig, DPOTrainer

    def load() -> Any:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16, bnb_4bit_compute_dtype=torch.bfloat16
        )
        return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, dtype=torch.bfloat16)

    with patches.transaction("accelerate.fsdp-on-cpu") as on_cpu:
        on_cpu.commit()
    with surgery.low_memory():
        model, reference = load(), load()
    trainer = DPOTrainer(
        model,
        reference,
        DPOConfig(
            output_dir=str(folder),
            fsdp=True,
            fsdp_config={"version": 2},
            use_cpu=True,
            bf16=False,
            max_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            per_device_train_batch_size=2,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["the cat"] * 8, "chosen": [" sat"] * 8, "rejected": [" ate"] * 8}),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    assert trainer.ref_model is reference
    assert all(isinstance(parameter, DTensor) and not parameter.is_meta for parameter in reference.parameters())
    surgery.attest(reference)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_reference_model_is_filled(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "model", vocab_size=VOCABULARY)
    for first, second in run_ranks(losses, 2, checkpoint, tmp_path / "run"):
        assert second < first == pytest.approx(0.6931472)
