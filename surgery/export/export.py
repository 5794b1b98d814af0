"""Export of a model that is sharded: what ranks hold, into a checkpoint, one module at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from surgery.errors import ConfigError, ExportError, NotFilledError
from surgery.export.live import Adapted, Place, Tensors, adapted_by
from surgery.export.merging import MergeSite, chunks
from surgery.export.output import MAX_SHARD_BYTES, Output, Planned, check_output, output
from surgery.export.sidecars import sidecars
from surgery.model.fqn import split
from surgery.model.skeleton import build_on_meta, causal_lm
from surgery.model.tree import is_conv1d, was_conv1d
from surgery.passes.lifetime import waiting_in
from surgery.passes.origin import Loaded, Origin, origin_of
from surgery.passes.replace import Replace, quantizable
from surgery.quantizers.base import QuantFormat, format_for, format_of
from surgery.sharding.base import Held, strategy_of
from surgery.telemetry.report import Report

__all__ = ["export"]

#: Elements that are written at a time where nothing has to be whole.
CHUNK = 1 << 20

#: What a sharded model can be written in by these names.
PACKED = ("nf4", "fp4")


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
    device = compute_device(next((p.device for p in model.parameters() if p.device.type != "cpu"), None))
    with beating(ranks), collective(ranks), torch.no_grad():
        with everyone(ranks, device=device):
            if waiting_in(model) is not None:
                raise NotFilledError("export()")
            base, origin = origin_of(model)
            asked = _checked(base, origin, dtype, merged=merged)
            if ranks.rank == 0:
                check_output(directory, overwrite=overwrite, source=origin.checkpoint.path)
            facts = facts_of({"dtype": dtype, "merged": merged, "overwrite": overwrite, "shards": max_shard_bytes})
            facts["directory"] = os.path.realpath(directory)
        same_on_every_rank(ranks, "export", {"options of export": facts}, device=device)
        with everyone(ranks, device=device):
            strategy = strategy_of(model)
            held = strategy.held(model)
            adapted = adapted_by(model, origin, held) if merged else Adapted()
            planner = _Planner(base=base, origin=origin, held=held, adapted=adapted, asked=asked)
            parts = tuple(planner.parts())
            files = _files(planner)
        writers = ranks.world_size if strategy.ranks_agree else 1
        tensors = Tensors.of(held, ranks, device, writers=writers)
        values = tensors.digest(value.state_tensors() for part in parts for value in part.values)
        with output(
            directory,
            [planned for part in parts for planned in part.tensors],
            job=json.dumps(["export", values, asked.facts, merged, device.type, versions()]),
            ranks=ranks,
            device=device,
            files=files,
            overwrite=overwrite,
            source=origin.checkpoint.path,
            max_shard_bytes=max_shard_bytes,
        ) as out:
            left = [part for part in parts if not out.is_done(*(planned.name for planned in part.tensors))]
            writing = _Writing(tensors=tensors, planner=planner, out=out)
            with everyone(ranks, device=device):
                for number, part in enumerate(part for part in left if not part.is_gathered):
                    ranks.raise_peer_failure()
                    writing.write_share(part, has_state=number % writers == ranks.rank)
            gathered = [part for part in left if part.is_gathered]
            for first in range(0, len(gathered), writers):
                writing.write_gathered(gathered[first : first + writers])
        return_freed_memory()
        return out.target


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """The form of the result. dtype: of what is not packed; None for that of each tensor.

    quant: options of the weights that are packed; None for none. packed: their format. chosen: FQNs of the modules that
    have them; None for those that the model has packed.
    """

    dtype: torch.dtype | None = None
    quant: Any = None
    packed: QuantFormat | None = None
    chosen: frozenset[str] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def facts(self) -> list[str]:
        """The form as text."""
        return [str(self.dtype), str(self.quant)]


def _checked(base: nn.Module, origin: Origin, dtype: Any, *, merged: bool) -> _Asked:
    """The form that `dtype` asks for. Raises `ConfigError`."""
    setting = origin.setting
    is_packed = any(format_of(module) is not None for module in base.modules())
    if dtype is None and (merged or not is_packed):
        return _Asked()
    if isinstance(dtype, torch.dtype):
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(f"dtype: expected float32, bfloat16 or float16, found {dtype}")
        return _Asked(dtype=dtype)
    quant: Any = setting.quant if dtype is None else dtype
    if isinstance(dtype, str):
        if dtype not in PACKED:
            raise ConfigError(
                f"dtype: expected a dtype of torch, a surgery.Quant, or {' or '.join(PACKED)}; found {dtype!r:.40}"
            )
        quant = setting.quant if getattr(setting.quant, "quant_type", None) == dtype else Quant(dtype)  # type: ignore[arg-type]
    if dtype is not None and not isinstance(quant, Quant):
        raise ConfigError(
            f"dtype: expected a dtype of torch, a surgery.Quant, or {' or '.join(PACKED)}; found {dtype!r:.80}"
        )
    if isinstance(dtype, Quant) and dtype.quant_storage not in (None, torch.uint8):
        raise ConfigError(
            f"dtype: packed weights are written as uint8, found quant_storage={dtype.quant_storage}: leave it out"
        )
    if isinstance(quant, Quant):
        quant = replace(quant, quant_storage=torch.uint8)
    packed = format_for(quant, dtype=setting.dtype)
    packed.saved_shapes(1)  # raises where there is no form on disk
    if is_packed:
        return _Asked(quant=quant, packed=packed, config=_quantization_config(base, origin, quant))
    skeleton: Any = build_on_meta(
        causal_lm(origin.checkpoint, setting.dtype), dtype=setting.dtype, device=torch.device("cpu")
    )
    chosen = quantizable(skeleton, packed)
    Replace(quant=packed, chosen=chosen).run(skeleton)
    return _Asked(
        quant=quant,
        packed=packed,
        chosen=frozenset(site.fqn for site in chosen),
        config=skeleton.config.quantization_config.to_dict(),
    )


def _quantization_config(base: Any, origin: Origin, quant: Any) -> dict[str, Any]:
    """The entry of config.json: as the checkpoint has it, or as the model was marked, with the settings of `quant`."""
    live = getattr(getattr(base, "config", None), "quantization_config", None)
    stored = (origin.checkpoint.config or {}).get("quantization_config")
    found = dict(stored or (live.to_dict() if live is not None else {}))
    if isinstance(quant, Quant):
        found |= {
            "bnb_4bit_quant_type": quant.quant_type,
            "bnb_4bit_use_double_quant": quant.double_quant,
            "bnb_4bit_quant_storage": "uint8",
        }
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Value:
    """One tensor of the model, and what is made of it.

    quant, state: of a packed weight, else None. shape: its own one, unpacked, as the module has it. dtype: in which it
    is merged, and written unless it is packed. sites: layers of PEFT that change it. beside: other tensors of its
    module that these change with it.
    """

    held: Held
    leaf: str
    quant: QuantFormat | None
    state: Any
    shape: torch.Size
    dtype: torch.dtype
    is_turned: bool
    sites: tuple[MergeSite, ...] = ()
    beside: tuple[_Value, ...] = ()

    def state_tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensors of its state."""
        return {} if self.quant is None else self.quant.state_tensors(self.state)

    @property
    def values_per_byte(self) -> int:
        """Elements in a byte of a packed weight."""
        assert self.quant is not None
        return self.quant.layout(None).values_per_byte

    def rows(self, flat: torch.Tensor, rows: range) -> torch.Tensor:
        """A range of dimension 0, of all that is stored of it."""
        row = self.shape[1:].numel()
        part = self.elements(flat, 0, rows.start * row, rows.stop * row)
        return part.view(len(rows), *self.shape[1:]) if self.shape else part.view(())

    def elements(self, stored: torch.Tensor, offset: int, start: int, stop: int) -> torch.Tensor:
        """The elements `start` to `stop`, 1-D, of what is `stored` from element `offset` on."""
        if self.quant is None:
            return stored[start - offset : stop - offset].to(self.dtype)
        size = self.values_per_byte
        packed = stored.view(torch.uint8)[(start - offset) // size : -(-(stop - offset) // size)]
        return self.quant.dequantize(packed, self.state, start)[: stop - start].to(self.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """Tensors of the output that are made together. is_gathered: whether one rank has to have all of `values`.

    packed: the format in which what is made of the one value is written, if it is. loaded: what is taken apart again
    for the output, where transformers makes parameters of several tensors of a checkpoint.
    """

    tensors: tuple[Planned, ...]
    values: tuple[_Value, ...]
    is_gathered: bool
    packed: QuantFormat | None = None
    loaded: tuple[Loaded, ...] = ()


@dataclass(kw_only=True, eq=False)
class _Planner:
    """Finds for every tensor that was loaded what is to be written, and how."""

    base: Any
    origin: Origin
    held: Mapping[Place, Held]
    adapted: Adapted
    asked: _Asked
    untied: bool = field(default=False, init=False)

    def parts(self) -> Iterator[_Part]:
        """All parts, in the order of the model."""
        groups: dict[Any, list[Loaded]] = {}
        for loaded in self.origin.tensors:
            groups.setdefault(loaded.assignment, []).append(loaded)
        for assignment, group in groups.items():
            found = [(loaded, self._values(loaded)) for loaded in group]
            is_packed = any(self._is_packed(loaded, value) for loaded, values in found for value in values[:1])
            if assignment.converter is not None and not is_packed:
                yield self._fused(group, tuple(self._only(loaded, values) for loaded, values in found))
                continue
            for loaded, values in found:
                yield from (self._part(loaded, value, number) for number, value in enumerate(values))

    def _only(self, loaded: Loaded, values: Sequence[_Value]) -> _Value:
        if len(values) > 1:
            raise self._tied(loaded)
        return values[0]

    def _tied(self, loaded: Loaded) -> ConfigError:
        return ConfigError(
            f"{' and '.join(loaded.names)} are tied in this base, and adapters change one and not the other: expected "
            "that of an embedding and a head, which can be untied. Export with merged=False"
        )

    def _values(self, loaded: Loaded) -> list[_Value]:
        """What the names of a tensor have become: one value, or more where adapters have changed them differently."""
        found: dict[object, _Value] = {}
        modules = []
        for (reference, leaf), name in zip(loaded.places, loaded.names, strict=True):
            module = reference()
            if module is None or (module, leaf) not in self.held:
                raise ConfigError(
                    f"{name} is not in the model any more, or not as it was loaded: expected the modules that "
                    "surgery.qlora or surgery.fill has filled"
                )
            value = self._value(loaded, module, leaf)
            found.setdefault((value.held, frozenset(id(site) for site in value.sites)), value)
            modules.append(module)
        if len(found) > 1:
            if len(found) != len(modules) or not any(isinstance(module, nn.Embedding) for module in modules):
                raise self._tied(loaded)
            self.untied = True
        return list(found.values())

    def _value(self, loaded: Loaded, module: Any, leaf: str) -> _Value:
        source = self.adapted.copies.get(module, module)
        sites = tuple(self.adapted.sites.get((module, leaf), ()))
        value = self._plain(loaded, source, leaf)
        others = {other for site in sites for other in site.changes if other != leaf}
        beside = tuple(self._plain(self._loaded_at(module, other), module, other) for other in sorted(others))
        return replace(value, sites=sites, beside=beside)

    def _loaded_at(self, module: nn.Module, leaf: str) -> Loaded:
        return next(
            each
            for each in self.origin.tensors
            if any(reference() is module and name == leaf for reference, name in each.places)
        )

    def _plain(self, loaded: Loaded, module: Any, leaf: str) -> _Value:
        """The value without adapters."""
        held = self.held[module, leaf]
        if held.shape != loaded.shape:
            raise ConfigError(
                f"{loaded.names[0]}: expected the shape with which it was loaded, {tuple(loaded.shape)}, found "
                f"{tuple(held.shape)}: a model that was resized cannot be exported"
            )
        quant = self.origin.setting.format if leaf == "weight" and format_of(module) is not None else None
        is_cast = self.asked.dtype is not None and loaded.dtype == self.origin.setting.dtype
        dtype = self.asked.dtype if is_cast else loaded.dtype
        return _Value(
            held=held,
            leaf=leaf,
            quant=quant,
            state=None if quant is None else quant.state_of(module),
            shape=held.shape if quant is None else quant.logical(module),
            dtype=dtype or loaded.dtype,
            is_turned=leaf == "weight" and (was_conv1d(module) if quant is not None else is_conv1d(module)),
        )

    def _is_packed(self, loaded: Loaded, value: _Value) -> bool:
        """Whether the tensor is to be packed."""
        if self.asked.packed is None or value.leaf != "weight":
            return False
        chosen = self.asked.chosen
        return value.quant is not None if chosen is None else split(loaded.names[0])[0] in chosen

    def _part(self, loaded: Loaded, value: _Value, number: int) -> _Part:
        """The part of one value. number: among those of its tensor."""
        if self._is_packed(loaded, value):
            return self._packed(loaded, value)
        name = loaded.assignment.sources[0] if loaded.assignment.converter is None else loaded.names[0]
        if number:  # the second of an embedding and a head, which the checkpoint has under the name of the first
            name = name.replace(loaded.names[0], loaded.names[number])
            name = loaded.names[number] if name == loaded.assignment.sources[0] else name
        turned = value.is_turned and value.quant is not None
        planned = Planned(name=name, dtype=value.dtype, shape=tuple(value.shape[:: -1 if turned else 1]))
        return _Part(tensors=(planned,), values=(value,), is_gathered=bool(value.sites) or turned)

    def _packed(self, loaded: Loaded, value: _Value) -> _Part:
        packed = self.asked.packed
        assert packed is not None
        source = loaded.assignment.sources[0]
        is_its_own = loaded.assignment.converter is None and split(source)[1] == value.leaf
        name = source if is_its_own else loaded.names[0]
        shape = value.shape[:: -1 if value.is_turned and value.quant is None else 1]
        rows = packed.layout(None).packed_shape(shape, packed.storage)
        found = [Planned(name=name, dtype=packed.storage, shape=rows)]
        for end, of in packed.saved_shapes(shape.numel()).items():
            known = {} if of is None else {"dtype": of[0]}
            found.append(Planned(name=f"{name}.{end}", shape=None if of is None else of[1], **known))
        is_same = value.quant is not None and _alike(value.quant.options, packed.options)
        return _Part(tensors=tuple(found), values=(value,), packed=packed, is_gathered=bool(value.sites) or not is_same)

    def _fused(self, group: Sequence[Loaded], values: tuple[_Value, ...]) -> _Part:
        """The part of tensors that transformers has merged or split, and takes apart as `save_pretrained` does."""
        meta = {
            loaded.names[0]: torch.empty(value.shape, dtype=value.dtype, device="meta")
            for loaded, value in zip(group, values, strict=True)
        }
        try:
            made = self.taken_apart(group[0], meta)
            found = {name: made.pop(name) for name in group[0].assignment.sources if name in made} | made
        except Exception as error:
            raise ConfigError(
                f"{group[0].names[0]}: transformers makes it of {len(group[0].assignment.sources)} tensors "
                f"({group[0].assignment.sources[0]}, ...), and cannot make those of it again: {error}. Save the "
                "adapter, and merge it with PEFT's merge_and_unload"
            ) from error
        planned = tuple(Planned(name=name, dtype=t.dtype, shape=tuple(t.shape)) for name, t in found.items())
        return _Part(tensors=planned, values=values, loaded=tuple(group), is_gathered=True)

    def taken_apart(self, loaded: Loaded, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of a checkpoint, as transformers makes them of parameters by FQN."""
        from transformers.core_model_loading import revert_weight_conversion

        logical = loaded.assignment.logical
        view: Any = SimpleNamespace(
            config=self.base.config,
            get_parameter=None if logical is None else logical.get_parameter,
            _weight_conversions=list(self.origin.conversions),
        )
        found: dict[str, torch.Tensor] = revert_weight_conversion(view, dict(tensors))
        return found


def _alike(one: Any, other: Any) -> bool:
    """Whether two options pack a weight into the same bytes."""
    names = ("quant_type", "blocksize", "double_quant")
    return type(one) is type(other) and all(getattr(one, n, None) == getattr(other, n, None) for n in names)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Writing:
    """Makes parts, and writes them."""

    tensors: Tensors
    planner: _Planner
    out: Output

    def write_share(self, part: _Part, *, has_state: bool) -> None:
        """Write this rank's share of a part that nobody has to have whole."""
        (value,) = part.values
        name = part.tensors[0].name
        start, data = self.tensors.mine(value.held)
        size = data.element_size()
        if part.packed is not None:
            self.out.write(name, data.view(torch.uint8), start * size)
            if has_state:
                self._write_state(name, part.packed.saved(value.state))
            return
        # Elements of the weight in each that is stored.
        many = 1 if value.quant is None else size * value.values_per_byte
        last = min((start + data.numel()) * many, value.shape.numel())
        for first in range(start * many, last, CHUNK):
            piece = value.elements(data, start * many, first, min(first + CHUNK, last))
            self.out.write(name, _finite(piece, name), first)

    def write_gathered(self, parts: Sequence[_Part]) -> None:
        """Gather, make and write parts, one by each of the first ranks; collective."""
        ranks, mine = self.tensors.ranks, None
        for rank, part in enumerate(parts):
            got = {held: self.tensors.gather(held, rank) for held in dict.fromkeys(self._needed(part))}
            if rank == ranks.rank:
                mine = (part, got)
        with everyone(ranks, device=self.tensors.device):
            if mine is not None:
                self._write_whole(*mine)

    def _needed(self, part: _Part) -> Iterator[Held]:
        for value in part.values:
            yield from (value.held, *(other.held for other in value.beside))
            for site in value.sites:
                yield from self.planner.adapted.inputs_of(site).values()

    def _write_whole(self, part: _Part, got: Mapping[Held, Any]) -> None:
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
        elif part.packed is not None:
            whole = self._whole(value, got, name)
            self._pack(name, whole.t() if value.is_turned and value.quant is None else whole, part.packed, value)
        elif value.is_turned and value.quant is not None:
            self.out.write(name, self._whole(value, got, name).t())
        else:
            row = value.shape[1:].numel()
            for rows, piece in self._pieces(value, got, name):
                self.out.write(name, piece, rows.start * row)

    def _whole(self, value: _Value, got: Mapping[Held, Any], name: str) -> torch.Tensor:
        """All of a value, in the memory that it was gathered to if it fits, since experts may be large."""
        flat = got[value.held]
        is_plain = value.quant is None and flat.dtype == value.dtype
        whole = flat.view(value.shape) if is_plain else torch.empty(value.shape, dtype=value.dtype, device=flat.device)
        for rows, piece in self._pieces(value, got, name):
            place = whole[rows.start : rows.stop]
            if place.data_ptr() != piece.data_ptr():
                place.copy_(piece)
        return whole

    def _pieces(self, value: _Value, got: Mapping[Held, Any], name: str) -> Iterator[tuple[range, torch.Tensor]]:
        """Ranges of dimension 0, merged."""
        inputs = [
            {key: got[held].view(held.shape).float() for key, held in self.planner.adapted.inputs_of(site).items()}
            for site in value.sites
        ]
        is_divisible = all(site.is_divisible for site in value.sites) and not value.beside
        for rows in chunks(value.shape) if is_divisible else [range(value.shape[0])]:
            piece = value.rows(got[value.held], rows)
            for site, given in zip(value.sites, inputs, strict=True):
                others = {
                    each.leaf: each.rows(got[each.held], rows) for each in value.beside if each.leaf in site.changes
                }
                piece = site.merge({value.leaf: piece, **others}, given, rows if is_divisible else None)[value.leaf]
            yield rows, _finite(piece, name)

    def _pack(self, name: str, whole: torch.Tensor, packed: QuantFormat, value: _Value) -> None:
        layout, flat = packed.layout(None), whole.reshape(-1)
        size = layout.whole_blocks(packed.run_elements(flat.device))
        statistics = []
        for start in range(0, flat.numel(), size):
            data, of_run = packed.quantize(flat[start : start + size], layout, value.dtype)
            self.out.write(name, data, start // layout.values_per_byte)
            statistics.append(of_run)
        (state,) = packed.states([torch.cat(statistics)], [whole.shape], [value.dtype])
        self._write_state(name, packed.saved(state))

    def _write_state(self, name: str, saved: Mapping[str, torch.Tensor | str]) -> None:
        for end, entry in saved.items():
            if isinstance(entry, str):
                self.out.write_state(f"{name}.{end}", entry)
            else:
                self.out.write(f"{name}.{end}", _finite(entry, name))


def _finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """`tensor` itself. Raises `ExportError` for values that are not finite."""
    if not tensor.dtype.is_floating_point or bool(torch.isfinite(tensor).all()):
        return tensor
    bad = int((~torch.isfinite(tensor)).sum())
    raise ExportError(
        f"{name}: expected finite numbers, found {bad:,} that are NaN or infinite: the base has such values, or training "
        f"has diverged, or the sum is beyond what {tensor.dtype} holds. The output was not made"
    )


def _files(planner: _Planner) -> dict[str, bytes | Path]:
    """Files beside the weights."""
    base, origin, asked, adapted = planner.base, planner.origin, planner.asked, planner.adapted
    live = getattr(base, "config", None)
    config = dict(origin.checkpoint.config or {})
    if live is not None and config.get("model_type") != live.model_type:  # the text model of a composite one
        config = json.loads(live.to_json_string(use_diff=False))
    config.pop("quantization_config", None)
    parts = [config]
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = dict(config["text_config"])
        parts.append(config["text_config"])
    dtype = str(asked.dtype or origin.setting.dtype).removeprefix("torch.")
    for part in parts:
        for name in ("dtype", "torch_dtype"):
            if name in part or (part is config and name == "dtype"):
                part[name] = dtype
        if planner.untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    if asked.packed is not None:
        config["quantization_config"] = dict(asked.config)
    rows: dict[str, object] = {
        f"adapter {name}": f"LoRA, rank {each.r}, alpha {each.lora_alpha}"
        for name, each in zip(adapted.names, adapted.configs, strict=True)
    }
    if asked.packed is not None:
        rows["quantization"] = f"{asked.packed.label}, {asked.packed.description}"
    title = "Base model with merged adapters" if adapted.names else "Base model"
    relation = "merge" if adapted.names else "quantized" if asked.packed is not None else "finetune"
    return sidecars(origin.checkpoint, config, title=title, relation=relation, settings=rows)
