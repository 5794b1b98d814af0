"""Run a training script as it is and under `surgery run`, and compare what the two did.

    python tools/compare_scripts.py script --ranks 2 train.py --output_dir {out} --max_steps 5
    python tools/compare_scripts.py cases build/smollm2 build/data --only trl --markdown build/trials.md

On CPU ranks, with the patch `accelerate.fsdp-on-cpu`. Compared: the loss of every batch on every rank, bytes of
parameters after `from_pretrained`, the most memory resident until training begins, files written, adapters tensor by
tensor, and whether everything that patches touch is as before. Exits with 1 if losses differ by more than 1e-6.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from trials.cases import CASES
from trials.runs import Trial, TrialFailedError, largest_difference, run, unequal_tensors

_TOLERANCE = 1e-6

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Markdown = Annotated[Path | None, typer.Option(help="Write the table that is printed.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write everything that was found.")]


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def script(
    command: Annotated[list[str], typer.Argument(help="The script and its arguments; {out} is the output folder.")],
    ranks: Annotated[int, typer.Option(min=1)] = 2,
    folder: Annotated[Path | None, typer.Option(help="Keep the runs here.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Compare one script."""
    place = folder or Path(tempfile.mkdtemp(prefix="trials-"))
    found = _compare(Path(command[0]), command[1:], place, ranks)
    print(json.dumps(found, indent=2))
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    if not _is_equal(found):
        raise typer.Exit(1)


@app.command()
def cases(
    model: Annotated[Path, typer.Argument(help="A checkpoint folder with a tokenizer.")],
    data: Annotated[Path, typer.Argument(help="A folder with train.jsonl and test.jsonl.")],
    only: Annotated[list[str] | None, typer.Option(help="Cases whose name has this in it; repeatable.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Keep the runs here.")] = None,
    markdown: Markdown = None,
    json_file: JsonFile = None,
) -> None:
    """Compare the cases of docs/drop-in-trials.md."""
    place = folder or Path(tempfile.mkdtemp(prefix="trials-"))
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        if only and not any(part in name for part in only):
            continue
        path, arguments = case.command(model, data)
        found[name] = {"ranks": case.ranks, "differs": case.differs}
        try:
            found[name] |= _compare(path, arguments, place / name.replace(" ", "-"), case.ranks)
        except TrialFailedError as error:
            found[name]["error"] = str(error)
        print(_row(name, found[name]), flush=True)
    if markdown is not None:
        markdown.write_text("\n".join([*_HEADER, *(_row(*item) for item in found.items())]) + "\n")
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    if not all(_is_equal(one) or (one["differs"] and "error" not in one) for one in found.values()):
        raise typer.Exit(1)


def _compare(path: Path, arguments: list[str], folder: Path, ranks: int) -> dict[str, Any]:
    stock = run(path, arguments, folder / "stock", low_memory=False, ranks=ranks)
    ours = run(path, arguments, folder / "ours", low_memory=True, ranks=ranks)
    return {
        "difference": largest_difference(stock.losses, ours.losses),
        "adapters": _adapters(stock, ours),
        "same_kinds": stock.kinds == ours.kinds,
        "left": ours.left,
        "stock": _summary(stock),
        "ours": _summary(ours),
    }


def _summary(trial: Trial) -> dict[str, Any]:
    names = ("losses", "evaluations", "parameter_bytes", "peaks", "resident", "kinds", "files")
    return {name: getattr(trial, name) for name in names}


def _adapters(stock: Trial, ours: Trial) -> dict[str, int]:
    """Count the tensors that differ in each file of adapters that either wrote."""
    written = [{name for name in trial.files if name.endswith("adapter_model.safetensors")} for trial in (stock, ours)]
    both = {name: len(unequal_tensors(stock.out / name, ours.out / name)) for name in sorted(written[0] & written[1])}
    return both | dict.fromkeys(sorted(written[0] ^ written[1]), -1)


def _is_equal(found: dict[str, Any]) -> bool:
    return "error" not in found and found["difference"] <= _TOLERANCE and found["same_kinds"] and not found["left"]


_COLUMNS = (
    "run", "ranks", "losses, stock", "ours", "largest difference", "parameters loaded, MiB", "peak, MiB", "ratio",
    "adapter tensors that differ",
)  # fmt: skip
_HEADER = (f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}")


def _row(name: str, found: dict[str, Any]) -> str:
    if "error" in found:
        return f"| {name} | {found['ranks']} | {found['error'].splitlines()[0]} | | | | | | |"
    stock, ours = found["stock"], found["ours"]
    ends = [f"{one['losses'][0][0]:.6f}, {one['losses'][0][-1]:.6f}" for one in (stock, ours)]
    loaded = " / ".join(f"{max(one['parameter_bytes']) / 2**20:.1f}" for one in (stock, ours))
    peaks = [max(one["peaks"]) / 2**20 for one in (stock, ours)]
    differing = ", ".join(map(str, found["adapters"].values())) or "none saved"
    difference = f"{found['difference']:.1e}" if found["difference"] else "0"
    cells = [name, found["ranks"], *ends, difference, loaded, f"{peaks[0]:.0f} / {peaks[1]:.0f}"]
    return "| " + " | ".join(map(str, [*cells, f"{peaks[1] / peaks[0]:.2f}", differing])) + " |"


if __name__ == "__main__":
    sys.exit(app())
