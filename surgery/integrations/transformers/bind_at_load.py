"""`transformers.bind-at-load`: `from_pretrained` builds a model, finds its weights, and reads none."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import model_surgery_patches as patches
from surgery.bound import LOADED
from surgery.comm.environment import launched_world_size
from surgery.config import QuantType
from surgery.errors import ConfigError, SurgeryError

__all__ = ["bind_at_load", "load_reads_everything", "loaded_specimen"]

ID = "transformers.bind-at-load"

logger = logging.getLogger("surgery")


def load_reads_everything() -> bool:
    """Whether this rank has the weights of a whole model once it is loaded, however many ranks there are."""
    return not loaded_specimen().linear.weight.is_meta


def check_reads_nothing() -> None:
    """Raise RuntimeError if a model that is loaded has its weights."""
    if not loaded_specimen().linear.weight.is_meta:
        raise RuntimeError("expected a model that is loaded to stay on meta, found its weights in memory")


def loaded_specimen(*, finalized: bool = False) -> Any:
    """The smallest model of transformers, loaded from a file in a folder of its own."""
    import torch
    from safetensors.torch import save_file
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.modeling_utils import LoadStateDictConfig

    class Specimen(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.linear = nn.Linear(2, 2, bias=False)
            self.post_init()  # type: ignore[no-untyped-call]

    with torch.random.fork_rng(devices=()), torch.device("meta"):
        model = Specimen(PretrainedConfig())
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "model.safetensors"))
        save_file({"linear.weight": torch.zeros(2, 2)}, file)
        config = LoadStateDictConfig(dtype=torch.float32, weight_mapping=[])
        with _without_bar():
            info, _ = PreTrainedModel._load_pretrained_model(model, None, [file], config)
    if finalized:
        PreTrainedModel._finalize_model_loading(model, config, info)
    return model


@contextmanager
def _without_bar() -> Iterator[None]:
    from transformers.utils import logging as upstream

    shown = upstream.is_progress_bar_enabled()
    upstream.disable_progress_bar()
    try:
        yield
    finally:
        (upstream.enable_progress_bar if shown else upstream.disable_progress_bar)()  # type: ignore[no-untyped-call]


@patches.register(
    ID,
    target="transformers.modeling_utils:PreTrainedModel._load_pretrained_model",
    reason="every rank of a job reads, quantizes and keeps the whole model before anything is sharded",
    upstream="https://github.com/huggingface/transformers/issues/43749",
    requires={"transformers": ">=5.17,<5.25"},
    signature="(model, state_dict, checkpoint_files, load_config, expected_keys=None)",
    fingerprint=("f89597e0782e8e9d", "1a2a7c2fecdf2a74"),  # until 5.22, and from 5.23 on
    on_unknown="skip",
    on_drift="skip",
    probe=load_reads_everything,
    verify=check_reads_nothing,
)
def bind_at_load(wrapped: Callable[..., Any], _instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Bind the model to its files where `_load_pretrained_model` would read them.

    What upstream does before and after is upstream's: it finds the files, builds the model, replaces its modules,
    makes tables of names, ties, and sets what a quantized model has. What cannot be bound is loaded as by upstream,
    and the reason is logged; if it has experts that were asked for in 4 bits, `ConfigError` is raised.
    """
    given = dict(zip(("model", "state_dict", "checkpoint_files", "load_config"), args, strict=False)) | kwargs
    if given.get("expected_keys") is None:  # otherwise it is an adapter beside the model, which is small
        reason = _why_not(given["state_dict"], given["checkpoint_files"], given["load_config"])
        advice = ". Leave out experts=, or change that"
        try:
            if reason is None:
                return _bind(given["model"], given["checkpoint_files"], given["load_config"]), None
        except SurgeryError as error:
            reason, advice = str(error), ""
        name = type(given["model"]).__name__
        _refuse_experts(given["model"], f"{reason}{advice}")
        logger.warning("surgery.low_memory: %s is loaded as without it: %s", name, reason)
        vars(given["model"])[LOADED] = reason
    patches.passed(ID)
    return wrapped(*args, **kwargs)


