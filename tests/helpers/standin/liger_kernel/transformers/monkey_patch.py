"""Changes everything that Liger's own functions change: modules, classes, namespaces of transformers and of torch."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

from liger_kernel.transformers.layers import (
    LigerExperts,
    LigerRMSNorm,
    LigerSwiGLUMLP,
    liger_cross_entropy,
    liger_rotary_pos_emb,
)
from liger_kernel.transformers.model.llama import lce_forward


def _bind_method_to_module(module: Any, method_name: str, new_method: Any) -> None:
    module.__dict__[method_name] = new_method.__get__(module, module.__class__)


def _patch_rms_norm_module(module: Any, offset: float = 0.0, eps: float = 1e-6, in_place: bool = True) -> None:
    module.offset = offset
    module.variance_epsilon = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None) or eps
    module.in_place = in_place
    _bind_method_to_module(module, "forward", LigerRMSNorm.forward)
    _bind_method_to_module(module, "_get_name", lambda self: LigerRMSNorm.__name__)


def _patch_swiglu_module(module: Any, liger_module: Any) -> None:
    _bind_method_to_module(module, "forward", liger_module.forward)


def apply_liger_kernel_to_llama(  # noqa: C901, PLR0917  # as Liger's
    rope: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    model: Any = None,
) -> None:
    from transformers.models.llama import modeling_llama

    if rope:
        modeling_llama.apply_rotary_pos_emb = liger_rotary_pos_emb
    if rms_norm:
        modeling_llama.LlamaRMSNorm = LigerRMSNorm
        modeling_llama.nn.LayerNorm = LigerRMSNorm
    if swiglu:
        modeling_llama.LlamaMLP = LigerSwiGLUMLP
    if cross_entropy:
        from transformers.loss.loss_utils import nn

        nn.functional.cross_entropy = liger_cross_entropy
    if fused_linear_cross_entropy:
        model.forward = MethodType(lce_forward, model)
    base_model = getattr(model, model.base_model_prefix, model)
    _patch_rms_norm_module(base_model.norm)
    for decoder_layer in base_model.layers:
        if swiglu:
            _patch_swiglu_module(decoder_layer.mlp, LigerSwiGLUMLP)
        if rms_norm:
            _patch_rms_norm_module(decoder_layer.input_layernorm)
            _patch_rms_norm_module(decoder_layer.post_attention_layernorm, in_place=False)


def apply_liger_kernel_to_mixtral(cross_entropy: bool = True, model: Any = None) -> None:
    from transformers.models.mixtral import modeling_mixtral
    from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM

    if cross_entropy:
        from transformers.loss.loss_utils import nn

        nn.functional.cross_entropy = liger_cross_entropy
    assert isinstance(model, MixtralForCausalLM)
    modeling_mixtral.MixtralForCausalLM.forward = lce_forward
    for decoder_layer in model.model.layers:
        _patch_swiglu_module(decoder_layer.mlp.experts, LigerExperts)


def apply_liger_kernel_to_llava(model: Any = None) -> None:
    model.forward = MethodType(lce_forward, model)
    apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, model=model.model.language_model)


def apply_liger_kernel_to_mistral(model: Any = None, **kwargs: Any) -> None:
    text_liger_fn = MODEL_TYPE_TO_APPLY_LIGER_FN["mistral_text"]
    accepted = inspect.signature(text_liger_fn).parameters
    text_liger_fn(**{name: value for name, value in kwargs.items() if name in accepted}, model=model)


def apply_liger_kernel_to_mistral_text(rope: bool = True, model: Any = None) -> None:
    from transformers.models.mistral import modeling_mistral

    if rope:
        modeling_mistral.apply_rotary_pos_emb = liger_rotary_pos_emb
    raise TypeError(f"Unsupported model type: {type(model).__name__}")


MODEL_TYPE_TO_APPLY_LIGER_FN = {
    "llama": apply_liger_kernel_to_llama,
    "llava": apply_liger_kernel_to_llava,
    "mixtral": apply_liger_kernel_to_mixtral,
    "mistral": apply_liger_kernel_to_mistral,
    "mistral_text": apply_liger_kernel_to_mistral_text,
}
