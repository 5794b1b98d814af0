"""Adapters merged into the weights of one module at a time, by PEFT's own layers, with tensors that the caller gives.

The model stays on meta: `adapt` puts PEFT's layers on it, `find_sites` lists them, and `MergeSite.merge` lends one of
them the real values of its base module and of its adapters, or of some rows of them, calls its `merge`, and takes the
result out. So nothing of LoRA is computed here, and what comes out is what `merge_and_unload` gives.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.errors import ConfigError
from surgery.model.fqn import split

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

__all__ = ["MergeSite", "adapt", "adapter_keys", "chunks", "find_sites"]

#: Elements of a weight that are merged at a time: their change is 8 MiB in float32, and PEFT makes two copies of it.
CHUNK = 1 << 21

#: Rows of a chunk, at least. A matrix of few rows has kernels of its own, which add in another order.
ROWS = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class MergeSite:
    """One layer of PEFT, on meta, and the parameters of one module of the base model that it changes.

    fqn: of that module in the base model. layer: PEFT's. adapters: names of adapters that it has, in the order in which
    they are merged. changes: names of the module's parameters. inputs: the layer's own parameters, by their name in it.
    is_divisible: whether it can be merged by ranges of dimension 0; otherwise it has to be whole.
    """

    fqn: str
    layer: Any
    adapters: tuple[str, ...]
    changes: tuple[str, ...]
    inputs: Mapping[str, nn.Parameter]
    is_divisible: bool

    @torch.no_grad()
    def merge(
        self, base: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor], rows: range | None = None
    ) -> dict[str, torch.Tensor]:
        """The parameters of `base` after the merge, in their dtypes; its memory may be used for it.

        base: values of some of `changes`, all or, with `rows`, those of dimension 0. inputs: all values of each of
        `inputs`; PEFT has them in float32 whatever the file has. A site that is not divisible takes no `rows`.
        """
        given, settings = (inputs, {}) if rows is None else _part(self.layer, inputs, rows)
        lent = dict(base)
        if self.changes != tuple(base):
            given = _stand_in(self.layer, self.changes, lent, dict(given))
        with _lent(self.layer.get_base_layer(), lent) as module, _lent(self.layer, given), _set(self.layer, settings):
            try:
                # PEFT cannot merge no tokens.
                some = [name for name in self.adapters if settings.get("token_indices", {name: True})[name]]
                self.layer.merge(safe_merge=False, adapter_names=some)
                return {name: module._parameters[name].data for name in base}
            finally:
                self.layer.merged_adapters.clear()
                getattr(self.layer, "_caches", {}).clear()


def chunks(shape: Sequence[int], elements: int | None = None) -> Iterator[range]:
    """Ranges of dimension 0 of a tensor of `shape`, with about so many `elements` each; the last is never shorter.

    elements: None for `CHUNK`. Of several experts two at least, since PEFT multiplies one as a matrix: it rounds
    otherwise then, and does not transpose.
    """
    total = shape[0] if shape else 1
    row = max(torch.Size(shape).numel() // max(total, 1), 1)
    least = ROWS if len(shape) < 3 else 2
    step, start = max((elements or CHUNK) // row // least * least, least), 0
    while start < total:
        stop = start + step if total - start >= 2 * step else total
        yield range(start, stop)
        start = stop


def adapt(model: nn.Module, configs: Mapping[str, LoraConfig]) -> Iterator[tuple[str, PeftModel]]:
    """Put PEFT's layers for each of `configs`, by adapter name, on `model`, which is on meta; yield after each.

    Nothing is drawn or computed: no initialization is run. Raises `ConfigError` for what PEFT cannot build.
    """
    from peft import get_peft_model

    adapted: Any = None
    for name, config in configs.items():
        own = copy.deepcopy(config)
        own.init_lora_weights = False
        own.lora_dropout = 0.0  # PEFT refuses it on parameters, and no merge has any
        try:
            with warnings.catch_warnings(), torch.device("meta"):
                warnings.simplefilter("ignore")  # of ties, which are taken apart where they have to be
                if adapted is None:
                    adapted = get_peft_model(model, own, adapter_name=name, autocast_adapter_dtype=False)
                else:
                    adapted.add_adapter(name, own, autocast_adapter_dtype=False)
        except Exception as error:
            raise ConfigError(
                f"PEFT cannot put the adapter {name!r} on this base model: {type(error).__name__}: {error}. Expected "
                "an adapter of this base: look at target_modules, modules_to_save and target_parameters in its "
                "adapter_config.json"
            ) from error
        yield name, adapted


def adapter_keys(adapted: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """The parameters and buffers on meta that the file of the adapter `name` fills, by PEFT's keys."""
    from peft import get_peft_model_state_dict

    state = dict(adapted.state_dict(keep_vars=True))
    found: dict[str, torch.Tensor] = get_peft_model_state_dict(
        adapted, state_dict=state, adapter_name=name, save_embedding_layers=False
    )
    return found


