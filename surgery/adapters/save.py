"""Saving the adapter of a sharded model under the keys of PEFT, without ever gathering its base weights."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from surgery.adapters.folder import AdapterFolder, hold
from surgery.adapters.metadata import base_folder, config_to_save, read_tokenizer, render_card
from surgery.adapters.place import refuse_base
from surgery.adapters.serving import check_served, serve
from surgery.checkpoint import Checkpoint
from surgery.comm.failures import everyone, together
from surgery.comm.ranks import current_ranks
from surgery.errors import AdapterError, ConfigError
from surgery.model.fqn import PEFT_PREFIX, clean, split
from surgery.model.twin import twin_of
from surgery.sharding.base import Part, ShardStrategy, device_of, strategy_of

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

__all__ = [
    "adapter_parts",
    "adapter_state",
    "belongs_to",
    "by_peft_key",
    "find_peft_model",
    "save_adapter",
    "search_peft_model",
]


@together()
def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    format: Literal["peft", "vllm"] = "peft",  # noqa: A002  # as the option of the command line
    training: Mapping[str, Mapping[str, object]] | None = None,
) -> None:
    """Write the adapter of `model` to `directory`, in PEFT's format or another; to be called on all ranks alike.

    Beside it are a model card and the tokenizer of the base model, where that is on rank 0's disk. Only trainable
    parameters are gathered, one FSDP unit at a time, to rank 0's CPU.

    The adapter that is there is replaced by a whole one, or left as it was, whatever happens on the way: see
    `surgery.adapters.folder`. To try the place and to keep it from others before the model is loaded, call this in a
    block of `surgery.reserve`.

    Args:
        model: what `surgery.qlora` has built.
        directory: made if it is not there; links are followed.
        format: "peft", or "vllm": as that reads it, see `surgery.adapters.serving`; the base model has to be on rank
            0's disk. PEFT loads the first, `load_adapter` too.
        training: what the model card says of the training: rows by title of a section.

    Raises:
        ConfigError: the folder cannot be written, another process has it, or it is that of a whole model; vLLM does
            not take such an adapter.
        AdapterError: a trainable parameter is missing from what PEFT saves, all of them are zero-sized, a value is not
            finite, or writing fails.
        PeerError: another rank has failed.
    """
    ranks = current_ranks()
    with ExitStack() as stack:
        with everyone(ranks, device=device_of(model)):
            served = _base_to_serve(model, format)
            folder = stack.enter_context(hold(directory)) if ranks.rank == 0 else None
        state = peft_state(model)
        with everyone(ranks, device=device_of(model)):
            if folder is not None:
                _write(find_peft_model(model)[1], state, folder, training or {}, served)


@together()
def peft_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the active adapter's file, by PEFT's keys, on rank 0's CPU; empty on the others.

    Whole trainable parameters, and buffers of the copies of `modules_to_save`. Call it on all ranks alike; they raise
    `AdapterError` together if something would be left out.
    """
    ranks = current_ranks()
    state = adapter_state(model)
    with everyone(ranks, device=device_of(model)):
        if ranks.rank != 0:
            return {}
        prefix, adapted = find_peft_model(model)
        start = f"{prefix}." if prefix else ""
        found = by_peft_key(adapted, {name.removeprefix(start): tensor for name, tensor in state.items()})
        return {key: tensor.cpu() for key, tensor in found.items()}


@together()
def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole trainable parameters by plain FQN, on rank 0's CPU; empty on the others. Call it on all ranks alike.

    Those of an active adapter that is frozen are among them. One that is tied has each of its names.
    """
    strategy = strategy_of(model)
    return strategy.trainable_state(model, frozenset(filter(_of_active(model), strategy.parameter_names(model))))


def _of_active(model: nn.Module) -> Callable[[str], bool]:
    """Whether a plain FQN is one of an active adapter's parameters."""
    prefix, adapted = search_peft_model(model)
    if adapted is None:
        return lambda _fqn: False
    each = [belongs_to(adapted.peft_config[name], name, prefix) for name in adapted.active_adapters]
    return lambda fqn: any(belongs(fqn) for belongs in each)


