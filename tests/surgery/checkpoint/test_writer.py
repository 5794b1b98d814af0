"""Writing: what was given is read back, by us and by safetensors, and an interrupted write leaves nothing."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from surgery.checkpoint import Reader, write_checkpoint
from surgery.errors import CheckpointError, ConfigError

INDEX_NAME = "model.safetensors.index.json"


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_one_shard_is_one_file(tmp_path: Path) -> None:
    index = write_checkpoint(tmp_path / "new", [("w", torch.arange(4.0))], metadata={"made": "here"})

    assert names_in(tmp_path / "new") == {"model.safetensors"}
    assert dict(index.metadata) == {"format": "pt", "made": "here"}
    with safe_open(tmp_path / "new" / "model.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("w"), torch.arange(4.0))
        assert file.metadata() == {"format": "pt", "made": "here"}


def test_shards_in_the_layout_of_the_hub(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(10), "b": torch.ones(10), "c": torch.ones(100), "d": torch.ones(1)}

    write_checkpoint(tmp_path, tensors.items(), max_shard_bytes=80)

    first, second, third = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
    assert names_in(tmp_path) == {first, second, third, INDEX_NAME}
    assert json.loads((tmp_path / INDEX_NAME).read_text()) == {
        "metadata": {"total_size": 484},
        "weight_map": {"a": first, "b": first, "c": second, "d": third},
    }


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.bool]),
    max_shard_bytes=st.integers(1, 200),
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], dtype: torch.dtype, max_shard_bytes: int
) -> None:
    tensors = {f"t{number}": (torch.rand(size) * 9).to(dtype) for number, size in enumerate(sizes)}

    index = write_checkpoint(tmp_path_factory.mktemp("written"), tensors.items(), max_shard_bytes=max_shard_bytes)

    assert set(index) == set(tensors)
    with Reader(index) as reader:
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())
    for file in index.files:
        held = [entry.nbytes for entry in index.values() if entry.file == file]
        assert sum(held) <= max_shard_bytes or len([size for size in held if size]) == 1


def test_files_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [("a", torch.zeros(3)), ("b", torch.zeros(3))], max_shard_bytes=12)
    (tmp_path / "any").touch()
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert modes == {(tmp_path / "any").stat().st_mode}


def test_views_parameters_and_shared_memory_are_written_in_full(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    parameter = torch.nn.Parameter(base)
    tensors = {"base": base, "tied": parameter, "transposed": base.t(), "row": base[1]}

    index = write_checkpoint(tmp_path, tensors.items())

    with Reader(index) as reader:
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


def test_one_shard_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    most = 0

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for number in range(12):
            tensor = torch.ones(256)
            alive.add(tensor.untyped_storage())
            most = max(most, len(alive))
            yield f"t{number}", tensor
            del tensor

    write_checkpoint(tmp_path, stream(), max_shard_bytes=3 * 1024)

    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert most <= 4, "the three of a shard, and the one that opens the next"


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(4)
        yield "b", torch.ones(4)
        assert names_in(tmp_path), "the first shard is on the disk by now"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, stream(), max_shard_bytes=16)

    assert names_in(tmp_path) == set()


def test_a_failure_while_publishing_leaves_no_shard(tmp_path: Path) -> None:
    (tmp_path / "model-00002-of-00002.safetensors").mkdir()  # no file can be renamed to the name of a folder
    (tmp_path / "model-00002-of-00002.safetensors").rename(tmp_path / "later")

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(4)
        yield "b", torch.ones(4)
        (tmp_path / "later").rename(tmp_path / "model-00002-of-00002.safetensors")

    with pytest.raises(OSError, match="model-00002-of-00002"):
        write_checkpoint(tmp_path, stream(), max_shard_bytes=16)

    assert names_in(tmp_path) == {"model-00002-of-00002.safetensors"}


@pytest.mark.parametrize("name", ["model.safetensors", INDEX_NAME, "other.safetensors"])
def test_a_folder_with_weights_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"precious")

    with pytest.raises(CheckpointError, match=f"found {name}"):
        write_checkpoint(tmp_path, [("w", torch.ones(1))])

    assert (tmp_path / name).read_bytes() == b"precious"


def test_bad_streams_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'w' twice"):
        write_checkpoint(tmp_path, [("w", torch.ones(1)), ("w", torch.ones(1))])
    with pytest.raises(CheckpointError, match="'w' is on the meta device"):
        write_checkpoint(tmp_path, [("w", torch.ones(1, device="meta"))])
    with pytest.raises(CheckpointError, match="at least one tensor"):
        write_checkpoint(tmp_path, [])
    with pytest.raises(ConfigError, match="max_shard_bytes above 0"):
        write_checkpoint(tmp_path, [("w", torch.ones(1))], max_shard_bytes=0)

    assert names_in(tmp_path) == set()
