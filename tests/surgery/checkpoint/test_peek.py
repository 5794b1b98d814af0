"""Looking at hub ids, against a real HTTP server on localhost, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from checkpoints.llama import LlamaShape
from surgery.checkpoint import Checkpoint
from surgery.checkpoint.layout import INDEX_NAME, SINGLE_NAME
from surgery.checkpoint.peek import FIRST_BYTES
from tests.helpers.forked import Forked
from tests.helpers.hollow import write_hollow
from tests.helpers.hub_server import HubServer, Repository, commit_of
from tests.helpers.models import save_tiny

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tests" / "helpers" / "peek_checkpoint.py"
COMMIT = commit_of("model")

#: 25 MB in 16 bits.
SHAPE = LlamaShape(layers=2, hidden=512, intermediate=2048, heads=8, kv_heads=4, vocab=4096)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a repository with a model in two shards."""
    folder = write_hollow(tmp_path_factory.mktemp("model"), SHAPE, shards=2)
    return {file.name: file.read_bytes() for file in folder.iterdir()} | {"pytorch_model.bin": b"a pickle"}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that its config ties, with a head of its own in a further shard, and more in the index than there is."""
    folder = save_tiny(tmp_path_factory.mktemp("untied"), tie_word_embeddings=True, vocab_size=1200)
    save_file(
        {"lm_head.weight": torch.rand(1200, 64), "extra": torch.ones(1)}, folder / "model-of-the-head.safetensors"
    )
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"] |= dict.fromkeys(("lm_head.weight", "mtp.fc.weight"), "model-of-the-head.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def repositories(model: Mapping[str, bytes], untied: Path) -> dict[str, Repository]:
    # A header longer than what is fetched at first.
    wide = {f"layer.{number}.weight": torch.zeros(1) for number in range(FIRST_BYTES // 64)}
    contents: dict[str, dict[str, bytes]] = {
        "team/model": dict(model),
        "team/wide": {"weights.safetensors": save(wide), "consolidated.safetensors": b"another copy"},
        "team/pickle": {"pytorch_model.bin": b"a pickle"},
        "team/two": {"a.safetensors": save({"a": torch.ones(1)}), "b.safetensors": save({"b": torch.ones(1)})},
        "team/untied": {file.name: file.read_bytes() for file in untied.iterdir()},
        "team/both": {**model, SINGLE_NAME: save({"a": torch.ones(1)})},
        "team/broken": {"model.safetensors": b"\xff" * 64},
    }
    made = {name: Repository(commits={COMMIT: files}, refs={"main": COMMIT}) for name, files in contents.items()}
    gated = Repository(commits={COMMIT: dict(model)}, refs={"main": COMMIT}, gated=True)
    return {**made, "team/gated": gated}


@pytest.fixture
def hub(repositories: Mapping[str, Repository]) -> Iterator[HubServer]:
    with HubServer(repositories) as server:
        yield server


def run(hub: HubServer | None, home: Path, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment_of(hub, home) | environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def environment_of(hub: HubServer | None, home: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return inherited | {
        "HF_HOME": str(home),
        "HF_ENDPOINT": hub.endpoint if hub is not None else "http://127.0.0.1:9",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def peek(hub: HubServer | None, home: Path, *looks: Mapping[str, Any], **environment: str) -> list[dict[str, Any]]:
    done = Forked(SCRIPT, *map(json.dumps, looks), env=environment_of(hub, home) | environment, cwd=home)
    stdout, stderr = done.communicate(timeout=250)
    assert done.returncode == 0, stderr
    return [json.loads(line) for line in stdout.splitlines()]


def of_weights(hub: HubServer) -> int:
    return sum(size for name, size in hub.served.items() if name.endswith(".safetensors"))


def test_headers_are_all_that_is_fetched_of_the_weights(hub: HubServer, tmp_path: Path) -> None:
    (found,) = peek(hub, tmp_path, {"source": "team/model"})
    assert found.get("revision") == COMMIT, found
    assert found["config"]["hidden_size"] == SHAPE.hidden
    assert {name: tuple(shape) for name, shape in found["shapes"].items()} == SHAPE.tensors()
    weights = 2 * sum(torch.Size(shape).numel() for shape in SHAPE.tensors().values())
    assert 0 < of_weights(hub) < weights / 100
    assert not any(path.endswith(".safetensors") for path in map(str, tmp_path.rglob("*")))
    assert "pytorch_model.bin" not in hub.served


def test_a_long_header_takes_a_second_range(hub: HubServer, tmp_path: Path) -> None:
    (found,) = peek(hub, tmp_path, {"source": "team/wide"})
    assert len(found["shapes"]) == FIRST_BYTES // 64
    assert hub.downloads["weights.safetensors"] == 2


def test_a_single_file_comes_before_the_index(hub: HubServer, tmp_path: Path) -> None:
    (found,) = peek(hub, tmp_path, {"source": "team/both"})
    assert found["shapes"] == {"a": [1]}


def test_a_server_without_ranges_is_not_listened_to_for_long(
    repositories: Mapping[str, Repository], tmp_path: Path
) -> None:
    with HubServer(repositories, ranges=False) as hub:
        found = peek(hub, tmp_path, {"source": "team/model"}, {"source": "team/wide"})
    assert {name: tuple(shape) for name, shape in found[0]["shapes"].items()} == SHAPE.tensors()
    assert len(found[1]["shapes"]) == FIRST_BYTES // 64


def test_the_command_plans_a_hub_id(hub: HubServer, tmp_path: Path, untied: Path) -> None:
    done = run(hub, tmp_path, "-m", "surgery", "plan", "team/model", "--world", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"] == sum(torch.Size(shape).numel() for shape in SHAPE.tensors().values())
    remote = json.loads(run(hub, tmp_path, "-m", "surgery", "plan", "team/untied", "--json").stdout)
    assert remote["ignored"] == ["extra", "mtp.fc.weight"]
    held = Checkpoint.open(untied).index
    assert remote["parameters"] == sum(entry.numel for entry in held.values()) - 1  # with both, but without the extra
    refused = run(hub, tmp_path, "-m", "surgery", "plan", "team/gated")
    assert refused.returncode == 2
    assert "restricted" in refused.stderr


def test_errors_say_what_to_do(hub: HubServer, tmp_path: Path) -> None:
    expected = {
        "team/absent": ["no such repository", "token"],
        "team/gated": ["restricted", "Accept its conditions"],
        "team/pickle": ["no safetensors weights", "converted"],
        "team/two": ["2 safetensors files", "no model.safetensors.index.json"],
        "team/broken": ["not a valid safetensors file"],
        "not valid!": ["neither an existing path nor a valid hub id"],
        "./nowhere": ["no checkpoint at nowhere"],
    }
    looks = [{"source": source} for source in expected]
    found = peek(hub, tmp_path, *looks, {"source": "team/model", "revision": "v9"})
    for error, parts in zip(found, [*expected.values(), ["no revision 'v9'"]], strict=True):
        assert all(part in error["error"] for part in parts), error


@pytest.mark.parametrize("silent", ["/api/models", "00002.safetensors"])
def test_a_host_that_never_answers_is_given_up(
    repositories: Mapping[str, Repository], tmp_path: Path, silent: str
) -> None:
    with HubServer(repositories, silent=silent) as hub:
        planned = run(hub, tmp_path, "-m", "surgery", "plan", "team/model", HF_HUB_ETAG_TIMEOUT="1")
    assert planned.returncode == 2
    assert "has not answered" in planned.stderr
    assert "HF_HUB_ETAG_TIMEOUT" in planned.stderr


def test_a_complete_cache_is_taken_where_nobody_answers(hub: HubServer, tmp_path: Path) -> None:
    (first,) = peek(hub, tmp_path, {"source": "team/model"})
    download = "from huggingface_hub import snapshot_download; snapshot_download('team/model')"
    assert run(hub, tmp_path, "-c", download).returncode == 0
    with HubServer({}, silent="/") as other:
        named, pinned = peek(other, tmp_path, {"source": "team/model"}, {"source": "team/model", "revision": COMMIT})
    assert named == pinned == first
    assert len([path for _, path in other.requests if "team/model" in path]) == 1


def test_without_a_network(tmp_path: Path) -> None:
    (unreachable,) = peek(None, tmp_path, {"source": "team/model"})
    assert "http://127.0.0.1:9 cannot be reached" in unreachable["error"]
    (offline,) = peek(None, tmp_path, {"source": "team/model"}, HF_HUB_OFFLINE="1")
    assert "Unset HF_HUB_OFFLINE" in offline["error"]
