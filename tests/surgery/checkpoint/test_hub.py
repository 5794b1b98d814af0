"""Hub ids, against a real HTTP server on localhost, in processes of their own."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tests.helpers.forked import Forked
from tests.helpers.hub_server import HubServer, Repository, commit_of

NOTHING: Mapping[str, str] = MappingProxyType({})

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tests" / "helpers" / "open_checkpoint.py"

OLD, NEW, SINGLE, PICKLE, ESCAPING = map(commit_of, ["old", "new", "single", "pickle", "escaping"])
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
EXPECTED_FILES = {"config.json", "chat_template.jinja", "tokenizer.model", INDEX, *SHARDS}


def sharded(value: float) -> dict[str, bytes]:
    """A repository's files: two shards, with a tensor full of `value` each, and much that is not wanted."""
    weight_map = dict(zip(("first", "second"), SHARDS, strict=True))
    weights = {shard: save({name: torch.full((3,), value)}) for name, shard in weight_map.items()}
    return {
        "config.json": b'{"model_type": "llama"}',
        "chat_template.jinja": b"{{ messages }}",
        "tokenizer.model": b"\0",
        INDEX: json.dumps({"metadata": {}, "weight_map": weight_map}).encode(),
        **weights,
        "consolidated.safetensors": b"another copy",
        "original/consolidated.00.pth": b"a pickle",
        "onnx/model.safetensors": b"another format",
        "onnx/config.json": b"{}",
        "pytorch_model.bin": b"a pickle",
        "modeling_custom.py": b"raise SystemExit('this code must not run')",
        "README.md": b"read me",
    }


REPOSITORIES = {
    "team/model": Repository(
        commits={OLD: sharded(1.0), NEW: sharded(2.0)}, refs={"main": NEW, "v1": OLD, "refs/pr/1": OLD}
    ),
    "single": Repository(
        commits={
            SINGLE: {
                "weights.safetensors": save({"w": torch.ones(2)}),
                "consolidated.safetensors": b"another copy",
                "config.json": b"{}",
            }
        },
        refs={"main": SINGLE},
    ),
    "team/both": Repository(
        commits={OLD: {**sharded(1.0), "model.safetensors": save({"first": torch.full((3,), 2.0)})}}, refs={"main": OLD}
    ),
    "team/gated": Repository(commits={OLD: sharded(1.0)}, refs={"main": OLD}, gated=True),
    "team/private": Repository(commits={OLD: sharded(3.0)}, refs={"main": OLD}, token="hf_secret"),
    "team/pickle": Repository(
        commits={PICKLE: {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}}, refs={"main": PICKLE}
    ),
    "team/escaping": Repository(
        commits={ESCAPING: {INDEX: json.dumps({"weight_map": {"w": "../../evil.safetensors"}}).encode()}},
        refs={"main": ESCAPING},
    ),
}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(REPOSITORIES) as server:
        yield server


@dataclass(frozen=True, kw_only=True)
class Client:
    """Starter of processes that open checkpoints, with a cache and an environment of their own."""

    folder: Path
    endpoint: str

    def start(self, *openings: Mapping[str, Any], cwd: Path | None = None, env: Mapping[str, str] = NOTHING) -> Forked:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment = {
            **inherited,
            "HF_HOME": str(self.folder / "home"),
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **env,
        }
        return Forked(SCRIPT, *map(json.dumps, openings), env=environment, cwd=cwd or self.folder)

    def open(self, *openings: Mapping[str, Any], env: Mapping[str, str] = NOTHING) -> list[dict[str, Any]]:
        return results(self.start(*openings, env=env))

    def start_ranks(
        self, opening: Mapping[str, Any], *, envs: list[dict[str, str]], folders: list[Path] | None = None
    ) -> list[Forked]:
        """One process an environment, all of them ranks of one group; by default, of one node."""
        shared = {"STORE": str(self.folder / "store"), "WORLD_SIZE": str(len(envs))}
        return [
            self.start(
                opening,
                cwd=folders[rank] if folders else None,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **env},
            )
            for rank, env in enumerate(envs)
        ]


def results(process: Forked) -> list[dict[str, Any]]:
    try:
        stdout, stderr = process.communicate(timeout=250)
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    return [json.loads(line) for line in stdout.splitlines()]


@pytest.fixture
def client(tmp_path: Path, hub: HubServer) -> Client:
    return Client(folder=tmp_path, endpoint=hub.endpoint)


def test_downloads_once_what_belongs_to_the_model(client: Client, hub: HubServer) -> None:
    opening = {"source": "team/model"}

    first, second = client.open(opening, opening)

    assert set(first["files"]) == EXPECTED_FILES
    assert first == second
    assert first["revision"] == NEW
    assert set(first["sums"].values()) == {6.0}
    assert first["path"].startswith(str(client.folder / "home"))
    assert NEW[:12] in first["repr"]
    assert dict(hub.downloads) == dict.fromkeys(EXPECTED_FILES, 1)

    seen = len(hub.requests)
    assert client.open(opening, env={"HF_HUB_OFFLINE": "1"}) == [first]
    assert len(hub.requests) == seen