def belongs_to(config: PeftConfig, adapter: str, prefix: str) -> Callable[[str], bool]:
    """Whether a plain FQN is one of the parameters of `adapter`, in a `PeftModel` whose own is `prefix`."""
    name = re.escape(adapter)
    patterns = [rf"(.*\.)?(lora_\w+|modules_to_save|trainable_tokens_\w+)\.{name}(\..*)?"]
    bias = getattr(config, "bias", "none")
    if bias == "lora_only":
        patterns.append(r".*\.base_layer\.bias")
    if bias == "all":
        patterns.append(r"(?!.*(lora_|modules_to_save)).*bias.*")
    pattern, start = re.compile("|".join(patterns)), f"{prefix}." if prefix else ""
    return lambda fqn: fqn.startswith(start) and pattern.fullmatch(fqn.removeprefix(start)) is not None


def adapter_parts(model: nn.Module, adapter: str, strategy: ShardStrategy | None = None) -> dict[str, Part]:
    """This rank's part of each tensor of `adapter`, by the key of PEFT's file. Nothing is sent.

    strategy: of `model`, where that cannot be found in it.
    """
    prefix, adapted = find_peft_model(model)
    start = f"{prefix}." if prefix else ""
    strategy = strategy or strategy_of(model)
    found = strategy.parts(model, belongs_to(adapted.peft_config[adapter], adapter, prefix))
    parts = {name.removeprefix(start): part for name, part in found.items()}
    buffers = _buffers(adapted, adapter)
    parts |= {name: Part(data=buffer, shape=buffer.shape) for name, buffer in buffers.items()}
    stands = {name: torch.empty(part.shape, dtype=part.data.dtype, device="meta") for name, part in parts.items()}
    name_of = {id(tensor): name for name, tensor in stands.items()}
    return {key: parts[name_of[id(tensor)]] for key, tensor in by_peft_key(adapted, stands, adapter).items()}


def _write(
    model: PeftModel,
    state: dict[str, torch.Tensor],
    folder: AdapterFolder,
    training: Mapping[str, Mapping[str, object]],
    served: Checkpoint | None,
) -> None:
    config = config_to_save(model, active_adapter(model))
    base = base_folder(config)
    if base is not None:
        refuse_base(folder.path, base)
    tensors: Mapping[str, torch.Tensor] = state
    if served is not None:
        config, tensors = serve(config, served, state, state.__getitem__)
    folder.save(
        tensors, config, card=render_card(config, training), tokenizer=read_tokenizer(base) if base is not None else {}
    )


def _base_to_serve(model: nn.Module, form: str) -> Checkpoint | None:
    """The base model, whose names vLLM asks for; None for PEFT's format, and where it is not on this disk."""
    if form not in ("peft", "vllm"):
        raise ConfigError(f"format: expected 'peft' or 'vllm', found {form!r:.80}")
    if form == "peft":
        return None
    adapted = find_peft_model(model)[1]
    config = config_to_save(adapted, active_adapter(adapted))
    check_served(config)
    base = base_folder(config)
    if base is None and current_ranks().rank == 0:
        raise ConfigError(
            f"format='vllm' asks for names in the base model, expected it on this disk, found none "
            f"({config.base_model_name_or_path}): save the adapter in PEFT's format, and convert it (surgery convert)"
        )
    return None if base is None else Checkpoint.open(base)


def find_peft_model(model: nn.Module) -> tuple[str, PeftModel]:
    """The `PeftModel` that is `model`, or is inside of it, and its FQN without wrappers."""
    prefix, adapted = search_peft_model(model)
    if adapted is None:
        raise ConfigError(f"{type(model).__name__} has no adapter to save: it was built with lora=None")
    return prefix, adapted


