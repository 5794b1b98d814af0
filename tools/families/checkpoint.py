"""Write a small random checkpoint of a family: seeded, in 16 bits, and with non-trivial output."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import nn

from families.exceptions import LEFT_ALONE
from families.inputs import loss_of
from families.shrink import tiny_config

__all__ = ["NotMadeError", "save_random"]

#: Maximum number of parameters: a config that the rules leave larger is not tiny.
MOST_PARAMETERS: Final = 20_000_000

#: Standard deviations of weights to try, until logits are finite and differ from token to token.
SCALES: Final = (0.08, 0.02, 0.005)


class NotMadeError(Exception):
    """No tiny model of this family can be made or run; the message says why."""


def save_random(family: str, folder: Path) -> None:
    """Save the checkpoint in `folder`: in float32 the tensors that transformers keeps so, in bfloat16 all others."""
    try:
        model = _tiny_model(family)
    except Exception as error:
        raise NotMadeError(textwrap.shorten(f"{type(error).__name__}: {error}", 320, placeholder=" ...")) from error
    model.save_pretrained(folder)


def _tiny_model(family: str) -> Any:
    config = tiny_config(family)
    build = _builder(config)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build(config).parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"{parameters:,} parameters after shrinking")
    torch.manual_seed(0)
    model = build(config, dtype=torch.float32).train()
    _randomize(model, family)
    _cast(model)
    return model


def _builder(config: Any) -> Callable[..., Any]:
    """The builder of the whole model of `config`, with vision even if `AutoModelForCausalLM` loads the text alone."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return (AutoModelForImageTextToText if _text_alone(config) else AutoModelForCausalLM).from_config


def _text_alone(config: Any) -> bool:
    from transformers import AutoModelForCausalLM

    text, classes = config.sub_configs.get("text_config"), cast("Any", AutoModelForCausalLM._model_mapping)
    return text is not None and classes[type(config)].config_class is text


def _randomize(model: Any, family: str) -> None:
    """Fill the model with random values, reducing their scale until its loss is finite."""
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    left_alone = LEFT_ALONE.get(family, ("/", ""))[0]  # no name ends with "/"
    for scale in SCALES:
        model.load_state_dict(own)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, tensor in _stored_tensors(model):
                if not name.endswith(left_alone):
                    _draw(name, tensor, scale, generator)
            loss = None if _text_alone(model.config) else loss_of(model)
        if loss is None or loss.isfinite():
            return
    raise ArithmeticError("the loss is not finite with random weights")


def _stored_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The floating-point tensors of `model` that a checkpoint stores, each once."""
    stored = model.state_dict(keep_vars=True)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in stored and tensor.is_floating_point() and tensor.numel():
            yield name, tensor


def _draw(name: str, tensor: torch.Tensor, scale: float, generator: torch.Generator) -> None:
    """Draw weights; perturb biases and norms; leave the rest, such as decay rates, at the class's values."""
    noise = torch.randn(tensor.shape, generator=generator)
    if tensor.dim() >= 2 and "A_log" not in name:
        tensor.copy_(noise * scale)
    elif tensor.dim() == 1 and re.search("bias|norm", name):
        tensor.add_(noise * 0.05)


def _cast(model: Any) -> None:
    kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    for name, tensor in _stored_tensors(model):
        if not any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in kept):
            tensor.data = tensor.data.to(torch.bfloat16)
