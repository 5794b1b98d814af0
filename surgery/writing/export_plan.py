"""The plan of an export, made before a tensor is gathered: which are cast, merged, packed, taken apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from surgery.config import Quant
from surgery.errors import ConfigError
from surgery.model.skeleton import build_on_meta, causal_lm
from surgery.model.tree import is_conv1d, was_conv1d
from surgery.origin import Loaded, Origin
from surgery.quantizers.base import STATISTICS, QuantFormat, format_of, formats_for
from surgery.sharding.base import Part
from surgery.writing.apart import Apart, apart
from surgery.writing.live import Adapted, Place
from surgery.writing.merging import MergeSite, chunks
from surgery.writing.output import Planned
from surgery.writing.packing import format_among, planned_packed, quantized_in

__all__ = ["OutputForm", "Planner", "Product", "Value", "form_of"]

#: Elements of a stack of experts that one rank makes at a time, if two experts have no more.
RUN = 1 << 26

#: The types of packed weights that can be asked for by name.
PACKED = ("nf4", "fp4")


@dataclass(frozen=True, kw_only=True)
class OutputForm:
    """The form of the result. dtype: of what is not packed; None for that of each tensor.

    quant: options of the weights that are packed; None for none. formats: theirs. chosen: FQNs of the weights that are
    packed, and the format of each; None for those that the model has packed. left_out: FQNs of those of their kind that
    stay in 16 bits.
    """

    dtype: torch.dtype | None = None
    quant: Any = None
    formats: tuple[QuantFormat, ...] = ()
    chosen: Mapping[str, QuantFormat] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def facts(self) -> list[str]:
        """The form as text."""
        return [str(self.dtype), str(self.quant)]


def form_of(base: nn.Module, origin: Origin, dtype: Any, *, merged: bool) -> OutputForm:
    """The form that `dtype` asks for, as `surgery.export` takes it. Raises `ConfigError`."""
    is_packed = any(format_of(module) is not None for module in base.modules())
    held = origin.setting.format
    if is_packed and type(held).dequantize is QuantFormat.dequantize:
        raise ConfigError(
            f"a model of {held.label} cannot be exported, since its format does not say how it is dequantized: save "
            "the adapter, and merge it into the checkpoint (surgery merge)"
        )
    if dtype is None and (merged or not is_packed):
        return OutputForm()
    if isinstance(dtype, torch.dtype):
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(f"dtype: expected float32, bfloat16 or float16, found {dtype}")
        return OutputForm(dtype=dtype)
    quant = _options(origin.setting.quant, dtype)
    formats = formats_for(quant, dtype=origin.setting.dtype)
    formats[0].saved_shapes(torch.Size((1, 1)))  # raises where there is no form on disk
    if is_packed:
        return OutputForm(quant=quant, formats=formats, config=_quantization_config(base, origin, quant))
    skeleton = build_on_meta(
        causal_lm(origin.checkpoint, origin.setting.dtype), dtype=origin.setting.dtype, device=torch.device("cpu")
    )
    chosen, config, left_out = quantized_in(skeleton, formats)
    return OutputForm(quant=quant, formats=formats, chosen=chosen, config=config, left_out=left_out)


def _options(held: Any, asked: Any) -> Any:
    """The options of packed weights: those that the model has, or the ones that are `asked` for."""
    if isinstance(asked, str) and asked in PACKED:
        found: Any = held if getattr(held, "quant_type", None) == asked else Quant(asked)  # type: ignore[arg-type]
    elif asked is None or isinstance(asked, Quant):
        found = held if asked is None else asked
    else:
        expected = f"a dtype of torch, a surgery.Quant, or {' or '.join(PACKED)}"
        raise ConfigError(f"dtype: expected {expected}; found {asked!r:.80}")
    if isinstance(asked, Quant) and asked.quant_storage not in (None, torch.uint8):
        raise ConfigError(
            f"dtype: packed weights are written as uint8, found quant_storage={asked.quant_storage}: leave it out"
        )
    return replace(found, quant_storage=torch.uint8) if isinstance(found, Quant) else found


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
class Value:
    """One tensor of the model, and what is made of it.

    quant, state: of a packed weight, else None; statistics: its state as a parameter, where its module has one. shape:
    its own one, unpacked, as the module has it. dtype: in which it is merged, and written unless it is packed. sites:
    layers of PEFT that change it. is_copied: whether packed bytes are written as they are. beside: other tensors of its
    module that these change with it.
    """

    held: Part
    leaf: str
    quant: QuantFormat | None
    state: Any
    shape: torch.Size
    dtype: torch.dtype
    is_turned: bool
    statistics: Part | None = None
    is_copied: bool = False
    sites: tuple[MergeSite, ...] = ()
    beside: tuple[Value, ...] = ()

    def state_tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensors of its state, unless they are a parameter."""
        if self.quant is None or self.statistics is not None:
            return {}
        return self.quant.state_tensors(self.state)

    @property
    def values_per_byte(self) -> int:
        """Elements in a byte of a packed weight."""
        assert self.quant is not None
        return self.quant.layout(None, self.leaf).values_per_byte

    @property
    def experts(self) -> range:
        """The experts of a stack; one of any other packed weight."""
        return range(self.shape[0] if self.quant is not None and self.quant.by_expert else 1)

    def joined(self, experts: range, found: Mapping[str, torch.Tensor]) -> Value:
        """The value of some experts alone, with the bytes of their statistics."""
        assert self.quant is not None
        shape = (len(experts), *self.shape[1:]) if self.quant.by_expert else self.shape
        state = self.quant.state_from(self.state, experts, found)
        return replace(self, state=state, shape=torch.Size(shape), statistics=None)

    def stored(self, rows: range) -> range:
        """The elements that are stored of a range of dimension 0; whole ones."""
        size = 1 if self.quant is None else self.held.data.element_size() * self.values_per_byte
        row = self.shape[1:].numel()
        return range(rows.start * row // size, rows.stop * row // size)

    def stored_statistics(self, experts: range) -> dict[str, tuple[range, slice]]:
        """The elements that are stored of the statistics of some experts, and the place of these among their bytes."""
        assert self.quant is not None
        assert self.statistics is not None
        size, found = self.statistics.data.element_size(), {}
        for name, bytes_ in self.quant.state_ranges(self.state, experts).items():
            first = bytes_.start // size
            place = slice(bytes_.start - first * size, bytes_.stop - first * size)
            found[name] = range(first, -(-bytes_.stop // size)), place
        return found

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
        return self.quant.dequantize(packed, start, self.state)[: stop - start].to(self.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Product:
    """Tensors of the output that are made together. is_gathered: whether one rank has to have all of `values`.

    packed: the format in which what is made of the one value is written, if it is. loaded: what is taken apart again
    for the output, where transformers makes parameters of several tensors of a checkpoint.
    experts: those of a stack that are made here. apart: the tensors of all of it, if it is not packed.
    """

    tensors: tuple[Planned, ...]
    values: tuple[Value, ...]
    is_gathered: bool
    packed: QuantFormat | None = None
    loaded: tuple[Loaded, ...] = ()
    experts: range | None = None
    apart: Apart | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors of the output."""
        return tuple(planned.name for planned in self.tensors)


@dataclass(kw_only=True, eq=False)
class Planner:
    """Finds for every tensor that was loaded what is to be written, and how."""

    base: Any
    origin: Origin
    held: Mapping[Place, Part]
    adapted: Adapted
    form: OutputForm
    untied: bool = field(default=False, init=False)

    def works(self) -> Iterator[Product]:
        """All work, in the order of the model."""
        groups: dict[Any, list[Loaded]] = {}
        for loaded in self.origin.tensors:
            groups.setdefault(loaded.assignment, []).append(loaded)
        for assignment, group in groups.items():
            left = []
            for loaded in group:
                values = self._values(loaded)
                stack = list(self._stack(loaded, values[0])) if len(values) == 1 else []
                yield from stack
                left += [] if stack else [(loaded, values)]
            is_packed = any(self._format(loaded, value) for loaded, values in left for value in values[:1])
            if left and assignment.converter is not None and not is_packed:
                yield self._fused(
                    [loaded for loaded, _ in left], tuple(self._only(loaded, values) for loaded, values in left)
                )
                continue
            for loaded, values in left:
                yield from (self._part(loaded, value, number) for number, value in enumerate(values))

    def _stack(self, loaded: Loaded, value: Value) -> Iterator[Product]:
        """The parts of a stack of experts, in runs; none if it is no stack, or has to be whole."""
        packed = self._format(loaded, value)
        kinds = [quant for quant in (packed, value.quant) if quant is not None]
        if not kinds or not kinds[0].by_expert:
            return
        name, pieces = loaded.names[0], None
        assignment = loaded.assignment
        if packed is not None:
            tensors = planned_packed(assignment.key_of(name), packed, value.shape, packed.storage)
        else:
            empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
            pieces = apart(assignment, name, empty, self.base, self.origin.conversions)
            if pieces is None and assignment.converter is not None:
                return
            key = assignment.key_of(name)
            pieces = pieces or Apart(tensors=(Planned(name=key, dtype=value.dtype, shape=tuple(value.shape)),))
            tensors = pieces.tensors
        is_same = packed is not None and value.quant is not None and _alike(value.quant.options, packed.options)
        if is_same and not value.sites:
            yield Product(tensors=tensors[:1], values=(value,), packed=packed, is_gathered=False)
            value = replace(value, is_copied=True)
        for experts in chunks(value.shape, RUN):
            yield Product(
                tensors=tensors, values=(value,), is_gathered=True, packed=packed, experts=experts, apart=pieces
            )

    def _only(self, loaded: Loaded, values: Sequence[Value]) -> Value:
        if len(values) > 1:
            raise self._tied(loaded)
        return values[0]

    def _tied(self, loaded: Loaded) -> ConfigError:
        return ConfigError(
            f"{' and '.join(loaded.names)} are tied in this base, and adapters change one and not the other: expected "
            "that of an embedding and a head, which can be untied. Export with merged=False"
        )

    def _values(self, loaded: Loaded) -> list[Value]:
        """The values of a tensor: one, or more where adapters have changed its names differently."""
        found: dict[object, Value] = {}
        modules = []
        for (reference, leaf), name in zip(loaded.places, loaded.names, strict=True):
            module = reference()
            if module is None or (module, leaf) not in self.held:
                raise ConfigError(
                    f"{name} is not in the model any more, or not as it was loaded: expected the modules that "
                    "surgery.qlora or surgery.fill has filled"
                )
            value = self._value(loaded, module, leaf)
            # An embedding and a head may share what changes them too, such as the rows of trained tokens.
            inputs = (part for site in value.sites for part in self.adapted.inputs_of(site).values())
            found.setdefault((value.held, frozenset(map(id, inputs))), value)
            modules.append(module)
        if len(found) > 1:
            if len(found) != len(modules) or not any(isinstance(module, nn.Embedding) for module in modules):
                raise self._tied(loaded)
            self.untied = True
        return list(found.values())

    def _value(self, loaded: Loaded, module: Any, leaf: str) -> Value:
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

    def _plain(self, loaded: Loaded, module: Any, leaf: str) -> Value:
        """The value without adapters."""
        held = self.held[module, leaf]
        if held.shape != loaded.shape:
            raise ConfigError(
                f"{loaded.names[0]}: expected the shape with which it was loaded, {tuple(loaded.shape)}, found "
                f"{tuple(held.shape)}: a model that was resized cannot be exported"
            )
        formats = self.origin.setting.formats
        quant = next((q for q in formats if q.is_quantized(module) and leaf in q.weight_names(module)), None)
        if quant is not None and held.data.dtype != quant.storage:
            raise ConfigError(
                f"{loaded.names[0]}: expected packed bytes in {quant.storage}, found it cast to {held.data.dtype}, and "
                "they mean nothing: load the model with dtype= instead of casting it"
            )
        is_cast = self.form.dtype is not None and loaded.dtype == self.origin.setting.dtype
        dtype = self.form.dtype if is_cast else loaded.dtype
        return Value(
            held=held,
            leaf=leaf,
            quant=quant,
            state=None if quant is None else quant.state_of(module, leaf),
            shape=held.shape if quant is None else quant.logical(module, leaf),
            dtype=dtype or loaded.dtype,
            statistics=self.held.get((module, leaf + STATISTICS)),
            is_turned=leaf == "weight" and (was_conv1d(module) if quant is not None else is_conv1d(module)),
        )

    def _format(self, loaded: Loaded, value: Value) -> QuantFormat | None:
        """The format in which the tensor is to be packed, if it is."""
        if self.form.chosen is not None:
            return self.form.chosen.get(loaded.names[0])
        return None if value.quant is None else format_among(self.form.formats, value.quant)

    def _part(self, loaded: Loaded, value: Value, number: int) -> Product:
        """The part of one value. number: among those of its tensor."""
        packed = self._format(loaded, value)
        if packed is not None:
            return self._packed(loaded, value, packed)
        name = loaded.assignment.sources[0] if loaded.assignment.converter is None else loaded.names[0]
        if number:  # the second of an embedding and a head, which the checkpoint has under the name of the first
            name = name.replace(loaded.names[0], loaded.names[number])
            name = loaded.names[number] if name == loaded.assignment.sources[0] else name
        turned = value.is_turned and value.quant is not None
        planned = Planned(name=name, dtype=value.dtype, shape=tuple(value.shape[:: -1 if turned else 1]))
        is_gathered = bool(value.sites) or turned or value.statistics is not None
        return Product(tensors=(planned,), values=(value,), is_gathered=is_gathered)

    def _packed(self, loaded: Loaded, value: Value, packed: QuantFormat) -> Product:
        name = loaded.assignment.key_of(loaded.names[0])
        shape = value.shape[:: -1 if value.is_turned and value.quant is None else 1]
        found = planned_packed(name, packed, shape, packed.storage)
        is_same = value.quant is not None and _alike(value.quant.options, packed.options)
        is_copied = is_same and not value.sites
        is_gathered = not is_copied or value.statistics is not None
        return Product(
            tensors=found, values=(replace(value, is_copied=is_copied),), packed=packed, is_gathered=is_gathered
        )

    def _fused(self, group: Sequence[Loaded], values: tuple[Value, ...]) -> Product:
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
        return Product(tensors=planned, values=values, loaded=tuple(group), is_gathered=True)

    def taken_apart(self, loaded: Loaded, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of a checkpoint, as transformers makes them of parameters by FQN."""
        return loaded.assignment.revert(tensors, self.base.config, self.origin.conversions)


def _alike(one: Any, other: Any) -> bool:
    """Whether two options pack a weight into the same bytes."""
    names = ("quant_type", "blocksize", "double_quant")
    return type(one) is type(other) and all(getattr(one, n, None) == getattr(other, n, None) for n in names)
