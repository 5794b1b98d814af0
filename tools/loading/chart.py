"""Summaries as a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loading.bars import Bar, Panel, draw
from loading.summary import Summary

__all__ = ["chart"]

GIB = 1024**3

#: Prefixes of the ways that are not this project's.
OTHERS = ("read", "seed", "accelerate")


def chart(summaries: Sequence[Summary]) -> str:
    """Draw a panel for each quantity that some way has, as SVG."""
    return draw(
        "Loading in several ways",
        [
            Panel(
                title="ready to train, seconds (line: least to most of several turns)",
                shown="{:.2f} s",
                bars=_bars(summaries, lambda summary: summary.seconds, _turns),
            ),
            Panel(
                title="peak of the GPU while loading, GiB",
                shown="{:.2f} GiB",
                bars=_bars(summaries, lambda summary: summary.device / GIB if summary.device else None),
            ),
            Panel(
                title="peak of anonymous host memory above imports, GiB, the rank with most",
                shown="{:.2f} GiB",
                bars=_bars(summaries, lambda summary: max(summary.hosts) / GIB if summary.hosts else None),
            ),
            Panel(
                title="median step, seconds",
                shown="{:.3f} s",
                bars=_bars(summaries, lambda summary: summary.median_step),
            ),
        ],
    )


def _turns(summary: Summary) -> tuple[float, float] | None:
    return (min(summary.ready), max(summary.ready)) if len(summary.ready) > 1 else None


def _bars(
    summaries: Sequence[Summary],
    value: Callable[[Summary], float | None],
    spread: Callable[[Summary], tuple[float, float] | None] = lambda _: None,
) -> list[Bar]:
    return [
        Bar(
            label=summary.way,
            ours=not summary.way.startswith(OTHERS),
            value=value(summary),
            spread=spread(summary),
            note="none" if summary.error is None else summary.error.split(":")[0],
        )
        for summary in summaries
    ]
