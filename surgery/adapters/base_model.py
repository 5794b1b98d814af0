"""The checkpoint that an adapter was made for, as it is named in the configuration that is saved with the adapter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from surgery.checkpoint import Checkpoint

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

__all__ = ["base_folder", "config_to_save", "name_base"]


def name_base(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Name `checkpoint` in the configurations of the adapters of `model`, if it has any.

    A folder by its absolute path; what is on the hub by its id, and the commit as `revision`.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return
    for config in model.peft_config.values():
        config.base_model_name_or_path = checkpoint.source if checkpoint.revision else str(checkpoint.path)
        config.revision = checkpoint.revision or config.revision


def base_folder(config: PeftConfig) -> Path | None:
    """The folder of the base model on this machine, hub cache included; None if it has none. Nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name = config.base_model_name_or_path
    if not name:
        return None
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=config.revision)
    except HFValidationError:  # no id, so it is a path
        return Path(name) if Path(name).is_dir() else None
    return Path(cached).parent if isinstance(cached, str) else None


def config_to_save(model: PeftModel, adapter: str) -> PeftConfig:
    """A copy of the configuration of `adapter`, for inference; with `CAUSAL_LM` where no task was given for one.

    Where it names no base model, it gets that of another adapter of `model`, as for one that was added later. Names are
    in order, so that the same configuration is the same file.
    """
    config = copy.deepcopy(model.peft_config[adapter])
    named = [each for each in model.peft_config.values() if each.base_model_name_or_path]
    if named and not config.base_model_name_or_path:
        config.base_model_name_or_path, config.revision = named[0].base_model_name_or_path, named[0].revision
    config.inference_mode = True
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))
    if config.task_type is None and _is_causal_lm(model.get_base_model()):
        config.task_type = "CAUSAL_LM"
    if config.task_type is None:
        kind = _class_of(model.get_base_model())
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return config


def _is_causal_lm(model: nn.Module) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return _class_of(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _class_of(model: nn.Module) -> type:
    """The class of `model`, without those that sharding puts in front of it."""
    return next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed."))
