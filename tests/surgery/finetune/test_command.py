"""The command line of `surgery finetune`: flags, YAML, help, and what is refused before a weight is read."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import patches
from surgery.cli import app
from surgery.errors import ConfigError
from surgery.finetune.parser import parse
from tests.helpers.tiny_tokenizer import save_with_tokenizer


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def refused(*arguments: object) -> str:
    """What stderr says, on one line, of arguments that must be refused."""
    result = command("finetune", *arguments)
    assert result.exit_code == 2, result.output
    return re.sub(r"\s+", " ", result.stderr)


def test_yaml_equals_flags(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "model_name_or_path: org/name\nlearning-rate: 1e-3\nmax_length: null\nlora_target_modules: [q_proj, v_proj]\n"
        "gradient_checkpointing: false\ndata:\n- a.jsonl\n- {path: org/data, split: train_sft}\n"
        "fsdp_config: {reshard_after_forward: false}\nmax_steps: 7\n"
    )
    flags = [
        "org/name", "--learning-rate", "1e-3", "--max_length", "none", "--lora_target_modules", "q_proj", "v_proj",
        "--gradient-checkpointing=false", "--data", "a.jsonl", '{"path": "org/data", "split": "train_sft"}',
        "--fsdp-config", '{"reshard_after_forward": false}',
    ]  # fmt: skip
    by_flags = parse([*flags, "--max-steps", "7"])
    assert parse(["--config", str(config)]).values == by_flags.values
    assert by_flags.values["learning_rate"] == 1e-3
    assert by_flags.model.lora_target_modules == ["q_proj", "v_proj"]
    assert parse([f"--config={config}", "--max-steps", "8"]).values == {**by_flags.values, "max_steps": 8}


@pytest.mark.parametrize("name", ["finetune", "dpo"])
def test_help_fits_80_columns_and_shows_whole_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = command(name, "--help")
    assert result.exit_code == 0, result.output
    shown = result.stdout.splitlines()
    assert [line for line in shown if len(line) > 80] == []
    assert shown.index("Options:") < next(n for n, line in enumerate(shown) if "Options of trl." in line)
    names = {line.split()[0] for line in shown if line.startswith("  --")}
    assert {
        "--data",
        "--output",
        "--attest",
        "--lora-r",
        "--per-device-train-batch-size",
        "--bnb-4bit-quant-type",
    } <= names
    assert {
        "--packing" if name == "finetune" else "--beta",
        "--resume-from-checkpoint",
        "--neftune-noise-alpha",
    } <= names
    assert f"torchrun --nproc-per-node 2 -m surgery {name}" in result.stdout


BAD_OPTIONS: dict[str, tuple[list[object], str]] = {
    "unknown": (["--learning-rat", 1], "there is no option --learning-rat; is it --learning-rate"),
    "no number": (["--max-steps", "many"], "argument --max_steps/--max-steps: invalid int value: 'many'"),
    "end of a name": (["--batch-size", 4], "is it --per-device-train-batch-size or"),
    "no step": (["--max-steps", 0], "expected a step to train, found --max-steps 0"),
    "position": (["--max-steps", 1, "model"], "'model' belongs to no option: MODEL comes first"),
    "TRL's": (["--lr-scheduler-type", "bumpy"], "bumpy"),
    "eval twice": (["--eval-fraction", 0.1, "--eval-data", "x"], "found both; give one"),
    "fraction": (["--eval-fraction", 2], "expected --eval-fraction between 0 and 1"),
    "few": (["--eval-fraction", 0.01], "of 20 samples leaves none to evaluate on"),
    "mesh": (["--mesh", "2by2"], "expected --mesh as REPLICATExSHARD"),
    "mesh of one": (["--mesh", "2x2"], "expected --mesh of 1 ranks in all, found 2x2"),
    "mesh of FSDP1": (["--fsdp", "1", "--mesh", "1x1"], "expected --fsdp 2 with --mesh"),
    "resume": (["--resume-from-checkpoint"], "expected a checkpoint in"),
    "patience": (["--early-stopping-patience", 1], "add --load-best-model-at-end"),
    "compiled twice": (["--compile", "--torch-compile"], "leave one out"),
    "compiled, attested": (["--compile", "--attest"], "leave out --compile"),
    "deepspeed": (["--deepspeed", "x.json"], "--deepspeed shards in another way"),
    "both bits": (["--load-in-4bit", "true", "--load-in-8bit"], "can't use 8 bit and 4 bit"),
    "adapter and rank": (["--adapter", "x", "--lora-r", 8], "expected --adapter without --lora-r"),
    "adapter": (["--adapter", "{data}"], "expected the folder of an adapter, with"),
    "no adapter": (["--use-peft", "false"], "4-bit weights cannot be trained without adapters"),
    "target": (["--lora-target-modules", "nowhere"], "'nowhere' matches no module"),
    "eval": (["--eval-strategy", "steps", "--load-best-model-at-end"], "SFTTrainer refuses"),
    "trace": (["--trace", "{data}"], "the trace cannot be written to"),
    "config": (["--config", "none.yaml"], "none.yaml cannot be read: No such file"),
    "stream": (["--streaming"], "max_steps"),
    "kernels": (["--kernels", "fused,ligr"], "expected names among fused, liger, found 'ligr'"),
    "liger": (["--use-liger-kernel"], "kernels: "),
    "attention": (["--attn-implementation", "slow"], "cannot be loaded with --attn-implementation slow"),
    "graphs": (["--cuda-graphs"], "--cuda-graphs needs a GPU"),
}


def test_options_that_are_refused(checkpoint: Path, data: Path, reads: list[str], tmp_path: Path) -> None:
    for name, (more, says) in BAD_OPTIONS.items():
        given = [str(word).format(data=data) for word in more]
        said = refused(checkpoint, "--data", data, "--output", tmp_path / "out", *given)
        assert says in said, f"{name}: {said}"
        assert "Traceback" not in said
    assert reads == [], "refused only after weights were read"
    gc.collect()  # models that were bound already
    assert patches.active() == []
    assert not (tmp_path / "out").exists()


BAD_DATA: dict[str, tuple[str, str]] = {
    "empty.jsonl": ("", "expected samples, found an empty file"),
    "json.jsonl": ('{"text": "a"}\n{"text": \n', "cannot be read"),
    "columns.jsonl": ('{"txt": "a"}\n', 'expected the columns {"messages"} or {"prompt", "completion"} or {"text"}'),
    "kinds.jsonl": ('{"text": "a"}\n{"messages": [{"role": "user", "content": "a"}]}\n', "of one kind of sample"),
    "null.jsonl": ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "'completion' in every row, found 1 of 2"),
    "tokens.jsonl": ('{"input_ids": [1, 2]}\n{"input_ids": [1, 90210]}\n', "the vocabulary of the model, found 90210"),
    "data.xml": ("<a/>", "expected one of .jsonl, .json"),
}


def test_data_that_is_refused(checkpoint: Path, data: Path, reads: list[str], tmp_path: Path) -> None:
    for name, (content, says) in BAD_DATA.items():
        (tmp_path / name).write_text(content)
        said = refused(checkpoint, "--data", tmp_path / name, "--output", tmp_path / "out")
        assert says in said, f"{name}: {said}"
        assert name in said
    assert "none.jsonl: cannot be read: No such file" in refused(checkpoint, "--data", tmp_path / "none.jsonl")
    two = [data, tmp_path / "columns.jsonl"]
    assert "with the same columns" in refused(checkpoint, "--data", *two, "--output", tmp_path / "out")
    assert reads == []


def test_outputs_that_are_refused(checkpoint: Path, data: Path, reads: list[str], tmp_path: Path) -> None:
    old, half = tmp_path / "old", tmp_path / "half"
    old.mkdir()
    (old / "adapter_config.json").touch()
    (half / "checkpoint-2").mkdir(parents=True)
    for output, says in (
        (old, "already has an adapter"),
        (half, "has checkpoints of an earlier run (checkpoint-2): add --resume-from-checkpoint"),
        (data / "out", "cannot be written: Not a directory"),
        (checkpoint, "expected a folder for an adapter, found that of a model"),
    ):
        assert says in refused(checkpoint, "--data", data, "--output", output)
    assert f"no checkpoint at {tmp_path / 'none'}" in refused(
        tmp_path / "none", "--data", data, "--output", tmp_path / "o"
    )
    assert reads == []


def test_one_process_learns_what_the_assistant_says(checkpoint: Path, tmp_path: Path) -> None:
    """From CSV-like mixtures too: two files, of which one is taken in part."""
    turns = [{"role": "user", "content": "the dog?"}, {"role": "assistant", "content": "ate the cake"}]
    file = tmp_path / "chat.jsonl"
    file.write_text((json.dumps({"messages": turns, "source": "made"}) + "\n") * 8)
    half = json.dumps({"path": "json", "data_files": str(file)})
    result = command(
        "finetune", checkpoint, "--data", file, half, "--output", tmp_path / "out", "--max-steps", 2, "--eval-fraction",
        0.25, "--gradient-accumulation-steps", 1, "--learning-rate", 1e-2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "12 to train on, 4 to evaluate on" in result.stdout
    assert "Not read: source" in result.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["sharding"], summary["patches_left"]) == (None, [])
    assert summary["evaluations"][-1]["loss"] < summary["evaluations"][0]["loss"]


def test_llama_4_learns_beside_experts_in_16_bits(data: Path, tmp_path: Path) -> None:
    """TRL's loss looks for a decoder and a number of experts under names that Llama 4 does not have."""
    sizes = {"num_local_experts": 4, "head_dim": 16, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1}
    folder = save_with_tokenizer(tmp_path / "llama4", "llama4_text", bos=True, max_position_embeddings=128, **sizes)
    words = [folder, "--data", data, "--output", tmp_path / "out", "--max-steps", 2, "--learning-rate", 1e-2]
    words += ["--experts", "16bit", "--lora-target-modules", "q_proj", "v_proj", "--gradient-accumulation-steps", 1]
    assert "add --router-aux-loss-coef 0" in refused(*words)
    result = command("finetune", *words, "--router-aux-loss-coef", 0)
    assert result.exit_code == 0, result.output
    first, second = json.loads((tmp_path / "out" / "summary.json").read_text())["losses"].values()
    assert 0 < second < first


