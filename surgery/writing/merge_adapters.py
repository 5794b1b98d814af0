"""Adapters as they are stored: opened, checked, and matched with the model that they are to be merged into."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from surgery.adapters.folder import CONFIG
from surgery.adapters.metadata import Base
from surgery.adapters.saved import SavedAdapter
from surgery.checkpoint import Checkpoint, Reader
from surgery.errors import AdapterError, ConfigError
from surgery.model.fqn import PEFT_PREFIX
from surgery.writing.merging import MergeSite, adapter_keys

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Matched", "MergeAdapter", "check_mergeable", "check_together", "match"]

#: Options of LoRA that change the modules that there are, beside PEFT's variants of LoRA, which look at the input or
#: change the base.
UNMERGEABLE = ("layer_replication", "megatron_config", "use_qalora")

Convert: TypeAlias = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]

#: Names that are listed of many.
SHOWN = 6


@dataclass(frozen=True, kw_only=True, eq=False)
class MergeAdapter(SavedAdapter):
    """A saved adapter that is merged. weight: with which it is."""

    weight: float = 1.0

    @property
    def identity(self) -> str:
        """Text that another content of the file does not have: the commit, or size and time, and the header."""
        stamps = self.index.stamps.values()
        return repr([(stamp.header, stamp.size, self.revision or stamp.modified) for stamp in stamps])

    def check(self) -> None:
        """Raise `ConfigError` if it cannot be merged, or not with this weight."""
        check_mergeable(str(self.path), self.config)
        if self.config.task_type not in (None, "CAUSAL_LM"):
            raise ConfigError(
                f"{self.path / CONFIG}: expected an adapter of a causal language model (task_type CAUSAL_LM), found "
                f"{self.config.task_type}"
            )
        _check_weight(self.path, self.config, self.weight)

    def check_finite(self) -> None:
        """Read all of it, a tensor at a time; raise `AdapterError` for values that are NaN or infinite."""
        counts = {}
        with Reader(self.index) as reader:
            for name in self.index:
                tensor = reader.read(name)
                counts[name] = tensor.numel() - int(tensor.isfinite().sum())
        bad = {name: count for name, count in counts.items() if count}
        if bad:
            raise AdapterError(
                f"{self.path}: expected finite numbers, found NaN or infinity in {len(bad)} of {len(counts)} tensors: "
                f"{', '.join([*bad][:SHOWN])}{', ...' if len(bad) > SHOWN else ''}. Nothing was written; take an "
                "earlier checkpoint of the training",
                not_finite=bad,
            )


def check_mergeable(adapter: str, config: Any) -> None:
    """Raise `ConfigError` for options of LoRA that cannot be merged into weights."""
    variants = [each.name for each in dataclasses.fields(config) if each.metadata.get("is_lora_variant")]
    for name in {*variants, *UNMERGEABLE} - {"use_dora"}:
        if getattr(config, name, None):
            raise ConfigError(f"{adapter}: one with {name} cannot be merged into weights: load it with PEFT")


def _check_weight(folder: Path, config: Any, weight: float) -> None:
    if not math.isfinite(weight):
        raise ConfigError(f"weight: expected a finite number for {folder}, found {weight}")
    names = ("use_dora", "modules_to_save", "trainable_token_indices")
    whole = [name for name in names if getattr(config, name, None)] + ["bias"] * (config.bias != "none")
    if whole and weight != 1:
        raise ConfigError(
            f"weight: expected 1 for {folder}, found {weight}: it has {', '.join(whole)}, which is no sum of the base "
            "and a change, so that a part of it has no meaning"
        )


def check_together(adapters: Sequence[MergeAdapter], checkpoint: Checkpoint) -> None:
    """Raise `ConfigError` for adapters that cannot be merged together, or that are of another revision of the base."""
    with_bias = [each.path for each in adapters if each.config.bias != "none"]
    if with_bias and len(adapters) > 1:
        raise ConfigError(f"{with_bias[0]} has trained biases of the base, and can only be merged alone")
    for each in adapters:
        each.base.check_revision(Base.of(checkpoint), each.path / CONFIG)


@dataclass(frozen=True, kw_only=True, eq=False)
class Matched:
    """A stored adapter and its places in an adapted model on meta.

    keys: the file's key of each parameter that it fills, by `id`. replaced: FQN of a parameter or buffer of the base
    model -> key of the tensor that takes its place. Two FQNs have one key if PEFT ties them. convert: makes the tensors
    of these keys of those in the file, which has the names of an older layout of the model; None where they are it.
    """

    adapter: MergeAdapter
    keys: Mapping[int, str]
    replaced: Mapping[str, str]
    convert: Convert | None = None

    @cached_property
    def _converted(self) -> dict[str, torch.Tensor]:
        """All tensors of the file, converted; in memory from then on."""
        assert self.convert is not None
        with Reader(self.adapter.index) as reader:
            return self.convert({name: reader.read(name) for name in self.adapter.index})

    def inputs(self, site: MergeSite, reader: Reader) -> dict[str, torch.Tensor]:
        """The values of this adapter for `site`, read in float32, as PEFT has them."""
        wanted = {name: self.keys[id(p)] for name, p in site.inputs.items() if id(p) in self.keys}
        read = reader.read if self.convert is None else self._converted.__getitem__
        return {name: read(key).to(torch.float32) for name, key in wanted.items()}


def match(adapter: MergeAdapter, name: str, adapted: PeftModel, base: Mapping[str, torch.Tensor]) -> Matched:
    """Match the file of `adapter` with `adapted`, to which PEFT has just added it as `name`; nothing is read.

    base: parameters and persistent buffers of the base model, on meta, by FQN, before it was adapted. Raises
    `WeightsMismatchError` for missing or unknown keys, and for other shapes.
    """
    try:
        expected = adapter_keys(adapted, name)
    except Exception as error:
        raise ConfigError(f"{adapter.path}: PEFT cannot name its tensors: {type(error).__name__}: {error}") from error
    expected |= _embeddings(adapter, adapted, expected)
    found = {key: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for key, entry in adapter.index.items()}
    convert = None if found.keys() == expected.keys() else _conversion(name, adapted)
    if convert is not None and convert(found).keys() == expected.keys():
        found = convert(found)
    else:
        convert = None
    shapes = {key: parameter.shape for key, parameter in expected.items()}
    adapter.check_tensors(shapes, {key: tensor.shape for key, tensor in found.items()})
    keys = {id(parameter): key for key, parameter in expected.items()}
    replaced = dict(_replaced(adapter, name, adapted, base, keys))
    return Matched(adapter=adapter, keys=keys, replaced=replaced, convert=convert)


def _conversion(name: str, adapted: PeftModel) -> Convert | None:
    """PEFT's conversion of the tensors of an adapter from an older layout of the model; None if it has none."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:  # older releases take a file's keys as they are
        return None

    def convert(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = convert_peft_adapter_state_dict_for_transformers(
            adapted, adapted.peft_config[name], dict(tensors), name
        )
        return made

    return convert


def _embeddings(adapter: MergeAdapter, adapted: Any, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of embedding and head that PEFT has saved beside the adapter, as it does where those are adapted."""
    ends = (adapted.get_input_embeddings(), adapted.get_output_embeddings())
    held = {id(p) for module in ends if module is not None for p in module.parameters()}
    state = adapted.state_dict(keep_vars=True)
    return {key: state[key] for key in adapter.index if key not in expected and key in state and id(state[key]) in held}


def _replaced(
    adapter: MergeAdapter, name: str, adapted: Any, base: Mapping[str, torch.Tensor], keys: Mapping[int, str]
) -> Iterator[tuple[str, str]]:
    """FQNs in the base model of what the adapter has whole, and the keys of those tensors."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    inside = (named for layer in layers for named in layer.named_parameters())
    own = {id(p) for part, p in inside if not part.startswith("base_layer.")}
    for place, tensor in adapted.state_dict(keep_vars=True).items():
        if id(tensor) not in keys or id(tensor) in own:
            continue
        fqn = place.removeprefix(PEFT_PREFIX).replace(f".modules_to_save.{name}", "").replace(".base_layer", "")
        fqn = fqn.replace(".token_adapter", "")
        if fqn not in base:
            raise ConfigError(
                f"{adapter.path}: {place} is adapted and saved whole at once, which cannot be merged here: merge it "
                "with PEFT's merge_and_unload"
            )
        yield fqn, keys[id(tensor)]
