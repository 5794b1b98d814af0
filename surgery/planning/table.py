"""A plan as a table for people, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from surgery.comm.environment import launched_rank
from surgery.passes.setting import Setting
from surgery.planning import verdict
from surgery.planning.plan import Experts, MemoryPlan
from surgery.planning.ranks import RankClass, RankPlan, Step
from surgery.planning.training import Training
from surgery.telemetry.measurements import group_names, say
from surgery.telemetry.numbers import say_size

__all__ = ["headline", "notes", "render", "show"]

DOES_NOT_FIT = 1

#: Columns of text that a table may take.
WIDEST = 400

#: Kinds of ranks shown side by side; those that need most.
COLUMNS = 4

Row = tuple[str, Callable[[RankPlan], int]]


def show(made: MemoryPlan, model: str, memory: int | None, *, as_json: bool = False) -> None:
    """Print the plan and the verdict, on rank 0 of a job; exit 1 if it does not fit."""
    if launched_rank() in (None, 0):
        _print(made, model, memory, as_json=as_json)
    if memory is not None and not verdict.fits_gpu(made, memory):
        raise typer.Exit(DOES_NOT_FIT)


def _print(made: MemoryPlan, model: str, memory: int | None, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"model": model, **made.as_dict(), **verdict.as_dict(made, memory, model)}, indent=1))
        return
    console, table = Console(highlight=False, soft_wrap=True), render(made)
    # Wider than the terminal rather than cut off: every figure counts.
    needed = Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum
    console.width = max(console.width, needed)
    console.print(headline(made, model), markup=False)
    console.print(table)
    for line in (*notes(made), *verdict.say(made, memory, model)):
        console.print(line, markup=False)


def headline(plan: MemoryPlan, source: str) -> str:
    """The model, its ranks and its format, in a line."""
    setting, inventory = plan.setting, plan.inventory
    stored = sum(target.stored_bytes for target in inventory.targets)
    return (
        f"{source}: {inventory.parameters / 1e9:,.1f} B parameters, {say_size(stored)}; {setting.world_size} "
        f"rank{'s' if setting.world_size > 1 else ''}, {setting.strategy.label}, placement "
        f"{setting.strategy.placement}, {setting.format.description}"
    )


def render(plan: MemoryPlan) -> Table:
    """A column for every kind of ranks, a row for every figure."""
    shown = _shown(plan)
    table = Table(highlight=False)
    table.add_column("each rank", no_wrap=True)
    for ranks, _ in shown:
        table.add_column(ranks.label, justify="right", no_wrap=True)
    for title, rows in _sections(plan.setting, plan.training):
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        for name, figure in rows:
            table.add_row(f"  {name}", *(say_size(figure(figures)) for _, figures in shown))
    return table


def notes(plan: MemoryPlan) -> Iterator[str]:
    """Remarks on the table, a line each."""
    hidden = len(plan.classes) - COLUMNS
    if hidden > 0:
        yield f"{hidden} more kinds of ranks are not shown: they need no more than these."
    if plan.training is not None:
        moment = max((f for _, f in plan.classes if f.train), key=lambda f: f.device_peak or f.host_peak).train
        assert moment is not None
        at = "at the loss" if moment.moment == "loss" else "in backward"
        yield (
            "Activations and logits are an estimate, from the shapes of linear layers, for attention that keeps no "
            f"scores. Training is at its peak {at}; its rows are of that moment, and add up to the peak."
        )
    if plan.experts is not None:
        yield _of_experts(plan.experts)
    if plan.inventory.left_out:
        yield say("left_out", group_names(plan.inventory.left_out))
    if plan.inventory.ignored:
        yield say("ignored", group_names(plan.inventory.ignored))
    if plan.inventory.initialized:
        yield say("initialized", group_names(plan.inventory.initialized))
    if plan.read_once_per_node:
        yield f"{say('read_once_per_node', group_names(plan.read_once_per_node))} That is not in the bytes read above."


def _of_experts(experts: Experts) -> str:
    return (
        f"Experts are in 4 bits: {say_size(experts.packed)}, and {say_size(experts.statistics)} of statistics, which "
        f"are divided as they are. In 16 bits (--experts 16bit) they would be {say_size(experts.in_16_bits)}: a rank "
        f"would hold {say_size(experts.held_in_16_bits)} after loading, not {say_size(experts.held)}, and need "
        f"{say_size(experts.peak_in_16_bits)} at its peak, not {say_size(experts.peak)}."
    )


def _shown(plan: MemoryPlan) -> Sequence[tuple[RankClass, RankPlan]]:
    by_need = sorted(plan.classes, key=lambda found: -max(found[1].device_peak, found[1].host_peak))[:COLUMNS]
    return [found for found in plan.classes if found in by_need]


def _sections(setting: Setting, training: Training | None) -> Iterator[tuple[str, Sequence[Row]]]:
    yield "Load", [("read from the checkpoint", lambda f: f.bytes_read), *_load_rows(setting)]
    if training is None:
        return
    recomputed = ", activations recomputed" if training.checkpointing else ""
    kernels = f", kernels {', '.join(training.kernels)}" if training.kernels else ""
    graphs = f", CUDA graphs of {training.graphs} shapes" if training.graphs else ""
    title = f"Train, {training.batch} x {training.seq} tokens a step{recomputed}{kernels}{graphs}"
    yield title, _train_rows(setting, training)


def _load_rows(setting: Setting) -> Iterator[Row]:
    yield "host, held", lambda f: f.load.host_held
    yield "host, peak", lambda f: f.load.host_peak
    if not setting.on_cpu:
        yield "device, held", lambda f: f.load.device_held
        yield "device, peak", lambda f: f.load.device_peak


def _train_rows(setting: Setting, training: Training) -> list[Row]:
    rows = [
        _row("weights, packed and not", lambda s: s.weights),
        _row("quant_state", lambda s: s.quant_state),
        _row("adapters", lambda s: s.adapters),
        _row("gradients", lambda s: s.gradients),
        _row("optimizer", lambda s: s.optimizer),
        _row("gathered by FSDP", lambda s: s.gathered),
        _row("dequantized layer", lambda s: s.dequantized),
        _row("activations (estimate)", lambda s: s.activations),
        _row("logits (estimate)", lambda s: s.logits),
    ]
    if training.graphs:
        rows.append(_row("recorded as CUDA graphs (estimate)", lambda s: s.recorded))
    if training.offload:
        rows.append(_row("inputs of blocks, on the CPU", lambda s: s.offloaded))
    if setting.strategy.cpu_offload:
        rows.append(_row("of these on the CPU", lambda s: s.on_host))
    rows.append(_row("host, peak", lambda s: s.host_peak))
    if not setting.on_cpu:
        rows.append(_row("device, peak", lambda s: s.device_peak))
    return rows


def _row(name: str, figure: Callable[[Step], int]) -> Row:
    return name, lambda plan: figure(plan.train) if plan.train is not None else 0
