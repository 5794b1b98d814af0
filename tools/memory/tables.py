"""Measurements as tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loading.tables import table
from memory.measure import Measured

__all__ = ["bounds_table", "phases_table", "ways_table"]

MIB = 1024 * 1024


def phases_table(found: Mapping[str, Sequence[Measured]]) -> str:
    """Table with a row for every way, rank and phase."""
    rows = [
        (way, rank, name, _mib(phase.peak), f"{phase.seconds:.1f}")
        for way, by_rank in found.items()
        for rank, measured in enumerate(by_rank)
        for name, phase in measured.phases.items()
    ]
    return table(("placement", "rank", "phase", "peak, MiB", "seconds"), rows)


def bounds_table(found: Mapping[str, Sequence[Measured]]) -> str:
    """Table with a row for every way and rank: memory of loading against its bound."""
    rows = []
    for way, by_rank in found.items():
        for rank, measured in enumerate(by_rank):
            sizes = measured.sizes
            assert sizes is not None
            parts = (sizes.bound, sizes.largest_layer, sizes.quant_states, sizes.kept)
            is_within = "yes" if measured.peak <= sizes.bound else "NO"
            rows.append((way, rank, _mib(measured.peak), *map(_mib, parts), is_within))
    head = ("placement", "rank", "peak while loading, MiB", "bound", "of a layer", "quant_state", "kept", "within")
    return table(head, rows)


def ways_table(found: Mapping[str, Sequence[Measured]], stock: Sequence[Measured]) -> str:
    """Table with a row for every way and rank: this project's loading against the stock way."""
    rows = []
    for way, by_rank in found.items():
        for rank, (own, other) in enumerate(zip(by_rank, stock, strict=True)):
            ratio = f"{other.peak / own.peak:.1f}"
            rows.append(
                (way, rank, *map(_mib, (own.peak, other.peak)), ratio, f"{own.seconds:.1f}", f"{other.seconds:.1f}")
            )
    return table(("placement", "rank", "surgery, MiB", "stock, MiB", "ratio", "surgery, s", "stock, s"), rows)


def _mib(size: int) -> str:
    return f"{size / MIB:.0f}"
