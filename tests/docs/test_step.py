"""The lines of `docs/step.md` for a script with a trainer: what TRL trains by them is what it trains without."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import patches
import surgery
from surgery.step import graphs
from tests.docs.test_docs import blocks
from tests.helpers.tiny_tokenizer import save_with_tokenizer
from tests.surgery.step.test_graphs import Running

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of transformers, to TRL
    # Of Dynamo.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(tmp_path_factory.mktemp("model"), intermediate_size=128, dtype=torch.float32)


def trainer_of(folder: Path, output: Path) -> Any:
    """TRL's, of a model in float32 under 4-bit weights, for five steps of one shape."""
    torch.manual_seed(0)
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**four), dtype=torch.float32
    )
    args = SFTConfig(
        output_dir=str(output), max_steps=5, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        dataloader_pin_memory=False, max_length=64, pad_to_multiple_of=64,
    )  # fmt: skip
    data = Dataset.from_dict({"text": [f"the cat sat on mat {number}" for number in range(10)]})
    lora = LoraConfig(r=4, target_modules="all-linear")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = SFTTrainer(model, args, train_dataset=data, peft_config=lora, processing_class=tokenizer)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # TRL makes bfloat16 of them
    return trainer


def test_the_lines_for_a_script_train_what_stock_trains(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced blocks are run by a backend that leaves them as they are, and graphs by running the model."""
    stock = trainer_of(folder, tmp_path)
    stock.train()
    (block,) = (each for each in blocks("step.md") if "trainer.train()" in each.text)
    with surgery.low_memory(kernels="fused"):
        trainer = trainer_of(folder, tmp_path)
    recorder = Running()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(graphs, "_refused", lambda _model: None)
    monkeypatch.setattr(graphs, "Recorder", lambda: type("", (), {"record": recorder}))
    exec(block.text, {"surgery": surgery, "trainer": trainer})
    assert graphs.tally(trainer.model).endswith("2 calls replayed, 3 run as without")
    assert recorder.recorded == 1
    losses, expected = ([each["loss"] for each in one.state.log_history if "loss" in each] for one in (trainer, stock))
    assert losses == pytest.approx(expected, rel=1e-6)
    surgery.release(trainer.model)
    assert patches.active() == []
