"""Names of an adapter's tensors in a file: those that PEFT would give them, without asking a sharded module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.errors import AdapterError, ConfigError
from surgery.model.fqn import PEFT_PREFIX, clean, split
from surgery.model.twin import twin_of

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["active_adapter", "by_peft_key", "find_peft_model"]


def find_peft_model(model: nn.Module) -> tuple[str, PeftModel]:
    """The `PeftModel` that is `model`, or is inside of it, and its FQN without wrappers."""
    from peft import PeftModel

    for name, module in model.named_modules():
        if isinstance(module, PeftModel):
            return clean(name), module
    raise ConfigError(f"{type(model).__name__} has no adapter to save: it was built with lora=None")


def active_adapter(model: PeftModel) -> str:
    """The name of the one adapter of `model` that is active, which is the one that is trained and saved."""
    active = list(model.active_adapters)
    if len(active) == 1:
        return active[0]
    raise ConfigError(
        f"expected one active adapter, found {len(active)}{': ' + ', '.join(active) if active else ''}: choose the one "
        "to save with model.set_adapter(name)"
    )


def by_peft_key(model: PeftModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state`, whole tensors of `model` by FQN, under the keys that PEFT has for the active adapter in a file, together
    with the buffers of modules that are saved whole.

    What PEFT takes, and how it calls it, follows from names and the configuration. So it is asked about a copy of the
    tree that has these tensors and no wrappers: FSDP1 takes a question of one rank for a collective, and its names
    stand in the way of PEFT's.

    Raises `AdapterError` naming what PEFT leaves out, or would not find again, or if there is nothing at all.
    """
    from peft import get_peft_model_state_dict

    adapter = active_adapter(model)
    state = {**state, **_buffers(model, adapter)}
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