def search_peft_model(model: nn.Module) -> tuple[str, PeftModel | None]:
    """The `PeftModel` that is `model`, or is inside of it, and its FQN; None where there is none."""
    from peft import PeftModel

    found = ((clean(name), module) for name, module in model.named_modules() if isinstance(module, PeftModel))
    return next(found, ("", None))


def active_adapter(model: PeftModel) -> str:
    """The name of the one active adapter of `model`, which is trained and saved."""
    active = list(model.active_adapters)
    if len(active) == 1:
        return active[0]
    raise ConfigError(
        f"expected one active adapter, found {len(active)}{': ' + ', '.join(active) if active else ''}: choose the one "
        "to save with model.set_adapter(name)"
    )


def by_peft_key(
    model: PeftModel, state: Mapping[str, torch.Tensor], adapter: str | None = None
) -> dict[str, torch.Tensor]:
    """Rename `state`, whole tensors by FQN, to the keys of PEFT's file for an adapter of `model`; None: the active one.

    Buffers of modules that are saved whole are added.

    What PEFT takes, and how it calls it, follows from names and the configuration. So it is asked about a copy of the
    tree that has these tensors and no wrappers: FSDP1 takes a question of one rank for a collective, and its names
    stand in the way of PEFT's.

    Raises `AdapterError` naming what PEFT leaves out, or would not find again, or if there is nothing at all.
    """
    from peft import get_peft_model_state_dict

    adapter = active_adapter(model) if adapter is None else adapter
    state = {**_buffers(model, adapter), **state}
    held: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        parent, leaf = split(name)
        held.setdefault(parent, {})[leaf] = tensor
    bare = twin_of(model, lambda fqn, _: held.get(fqn, {}))[model]
    # The base embeddings are as they were; "auto" would look for their size on the hub.
    found: dict[str, torch.Tensor] = get_peft_model_state_dict(
        bare, state_dict=state, adapter_name=adapter, save_embedding_layers=False
    )
    taken = {id(tensor) for tensor in found.values()}
    missing = [name for name, tensor in state.items() if id(tensor) not in taken]
    if found and not missing:
        _check_read_back(bare, found, adapter)
        return found
    raise AdapterError(
        f"PEFT left out {len(missing)} of {len(state)} trainable parameters"
        f"{': ' + ', '.join(missing[:4]) if missing else ', since there is none'}. Nothing was saved; report it with "
        "the output of `patches check`",
        missing=missing,
    )


def _check_read_back(model: Any, found: Mapping[str, torch.Tensor], adapter: str) -> None:
    """Ask PEFT's loader for the names under which it would look for these keys.

    peft 0.21.2 applies to them what transformers has for the keys of checkpoints, `mlp.shared_expert.` of Laguna say,
    where a dot is any character; what has lost its name so is left as it was drawn, with no more than a warning.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:  # older releases take a file's keys as they are
        return
    meta = {key: torch.empty_like(tensor, device="meta") for key, tensor in found.items()}
    read = convert_peft_adapter_state_dict_for_transformers(model, model.peft_config[adapter], meta, adapter)
    lost = sorted(meta.keys() - read.keys())
    if not lost:
        return
    modules = sorted({key.partition(".lora_")[0].removeprefix(PEFT_PREFIX) for key in lost})
    raise AdapterError(
        f"PEFT would save {len(lost)} of {len(found)} tensors of this adapter, and not find them when it loads it, "
        f"since it takes their names for those of a checkpoint: {', '.join(modules[:4])}"
        f"{', ...' if len(modules) > 4 else ''}. Leave these modules out (exclude_modules)",
        missing=lost,
    )


def _buffers(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """Persistent buffers, by FQN, of the copies that `modules_to_save` has made for `adapter`."""
    found: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        if f".modules_to_save.{adapter}" not in prefix:
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[clean(f"{prefix}.{name}")] = buffer.detach()
    return found
