"""Load a model in several ways on the same ranks, train it for some steps, and compare.

    PYTHONPATH=. python tools/bench_load.py compare --checkpoint build/llama-1gb --ranks 2 --ways sharded,seed
    PYTHONPATH=. torchrun --nproc-per-node 2 tools/bench_load.py run --checkpoint build/llama-1gb --into build/load

`compare` starts torchrun anew for each turn of each way, so that turns cannot affect each other; with `--together` one
set of processes takes all turns, which is quicker but measures host memory less well. `run` is the part of these
processes. A way that fails, for lack of memory for example, is a result like any other.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from loading.launch import compare
from loading.options import Options, add_arguments
from loading.outcome import Journal, collect
from loading.results import Results, environment


def main() -> int:
    """Run the benchmark; returns the exit code: 1 if a way has no figures at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="on every rank, under torchrun")
    running.add_argument("--into", type=Path, default=Path("build/bench_load"), help="folder for a file of each rank")
    comparing = commands.add_parser("compare", help="start torchrun for every way")
    comparing.add_argument("--ranks", type=int, default=2)
    comparing.add_argument("--together", action="store_true", help="all turns of all ways in the same processes")
    comparing.add_argument("--limit", type=int, default=300, help="seconds for one start of torchrun")
    for command in (running, comparing):
        add_arguments(command)
        command.add_argument("--json", type=Path, help="write everything that was measured")
        command.add_argument("--markdown", type=Path, help="write the tables that are printed")
        command.add_argument("--svg", type=Path, help="write a plot")
    parsed = parser.parse_args()
    options = Options.of(parsed)
    results = _run(options, parsed.into) if parsed.command == "run" else compare(options, parsed)
    if results is None:
        return 0
    print(results.markdown())
    results.write(json_file=parsed.json, markdown=parsed.markdown, svg=parsed.svg)
    return 0 if results.is_complete else 1


def _run(options: Options, folder: Path) -> Results | None:
    """Measure all ways on this rank; returns the results on rank 0, None on others."""
    from loading.imports import import_upstream
    from loading.measure import measure_all
    from loading.world import joined

    warnings.simplefilter("ignore")
    import_upstream()
    folder.mkdir(parents=True, exist_ok=True)
    with joined(options.device, memory_cap=options.memory_cap) as world:
        (folder / f"rank-{world.rank}.json").unlink(missing_ok=True)
        measure_all(options, world, Journal(folder=folder, rank=world.rank))
        world.any(False)
        if world.rank > 0:
            return None
        return Results(
            options=options,
            environment=environment(options, ranks=world.size),
            outcomes=tuple(each for each in collect(folder) if each.rank < world.size),
        )


if __name__ == "__main__":
    sys.exit(main())