def _why_not(state_dict: Any, files: Sequence[str] | None, config: Any) -> str | None:
    """The reason why upstream has to load the model; None if there is none."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    quantizer, places = config.hf_quantizer, set((config.device_map or {}).values())
    reasons = {
        "its weights are given as a state_dict": state_dict is not None,
        "its weights are not in safetensors files": not files or not all(f.endswith(".safetensors") for f in files),
        "DeepSpeed ZeRO-3 shards it by itself": is_deepspeed_zero3_enabled(),
        "it is on a device mesh (tp_plan)": config.device_mesh is not None,
        f"device_map spreads it over {', '.join(map(str, sorted(map(str, places))))}": len(places) > 1
        or "disk" in places,
        f"{type(quantizer).__name__} is not a way to store weights here; BitsAndBytesConfig(load_in_4bit=True) is": (
            quantizer is not None and type(quantizer).__name__ != "Bnb4BitHfQuantizer" and not _is_in_8_bits(quantizer)
        ),
        "ignore_mismatched_sizes=True may leave weights to be initialized": bool(config.ignore_mismatched_sizes),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _is_in_8_bits(quantizer: Any) -> bool:
    """Whether its checkpoint is in 8 bits already: nothing is quantized to that here."""
    return type(quantizer).__name__ == "Bnb8BitHfQuantizer" and bool(quantizer.pre_quantized)


def _bind(model: Any, files: Sequence[str], config: Any) -> Any:
    """Bind `model`, and return what upstream wants to know of loading."""
    from transformers.utils.loading_report import LoadStateDictInfo

    from surgery.bound import bind_alone
    from surgery.checkpoint import Checkpoint
    from surgery.integrations.low_memory import asked_experts, asked_kernels
    from surgery.model.pretrained import leave_initialized

    checkpoint = Checkpoint.of_files(files, source=str(config.pretrained_model_name_or_path or model.name_or_path))
    packing = checkpoint.packing
    stored: Any = packing.quant_type if packing is not None and packing.is_stack else None
    quant, compute_dtype = _quantization(model, config.hf_quantizer, asked_experts() or stored)
    bound = bind_alone(
        model,
        checkpoint,
        quant=quant,
        dtype=config.dtype,
        compute_dtype=compute_dtype,
        conversions=[each for each in config.weight_mapping or () if not _makes_packed(each)],
        kernels=asked_kernels(),
    )
    leave_initialized(model)
    _say_left_out(model, asked_experts())
    return LoadStateDictInfo(
        missing_keys=set(),
        unexpected_keys=set(bound.ignored),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )


def _refuse_experts(model: Any, reason: str) -> None:
    """Raise `ConfigError` if experts of `model`, which cannot be bound for that `reason`, are to be in 4 bits."""
    from surgery.integrations.low_memory import asked_experts
    from surgery.quantizers.experts import has_experts

    experts = asked_experts()
    if experts is not None and has_experts(model):
        raise ConfigError(
            f"low_memory(experts={experts!r}): {type(model).__name__} would be loaded by transformers, its experts in "
            f"16 bits: {reason}"
        )


def _say_left_out(model: Any, experts: QuantType | None) -> None:
    """Warn of experts of `model` that stay in 16 bits though they are asked for in 4."""
    from surgery.quantizers.experts import left_out

    names = left_out(model)
    if experts is not None and names:
        left = f"{', '.join(names[:2])} ({len(names)} in all)"
        logger.warning("surgery.low_memory(experts=%r): %s stay in 16 bits", experts, left)


def _makes_packed(conversion: Any) -> bool:
    """Whether a conversion of upstream puts together the tensors of a packed weight, which are known here as one."""
    makers = ("Bnb4bitDeserialize", "Bnb8bitDeserialize")
    return any(type(each).__name__ in makers for each in getattr(conversion, "operations", ()))


def _quantization(model: Any, quantizer: Any, experts: QuantType | None) -> tuple[Any, Any]:
    """`(quant, compute_dtype)` as upstream's configuration has them; None for a model in 16 bits.

    experts: the 4-bit type of fused experts, for which it has no word.
    """
    from surgery.config import Quant, Quant8

    if quantizer is None:
        return (None if experts is None else Quant(experts)), None
    asked = quantizer.quantization_config
    if _is_in_8_bits(quantizer):
        if experts is not None:
            raise ConfigError("its other weights are in 8 bits, with which experts in 4 bits do not go")
        return Quant8(threshold=asked.llm_int8_threshold), None
    # What is packed already is mostly stored as bytes, which cannot be sharded together with the rest.
    is_viewed = quantizer.pre_quantized and (launched_world_size() or 1) > 1
    quant = Quant(
        asked.bnb_4bit_quant_type,
        double_quant=asked.bnb_4bit_use_double_quant,
        quant_storage=None if is_viewed else asked.bnb_4bit_quant_storage,
        experts=experts or False,
        skip_modules=_skipped_experts(model, quantizer) if experts is not None else (),
    )
    return quant, asked.bnb_4bit_compute_dtype


def _skipped_experts(model: Any, quantizer: Any) -> tuple[str, ...]:
    """Patterns of the fused experts of `model` that the configuration leaves as they are (`llm_int8_skip_modules`)."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    from surgery.quantizers.experts import fused_parameters

    experts = (name for name, module in model.named_modules() if fused_parameters(module))
    skipped = (name for name in experts if not should_convert_module(name, quantizer.modules_to_not_convert))
    return tuple(f"^{re.escape(name)}$" for name in skipped)