def test_revision_is_honoured(client: Client) -> None:
    tag, pull_request, commit, main = client.open(
        {"source": "team/model", "revision": "v1"},
        {"source": "team/model", "revision": "refs/pr/1"},
        {"source": "team/model", "revision": OLD},
        {"source": "team/model"},
    )

    assert tag == pull_request == commit
    assert tag["revision"] == OLD
    assert set(tag["sums"].values()) == {3.0}
    assert main["revision"] == NEW
    assert set(main["sums"].values()) == {6.0}


def test_repository_without_index(client: Client) -> None:
    (found,) = client.open({"source": "single"})

    assert found["files"] == ["config.json", "weights.safetensors"]
    assert found["sums"] == {"w": 2.0}


def test_a_single_file_comes_before_the_index(client: Client, hub: HubServer) -> None:
    (found,) = client.open({"source": "team/both"})

    assert found["sums"] == {"first": 6.0}
    assert not set(SHARDS) & hub.downloads.keys()


def test_tokens_are_honoured(client: Client) -> None:
    private, gated = {"source": "team/private"}, {"source": "team/gated"}

    (given,) = client.open({**private, "token": "hf_secret"})
    from_environment, accepted = client.open(private, gated, env={"HF_TOKEN": "hf_secret"})

    assert given == from_environment
    assert set(given["sums"].values()) == {9.0}
    assert accepted["revision"] == OLD


