"""Checkpoints that are broken, or of another model, are refused before a byte of weights is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import patches
import surgery
from surgery.checkpoint import Checkpoint
from surgery.errors import ConfigError, PassError, WeightsMismatchError
from surgery.model.keys import Assignment
from surgery.model.skeleton import build_on_meta, causal_lm
from surgery.model.weights import plan_weights
from tests.helpers.damage import DAMAGES, Damage, edit_tensors
from tests.helpers.models import save_tiny


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_damage_is_refused_before_weights_are_read(
    tmp_path: Path, tiny: Path, reads: list[str], damage: Damage
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    damage.apply(folder)
    with pytest.raises(damage.kind) as caught:
        surgery.qlora(folder, report=surgery.Report())
    for text in damage.says:
        assert text in str(caught.value)
    assert reads == []
    assert patches.active() == []
    assert not (folder / "executed").exists()


def test_reads_are_seen(tiny: Path, reads: list[str]) -> None:
    """The other tests here assert that nothing was read: this one, that they would notice."""
    with surgery.qlora(tiny, report=surgery.Report()):
        assert sorted(reads) == sorted(Checkpoint.open(tiny).names())


def plan(folder: Path) -> tuple[Assignment, ...]:
    checkpoint = Checkpoint.open(folder)
    build, device = causal_lm(checkpoint, torch.bfloat16), torch.device("cpu")
    model = build_on_meta(build, dtype=torch.bfloat16, device=device)
    return plan_weights(model, checkpoint, device=device).assignments


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floating_weights_of_any_width_fit(tmp_path: Path, dtype: torch.dtype) -> None:
    assignments = plan(save_tiny(tmp_path, dtype=dtype))
    assert all(len(assignment.sources) == len(assignment.targets) == 1 for assignment in assignments)
    assert len(assignments) == 21


def test_mismatch_says_which_keys(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    edit_tensors(folder, lambda tensors: tensors.update({"model.typo.weight": tensors.pop("model.norm.weight")}))
    with pytest.raises(WeightsMismatchError) as caught:
        plan(folder)
    assert caught.value.missing == ("model.norm.weight",)
    assert caught.value.unexpected == ("model.typo.weight",)


def test_many_lost_keys_are_counted_and_some_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.0" in name])
    with pytest.raises(WeightsMismatchError, match=r"9 parameters no tensor fills: .*, \.\.\.") as caught:
        plan(folder)
    assert len(caught.value.missing) == 9


def saved_twice(folder: Path, *, differing: bool) -> Path:
    """A tied llama whose checkpoint holds the tied tensor under both names."""
    save_tiny(folder, tie_word_embeddings=True)

    def repeat(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][5, 7] += differing

    edit_tensors(folder, repeat)
    return folder


def test_a_tensor_saved_again_under_a_tied_name_is_one(tmp_path: Path) -> None:
    (twice,) = [a for a in plan(saved_twice(tmp_path, differing=False)) if a.duplicates]
    assert (twice.targets, twice.duplicates) == (("model.embed_tokens.weight",), ("lm_head.weight",))


def test_one_element_that_differs_unties(tmp_path: Path) -> None:
    targets = [assignment.targets for assignment in plan(saved_twice(tmp_path, differing=True))]
    assert ("lm_head.weight",) in targets
    assert ("model.embed_tokens.weight",) in targets


def test_what_samples_do_not_see_is_refused_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.model.weights.SAMPLE", 16)
    with pytest.raises(PassError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ") as caught:
        surgery.qlora(saved_twice(tmp_path, differing=True), report=surgery.Report())
    assert isinstance(caught.value.__cause__, WeightsMismatchError)
    assert patches.active() == []


class Shared(nn.Module):
    """No model of transformers: two names of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(64, 64, bias=False)
        self.other = self.one


def test_a_plain_module_takes_each_name_and_no_other(tmp_path: Path) -> None:
    weight = torch.ones(64, 64)
    tensors = {"one.weight": weight, "other.weight": weight.clone()}
    save_file(tensors, tmp_path / "model.safetensors")
    with surgery.qlora(tmp_path, model=Shared, report=surgery.Report()) as model:
        assert model.one is model.other
    save_file({**tensors, "more": weight.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsMismatchError, match=r"1 tensors that fit nowhere: more"):
        surgery.qlora(tmp_path, model=Shared, report=surgery.Report())
    save_file({**tensors, "other.weight": 2 * weight}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsMismatchError, match=r"other\.weight and one\.weight differ"):
        surgery.qlora(tmp_path, model=Shared, report=surgery.Report())


def test_duplicate_of_another_shape_is_refused_unread(tmp_path: Path, reads: list[str]) -> None:
    folder = saved_twice(tmp_path, differing=False)
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(96, 32)}))
    with pytest.raises(WeightsMismatchError, match=r"lm_head\.weight with shape \(96, 32\)"):
        surgery.qlora(folder, report=surgery.Report())
    assert reads == []


def relabelled(folder: Path, name: str, dtype: str, tensor: torch.Tensor) -> None:
    """Add `tensor` to a checkpoint of one file, with `dtype` in its header."""
    edit_tensors(folder, lambda tensors: tensors.update({name: tensor}))
    file = next(file for file in folder.glob("*.safetensors") if name.encode() in file.read_bytes())
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    fields = json.loads(raw[8 : 8 + length])
    fields[name]["dtype"] = dtype
    header = json.dumps(fields).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


@pytest.mark.parametrize(
    ("dtype", "tensor"),
    [
        ("F4", torch.zeros(2, 4, dtype=torch.uint8)),
        ("C64", torch.zeros(2, dtype=torch.complex64)),
        ("F8_E8M0", torch.ones(2, dtype=torch.float8_e8m0fnu)),
        ("F8_E4M3FNUZ", torch.ones(2, dtype=torch.float8_e4m3fnuz)),
    ],
)
def test_a_dtype_that_cannot_be_loaded_matters_only_to_a_parameter(
    tmp_path: Path, dtype: str, tensor: torch.Tensor
) -> None:
    more, norm = save_tiny(tmp_path / "more"), save_tiny(tmp_path / "norm")
    relabelled(more, "model.more.weight", dtype, tensor)
    assert len(plan(more)) == 21
    relabelled(norm, "model.norm.weight", dtype, tensor)
    with pytest.raises(WeightsMismatchError, match=r"model\.norm\.weight"):
        plan(norm)


@pytest.mark.parametrize(
    "content", ["[]", '"text"', '{"watermarking_config": 3}', '{"max_new_tokens": -1}', '{"cache_implementation": "x"}']
)
def test_the_file_that_transformers_cannot_use_is_named(tmp_path: Path, content: str) -> None:
    folder = save_tiny(tmp_path)
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"cannot use this generation_config\.json"):
        plan(folder)


@pytest.mark.parametrize("number", ["1" * 5000, "²"])
def test_names_with_numbers_that_python_does_not_parse_are_refused(tiny: Path, tmp_path: Path, number: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    edit_tensors(folder, lambda tensors: tensors.update({f"model.layers.{number}.weight": torch.zeros(2)}))
    with pytest.raises(WeightsMismatchError, match="have a number that is none"):
        surgery.qlora(folder)
