"""Files of a checkpoint, in agreement with each other and with the index file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from surgery.checkpoint.index import Index
from surgery.errors import CheckpointError, WeightsMismatchError

INDEX_NAME = "model.safetensors.index.json"


def shard(file: Path, *names: str, metadata: dict[str, str] | None = None) -> None:
    save_file({name: torch.ones(2) for name in names}, file, metadata)


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def failure(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        Index.open(path)
    return caught.value


def test_single_file(tmp_path: Path) -> None:
    shard(tmp_path / "model.safetensors", "a", "b", metadata={"format": "pt"})

    index = Index.open(tmp_path)

    assert index.names() == tuple(index) == ("a", "b")
    assert index.files == (tmp_path / "model.safetensors",)
    assert index.total_bytes == 16
    assert dict(index.metadata) == {"format": "pt"}
    assert "a" in index
    assert "c" not in index
    assert index["a"] == index.entry("a")
    assert repr(index) == "Index(2 tensors in 1 files, 16 bytes)"


def test_sharded(tmp_path: Path) -> None:
    shard(tmp_path / "one.safetensors", "a", "b", metadata={"format": "pt", "by": "one"})
    shard(tmp_path / "two.safetensors", "c", metadata={"format": "pt", "by": "two"})
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})

    index = Index.open(tmp_path)

    assert {name: entry.file.name for name, entry in index.items()} == {
        "a": "one.safetensors",
        "b": "one.safetensors",
        "c": "two.safetensors",
    }
    assert dict(index.metadata) == {"format": "pt", "by": "one"}


def test_tensors_that_the_index_file_does_not_list_are_not_lost(tmp_path: Path) -> None:
    shard(tmp_path / "one.safetensors", "a", "extra")
    write_index(tmp_path, {"a": "one.safetensors"})

    assert set(Index.open(tmp_path)) == {"a", "extra"}


@pytest.mark.parametrize("as_file", [True, False], ids=["file", "folder"])
def test_one_file_of_any_name(tmp_path: Path, as_file: bool) -> None:
    file = tmp_path / "weights.safetensors"
    shard(file, "a")

    assert Index.open(file if as_file else tmp_path).files == (file,)


def test_an_adapter_beside_the_model_is_not_a_part_of_it(tmp_path: Path) -> None:
    shard(tmp_path / "weights.safetensors", "a")
    shard(tmp_path / "adapter_model.safetensors", "lora")

    assert set(Index.open(tmp_path)) == {"a"}


def test_model_safetensors_comes_before_an_index(tmp_path: Path) -> None:
    shard(tmp_path / "model.safetensors", "a")
    write_index(tmp_path, {"b": "gone.safetensors"})

    assert set(Index.open(tmp_path)) == {"a"}


def test_hub_cache_layout_is_followed_through_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    shard(blobs / "4567", "a")
    (snapshot / "one.safetensors").symlink_to("../../blobs/4567")
    write_index(snapshot, {"a": "one.safetensors"})

    assert Index.open(snapshot)["a"].file == snapshot / "one.safetensors"


def test_missing_folder(tmp_path: Path) -> None:
    error = failure(tmp_path / "absent")

    assert "no checkpoint at" in str(error)
    assert error.path == tmp_path / "absent"


def test_missing_shards_are_all_named(tmp_path: Path) -> None:
    shard(tmp_path / "one.safetensors", "a")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "three.safetensors"})

    error = failure(tmp_path)

    assert "2 of the 3 files" in str(error)
    assert "three.safetensors, two.safetensors" in str(error)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/weights.safetensors",
        "../weights.safetensors",
        "sub/../../weights.safetensors",
        "..\\weights.safetensors",
        "C:weights.safetensors",
        "weights.safetensors\0",
        "pytorch_model.bin",
        "",
        3,
        None,
    ],
)
def test_a_weight_map_names_safetensors_inside_its_folder_only(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shard(tmp_path / "weights.safetensors", "a")
    write_index(folder, {"a": name})

    error = failure(folder)

    assert "inside the index's folder" in str(error)
    assert (error.path, error.tensor) == (folder / INDEX_NAME, "a")


def test_a_shard_name_too_long_for_the_file_system_is_missing(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "x" * 300 + ".safetensors"})

    assert "are missing" in str(failure(tmp_path))


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": "b", "a": "c"}}'],
)
def test_an_index_that_cannot_be_used(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_NAME).write_text(content)

    assert failure(tmp_path).path == tmp_path / INDEX_NAME


def test_where_the_index_puts_a_tensor_does_not_count(tmp_path: Path) -> None:
    shard(tmp_path / "one.safetensors", "a")
    shard(tmp_path / "two.safetensors", "b")
    write_index(tmp_path, {"a": "two.safetensors", "b": "two.safetensors", "c": "one.safetensors"})

    index = Index.open(tmp_path)

    assert {name: entry.file.name for name, entry in index.items()} == {"a": "one.safetensors", "b": "two.safetensors"}
    assert index.ignored == ("c",)


def test_of_a_tensor_in_two_files_the_last_one_counts(tmp_path: Path) -> None:
    shard(tmp_path / "one.safetensors", "a", "b")
    shard(tmp_path / "two.safetensors", "a")
    write_index(tmp_path, {"a": "two.safetensors", "b": "one.safetensors"})

    index = Index.open(tmp_path)

    assert {name: entry.file.name for name, entry in index.items()} == {"a": "two.safetensors", "b": "one.safetensors"}
    assert index.ignored == ("a",)


def test_a_truncated_shard_is_named_with_its_tensor(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    shard(file, "a", "b")
    file.write_bytes(file.read_bytes()[:-1])

    error = failure(tmp_path)

    assert "is truncated" in str(error)
    assert (error.path, error.tensor) == (file, "b")


def test_several_files_without_an_index(tmp_path: Path) -> None:
    shard(tmp_path / "one.safetensors", "a")
    shard(tmp_path / "two.safetensors", "b")

    assert f"no {INDEX_NAME}" in str(failure(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
@pytest.mark.parametrize("as_file", [True, False], ids=["file", "folder"])
def test_pickles_are_refused_with_a_way_out(tmp_path: Path, name: str, as_file: bool) -> None:
    (tmp_path / name).write_bytes(b"")

    message = str(failure(tmp_path / name if as_file else tmp_path))

    assert name in message
    assert "save_pretrained" in message


def test_a_folder_without_weights_and_an_adapter_say_what_they_are(tmp_path: Path) -> None:
    assert "holds no .safetensors file" in str(failure(tmp_path))

    shard(tmp_path / "adapter_model.safetensors", "lora")

    assert "PEFT adapter" in str(failure(tmp_path))


def test_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")

    assert "Expected a .safetensors file" in str(failure(tmp_path / "model.gguf"))


def test_an_unknown_tensor_is_answered_with_a_similar_name(tmp_path: Path) -> None:
    shard(tmp_path / "model.safetensors", "model.norm.weight")

    with pytest.raises(WeightsMismatchError, match=r"similar name is 'model\.norm\.weight'") as caught:
        Index.open(tmp_path).entry("norm.weight")

    assert caught.value.missing == ("norm.weight",)
