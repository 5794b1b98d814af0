"""Properties that transformers gives a model of its own that it loads in 4 or 8 bits, set by its own code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from surgery.model.fqn import join
from surgery.model.tree import modules_of, own_tensors

__all__ = [
    "compute_buffers",
    "is_pretrained",
    "leave_initialized",
    "load_generation_config",
    "mark_quantized",
    "not_converted",
    "planned_dtypes",
    "refuse_saving",
    "stored_dtypes",
]

logger = logging.getLogger("surgery")

#: What transformers sets on a tensor, or a module, that it must not initialize.
INITIALIZED = "_is_hf_initialized"


def is_pretrained(model: nn.Module) -> bool:
    """Whether `model` is one of transformers'."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def stored_dtypes(model: Any, dtype: torch.dtype) -> Iterator[tuple[nn.Module, str, torch.dtype]]:
    """`(module, name, dtype)` of each floating-point parameter and persistent buffer of a transformers `model`.

    As `from_pretrained(dtype=dtype)` stores them: float32 where the model says so (`_keep_in_fp32_modules` and
    `_keep_in_fp32_modules_strict`); else what the constructor has asked for, if it was made in `dtype`; else `dtype`
    for parameters, and what they have for buffers.
    """
    planned = planned_dtypes(model, dtype)
    made_in_it = model.config.dtype == dtype
    seen: set[torch.Tensor] = set()
    for prefix, module in model.named_modules():
        for name, tensor in own_tensors(module):
            if tensor in seen or not tensor.is_floating_point():
                continue
            seen.add(tensor)
            own = tensor.dtype if made_in_it or not isinstance(tensor, nn.Parameter) else dtype
            yield module, name, planned(join(prefix, name)) or own


def planned_dtypes(model: Any, dtype: torch.dtype) -> Callable[[str], torch.dtype | None]:
    """The dtype that a transformers `model` wants of the tensor of a name whatever `dtype` is loaded in; or None."""
    from transformers.core_model_loading import build_glob_alternation

    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    pattern, names, _ = build_glob_alternation(list(plan)) if plan else (None, {}, {})

    def planned(name: str) -> torch.dtype | None:
        found = pattern.search(name) if pattern is not None else None
        return plan[names[str(found.lastgroup)]] if found is not None else None

    return planned


def compute_buffers(model: Any, device: torch.device) -> None:
    """Give the buffers of a transformers `model` that no checkpoint holds, on `device`, the values that it computes.

    Constructors make them in the dtype of the model, in which a position has no more than three digits; what counts is
    `_init_weights`, which runs when everything is loaded. Parameters and persistent buffers are on meta, and stay so;
    torch's random generators are left as they are.
    """
    from transformers.initialization import guard_torch_init_functions

    visited = _around_buffers(model)
    for module in model.modules():
        vars(module)[INITIALIZED] = module not in visited  # those visited may have been initialized in another dtype
        for _, tensor in own_tensors(module):
            setattr(tensor, INITIALIZED, True)
    # Not `model.initialize_weights()`, which visits every module, and leaves a method on `torch.nn.Module`.
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), guard_torch_init_functions(), torch.random.fork_rng(devices=devices):
        for module, initializer in _children_first(model, model, visited):
            initializer._initialize_weights(module)


def leave_initialized(model: Any) -> None:
    """Have transformers initialize nothing of `model` but non-persistent buffers, when it has loaded it."""
    for module in model.modules():
        for _, tensor in own_tensors(module):
            setattr(tensor, INITIALIZED, True)


def _children_first(module: nn.Module, initializer: Any, among: set[nn.Module]) -> Iterator[tuple[nn.Module, Any]]:
    """`(module, the model of transformers that it is in)` of `module`, and before it of all below, that are `among`."""
    if is_pretrained(module):
        initializer = module
    for child in module.children():
        if child in among:
            yield from _children_first(child, initializer, among)
    yield module, initializer


def _around_buffers(model: nn.Module) -> set[nn.Module]:
    """Modules with non-persistent buffers, and all that contain them: a parent may fill those of its children."""
    found: set[nn.Module] = set()
    for fqn, module in model.named_modules():
        if module._non_persistent_buffers_set:
            parts = fqn.split(".")
            found.update(model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1))
    return found


def load_generation_config(model: Any, folder: Path) -> None:
    """Read the generation settings of `folder` into a transformers `model`, as a load does; no code is run."""
    model.set_use_kernels(False)
    if not model.can_generate() or not hasattr(model, "adjust_generation_fn"):
        return
    model.adjust_generation_fn(
        None,
        from_auto_class=True,
        from_pipeline=None,
        pretrained_model_name_or_path=folder,
        cache_dir=None,
        force_download=False,
        proxies=None,
        local_files_only=True,
        token=None,
        revision="main",
        subfolder="",
        trust_remote_code=False,
    )


def not_converted(model: Any) -> list[str]:
    """Patterns, for `should_convert_module`, of the modules of a transformers `model` that its quantizer leaves."""
    from transformers.quantizers.base import HfQuantizer

    # transformers asks before it ties weights, when each still has every name.
    untied = SimpleNamespace(
        all_tied_weights_keys=model.all_tied_weights_keys,
        get_output_embeddings=model.get_output_embeddings,
        named_modules=model.named_modules,
        named_parameters=lambda: model.named_parameters(remove_duplicate=False),
    )
    patterns: list[str] = HfQuantizer.get_modules_to_not_convert(
        untied,  # type: ignore[arg-type]  # all that it looks at
        None,
        model._keep_in_fp32_modules,
    )
    return sorted(patterns)


def mark_quantized(model: Any, *, dtype: torch.dtype, **options: Any) -> None:
    """Set on a transformers `model`, its linear modules replaced already, and on its config, what its quantizer sets.

    Trainers, PEFT and models' own code ask for it. options: of its `BitsAndBytesConfig`.
    """
    from transformers import BitsAndBytesConfig
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    left = [fqn for fqn, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
    skipped = not_converted(model)
    if any(should_convert_module(fqn, skipped) for fqn in left):
        skipped = left
    config = BitsAndBytesConfig(llm_int8_skip_modules=left if skipped is left else None, **options)
    kind: Any = Bnb4BitHfQuantizer if config.load_in_4bit else Bnb8BitHfQuantizer
    quantizer: Any = kind(config, pre_quantized=False)
    quantizer.modules_to_not_convert = skipped
    # It would replace the modules.
    quantizer._process_model_before_weight_loading = lambda *_args, **_options: None
    quantizer.preprocess_model(model, dtype=dtype)
    del quantizer._process_model_before_weight_loading
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def refuse_saving(model: nn.Module) -> None:
    """Have `save_pretrained` of the transformers models in `model` raise `ValueError`, once a line has said why."""
    for module in modules_of(model):
        quantizer = vars(module).get("hf_quantizer")
        if quantizer is not None:
            quantizer.is_serializable = _is_serializable


def _is_serializable() -> bool:
    logger.warning("weights in 4 bits are written by surgery.export(model, directory), and not by save_pretrained")
    return False
