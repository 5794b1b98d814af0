"""Skeletons: models on meta, with real buffers where no checkpoint holds them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.refusals import contradiction
from surgery.errors import CheckpointError, ConfigError, SurgeryError
from surgery.model.fqn import join, split
from surgery.model.pretrained import compute_buffers, is_pretrained, load_generation_config, stored_dtypes

__all__ = [
    "bounded",
    "build_on_meta",
    "cast_as_stored",
    "causal_lm",
    "compute_own_buffers",
    "require_meta",
    "restore_buffers",
]


def build_on_meta(build: Callable[[], nn.Module], *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Call `build`, with every parameter and persistent buffer of its model on meta.

    Buffers that no checkpoint holds (rotary frequencies, say) are real, on `device`; tied parameters are one object. A
    model of transformers has the dtypes and the values that it would have if transformers had loaded it in `dtype`; of
    another module every parameter is in `dtype`.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        skeleton = build()
    # Registering on meta has made one parameter of every name.
    getattr(skeleton, "tie_weights", lambda: None)()
    _place_buffers(skeleton, device)
    if is_pretrained(skeleton):
        cast_as_stored(skeleton, dtype)
        compute_buffers(skeleton, device)
        return skeleton
    for parameter in skeleton.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return skeleton


def require_meta(model: nn.Module) -> None:
    """Raise `ConfigError` unless every parameter of `model` is on meta."""
    real = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
    if real:
        raise ConfigError(
            f"bind: expected a model on meta, found {real[0]} in memory ({len(real)} in all): build it in a block of "
            'torch.device("meta"), or of accelerate.init_empty_weights(include_buffers=False)'
        )


def compute_own_buffers(model: nn.Module, device: torch.device) -> None:
    """Put the buffers of a `model` that somebody else has built on meta where `build_on_meta` puts them.

    Raises `ConfigError` for a buffer on meta that no checkpoint holds, in a module that transformers cannot initialize.
    """
    lost = list(_lost_buffers(model))
    if lost and not is_pretrained(model):
        raise ConfigError(
            f"bind: {lost[0]} is on meta, and no checkpoint holds it: build the model in a block of "
            "accelerate.init_empty_weights(include_buffers=False)"
        )
    _make_room(model, lost, device)
    getattr(model, "tie_weights", lambda: None)()
    _place_buffers(model, device)
    if is_pretrained(model):
        compute_buffers(model, device)


def restore_buffers(model: nn.Module) -> None:
    """Compute the buffers of a transformers `model` that no checkpoint holds, on the CPU, if any was left on meta."""
    lost = list(_lost_buffers(model))
    _make_room(model, lost, torch.device("cpu"))
    if lost:
        compute_buffers(model, torch.device("cpu"))


def _lost_buffers(model: nn.Module) -> Iterator[str]:
    for prefix, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            if module._buffers[name] is not None and module.get_buffer(name).is_meta:
                yield join(prefix, name)


def _make_room(model: nn.Module, names: Iterable[str], device: torch.device) -> None:
    for name in names:
        path, leaf = split(name)
        owner = model.get_submodule(path)
        owner._buffers[leaf] = torch.empty_like(owner.get_buffer(leaf), device=device)


def cast_as_stored(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters and persistent buffers of a transformers `model`, on meta, as `from_pretrained(dtype=)` does."""
    for module, name, wanted in list(stored_dtypes(model, dtype)):
        _cast(module, name, wanted)


