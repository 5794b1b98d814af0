"""The output folder: whole or absent, the same bytes from any number of ranks, resumed, never over what stays."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from surgery.comm.ranks import current_ranks
from surgery.errors import ConfigError, ExportError
from surgery.writing.output import Output, Planned, output
from tests.helpers.ranks import run_ranks

TENSORS = {
    "bytes": torch.arange(7, dtype=torch.uint8),
    "half": torch.arange(10, dtype=torch.bfloat16).view(2, 5),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "wide": torch.arange(6, dtype=torch.float64),
}
STATES = {"state": json.dumps({"a": 1}), "bytes.state": json.dumps({"offset": 0.125})}

PLANNED = [
    *(Planned(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape)) for name, tensor in TENSORS.items()),
    *(Planned(name=name, shape=None) for name in STATES),
]


@contextmanager
def opened(directory: Path, **options: Any) -> Iterator[Output]:
    defaults = {"job": "job", "ranks": current_ranks(), "device": torch.device("cpu"), "files": {"config.json": b"{}"}}
    with output(directory, PLANNED, **{**defaults, **options}) as out:
        yield out


def write(directory: Path, names: set[str] = {*TENSORS}, **options: Any) -> dict[str, bytes]:  # noqa: B006  # not changed
    """Write this rank's part of the tensors `names`, and the texts, and return what is then in the folder."""
    ranks = current_ranks()
    with opened(directory, **options) as out:
        for name in names.difference(name for name in TENSORS if out.is_done(name)):
            flat = TENSORS[name].reshape(-1)
            size = -(-flat.numel() // ranks.world_size)
            out.write(name, flat[ranks.rank * size :][:size], min(ranks.rank * size, flat.numel()))
        for name, text in STATES.items():
            out.write_state(name, text)
    return contents(directory)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


SHARDED = {"max_shard_bytes": 600, "files": {"config.json": b"{}", "more/a.txt": b"x"}}


def test_any_number_of_ranks_writes_the_same_bytes_that_safetensors_reads(tmp_path: Path) -> None:
    one = write(tmp_path / "one", **SHARDED)
    run_ranks(_on_ranks, 3, tmp_path / "three")

    assert one == contents(tmp_path / "three")
    shards = sorted(name for name in one if name.endswith(".safetensors"))
    assert shards == sorted({*json.loads(one["model.safetensors.index.json"])["weight_map"].values()})
    assert len(shards) == 2
    loaded = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / "one" / shard).items()}
    assert {name: bytes(loaded.pop(name).tolist()).decode() for name in STATES} == STATES
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], tensor)
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
    with safe_open(tmp_path / "one" / shards[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three"]


def _on_ranks(directory: Path) -> None:
    write(directory, **SHARDED)


def test_a_job_that_was_stopped_goes_on_and_another_begins_anew(tmp_path: Path) -> None:
    expected = write(tmp_path / "whole")
    for job, kept in (("job", {"half", "wide", "empty"}), ("other", {"empty"})):
        with pytest.raises(ExportError, match=r"2 tensors of .*/out were not written whole, scalar the first"):
            write(tmp_path / "out", {"half", "wide"})
        with (tmp_path / ".out.surgery" / "journal.0").open("a") as journal:
            journal.write('["bytes", 0, 7')  # a process that was killed
        with pytest.raises(KeyboardInterrupt):
            _stop_on_the_way(tmp_path / "out", job, kept)
        with opened(tmp_path / "out", job=job) as out:
            assert {name for name in TENSORS if out.is_done(name)} == {*kept, "bytes"}
            for name, tensor in TENSORS.items():
                out.write(name, tensor)
            for name, text in STATES.items():
                out.write_state(name, text)
        assert contents(tmp_path / "out") == expected
        (tmp_path / "out").rename(tmp_path / f"done by {job}")


def _stop_on_the_way(directory: Path, job: str, kept: set[str]) -> None:
    with opened(directory, job=job) as out:
        assert {name for name in TENSORS if out.is_done(name)} == kept
        with pytest.raises(ConfigError, match=r"in use by process \d+"), opened(directory):
            pass
        out.write("bytes", TENSORS["bytes"])
        out.check("bytes", TENSORS["bytes"])
        with pytest.raises(ExportError, match="bytes is not as it was written"):
            out.check("bytes", TENSORS["bytes"] + 1)
        raise KeyboardInterrupt


def test_what_is_there_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    old = write(tmp_path / "out", files={"config.json": b"old"})
    with pytest.raises(ConfigError, match=r"it is there, and config.json in it; --overwrite"):
        write(tmp_path / "out")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(ConfigError, match=r"needs [\d,]+ bytes .* \(File too large"):
            write(tmp_path / "out", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ExportError, match="not written whole"):
        write(tmp_path / "out", {"half"}, overwrite=True)
    assert contents(tmp_path / "out") == old

    # Killed between the two renames; the next one puts it back before it does anything else.
    (tmp_path / "out").rename(tmp_path / ".out.surgery" / "old")
    with pytest.raises(ConfigError, match="it is there"):
        write(tmp_path / "out")
    assert contents(tmp_path / "out") == old
    assert write(tmp_path / "out", overwrite=True)["config.json"] == b"{}"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_may_not_be_replaced_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for name, inside in (("home", "notes.txt"), ("code", "src/main.py"), ("here", "sub/a")):
        (tmp_path / name / inside).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / inside).touch()
    (tmp_path / "code" / "model.safetensors").touch()
    (tmp_path / ".taken.surgery").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "around" / ".cache").mkdir(parents=True)
    read = [tmp_path / "source", tmp_path / "around" / ".cache"]
    monkeypatch.chdir(tmp_path / "here")
    for name, message in (
        ("file", "it is a file"),
        ("home", r"no \*.safetensors in it \(notes.txt\)"),
        ("code", "the folder src is in it"),
        ("here", "the current folder"),
        ("source", "it is the folder that is read"),
        ("around", "it is the folder that is read, or around it: .*cache"),
        ("loop", "a link that leads nowhere"),
        ("taken", "cannot be written: File exists"),
        ("file/out", "cannot be written: Not a directory"),
        ("x" * 300, "cannot be written: File name too long"),
        ("x" * 250, "cannot be written: File name too long"),
    ):
        with pytest.raises(ConfigError, match=message):
            write(tmp_path / name, overwrite=True, sources=read)
