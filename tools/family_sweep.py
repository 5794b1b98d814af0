"""Load every causal language model of the installed transformers twice, stock and here, and compare everything.

    python tools/family_sweep.py                                    # all families; some minutes on two cores
    python tools/family_sweep.py --families llama jamba             # these
    python tools/family_sweep.py --part 1/5                         # the first fifth: every fifth family from the first
    python tools/family_sweep.py --ranks all --families mixtral     # under FSDP2 on two ranks too
    python tools/family_sweep.py --drop-in --ranks none             # loaded by from_pretrained in surgery.low_memory()
    python tools/family_sweep.py --output docs/models.md            # write the page of results

For each family a small random checkpoint is made from its config, by rules on the names of its attributes
(`families/shrink.py`) and a short table of exceptions (`families/exceptions.py`). It is loaded by transformers,
bitsandbytes and PEFT alone, and by `surgery.qlora`, and compared bit for bit (`families/check.py`). Families run in
separate processes, so that a crash or a hang affects only one row.

Verdicts: exact; refused (before a weight is read); stock fails; not made; differs. The exit code is 1 if any family
differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `tests.helpers`, which runs ranks

from families.outcome import Outcome
from families.page import page
from families.pool import outcomes


def main() -> int:
    """Run the sweep, print and write the results; returns the exit code."""
    options = _parse()
    chosen = _chosen(options)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = _run(chosen, options)
    print(", ".join(f"{count} {verdict}" for verdict, count in Counter(o.verdict for o in found).most_common()))
    if options.output:
        options.output.write_text(page(found))
    return int(any(outcome.verdict == "differs" for outcome in found))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", metavar="TYPE", help="model types, if not all of transformers")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every Nth family, from the Ith on")
    parser.add_argument(
        "--ranks", choices=("fifth", "all", "none"), default="fifth", help="which go under FSDP2 on two ranks too"
    )
    parser.add_argument(
        "--drop-in", action="store_true", help="load by stock's own calls in surgery.low_memory(), and fill"
    )
    parser.add_argument("--jobs", type=int, default=1, help="families at a time; each takes about 1.5 GB")
    parser.add_argument("--output", type=Path, help="where to write the page of results")
    parser.add_argument("--json", type=Path, help="where to write the results as JSON")
    return parser.parse_args()


def _chosen(options: argparse.Namespace) -> list[tuple[str, bool]]:
    """The selected families, in the order of transformers, each with whether to run it under FSDP2 too."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    unknown = set(options.families or ()) - NAMES.keys()
    if unknown:
        sys.exit(f"no causal language model of the installed transformers: {', '.join(sorted(unknown))}")
    part, parts = (int(number) for number in options.part.split("/"))
    sharded = {"all": 1, "fifth": 5, "none": len(NAMES) + 1}[options.ranks]
    every = [(name, number % sharded == 0) for number, name in enumerate(NAMES, start=1)]
    return [pair for pair in every if pair[0] in (options.families or NAMES)][part - 1 :: parts]


def _run(chosen: Sequence[tuple[str, bool]], options: argparse.Namespace) -> list[Outcome]:
    """Run the families; prints and writes outcomes as they come."""
    from rich.console import Console
    from rich.progress import Progress

    from families.check import check

    found = []
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("families", total=len(chosen))
        for outcome in outcomes(chosen, partial(check, drop_in=options.drop_in), jobs=options.jobs):
            found.append(outcome)
            said = f"{outcome.family}: {outcome.verdict}, {outcome.seconds} s"
            why = f"\n    {outcome.why}" if outcome.verdict == "differs" else ""
            progress.console.print(said + why, highlight=False, markup=False, soft_wrap=True)
            progress.advance(bar)
            if options.json:
                options.json.write_text(json.dumps([asdict(outcome) for outcome in found], indent=1) + "\n")
    return found


if __name__ == "__main__":
    sys.exit(main())
