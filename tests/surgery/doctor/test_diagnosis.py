"""Each diagnosis, by the settings that lead to it, and by those that are almost the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery.doctor.diagnosis import Job, diagnose
from surgery.doctor.settings import read_settings
from tests.helpers.models import save_tiny

VERSIONS = {"torch": "2.13.0+cpu", "transformers": "5.24.0", "peft": "0.21.2", "bitsandbytes": "0.50.2"}
VERDICTS = {
    "accelerate.fsdp-on-cpu": "needed",
    "bitsandbytes.keep-packing": "needed",
    "torch.fsdp2-bit-exact-gather": "needed",
    "transformers.bind-at-load": "needed",
}
BOUND = {"transformers.bind-at-load": "needed"}  # and no more, as on a CPU without AVX512-BF16
V1 = '{"version":1}'
ON_CPU = {"applied": ("accelerate.fsdp-on-cpu",)}
QLORA = "--fsdp --load_in_4bit --dtype bfloat16 --bnb_4bit_quant_storage "
READS = "every-rank-reads-everything"


def job(words: str, **changes: Any) -> Job:
    settings = read_settings({}, arguments=words.split())
    given = {"world_size": 2, "device": "cuda", "versions": VERSIONS, "verdicts": VERDICTS}
    return Job(settings=settings, **{**given, "bundle": ("transformers.bind-at-load",), **changes})


def found(words: str, **changes: Any) -> list[str]:
    return [finding.id for finding in diagnose(job(words, **changes)) if not finding.remedied]


@pytest.mark.parametrize(
    ("words", "changes", "expected"),
    [
        ("", {}, []),
        ("--load_in_4bit", {"world_size": 1}, []),
        (f"{QLORA} bfloat16", {}, ["silent-corruption", READS]),
        (f"{QLORA} float16 --dtype float16", {}, ["silent-corruption", READS]),
        (f"{QLORA} float32", {}, [READS]),  # beside norms in bfloat16 it is copied as bytes
        (f"{QLORA} bfloat16", {"verdicts": {**VERDICTS, "torch.fsdp2-bit-exact-gather": "obsolete"}}, [READS]),
        (f"{QLORA} bfloat16 --fsdp_config {V1}", {}, ["empty-adapter", READS]),
        (f"{QLORA} float32 --fsdp_config {{\"activation_checkpointing\":true}}", {}, ["empty-adapter", READS]),
        (f"{QLORA} float32 --fsdp_config {V1}", {"versions": {**VERSIONS, "peft": "0.20.0"}}, [READS]),
        (f"{QLORA} bfloat16 --fp16", {}, ["silent-corruption", "packed-weights-cast", READS]),
        (f"{QLORA} float32 --bf16", {}, ["packed-weights-cast", READS]),
        ("--fsdp --load_in_4bit", {}, ["replicated-weights", READS]),
        (f"{QLORA} uint8 --fsdp_config {V1}", {}, ["storage-cannot-be-flattened", "empty-adapter", READS]),
        ("--fsdp", {}, []),
        ("--fsdp --fsdp_config {\"cpu_ram_efficient_loading\":\"true\"}", {}, [READS]),
        (f"{QLORA} float32", {"versions": {**VERSIONS, "transformers": "4.57.0"}}, []),
        (f"{QLORA} bfloat16", {"device": "cpu"}, ["fsdp-taken-for-ddp", READS]),
        (f"{QLORA} bfloat16 --fsdp_config {V1}", {"device": "cpu"}, ["fsdp1-on-cpu", READS]),
        (f"{QLORA} bfloat16", {"device": "cpu", **ON_CPU}, [READS]),
        (f"{QLORA} bfloat16 --eval_strategy steps", {"device": "cpu", **ON_CPU}, ["evaluation-repacks", READS]),
        ("--load_in_4bit --eval_strategy steps", {"device": "cpu", "verdicts": BOUND}, []),
        (f"{QLORA} bfloat16", {"low_memory": "train.py, line 3"}, []),
        ("", {"verdicts": {"transformers.bind-at-load": "unknown"}}, ["low-memory-does-not-apply"]),
        (
            f"{QLORA} float32",
            {"low_memory": "train.py, line 3", "verdicts": {"transformers.bind-at-load": "unknown"}},
            ["low-memory-does-not-apply", READS],
        ),
    ],
)  # fmt: skip
def test_what_applies_is_found_and_nothing_else(words: str, changes: dict[str, Any], expected: list[str]) -> None:
    assert found(words, **changes) == expected


def test_each_finding_says_where_its_settings_are_and_what_to_add() -> None:
    wrong, reads = diagnose(job(f"{QLORA} bfloat16"))
    assert wrong.because.startswith("fsdp=True (--fsdp), bnb_4bit_quant_storage=bfloat16")
    assert "surgery.low_memory()" in wrong.line
    assert reads.what.startswith("each of 2 ranks reads and holds the whole checkpoint")
    (on_cpu, *_) = diagnose(job(f"{QLORA} bfloat16", device="cpu"))
    assert "--apply accelerate.fsdp-on-cpu" in on_cpu.line


def test_a_model_that_is_packed_decides_how(tmp_path: Path) -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "uint8"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": stored}))
    words = f"--fsdp --model {tmp_path} --bnb_4bit_quant_storage bfloat16"
    assert found(words) == ["replicated-weights", READS]
    (finding,) = [each for each in diagnose(job(f"{words} --fsdp_config {V1}")) if "flatten" in each.id]
    assert "bnb_4bit_quant_storage=uint8 (the model's config.json)" in finding.because
    assert finding.line.startswith("with surgery.low_memory()")


def test_memory_is_diagnosed_by_plans(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, hidden_size=512, intermediate_size=1024, num_hidden_layers=4)
    quant = surgery.Quant("nf4")
    whole = surgery.plan(folder, world_size=1, quant=quant, training=None)
    plan = surgery.plan(folder, world_size=8, quant=quant, training=surgery.Training(seq=1))
    assert plan.device_peak < whole.device_peak
    around = {"plan": plan, "whole": whole, "world_size": 8}
    outside = 768 << 20
    words = f"{QLORA} float32 --model {folder}"
    between, below = (outside + peak - 1 for peak in (whole.device_peak, plan.device_peak))
    assert found(words, gpu_memory=1 << 40, **around) == [READS]
    assert found(words, gpu_memory=between, **around) == ["out-of-memory-while-loading", READS]
    assert found(words, gpu_memory=below, **around) == ["out-of-memory", READS]