def test_one_process_goes_on_as_if_never_interrupted(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """In the dtype of adapters too, which PEFT would raise to float32."""
    out = tmp_path / "out"
    words = (checkpoint, "--data", data, "--output", out, "--max-steps", 2, "--learning-rate", 1e-2, "--save-steps", 1)
    straight = command("finetune", *words)
    assert straight.exit_code == 0, straight.output
    adapter = load_file(out / "adapter_model.safetensors")
    resumed = command("finetune", *words, "--resume-from-checkpoint", out / "checkpoint-1", "--overwrite")
    assert resumed.exit_code == 0, resumed.output
    assert "resumed after step 1" in resumed.stdout
    torch.testing.assert_close(load_file(out / "adapter_model.safetensors"), adapter, rtol=0, atol=0)


def test_sigterm_ends_a_job_that_has_its_output_to_itself(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    words = [str(checkpoint), "--data", str(data), "--output", str(tmp_path / "out"), "--max-steps", "100000"]
    with subprocess.Popen(
        [sys.executable, "-m", "surgery", "finetune", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        assert any(line.startswith("step 1/") for line in job.stdout)
        assert f"is in use by process {job.pid}" in refused(*words)
        job.terminate()
        _, said = job.communicate(timeout=60)
    assert job.returncode == 143
    assert said.endswith("terminated; every patch is undone\n")
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_a_job_without_a_model_or_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected MODEL first"):
        parse(["--data", "x"])
    with pytest.raises(ConfigError, match="expected --data"):
        parse(["model"])
