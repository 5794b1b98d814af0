"""The files of a trace: one for each rank, then the page, and the JSON of all ranks that trace viewers open."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from surgery.errors import TraceError
from surgery.telemetry.atomic import remove_partials, write_whole
from surgery.tracing.chrome import trace_events
from surgery.tracing.page import render
from surgery.tracing.record import RankTrace

__all__ = ["PAGE", "draw", "read_ranks", "start_afresh", "write_rank"]

#: The page; the joined JSON has the same name with another suffix.
PAGE = "trace.html"

_RANK_FILE = re.compile(r"rank-(\d{5,})\.json")


def start_afresh(folder: Path, *, rank: int, world_size: int) -> None:
    """Make `folder`, and remove this rank's files of an earlier run; rank 0 also those of ranks beyond `world_size`.

    Raises `TraceError` if this rank could not write there either.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, file in _rank_files(folder).items():
            if number == rank or (rank == 0 and number >= world_size):
                file.unlink()
        remove_partials(folder, _name(rank))
        if rank == 0:
            remove_partials(folder, f"{Path(PAGE).stem}.*")
            for file in (folder / PAGE, (folder / PAGE).with_suffix(".json")):
                file.unlink(missing_ok=True)
        probe = folder / f".{_name(rank)}.probe"
        write_whole(probe, "")
        probe.unlink()
    except OSError as error:
        raise _cannot_write(folder, error) from error


def write_rank(trace: RankTrace, folder: Path) -> None:
    """Write the file of a rank. Rank 0 draws at once; so does whoever comes last, for then all files are there."""
    try:
        write_whole(folder / _name(trace.rank), trace.as_json())
    except OSError as error:
        raise _cannot_write(folder, error) from error
    if trace.rank == 0 or len(_rank_files(folder)) == trace.world_size:
        draw(folder, folder / PAGE)


def read_ranks(folder: Path) -> tuple[RankTrace, ...]:
    """The traces in `folder`, by rank. Raises `TraceError` if there are none, or naming the file that is not one."""
    traces = tuple(_read(file, rank) for rank, file in _rank_files(folder).items())
    if not traces:
        raise TraceError(
            f"expected files rank-00000.json, ... in {folder}, found none; write them with `surgery finetune --trace "
            f"{folder}`, or with surgery.trace()",
            path=folder,
        )
    first = traces[0]
    for trace in traces:
        if trace.world_size != first.world_size:
            raise TraceError(
                f"expected the ranks of one run in {folder}, found rank {first.rank} of {first.world_size} and rank "
                f"{trace.rank} of {trace.world_size}; remove the files of the older run",
                path=folder / _name(trace.rank),
            )
    return traces


def draw(folder: Path, page: Path) -> tuple[RankTrace, ...]:
    """Join the traces in `folder` into `page` and the JSON beside it; return the traces that are on it.

    Raises `TraceError`, as `read_ranks` does, or if they cannot be written.
    """
    joined = page.with_suffix(".json")
    drawn: tuple[RankTrace, ...] = ()
    # A rank that ends meanwhile may have drawn more than is about to be written over it: look again.
    while len(drawn) != len(_rank_files(folder)) or not drawn:
        drawn = read_ranks(folder)
        try:
            write_whole(joined, _join(drawn))
            write_whole(page, render(drawn))
        except OSError as error:
            raise _cannot_write(page.parent, error) from error
    return drawn


def _join(traces: Sequence[RankTrace]) -> str:
    """The joined JSON: our figures beside the events, since viewers skip what they do not know."""
    ranks = [trace.as_dict() for trace in traces]
    joined = {"traceEvents": trace_events(traces), "world_size": traces[0].world_size, "ranks": ranks}
    return json.dumps(joined, separators=(",", ":"), allow_nan=False) + "\n"


def _read(file: Path, rank: int) -> RankTrace:
    try:
        trace = RankTrace.from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise TraceError(f"{file} cannot be read: {error.strerror or error}", path=file) from error
    except ValueError as error:  # json's, that of UTF-8, and our own
        raise TraceError(f"{file} is not the trace of a rank: {error}; remove it, or run again", path=file) from error
    if trace.rank != rank:
        raise TraceError(f"{file} is the trace of rank {trace.rank}; name it {_name(trace.rank)}", path=file)
    return trace


def _rank_files(folder: Path) -> dict[int, Path]:
    """The files of ranks that are in `folder`, in the order of ranks."""
    try:
        files = list(folder.iterdir())
    except OSError as error:
        raise TraceError(f"{folder} cannot be read: {error.strerror or error}", path=folder) from error
    found = ((_RANK_FILE.fullmatch(file.name), file) for file in files)
    return dict(sorted((int(match[1]), file) for match, file in found if match))


def _name(rank: int) -> str:
    return f"rank-{rank:05}.json"


def _cannot_write(folder: Path, error: OSError) -> TraceError:
    return TraceError(f"the trace cannot be written to {folder}: {error.strerror or error}", path=folder)