def find_sites(adapted: PeftModel, modules: Mapping[nn.Module, str], names: Sequence[str]) -> tuple[MergeSite, ...]:
    """Every layer of PEFT in `adapted` that changes base parameters.

    modules: those of the base model, and their FQNs, before it was adapted. names: of the adapters, in the order of
    merging. Raises `ConfigError` for a kind of layer that cannot be merged so.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, module) for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)]
    return tuple(_site(name, layer, modules, names) for name, layer in layers if ".original_module" not in name)


def _site(name: str, layer: Any, modules: Mapping[nn.Module, str], names: Sequence[str]) -> MergeSite:
    from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, ParamWrapper
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    base = layer.get_base_layer()
    known = (Linear, Embedding, ParamWrapper, TrainableTokensLayer, Conv1d, Conv2d, Conv3d)
    if type(layer) not in known or base not in modules:
        raise ConfigError(
            f"{name}: expected a layer of PEFT that can be merged into one module of the base model, found "
            f"{type(layer).__name__}: merge it with PEFT's merge_and_unload"
        )
    own = layer.adapter_layer_names[0]
    held = layer.lora_embedding_A if isinstance(layer, Embedding) else getattr(layer, own)
    weight = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    with_bias = any(getattr(layer, "lora_bias", {}).values())
    return MergeSite(
        fqn=modules[base],
        layer=layer,
        adapters=tuple(each for each in names if each in held),
        changes=(weight, "bias") if with_bias else (weight,),
        inputs={key: p for key, p in layer.named_parameters() if not key.startswith("base_layer.")},
        is_divisible=_is_divisible(layer),
    )


def _is_divisible(layer: Any) -> bool:
    """Whether each range of dimension 0 of the weight is merged for itself.

    Not where DoRA takes norms over that dimension.
    """
    from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    if isinstance(layer, TrainableTokensLayer):
        return True
    if isinstance(layer, Linear):
        return not layer.fan_in_fan_out or not (layer.lora_variant or any(layer.lora_bias.values()))
    if isinstance(layer, ParamWrapper):
        return layer.num_experts > 1 or layer._param_ndim == 2
    return isinstance(layer, Embedding) and not layer.lora_variant


def _part(
    layer: Any, inputs: Mapping[str, torch.Tensor], rows: range
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The inputs, and attributes of `layer`, for some `rows` of its weight."""
    from peft.tuners.lora.layer import Embedding, ParamWrapper
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    part = slice(rows.start, rows.stop)
    if isinstance(layer, TrainableTokensLayer):
        return _tokens(layer, inputs, rows)
    if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
        number = layer.num_experts
        return {
            key: value.view(number, -1, value.shape[1])[part].flatten(0, 1)
            if key.startswith("lora_A.")
            else value.view(len(value), -1, number)[..., part].flatten(1)
            for key, value in inputs.items()
        }, {"num_experts": len(rows)}
    if isinstance(layer, Embedding) or layer.fan_in_fan_out:
        # The rows of a weight that is stored as (in, out) are the columns of A.
        across = ("lora_A.", "lora_embedding_A.")
        return {key: value[:, part] if key.startswith(across) else value for key, value in inputs.items()}, {}
    return {key: value if key.startswith("lora_A.") else value[part] for key, value in inputs.items()}, {}


def _stand_in(
    layer: Any, changes: Sequence[str], lent: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Lend zeros for a weight, of one column, or a bias that is not asked for: PEFT merges both at once."""
    if "bias" not in lent and "bias" in changes:
        lent["bias"] = torch.zeros(lent["weight"].shape[1 if layer.fan_in_fan_out else 0])
    if "weight" not in lent:
        shape = (1, len(lent["bias"])) if layer.fan_in_fan_out else (len(lent["bias"]), 1)
        lent["weight"] = torch.zeros(shape)
        inputs = {key: value[:, :1] if key.startswith("lora_A.") else value for key, value in inputs.items()}
    return inputs


def _tokens(
    layer: Any, inputs: Mapping[str, torch.Tensor], rows: range
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tokens of a range of rows, counted from its beginning."""
    indices, part = dict(layer.token_indices), {}
    for key, value in inputs.items():
        adapter = key.removeprefix("trainable_tokens_delta.")
        places = [place for place, token in enumerate(layer.token_indices[adapter]) if token in rows]
        indices[adapter] = [layer.token_indices[adapter][place] - rows.start for place in places]
        part[key] = value[places]
    return part, {"token_indices": indices}


@contextmanager
def _lent(module: Any, values: Mapping[str, torch.Tensor]) -> Iterator[Any]:
    """Give parameters of `module`, by name, other values for a block."""
    before = []
    for name, value in values.items():
        path, leaf = split(name)
        held = module.get_submodule(path)._parameters
        before.append((held, leaf, held[leaf]))
        held[leaf] = nn.Parameter(value, requires_grad=False)
    try:
        yield module
    finally:
        for held, leaf, parameter in before:
            held[leaf] = parameter


@contextmanager
def _set(layer: Any, values: Mapping[str, Any]) -> Iterator[None]:
    before = {name: getattr(layer, name) for name in values}
    for name, value in values.items():
        setattr(layer, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(layer, name, value)
