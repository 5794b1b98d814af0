"""The command `surgery plan`: tables, JSON, verdicts and exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from surgery.cli import app
from surgery.finetune import job
from surgery.finetune.parser import parse
from tests.helpers.damage import edit_tensors
from tests.helpers.models import save_tiny


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("planned") / "model")


def test_what_fits_exits_0(folder_70b: Path) -> None:
    result = run(folder_70b, "--world", 2, "--gpu-memory", "24GiB")
    assert result.exit_code == 0, result.output
    assert "It fits 24.0 GiB" in result.stdout
    for row in ("ranks 0-1", "read from the checkpoint", "quant_state", "optimizer", "activations (estimate)"):
        assert row in result.stdout


def test_what_does_not_fit_exits_1_and_says_what_would(folder_70b: Path) -> None:
    result = run(folder_70b, "--world", 2, "--gpu_memory", "24GiB", "--no_gradient_checkpointing", "--lora-r", 8)
    assert result.exit_code == 1, result.output
    assert "It does not fit 24.0 GiB" in result.stdout
    assert re.search(r"It would fit with --gradient-checkpointing: \d+\.\d GiB", result.stdout)
    assert f"torchrun --nproc-per-node 2 -m surgery finetune {folder_70b} --data DATA --lora-r 8\n" in result.stdout


def test_of_several_ranks_one_speaks(folder_70b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    result = run(folder_70b, "--world", 2, "--gpu-memory", "20GiB")
    assert (result.exit_code, result.output) == (1, "")


def test_without_a_size_there_is_no_verdict(folder_70b: Path) -> None:
    result = run(folder_70b, "--world", 8, "--fsdp", 1)
    assert result.exit_code == 0, result.output
    assert "FSDP1, placement rank0-cpu" in result.stdout
    assert "rank 0" in result.stdout
    assert "ranks 1-7" in result.stdout
    assert "fit" not in result.stdout


def test_kernels_and_offloaded_inputs_are_planned_and_said(folder_70b: Path) -> None:
    options = ("--world", 2, "--max-length", 4096, "--activation-offloading", "--kernels", "liger, fused")
    result = run(folder_70b, "--gpu-memory", "20GiB", *options)
    assert result.exit_code == 1, result.output
    for said in ("activations recomputed, kernels liger, fused", "inputs of blocks, on the CPU", "4.94 GiB"):
        assert said in result.stdout
    assert "--max-length 4096 --activation-offloading --kernels liger,fused\n" in result.stdout
    plain, changed = (
        json.loads(run(folder_70b, *each, "--json").stdout)["ranks"][0]["train"] for each in (options[:4], options)
    )
    assert changed["device_peak"] < plain["device_peak"] - changed["offloaded"] * 78 / 80
    for wrong in (("--kernels", "ligre"), ("--activation-offloading", "--no-gradient-checkpointing")):
        assert run(folder_70b, *wrong).exit_code == 2


def test_json_has_bytes_and_the_verdict(folder_70b: Path) -> None:
    result = run(folder_70b, "--world", 3, "--gpu-memory", "24GiB", "--no-gradient-checkpointing", "--json")
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    assert sum(ranks["count"] for ranks in found["ranks"]) == 3
    assert found["fits"] is False
    assert found["would_fit_with"][0]["options"] == ["--gradient-checkpointing"]
    assert found["ranks"][0]["load"]["device_peak"] > 10**9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpu-memory", "24"), "expected a size such as 24GiB"),
        (("--world", 0), "world_size to be 1 or more"),
        (("--world", 4, "--mesh", "3x2"), "needs 6 ranks"),
        (("--world", 4, "--fsdp", 1, "--placement", "sharded"), "placement sharded"),
        (("--fsdp-config", '{"cpu_offload": true}'), "--world of 2 or more"),
        (("--world", 2, "--fsdp-config", "offload"), "--fsdp-config: expected a JSON object"),
        (("--world", 2, "--fsdp", "none", "--mesh", "1x2"), "expected --fsdp 1 or 2 with --mesh"),
        (("--world", 2, "--lora-target-modules", "nothing"), "matches no module"),
        (("--world", 2, "--lora-target-modules", "q_proj,nothing,up_proj"), "'nothing' matches no module"),
        (("--max-length", 0), "seq to be 1 or more"),
        (("--cuda-graphs", "--device", "cpu"), "--cuda-graphs needs a GPU"),
        (("--cuda-graphs", "--world", 2, "--fsdp", 1), "found --fsdp 1"),
        (("--model-revision", "main"), "Revisions are for hub ids"),
    ],
)
def test_bad_input_exits_2(options: tuple[object, ...], message: str, folder_70b: Path) -> None:
    result = run(folder_70b, *options)
    assert result.exit_code == 2, result.output
    assert message in re.sub(r"\s+", " ", result.stderr)


def test_tensors_that_are_turned_or_ignored_are_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "turned", "gpt2", n_embd=64, n_layer=2, n_head=4)
    edit_tensors(folder, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.ones(8)}))
    result = run(folder, "--world", 2)
    assert result.exit_code == 0, result.output
    assert "8 tensors are merged, split, transposed or unpacked for the model, so read once per node" in result.stdout
    assert "transformer.h.*.attn.c_attn.weight (2)" in re.sub(r"\s+", " ", result.stdout)
    assert "1 name in the checkpoint with no place in this model" in result.stdout
    assert "ignored as transformers does: model.rotary_emb.inv_freq." in re.sub(r"\s+", " ", result.stdout)


def test_experts_that_fsdp1_cannot_train_exit_2(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "experts", "mixtral", num_local_experts=2)
    fsdp1 = (folder, "--world", 2, "--fsdp", 1)
    assert run(*fsdp1).exit_code == 0
    result = run(*fsdp1, "--experts", "16bit")
    assert result.exit_code == 2, result.output
    message = re.sub(r"\s+", " ", result.stderr)
    assert "model.layers.0.mlp.experts.down_proj, model.layers.0.mlp.experts.gate_up_proj as parameters" in message
    assert "use shard=FSDP2()" in message
    assert run(*fsdp1, "--experts", "16bit", "--lora-target-modules", "q_proj,v_proj").exit_code == 0


def test_adapters_of_chosen_parameters_are_counted(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "experts", "mixtral", num_local_experts=2)

    def adapters(*options: object) -> int:
        result = run(folder, "--json", "--lora-r", 4, "--lora-target-modules", "q_proj", *options)
        assert result.exit_code == 0, result.output
        size: int = json.loads(result.stdout)["ranks"][0]["train"]["adapters"]
        return size

    config = AutoConfig.from_pretrained(folder)
    of_stack = 2 * 4 * (config.hidden_size + config.intermediate_size) * 2  # experts, rank, elements, bytes
    more = adapters("--lora-target-parameters", "experts.down_proj") - adapters()
    assert more == config.num_hidden_layers * of_stack


def test_without_such_tensors_nothing_is_said_of_them(tmp_path: Path) -> None:
    result = run(save_tiny(tmp_path / "plain"), "--world", 2)
    assert result.exit_code == 0, result.output
    assert "read once per node" not in result.stdout
    assert "ignored" not in result.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--world", "1" * 5000], "Invalid value for '--world'"),
        (["--world", "1" * 4000], "world_size to be 1,048,576 or less"),
        (["--world", 2, "--mesh", f"1x{'2' * 5000}"], "expected --mesh as REPLICATExSHARD"),
        (["--max-length", "1" * 30], "seq to be 1,048,576 or less"),
        (["--gpu-memory", "1" * 5000 + "GiB"], "below 2**63 bytes"),
        (["--gpu-memory", "1" * 20 + "GiB"], "below 2**63 bytes"),
    ],
)
def test_numbers_that_nothing_has_are_refused(folder_70b: Path, options: list[object], expected: str) -> None:
    result = run(folder_70b, *options)
    assert result.exit_code == 2
    assert expected in result.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--cuda-graphs", "--kernels", "fused"),
        ("--activation-offloading", "--max-length", "512"),
        ("--fsdp-config", '{"cpu_offload": true}', "--lora-r", "4"),
        ("--fsdp", "1", "--optim", "sgd", "--experts", "16bit"),
        ("--mesh", "1x2", "--no-gradient-checkpointing"),
        ("--fsdp", "none", "--dtype", "float32", "--per-device-train-batch-size", "2"),
    ],
)
def test_a_job_is_planned_as_the_command_plans_it(
    options: tuple[str, ...], planned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(job, "_on_cpu", lambda _request: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 24 << 30))
    found, memory = job.plan_alone(parse([str(planned), "--data", "x", *options]))
    said = json.loads(run(planned, "--world", 2, *options, "--json").stdout)
    assert memory == 24 << 30
    assert json.loads(json.dumps(found.as_dict())) == {name: said[name] for name in found.as_dict()}
