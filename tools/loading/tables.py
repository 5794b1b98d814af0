"""Summaries as tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loading.summary import Summary

__all__ = ["table", "tables"]

MIB = 1024 * 1024


def tables(summaries: Sequence[Summary]) -> list[str]:
    """Tables of loading, its phases, and training if there was any."""
    found = [_loading(summaries), _phases(summaries)]
    trained = [summary for summary in summaries if summary.losses]
    return [*found, _training(trained)] if trained else found


def _loading(summaries: Sequence[Summary]) -> str:
    head = (
        "way",
        "ready, s",
        "of turns",
        "relative",
        "peak of the GPU, MiB",
        "held, MiB",
        "host peak by rank, MiB",
        "pinned, MiB",
        "late imports",
    )
    base = next((summary.seconds for summary in summaries if summary.way == "sharded"), None)
    rows = []
    for summary in summaries:
        seconds = summary.seconds
        if seconds is None:
            rows.append((summary.way, summary.error or "nothing", *[""] * (len(head) - 2)))
            continue
        turns = f"{min(summary.ready):.2f} to {max(summary.ready):.2f} ({len(summary.ready)})"
        memory = (_mib(summary.device), _mib(summary.held), ", ".join(map(_mib, summary.hosts)), _mib(summary.pinned))
        relative = f"{seconds / base:.2f}" if base else ""
        rows.append((summary.way, f"{seconds:.2f}", turns, relative, *memory, str(summary.late_imports)))
    return table(head, rows)


def _phases(summaries: Sequence[Summary]) -> str:
    rows = [
        (summary.way, ", ".join(f"{name} {seconds:.2f}" for name, seconds in (summary.phases or {}).items()))
        for summary in summaries
        if summary.phases
    ]
    return table(("way", "seconds by phase, of the last rank; those of two threads overlap"), rows)


def _training(summaries: Sequence[Summary]) -> str:
    head = ("way", "first step, s", "median step, s", "relative", "peak of the GPU, MiB", "first losses", "last loss")
    base = next((summary.median_step for summary in summaries if summary.way == "sharded"), None)
    rows = []
    for summary in summaries:
        assert summary.median_step is not None
        rows.append(
            (
                summary.way,
                f"{summary.first_step:.3f}",
                f"{summary.median_step:.4f}" if summary.error is None else summary.error,
                f"{summary.median_step / base:.2f}" if base else "",
                _mib(summary.train_device),
                ", ".join(f"{loss:.5f}" for loss in summary.losses[:3]),
                f"{summary.losses[-1]:.5f}",
            )
        )
    return table(head, rows)


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Table in Markdown; a row that ends early is filled up with empty cells."""
    full = [(*row, *[""] * (len(head) - len(row))) for row in rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *full))
