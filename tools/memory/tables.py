"""What was measured, as tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from memory.measure import LOADING, Measured

__all__ = ["bounds_table", "phases_table", "ways_table"]

MIB = 1024 * 1024


def phases_table(ours: Sequence[Measured]) -> str:
    """A row for every rank and phase."""
    rows = [
        (rank, name, _mib(phase.peak), f"{phase.seconds:.1f}")
        for rank, measured in enumerate(ours)
        for name, phase in measured.phases.items()
    ]
    return _table(("rank", "phase", "peak, MiB", "seconds"), rows)


def bounds_table(ours: Sequence[Measured]) -> str:
    """A row for every rank: what loading took against what it may take."""
    rows = []
    for rank, measured in enumerate(ours):
        sizes = measured.sizes
        assert sizes is not None
        peak, bound = measured.peak(LOADING), sizes.bound(rank)
        parts = (sizes.largest_layer, sizes.quant_states, sizes.packed_model if rank == 0 else 0)
        rows.append((rank, _mib(peak), _mib(bound), *map(_mib, parts), "yes" if peak <= bound else "NO"))
    head = ("rank", "peak while loading, MiB", "bound", "largest layer", "quant_state", "packed model", "within")
    return _table(head, rows)


def ways_table(ours: Sequence[Measured], stock: Sequence[Measured]) -> str:
    """A row for every rank: this project's loading against the stock way."""
    rows = []
    for rank, (own, other) in enumerate(zip(ours, stock, strict=True)):
        peaks = own.peak(LOADING), other.peak()
        seconds = sum(own.phases[name].seconds for name in LOADING), sum(p.seconds for p in other.phases.values())
        rows.append((rank, *map(_mib, peaks), f"{peaks[1] / peaks[0]:.1f}", *(f"{value:.1f}" for value in seconds)))
    return _table(("rank", "surgery, MiB", "stock, MiB", "ratio", "surgery, s", "stock, s"), rows)


def _mib(size: int) -> str:
    return f"{size / MIB:.0f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
