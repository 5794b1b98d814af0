"""The command `surgery generate`: what transformers and PEFT would say, and what is refused before anything is read."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from typer.testing import CliRunner

import patches
import surgery
from surgery.cli import app
from surgery.writing.quantize import quantize
from tests.helpers.models import save_tiny
from tests.helpers.tiny_tokenizer import VOCABULARY, save_with_tokenizer

PROMPTS = ("the cat", "what does the dog say")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of whole blocks, which every CPU dequantizes rightly."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
    return save_with_tokenizer(tmp_path_factory.mktemp("base"), initializer_range=0.2, **shape)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that changes what is said."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    with surgery.qlora(base, lora=lora, report=surgery.Report()) as model:
        surgery.save_adapter(model, folder)
    return folder


def run(*arguments: object, stdin: str = "") -> Any:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], input=stdin)


def answers(*arguments: object, stdin: str = "") -> list[str]:
    result = run("--json", "--max_new_tokens", 12, *arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return [json.loads(line)["answer"] for line in result.stdout.splitlines()]


def stock(base: Path, adapter: Path, *, raw: bool = False, **options: Any) -> list[str]:
    """The likeliest answers, by transformers and PEFT alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    model = PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    said = []
    for prompt in PROMPTS:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        inputs = tokenizer(prompt if raw else chat, return_tensors="pt", return_token_type_ids=False)
        found = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        said.append(tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return said


def given() -> list[str]:
    return [word for prompt in PROMPTS for word in ("--prompt", prompt)]


def test_answers_are_those_of_transformers_and_peft(base: Path, adapter: Path) -> None:
    wanted = stock(base, adapter)
    assert answers(base, "--adapter", adapter, "--no-quantize", "--dtype", "float32", *given()) == wanted
    assert answers(base, "--no-quantize", "--dtype", "float32", *given()) != wanted, "the adapter changes them"
    assert not patches.active()


def test_text_is_gone_on_with_and_streamed(base: Path, adapter: Path) -> None:
    wanted = stock(base, adapter, raw=True)
    options = ("--raw", "--adapter", adapter, "--no_quantize", "--dtype", "float32", "--max-new-tokens", 12)
    streamed = run(*options, *given())
    assert streamed.stdout == f"{wanted[0]}\n\n{wanted[1]}\n"
    assert run(*options, stdin=PROMPTS[1]).stdout == f"{wanted[1]}\n"


def test_four_bits_are_those_of_stock(base: Path, adapter: Path, tmp_path: Path) -> None:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    with patches.transaction("bitsandbytes.keep-packing", reason="stock repacks, and is then another model"):
        wanted = stock(base, adapter, quantization_config=quantization)
    assert answers("--adapter", adapter, "--dtype", "float32", *given()) == wanted
    packed = quantize(base, tmp_path / "packed", dtype=torch.float32, report=surgery.Report())
    file = shutil.copytree(adapter, tmp_path / "adapter") / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(packed)}))
    assert answers("--adapter", file.parent, "--dtype", "float32", *given()) == wanted


def test_what_is_drawn_depends_on_the_seed_alone(base: Path) -> None:
    drawn = [answers(base, "--raw", "--top_k", 50, "--seed", seed, *given()) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "other", vocab_size=VOCABULARY, hidden_size=32)


def test_what_is_refused_before_anything_is_read(
    base: Path, adapter: Path, other: Path, tmp_path: Path, reads: list[str]
) -> None:
    moved = shutil.copytree(adapter, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/there/it/was"}))
    for arguments, expected in (
        ([other, "--adapter", adapter], f"expected the base model of {adapter}, which is {base}, found {other}"),
        (["team/model", "--adapter", adapter], f"which is {base}, found team/model: leave out MODEL"),
        ([other, "--adapter", moved], "give the model that it was trained on"),
        (["--adapter", moved], "/there/it/was"),
        (["--adapter", base], "found no adapter_config.json"),
        ([], "expected MODEL, or an adapter that names its base model"),
        ([base, "--temperature", 0], "expected temperature above 0, found 0"),
        ([base, "--no-do-sample", "--top-k", 3], "expected --do-sample with top_k"),
        ([save_tiny(tmp_path / "bare")], "no tokenizer that transformers can load"),
    ):
        result = run(*arguments, "--prompt", "a")
        assert result.exit_code == 2, result.output
        assert expected in re.sub(r"\s+", " ", result.stderr)
    assert reads == []
    assert run(base, "--adapter", moved, "--prompt", "a", "--max-new-tokens", 1).exit_code == 0, "a folder that moved"


def test_conversation_at_a_terminal(base: Path, adapter: Path) -> None:
    """Turns are remembered until /reset, and nobody but this command says anything on stderr."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "surgery", "generate", "--adapter", str(adapter), "--max-new-tokens", "12"]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        os.close(theirs)
        os.write(ours, b"the cat\nthe cat\n/reset\nthe cat\n\x04")
        out, err = process.communicate(timeout=120)
    os.close(ours)
    assert process.returncode == 0, err
    first, second, again, end = re.split(r"^> |\n> (?:> )?", out.replace("\r", ""))[1:]
    assert first == again != second
    assert end == ""
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "Loaded 2 layers",
        "Type a message; /reset forgets the conversation, Ctrl-D ends it.",
        "",
    ]
