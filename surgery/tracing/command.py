"""The command `surgery trace`: draw what ranks have left in a folder. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["EPILOG", "trace"]

EPILOG = """
Examples

What every rank of a job did, drawn when the job ends; then once more, when the files of other nodes are there too:

\b
  torchrun --nproc-per-node 2 -m surgery finetune ./model \\
    --data train.jsonl --trace ./trace

  surgery trace ./trace

Exit codes: 0 done, 2 refused: there is no trace, or a file is not one (the message names it).
"""


def trace(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A folder with rank-00000.json, ... of `surgery finetune --trace`.", show_default=False
        ),
    ],
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            help="The page; the JSON of all ranks, for https://ui.perfetto.dev, gets the same name with .json.",
            metavar="FILE.html",
            show_default="DIR/trace.html",
        ),
    ] = None,
) -> None:
    """Draw the trace in DIR. It has memory of every rank over time, phases, bytes read, beside what was predicted."""
    from surgery.errors import ConfigError
    from surgery.tracing.folder import PAGE, draw

    page = output or folder / PAGE
    if page.suffix not in {".html", ".htm"}:
        raise ConfigError(f"expected --output to be the name of a page that ends in .html, found {page}")
    drawn = draw(folder, page)
    typer.echo(f"{page}: {len(drawn)} of {drawn[0].world_size} ranks; {page.with_suffix('.json')}: their figures")