def _cast(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Cast a parameter in place, so that ties survive, or replace a buffer."""
    parameter = module._parameters.get(name)
    if parameter is None:
        module._buffers[name] = module.get_buffer(name).to(dtype)
    elif parameter.dtype != dtype:
        parameter.data = parameter.data.to(dtype)


def _place_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            persistent = name not in module._non_persistent_buffers_set
            module._buffers[name] = buffer.to("meta" if persistent else device)


def causal_lm(checkpoint: Checkpoint, dtype: torch.dtype, attention: str | None = None) -> Callable[[], nn.Module]:
    """A builder of the decoder-only transformers model that `checkpoint.config` describes.

    attention: its implementation, by transformers' name; None is transformers' choice.

    Raises `CheckpointError` or `ConfigError` here, before anything is built, if there is no such model; what is built
    may turn out to be impossible, which is a `ConfigError` too, or larger than what the checkpoint holds, which ends it
    at once (`WeightsMismatchError`). Code that the checkpoint brings or asks for is not run.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if checkpoint.config is None:
        raise CheckpointError(
            f"{checkpoint.path} has no config.json, so its architecture is unknown: add one, or pass model= a function "
            "that builds the nn.Module",
            path=checkpoint.path,
        )
    _refuse_other_weights(checkpoint)
    with _blaming(checkpoint, "config.json"):
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ConfigError(
            f"{checkpoint.path}: model_type {config.model_type!r} has no causal language model in transformers"
        )
    _refuse_hub_kernels(config, checkpoint)
    own = _own_config(config)
    own._name_or_path = str(checkpoint.source)
    for part in (own, getattr(own, "text_config", None) or own):
        part.use_cache = False

    def build() -> nn.Module:
        from transformers.initialization import no_init_weights

        # Some constructors draw initial values themselves.
        with (
            _blaming(checkpoint, "config.json"),
            no_init_weights(),
            torch.random.fork_rng(devices=[]),
            bounded(checkpoint),
        ):
            model: Any = _built(config, dtype, attention)
        with _blaming(checkpoint, "generation_config.json"):
            load_generation_config(model, checkpoint.path)
        trained: nn.Module = model.train()
        return trained

    return build


def _built(config: Any, dtype: torch.dtype, attention: str | None) -> Any:
    """The model of `config`. Raises `ConfigError` for an `attention` that it, or this host, does not have."""
    from transformers import AutoModelForCausalLM

    options = {} if attention is None else {"attn_implementation": attention}
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **options)
    except (ImportError, ValueError) as error:
        if attention is None:
            raise
        raise ConfigError(f"attention={attention!r:.80} is not to be had here: {error}") from error


def _own_config(config: Any) -> Any:
    """The part of `config` that the model is built from: of a vision-language one, the text's, where transformers has
    a causal language model for that alone.
    """
    from transformers import AutoModelForCausalLM

    text = config.sub_configs.get("text_config")
    of_class = getattr(AutoModelForCausalLM._model_mapping[type(config)], "config_class", None)
    return config.get_text_config() if text is not None and of_class is text else config


@contextlib.contextmanager
def _blaming(checkpoint: Checkpoint, file: str) -> Iterator[None]:
    """Turn whatever transformers raises about `file` into a `ConfigError`."""
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:
        raise ConfigError(f"{checkpoint.path}: transformers cannot use this {file}: {error}") from error


def _refuse_other_weights(checkpoint: Checkpoint) -> None:
    """Refuse a config that names another weight file, or an adapter beside the weights: transformers would load it."""
    named = (checkpoint.config or {}).get("transformers_weights")
    if named is not None and [file.name for file in checkpoint.index.files] != [named]:
        raise CheckpointError(
            f"{checkpoint.path}: config.json says that the weights are in {named!r:.200} (transformers_weights): give "
            "the path of that file, or remove the entry",
            path=checkpoint.path,
        )
    if (checkpoint.path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{checkpoint.path} holds an adapter beside the model (adapter_config.json), which transformers would load "
            "on top of it: move one of them to another folder",
            path=checkpoint.path,
        )


def _refuse_hub_kernels(config: Any, checkpoint: Checkpoint) -> None:
    """Refuse a config that names a hub repository, whose compiled kernels transformers would download and call."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        asked = getattr(part, "_attn_implementation", None)
        if isinstance(asked, str) and "/" in asked:
            raise ConfigError(
                f"{checkpoint.path}: config.json asks for attention code from the hub ({asked}), which is not run on a "
                "checkpoint's word: remove _attn_implementation from it"
            )


#: Parameters that will be tied are counted one by one while a model is built.
TIES = 8
FEW_ELEMENTS = 1 << 20


@contextmanager
def bounded(checkpoint: Checkpoint) -> Iterator[None]:
    """End the building, in this thread, of a model that has several times as many elements as the checkpoint.

    Every stored element fills one parameter, however tensors are merged or split on the way. Raises
    `WeightsMismatchError` from within a constructor.
    """
    stored = sum(entry.numel for entry in checkpoint.index.values())
    most = left = TIES * stored + FEW_ELEMENTS
    builder = threading.get_ident()

    def count(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        if parameter is None or threading.get_ident() != builder:
            return
        left -= parameter.numel()
        if left < 0:
            said = f"it describes a model of more than {most:,} elements"
            raise contradiction(checkpoint.path, said, f"{stored:,}")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
