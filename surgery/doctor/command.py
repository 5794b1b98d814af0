"""The command `surgery doctor`: a diagnosis, and an observation of a script that runs."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from surgery.run import Apply, OfExperts, script_of

if TYPE_CHECKING:
    from surgery.doctor.diagnosis import Finding, Job
    from surgery.doctor.observation import Observation

__all__ = ["EPILOG", "doctor"]

WOULD_GO_WRONG = 1

EPILOG = """
Examples

The versions and patches of this environment, and the FSDP settings that it has:

  surgery doctor

What stock libraries would do with a script and its arguments, without running it; on two GPUs that are not here:

\b
  surgery doctor --dry-run --device cuda --world 2 --gpu-memory 24GiB \\
    sft.py --load_in_4bit --fsdp

Options alone:

  surgery doctor -- --fsdp --load_in_4bit --bnb_4bit_quant_storage bfloat16

Run it, and see which patches acted, and the memory of its first step:

  torchrun --nproc-per-node 2 -m surgery doctor sft.py --load_in_4bit --fsdp

Exit codes: 0 healthy; 1 something would go wrong, or the script has failed; 2 refused.
"""


def doctor(
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="SCRIPT ARGS...", help="`script.py ...`, `-m module ...`, or after `--` options alone."),
    ] = None,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read SCRIPT and ARGS, and do not run it.")] = False,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config-file",
            "--config_file",
            help="The file of `accelerate config`.",
            metavar="FILE",
            show_default="accelerate's own",
        ),
    ] = None,
    world: Annotated[int | None, typer.Option(help="Number of ranks.", show_default="as found")] = None,
    device: Annotated[
        Literal["cuda", "cpu"] | None, typer.Option(help="What ranks compute on.", show_default="as found")
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Of each GPU, such as 24GiB.", show_default="of the GPU here")
    ] = None,
    apply: Apply = None,
    experts: OfExperts = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; what SCRIPT prints goes to stderr.")] = False,
) -> None:
    """Say what stock libraries would do with a job. With SCRIPT, run it in `surgery.low_memory()`; say what acted."""
    words = command or []
    named = bool(words) and (words[0] == "-m" or not words[0].startswith("-"))
    runs = named and not dry_run
    script = script_of(words) if named else None
    arguments = words[2:] if named and script is None else words[1:] if named else words
    from surgery.doctor.diagnosis import diagnose
    from surgery.doctor.job import examine, make_plans, module_file
    from surgery.doctor.observation import observe
    from surgery.telemetry.numbers import parse_size

    if os.environ.get("RANK", "0") != "0":  # one rank tells, and probes, which takes memory of its GPU
        with _output_to_stderr(as_json):
            failed = runs and observe(words, apply, experts).failed
        raise typer.Exit(WOULD_GO_WRONG if failed else 0)
    memory = None if gpu_memory is None else parse_size(gpu_memory)
    job, verdicts = examine(
        script or (module_file(words[1]) if named else None),
        arguments,
        runs=runs,
        config_file=config_file,
        world_size=world,
        device=device,
        gpu_memory=memory,
        experts=experts,
        apply=[word.strip() for each in apply or () for word in each.split(",")],
    )
    job, unplanned = make_plans(job)
    findings = diagnose(job)
    if not as_json:
        _print(_diagnosis(job, verdicts, findings, unplanned))
    observed = None
    if runs:
        with _output_to_stderr(as_json):
            observed = observe(words, apply, experts)
        if not as_json:
            _print(_observation(job, observed))
    healthy = _is_healthy(job, findings, observed)
    if as_json:
        typer.echo(json.dumps(_as_dict(job, verdicts, findings, observed) | {"healthy": healthy}, indent=1))
    raise typer.Exit(0 if healthy else WOULD_GO_WRONG)


def _is_healthy(job: Job, findings: Sequence[Finding], observed: Observation | None) -> bool:
    """Whether nothing would go wrong; what only this run remedies would, unless the patches have acted."""
    from surgery.doctor.job import THIS_RUN

    has_acted = observed is not None and observed.has_acted(job.bundle)
    remedied = all(found.remedied and (found.remedied != THIS_RUN or has_acted) for found in findings)
    return remedied and (observed is None or not observed.failed)


@contextmanager
def _output_to_stderr(redirect: bool) -> Iterator[None]:  # noqa: FBT001 - a block that may do nothing
    """Send what is written to file 1 in the block, by libraries too, to stderr, if asked to."""
    if not redirect:
        yield
        return
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def _print(lines: Iterator[str]) -> None:
    for line in lines:
        typer.echo(line)
    sys.stdout.flush()


def _diagnosis(job: Job, verdicts: dict[str, Any], findings: Sequence[Finding], unplanned: str) -> Iterator[str]:
    from surgery.doctor.job import THIS_RUN
    from surgery.doctor.settings import DEFAULT
    from surgery.telemetry.numbers import say_size

    yield from _wrapped(", ".join(f"{name} {version}" for name, version in job.versions.items()))
    yield ""
    yield f"Settings of {job.world_size} rank{'s' * (job.world_size > 1)} on {job.device}"
    if job.is_assumed:
        yield "  nothing says how many ranks; --world does"
    chosen = {name: found for name, found in job.settings.found.items() if not found.source.startswith(DEFAULT)}
    yield from _table((name, found.value, found.source) for name, found in chosen.items())
    if not chosen:
        yield "  none found"
    if job.plan is not None:
        peak = job.plan.host_peak if job.device == "cpu" else job.plan.device_peak
        yield f"  planned: at most {say_size(peak)} a rank, above what a process holds before it loads"
    if unplanned:
        yield from _wrapped(f"not planned: {unplanned}", indent=2)
    yield ""
    yield "Patches, as this host has been probed"
    names: dict[str, list[str]] = {}
    for patch_id, found in verdicts.items():
        trusted = str(found) in {"needed", "obsolete"}
        names.setdefault(str(found), []).append(patch_id if trusted else f"{patch_id} ({found.why})")
    yield from _table((kind, ", ".join(each)) for kind, each in names.items())
    yield ""
    yield "Stock libraries would go wrong" if findings else "Nothing would go wrong, as far as these settings tell"
    for found in findings:
        yield from _wrapped(f"{found.id}: {found.what}", indent=2)
        yield from _wrapped(f"because: {found.because}" if found.because else "", indent=4)
        yield from _wrapped(f"remedied by: {found.remedied}" if found.remedied else "", indent=4)
        yield from _wrapped(f"add: {found.line}" if found.remedied in {"", THIS_RUN} else "", indent=4)


def _observation(job: Job, observed: Observation) -> Iterator[str]:
    from surgery.doctor.job import BUNDLE
    from surgery.telemetry.numbers import say_size

    yield ""
    yield f"The script has ended with {observed.code or 0}{'; rank 0 had' if job.world_size > 1 else ', and had'}"
    called = [each for each in observed.acted if each.calls]
    yield from _table((each.id, f"acted on {each.acted} of {each.calls} calls", each.state) for each in called)
    others = ", ".join(each.id for each in observed.acted if not each.calls)
    yield from _wrapped(f"never called: {others}" if others else "", indent=2)
    if not observed.has_acted(job.bundle):
        yield f"  no patch of {BUNDLE} has acted: surgery.low_memory() has changed nothing"
    step = observed.first_step
    if step is None:
        yield "  no optimizer made a step"
        return
    mesh = " x ".join(f"{name} {size}" for name, size in step.mesh.items()) or "not sharded"
    yield f"First optimizer step after {step.seconds:.1f} s; mesh: {mesh}"
    peaks = {"host": (step.host_peak, "host_peak"), "device": (step.device_peak, "device_peak")}
    for name, (peak, figure) in peaks.items():
        planned = "" if job.plan is None else f", planned {say_size(getattr(job.plan.of_rank(0), figure))}"
        if name == "host" or job.device == "cuda":
            yield f"  {name} peak {say_size(peak)}{planned}"


def _table(rows: Iterator[tuple[object, ...]]) -> Iterator[str]:
    """Rows in columns, the last of them wrapped."""
    texts = [[str(cell) for cell in row] for row in rows]
    if not texts:
        return
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)][:-1]
    for row in texts:
        start = "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + "  "
        yield from _wrapped(row[-1], start=start)


def _wrapped(text: str, *, indent: int = 0, start: str = "") -> list[str]:
    """Lines of `text`, after `start` or so many spaces, in the width of the terminal."""
    width = shutil.get_terminal_size((100, 0)).columns
    first = start or " " * indent
    later = " " * (len(first) if len(first) < width // 2 else 4) + " " * (0 if start else 2)
    wrap = textwrap.TextWrapper(
        max(width, 40), initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )
    return wrap.wrap(text)


def _as_dict(
    job: Job, verdicts: dict[str, Any], findings: Sequence[Finding], observed: Observation | None
) -> dict[str, Any]:
    """Everything that is known, for JSON."""
    ran = None if observed is None else asdict(observed)
    if observed is not None and ran is not None:
        ran["acted"] = [asdict(each) | {"acted": each.acted} for each in observed.acted]
    return {
        "versions": dict(job.versions),
        "world_size": job.world_size,
        "device": job.device,
        "gpu_memory": job.gpu_memory,
        "settings": {name: asdict(found) for name, found in job.settings.found.items()},
        "patches": [{"id": key, "verdict": str(found), "why": found.why} for key, found in verdicts.items()],
        "findings": [asdict(found) for found in findings],
        "plan": None if job.plan is None else job.plan.as_dict(),
        "run": ran,
    }
