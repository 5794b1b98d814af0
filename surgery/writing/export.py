"""Export of a model that is sharded: what ranks hold, into a checkpoint, one module at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from surgery.adapters.metadata import versions
from surgery.comm.background import return_freed_memory
from surgery.comm.comparison import facts_of, same_on_every_rank
from surgery.comm.environment import compute_device, launched_world_size
from surgery.comm.failures import collective, everyone
from surgery.comm.heartbeat import beating
from surgery.comm.ranks import current_ranks
from surgery.config import Quant
from surgery.errors import NotFilledError
from surgery.model.fqn import split
from surgery.origin import origin_of
from surgery.passes.lifetime import waiting_in
from surgery.sharding.base import Part, strategy_of
from surgery.telemetry.report import Report
from surgery.writing.export_plan import Planner, Product, Value, form_of
from surgery.writing.live import Adapted, Tensors, adapted_by
from surgery.writing.merging import chunks
from surgery.writing.output import MAX_SHARD_BYTES, Output, check_output, finite, output
from surgery.writing.packing import Packer, StackPacker, write_state
from surgery.writing.sidecars import changed_config, sidecars

__all__ = ["export"]

#: A tensor that is to be gathered, and the range of what is stored of it; None for all.
Need: TypeAlias = tuple[Part, range | None]

#: Elements that are written at a time where nothing has to be whole.
CHUNK = 1 << 20


def export(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    merged: bool = True,
    dtype: torch.dtype | Quant | str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    report: Report | None = None,
) -> Path:
    """Write `model` as a checkpoint, with its active adapters merged into it; to be called on all ranks alike.

    A module that an adapter changes is gathered by one rank, the ranks taking turns; PEFT's own layers merge it. All
    else is written by the ranks that hold it. `model` is as it was afterwards, also if this fails. A call that was
    killed goes on where it stopped, on any number of ranks, if it is called with the same values.

    Args:
        model: what `surgery.qlora` or `surgery.fill` has returned, or a trainer that was given such a model; sharded or
            not, between steps.
        directory: the new folder.
        merged: whether the active adapters are merged. If not, the base is written as the model holds it, without
            adapters; `surgery.save_adapter` writes these.
        dtype: of the result. None is the dtype of the model with `merged`, and otherwise whatever it holds, packed
            weights as they are. A dtype of torch is for 16 or 32 bits; `surgery.Quant(...)`, "nf4" or "fp4" for packed
            weights: those that the model has packed, or in a model of 16 bits those that `surgery.qlora` would pack.
            What is packed already in this way, and not changed by an adapter, keeps its bytes.
        overwrite: whether a checkpoint in `directory` may be replaced, with all that is in the folder.
        max_shard_bytes: most bytes of a file.
        report: filled with seconds and memory; None makes one that shows progress on rank 0.

    Returns:
        The path of the new folder.

    Raises:
        ConfigError: a model whose checkpoint is not known, adapters that cannot be merged, a `directory` that cannot be
            written; before anything is gathered.
        ExportError: values that are not finite, with the name of the tensor; a full disk.
        PeerError: on the other ranks.
    """
    ranks = current_ranks(launched_world_size())
    report = report or Report(show_progress=ranks.rank == 0, verbs=("Exporting", "Exported"))
    device = compute_device(next((p.device for p in model.parameters() if p.device.type != "cpu"), None))
    with beating(ranks), collective(ranks), torch.no_grad():
        with everyone(ranks, device=device):
            if waiting_in(model) is not None:
                raise NotFilledError("export()")
            base, origin = origin_of(model)
            form = form_of(base, origin, dtype, merged=merged)
            report.note("left_out", form.left_out)
            if ranks.rank == 0:
                check_output(directory, overwrite=overwrite, sources=origin.checkpoint.places)
            facts = facts_of({"dtype": dtype, "merged": merged, "overwrite": overwrite, "shards": max_shard_bytes})
            facts["directory"] = os.path.realpath(directory)
        same_on_every_rank(ranks, "export", {"options of export": facts}, device=device)
        with everyone(ranks, device=device):
            strategy = strategy_of(model)
            strategy.settle(model)
            held = strategy.held(model)
            adapted = adapted_by(model, origin, held) if merged else Adapted()
            planner = Planner(base=base, origin=origin, held=held, adapted=adapted, form=form)
            parts = tuple(planner.works())
            files = _files(planner)
        writers = ranks.world_size if strategy.ranks_agree else 1
        tensors = Tensors.of(held, ranks, device, writers=writers)
        values = tensors.digest(value.state_tensors() for part in parts for value in part.values)
        with output(
            directory,
            list(dict.fromkeys(planned for part in parts for planned in part.tensors)),
            job=json.dumps(["export", values, form.facts, merged, device.type, versions()]),
            ranks=ranks,
            device=device,
            files=files,
            overwrite=overwrite,
            sources=origin.checkpoint.places,
            max_shard_bytes=max_shard_bytes,
        ) as out:
            left = [part for part in parts if not out.is_done(*part.names)]
            writing = _Writing(tensors=tensors, planner=planner, out=out)
            with everyone(ranks, device=device):
                for number, part in enumerate(part for part in left if not part.is_gathered):
                    ranks.raise_peer_failure()
                    writing.write_share(part, has_state=number % writers == ranks.rank)
            gathered = [part for part in left if part.is_gathered]
            rounds = [gathered[first : first + writers] for first in range(0, len(gathered), writers)]
            # Nothing but these takes long.
            tracked = report.track(rounds, names=lambda of_round: [split(part.names[0])[0] for part in of_round])
            for each in tracked if rounds else ():
                report.count_bytes(writing.write_gathered(each))
        return_freed_memory()
        return out.target


@dataclass(frozen=True, kw_only=True, eq=False)
class _Writing:
    """Makes parts, and writes them.

    kept: by the rank that makes them, the factors of the adapters of a stack of experts, which is made in runs.
    """

    tensors: Tensors
    planner: Planner
    out: Output
    kept: dict[int, dict[Need, torch.Tensor | None]] = field(default_factory=dict)

    def write_share(self, part: Product, *, has_state: bool) -> None:
        """Write this rank's share of a part that nobody has to have whole."""
        (value,) = part.values
        name = part.tensors[0].name
        start, data = self.tensors.mine(value.held)
        size = data.element_size()
        if part.packed is not None:
            self.out.write(name, data.view(torch.uint8), start * size)
            if has_state and value.statistics is None:
                write_state(self.out, name, part.packed.saved(value.state))
            return
        # Elements of the weight in each that is stored.
        many = 1 if value.quant is None else size * value.values_per_byte
        last = min((start + data.numel()) * many, value.shape.numel())
        for first in range(start * many, last, CHUNK):
            piece = value.elements(data, start * many, first, min(first + CHUNK, last))
            self.out.write(name, finite(piece, name), first)

    def write_gathered(self, parts: Sequence[Product]) -> int:
        """Gather, make and write parts, one by each of the first ranks; returns bytes gathered here. Collective."""
        ranks, mine, size = self.tensors.ranks, None, 0
        for rank, part in enumerate(parts):
            factors, kept = dict.fromkeys(self._factors(part)), self.kept.pop(rank, {})
            got = {need: kept.pop(need) for need in factors if need in kept}
            kept.clear()
            new = [need for need in dict.fromkeys((*self._base(part), *factors)) if need not in got]
            got |= {need: self.tensors.gather(need[0], rank, need[1]) for need in new}
            if part.experts is not None:
                self.kept[rank] = {need: got[need] for need in factors}
            if rank == ranks.rank:
                mine = (part, {need: tensor for need, tensor in got.items() if tensor is not None})
                size = sum(mine[1][need].nbytes for need in new)
        with everyone(ranks, device=self.tensors.device):
            if mine is not None:
                self._write_whole(*mine)
            return size

    def _factors(self, part: Product) -> list[Need]:
        """The tensors of adapters that change `part`."""
        sites = (site for value in part.values for site in value.sites)
        return [(held, None) for site in sites for held in self.planner.adapted.inputs_of(site).values()]

    def _base(self, part: Product) -> Iterator[Need]:
        """Tensors of the base that one rank has to have, and ranges of the elements that are stored of them."""
        for value in part.values:
            experts = part.experts or value.experts
            if part.experts is None or not value.is_copied:
                yield value.held, None if part.experts is None else value.stored(experts)
            if value.statistics is not None:
                yield from ((value.statistics, each) for each, _ in value.stored_statistics(experts).values())
            yield from ((other.held, None) for other in value.beside)

    def _write_experts(self, part: Product, experts: range, got: Mapping[Need, torch.Tensor]) -> None:
        (value,), name = part.values, part.tensors[0].name
        own, row = self._joined(value, got, experts), value.shape[1:].numel()
        packer = None if part.packed is None else StackPacker(part.packed, value.shape, part.tensors, self.out)
        if packer is not None and value.is_copied:
            packer.add_state(own.state, experts)
            return
        flat = got[value.held, value.stored(experts)]
        for rows, piece in self._pieces(own, got, name, flat=flat, first=experts.start):
            start = (experts.start + rows.start) * row
            if packer is not None:
                packer.add(piece, start)
            else:
                assert part.apart is not None
                part.apart.write(self.out.write, piece, start)

    def _joined(self, value: Value, got: Mapping[Need, torch.Tensor], experts: range) -> Value:
        """The value of some experts, with their statistics, if it is a packed stack; of any other these rows."""
        if value.statistics is None:
            return replace(value, shape=torch.Size((len(experts), *value.shape[1:])))
        parts = value.stored_statistics(experts).items()
        found = {name: got[value.statistics, need].view(torch.uint8)[own] for name, (need, own) in parts}
        return value.joined(experts, found)

    def _write_whole(self, part: Product, got: Mapping[Need, torch.Tensor]) -> None:
        if part.experts is not None:
            self._write_experts(part, part.experts, got)
            return
        name, value = part.tensors[0].name, part.values[0]
        if part.loaded:
            made = {
                loaded.names[0]: self._whole(each, got, loaded.names[0])
                for loaded, each in zip(part.loaded, part.values, strict=True)
            }
            apart = self.planner.taken_apart(part.loaded[0], made)
            made.clear()
            for planned in part.tensors:
                self.out.write(planned.name, apart.pop(planned.name))
        elif part.packed is not None and value.is_copied:
            self.out.write(name, got[value.held, None].view(torch.uint8))
            write_state(self.out, name, part.packed.saved(self._joined(value, got, value.experts).state))
        elif part.packed is not None:
            whole = self._whole(value, got, name)
            whole = whole.t() if value.is_turned and value.quant is None else whole
            Packer(part.packed, whole.shape, part.tensors, self.out).add(whole, 0)
        elif value.is_turned and value.quant is not None:
            self.out.write(name, self._whole(value, got, name).t())
        else:
            row = value.shape[1:].numel()
            for rows, piece in self._pieces(value, got, name):
                self.out.write(name, piece, rows.start * row)

    def _whole(self, value: Value, got: Mapping[Need, torch.Tensor], name: str) -> torch.Tensor:
        """All of a value, in the memory that it was gathered to if it fits, since experts may be large."""
        flat = got[value.held, None]
        is_plain = value.quant is None and flat.dtype == value.dtype
        whole = flat.view(value.shape) if is_plain else torch.empty(value.shape, dtype=value.dtype, device=flat.device)
        for rows, piece in self._pieces(value, got, name):
            place = whole[rows.start : rows.stop]
            if place.data_ptr() != piece.data_ptr():
                place.copy_(piece)
        return whole

    def _pieces(
        self,
        value: Value,
        got: Mapping[Need, torch.Tensor],
        name: str,
        *,
        flat: torch.Tensor | None = None,
        first: int = 0,
    ) -> Iterator[tuple[range, torch.Tensor]]:
        """Ranges of dimension 0, merged.

        flat: what is stored of `value`; None if that was gathered whole. first: its row in the whole tensor.
        """
        if flat is None:
            flat = got[value.held, None]
            value = value if value.statistics is None else self._joined(value, got, value.experts)
        inputs = [
            {
                key: got[held, None].view(held.shape).float()
                for key, held in self.planner.adapted.inputs_of(site).items()
            }
            for site in value.sites
        ]
        is_divisible = all(site.is_divisible for site in value.sites) and not value.beside
        for rows in chunks(value.shape) if is_divisible else [range(value.shape[0])]:
            piece = value.rows(flat, rows)
            at = range(first + rows.start, first + rows.stop)
            for site, given in zip(value.sites, inputs, strict=True):
                others = {
                    each.leaf: each.rows(got[each.held, None], rows)
                    for each in value.beside
                    if each.leaf in site.changes
                }
                piece = site.merge({value.leaf: piece, **others}, given, at if is_divisible else None)[value.leaf]
            yield rows, finite(piece, name)


def _files(planner: Planner) -> dict[str, bytes | Path]:
    """Files beside the weights."""
    form, adapted = planner.form, planner.adapted
    rows: dict[str, object] = {
        f"adapter {name}": f"LoRA, rank {each.r}, alpha {each.lora_alpha}"
        for name, each in zip(adapted.names, adapted.configs, strict=True)
    }
    if form.formats:
        rows["quantization"] = f"{form.formats[0].label}, {form.formats[0].description}"
    title = "Base model with merged adapters" if adapted.names else "Base model"
    relation = "merge" if adapted.names else "quantized" if form.formats else "finetune"
    return sidecars(planner.origin.checkpoint, _config(planner), title=title, relation=relation, settings=rows)


def _config(planner: Planner) -> dict[str, Any]:
    """The checkpoint's config.json with what has changed."""
    form, live = planner.form, getattr(planner.base, "config", None)
    config = planner.origin.checkpoint.config or {}
    if live is not None and config.get("model_type") != live.model_type:  # the text model of a composite one
        config = json.loads(live.to_json_string(use_diff=False))
    return changed_config(
        config,
        dtype=form.dtype or planner.origin.setting.dtype,
        untied=planner.untied,
        quantization=form.config if form.formats else None,
    )