BAD_OPENINGS: dict[str, tuple[dict[str, str], list[str]]] = {
    "absent": ({"source": "team/absent"}, ["no folder 'team/absent'", "no such repository", "token"]),
    "private": ({"source": "team/private"}, ["no such repository", "private", "token"]),
    "gated": ({"source": "team/gated"}, ["restricted", "Accept its conditions", "/team/gated"]),
    "revision": ({"source": "team/model", "revision": "v9"}, ["no revision 'v9'"]),
    "pickle": ({"source": "team/pickle"}, ["no safetensors weights", "converted"]),
    "escaping": ({"source": "team/escaping"}, ["../../evil.safetensors", "inside the index's folder"]),
    "invalid": ({"source": "not valid!"}, ["neither an existing path nor a valid hub id"]),
    "too long": ({"source": "x" * 300}, ["neither an existing path nor a valid hub id"]),
    "relative path": ({"source": "./nowhere"}, ["no checkpoint at nowhere"]),
    "deep path": ({"source": "too/many/parts"}, ["no checkpoint at too/many/parts"]),
    "empty": ({"source": ""}, ["empty string"]),
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The error of each bad opening, all tried in one process, because starting one takes seconds."""
    openings = [opening for opening, _ in BAD_OPENINGS.values()]
    with HubServer(REPOSITORIES) as server:
        found = Client(folder=tmp_path_factory.mktemp("hub"), endpoint=server.endpoint).open(*openings)
    return {case: result["error"] for case, result in zip(BAD_OPENINGS, found, strict=True)}


@pytest.mark.parametrize("case", BAD_OPENINGS)
def test_errors_say_what_to_do(errors: Mapping[str, str], case: str) -> None:
    _, expected = BAD_OPENINGS[case]

    assert all(part in errors[case] for part in expected), errors[case]


def test_offline_and_not_cached(client: Client, hub: HubServer) -> None:
    (found,) = client.open({"source": "team/model"}, env={"HF_HUB_OFFLINE": "1"})

    assert "Unset HF_HUB_OFFLINE" in found["error"]
    assert hub.requests == []


def test_unreachable_endpoint(client: Client) -> None:
    (found,) = client.open({"source": "team/model"}, env={"HF_ENDPOINT": "http://127.0.0.1:9"})

    assert "http://127.0.0.1:9 cannot be reached" in found["error"]


#: Requests that are in vain, and so whatever is asked next is refused at once: the API's, a list of files, a file's.
SILENT = ("/revision/main", "/tree/", "/resolve/")


@pytest.mark.parametrize("silent", SILENT)
def test_a_host_that_never_answers_is_given_up(tmp_path: Path, silent: str) -> None:
    """The user is told of the wait after five seconds; the limit is `huggingface_hub`'s own setting."""
    with HubServer(REPOSITORIES, silent=silent) as hub:
        client = Client(folder=tmp_path, endpoint=hub.endpoint)
        limits = {"HF_HUB_ETAG_TIMEOUT": "7", "HF_HUB_DOWNLOAD_TIMEOUT": "7"}
        process = client.start({"source": "team/model"}, env=limits)
        stdout, stderr = process.communicate(timeout=250)
    error = json.loads(stdout)["error"]
    assert "has not answered" in error
    assert "HF_HUB_ETAG_TIMEOUT" in error
    assert hub.endpoint in error
    assert "Waiting for an answer to " in stderr
    assert "for 5 s now; giving up after 7 s" in stderr
    unanswered = Counter(path for _, path in hub.requests if silent in path)
    assert max(unanswered.values()) == 1, "nothing is asked twice of a host that is silent"


def test_a_complete_cache_is_taken_where_nobody_answers(client: Client, tmp_path: Path) -> None:
    branch, commit, other = (
        {"source": "team/model"},
        {"source": "team/model", "revision": NEW},
        {"source": "team/model", "revision": OLD},
    )
    (first,) = client.open(branch)
    with HubServer(REPOSITORIES, silent="/") as hub:
        process = client.start(commit, branch, other, env={"HF_ENDPOINT": hub.endpoint, "HF_HUB_ETAG_TIMEOUT": "4"})
        stdout, stderr = process.communicate(timeout=250)
    pinned, named, absent = map(json.loads, stdout.splitlines())
    assert pinned == named == first
    assert "has not answered" in absent["error"]
    assert [path for _, path in hub.requests if "team/model" in path] == [
        "/api/models/team/model/revision/main",
        f"/api/models/team/model/tree/{OLD}",
    ]
    assert f"taking team/model at commit {NEW}, which is complete in the cache" in stderr


def test_an_incomplete_cache_is_not_taken(client: Client, tmp_path: Path) -> None:
    opening = {"source": "team/model", "revision": NEW}
    (first,) = client.open(opening)
    (Path(first["path"]) / SHARDS[1]).unlink()
    with HubServer(REPOSITORIES, silent="/") as hub:
        (found,) = client.open(opening, env={"HF_ENDPOINT": hub.endpoint, "HF_HUB_ETAG_TIMEOUT": "1"})
    assert "has not answered" in found["error"]


@pytest.mark.distributed
def test_two_ranks_download_once(client: Client, hub: HubServer) -> None:
    opening = {"source": "team/model", "revision": "v1"}

    (first,), (second,) = map(results, client.start_ranks(opening, envs=[{}, {}]))

    assert first == second
    assert first["revision"] == OLD
    assert dict(hub.downloads) == dict.fromkeys(EXPECTED_FILES, 1)
    assert sum(method == "HEAD" for method, _ in hub.requests) == len(EXPECTED_FILES)


@pytest.mark.distributed
def test_each_node_downloads_once(client: Client, hub: HubServer) -> None:
    """Two nodes of two ranks: a node is a cache of its own."""
    nodes = [{"HF_HOME": str(client.folder / node)} for node in ("node0", "node1")]
    envs = [{**node, "LOCAL_RANK": local_rank} for node in nodes for local_rank in ("0", "1")]

    ranks = client.start_ranks({"source": "team/model"}, envs=envs)
    found = [result for rank in ranks for result in results(rank)]

    assert [Path(result["path"]).relative_to(client.folder).parts[0] for result in found] == [
        "node0",
        "node0",
        "node1",
        "node1",
    ]
    assert {result["revision"] for result in found} == {NEW}
    assert dict(hub.downloads) == dict.fromkeys(EXPECTED_FILES, 2)


@pytest.mark.distributed
def test_a_failed_download_fails_on_every_rank(client: Client) -> None:
    opening = {"source": "team/absent"}

    (first,), (second,) = map(results, client.start_ranks(opening, envs=[{}, {}]))

    assert "no such repository" in first["error"]
    assert second["error"] == f"Rank 0 failed: {first['error']}"


@pytest.mark.distributed
def test_a_rank_that_cannot_see_the_cache_fails_every_rank(client: Client) -> None:
    other = {"HF_HOME": str(client.folder / "other")}

    (first,), (second,) = map(results, client.start_ranks({"source": "team/model"}, envs=[{}, other]))

    assert "set LOCAL_RANK" in second["error"]
    assert first["error"] == f"Rank 1 failed: {second['error']}"


@pytest.mark.distributed
def test_a_folder_that_only_one_rank_sees_is_refused(client: Client, tmp_path: Path) -> None:
    (tmp_path / "here" / "team" / "model").mkdir(parents=True)

    ranks = client.start_ranks({"source": "team/model"}, envs=[{}, {}], folders=[tmp_path / "here", tmp_path])
    (first,), (second,) = map(results, ranks)

    assert first == second
    assert "on some ranks and not on others (not on 1)" in first["error"]


@pytest.mark.distributed
def test_ranks_do_not_wait_for_a_rank_that_died(tmp_path: Path) -> None:
    with HubServer(REPOSITORIES, hold=threading.Event()) as hub:
        client = Client(folder=tmp_path, endpoint=hub.endpoint)
        leader, follower = client.start_ranks({"source": "team/model"}, envs=[{}, {}])
        assert hub.downloading.wait(250)
        leader.kill()
        leader.communicate()
        stdout, stderr = follower.communicate()  # nobody releases the file before it ends

    assert "A rank has ended while others waited for it to open a checkpoint" in stdout, stderr
