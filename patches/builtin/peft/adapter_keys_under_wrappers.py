"""`peft.adapter-keys-under-wrappers`: an adapter inside a wrapper is saved with all its keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from ...registry import REGISTRY

__all__ = ["add_unwrapped_prefixes"]

# torch removes both from the keys of a state dict, wherever they occur.
_WRAPPERS: Final = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def keys_are_lost_under_wrapper() -> bool:
    """Whether PEFT omits the adapter of a layer inside a wrapper from the state dict that it saves."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"model_type": "custom"}  # PEFT reads this from a transformers model
            self.block = nn.Sequential(nn.Linear(4, 4))

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._fsdp_wrapped_module = module

    with torch.random.fork_rng(devices=()):  # layers and adapters are initialized at random
        model: Any = get_peft_model(Model(), LoraConfig(r=2, target_modules=["0"]))
    clean = model.state_dict()
    expected = get_peft_model_state_dict(model, state_dict=clean)
    model.base_model.model.block = Wrapper(model.base_model.model.block)
    return len(get_peft_model_state_dict(model, state_dict=clean)) < len(expected)


def check_finds_keys_under_wrapper() -> None:
    """Raise RuntimeError if the patched function omits a prefix."""
    found = add_unwrapped_prefixes(lambda: {"a._fsdp_wrapped_module.b._checkpoint_wrapped_module.c"}, None, (), {})
    if "a.b.c" not in found:
        raise RuntimeError(f"expected 'a.b.c' among the prefixes of the adapter's keys, found {sorted(found)}")


@REGISTRY.register(
    "peft.adapter-keys-under-wrappers",
    target="peft.tuners.tuners_utils:_get_tuner_state_dict_key_prefixes",
    reason=(
        "save_pretrained writes an adapter without keys, silently, where FSDP1 or activation checkpointing "
        "wraps a layer: PEFT looks for names that have the wrappers in them, and state_dict's have not"
    ),
    upstream="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/tuners_utils.py",
    requires={"peft": ">=0.21.0,<=0.21.2"},
    fingerprint="e5ce0ada8389b35c",  # a later release with the same source has the same defect
    subject=lambda _instance, args, kwargs: args[0] if args else kwargs["model"],
    probe=keys_are_lost_under_wrapper,
    verify=check_finds_keys_under_wrapper,
)
def add_unwrapped_prefixes(
    wrapped: Callable[..., set[str]], _instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> set[str]:
    """Return the prefixes of the adapter's state dict keys, both with and without the names of wrapper modules.

    Both are needed: PEFT also compares the prefixes with `named_parameters()`, whose names include the
    wrappers. The function has three callers (saving, loading, freezing), all of which look it up in its own
    module.
    """
    prefixes = wrapped(*args, **kwargs)
    return prefixes | {_without_wrappers(prefix) for prefix in prefixes}


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)
