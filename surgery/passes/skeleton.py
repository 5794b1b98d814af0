"""Build the model on meta, with real non-persistent buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError, ConfigError, SurgeryError
from surgery.passes.base import Pass
from surgery.passes.extent import bounded

__all__ = ["Skeleton", "causal_lm"]


@dataclass(frozen=True, kw_only=True)
class Skeleton(Pass):
    """Calls `build` with every parameter going to meta.

    After: parameters and persistent buffers are on meta, in `dtype`; buffers that no checkpoint holds (rotary
    frequencies, say) are real, on `device`; tied parameters are one object.
    """

    name: ClassVar[str] = "skeleton"
    ensures: ClassVar[frozenset[str]] = frozenset({"on-meta"})

    build: Callable[[], nn.Module]
    dtype: torch.dtype
    device: torch.device

    def build_on_meta(self) -> nn.Module:
        """The new model."""
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            skeleton = self.build()
        # Registering on meta has made one parameter of every name.
        getattr(skeleton, "tie_weights", lambda: None)()
        for parameter in skeleton.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(self.dtype)
        _place_buffers(skeleton, self.device)
        return skeleton


def _place_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            persistent = name not in module._non_persistent_buffers_set
            module._buffers[name] = buffer.to("meta" if persistent else device)


def causal_lm(checkpoint: Checkpoint, dtype: torch.dtype) -> Callable[[], nn.Module]:
    """A builder of the decoder-only transformers model that `checkpoint.config` describes.

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
    with _blaming_the_config(checkpoint):
        config = AutoConfig.from_pretrained(_folder(checkpoint), trust_remote_code=False)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ConfigError(
            f"{checkpoint.path}: model_type {config.model_type!r} has no causal language model in transformers"
        )
    _refuse_hub_kernels(config, checkpoint)
    config._name_or_path = str(checkpoint.source)
    config.use_cache = False

    def build() -> nn.Module:
        from transformers.initialization import no_init_weights

        with _blaming_the_config(checkpoint), no_init_weights(), bounded(checkpoint):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        return model.train()

    return build


@contextlib.contextmanager
def _blaming_the_config(checkpoint: Checkpoint) -> Iterator[None]:
    """Turns whatever a config class or a model's constructor raises, each its own kind, into a `ConfigError`."""
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:
        raise ConfigError(f"{checkpoint.path}: transformers cannot use this config.json: {error}") from error


def _refuse_hub_kernels(config: Any, checkpoint: Checkpoint) -> None:
    """A config can name a hub repository whose compiled attention kernels transformers would download and call."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        asked = getattr(part, "_attn_implementation", None)
        if isinstance(asked, str) and "/" in asked:
            raise ConfigError(
                f"{checkpoint.path}: config.json asks for attention code from the hub ({asked}), which is not run on a "
                "checkpoint's word: remove _attn_implementation from it"
            )


def _folder(checkpoint: Checkpoint) -> Path:
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
