"""The files of a trace: who draws, what is replaced, and which files are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surgery.errors import TraceError
from surgery.tracing.folder import draw, read_ranks, start_afresh, write_rank
from tests.surgery.tracing.made import Page, trace_of


def ranks_on(page: Path) -> list[str]:
    return [row[0] for row in Page.read(page).rows("of-ranks")[0]]


def test_rank_0_draws_at_once_and_the_last_one_draws_all(tmp_path: Path) -> None:
    page, joined = tmp_path / "trace.html", tmp_path / "trace.json"
    write_rank(trace_of(1, 3), tmp_path)
    assert not page.exists()
    write_rank(trace_of(0, 3), tmp_path)
    assert ranks_on(page) == ["0", "1"]
    assert "No file yet of 1 rank: 2. Draw again with: surgery trace DIR" in page.read_text()
    write_rank(trace_of(2, 3), tmp_path)
    assert ranks_on(page) == ["0", "1", "2"]
    assert "No file yet" not in page.read_text()
    assert [rank["rank"] for rank in json.loads(joined.read_text())["ranks"]] == [0, 1, 2]
    assert {file.name for file in tmp_path.iterdir()} == {
        "rank-00000.json", "rank-00001.json", "rank-00002.json", "trace.html", "trace.json",
    }  # fmt: skip


def test_an_earlier_run_does_not_get_into_a_later_one(tmp_path: Path) -> None:
    for rank in range(3):
        write_rank(trace_of(rank, 3), tmp_path)
    (tmp_path / "notes.json").write_text("mine")
    for name in ("rank-00000.json", "trace.html", "trace.json"):
        (tmp_path / f".{name}.host.1.partial").write_text("of a process that was killed")
    start_afresh(tmp_path, rank=0, world_size=2)
    assert {file.name for file in tmp_path.iterdir()} == {"rank-00001.json", "notes.json"}
    start_afresh(tmp_path, rank=1, world_size=2)
    assert {file.name for file in tmp_path.iterdir()} == {"notes.json"}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TraceError, match=r"the trace cannot be written to .*file.*: (File exists|Not a directory)"):
        start_afresh(tmp_path / "file", rank=0, world_size=1)


def test_joined_json_is_what_ranks_wrote(tmp_path: Path) -> None:
    traces = [trace_of(0, 2), trace_of(1, 2, error="PassError")]
    for trace in traces:
        write_rank(trace, tmp_path)
    joined = json.loads((tmp_path / "trace.json").read_text())
    assert joined["world_size"] == 2
    assert joined["ranks"] == [json.loads(trace.as_json()) for trace in traces]
    assert read_ranks(tmp_path) == tuple(traces)


def refused(folder: Path) -> TraceError:
    with pytest.raises(TraceError) as caught:
        draw(folder, folder / "trace.html")
    assert not (folder / "trace.html").exists()
    return caught.value


def test_a_folder_without_ranks(tmp_path: Path) -> None:
    assert "expected files rank-00000.json, ..." in str(refused(tmp_path))
    assert "No such file or directory" in str(refused(tmp_path / "none"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "Expecting value"),
        (trace_of(1, 2).as_json().encode()[:300], "line 1 column"),
        (b"\xff\xfe", "can't decode byte"),
        (b'{"a": 1}', "some other JSON"),
        (trace_of(0, 2).as_json().encode(), "is the trace of rank 0; name it rank-00000.json"),
    ],
)
def test_a_file_that_is_not_the_trace_of_its_rank_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "rank-00000.json").write_text(trace_of(0, 2).as_json())
    (tmp_path / "rank-00001.json").write_bytes(content)
    error = refused(tmp_path)
    assert str(tmp_path / "rank-00001.json") in str(error)
    assert says in str(error)
    assert error.path == tmp_path / "rank-00001.json"


def test_ranks_of_two_runs(tmp_path: Path) -> None:
    (tmp_path / "rank-00000.json").write_text(trace_of(0, 2).as_json())
    (tmp_path / "rank-00001.json").write_text(trace_of(1, 4).as_json())
    assert "found rank 0 of 2 and rank 1 of 4; remove the files of the older run" in str(refused(tmp_path))


def test_a_file_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "rank-00000.json").mkdir()
    assert "rank-00000.json cannot be read: Is a directory" in str(refused(tmp_path))
