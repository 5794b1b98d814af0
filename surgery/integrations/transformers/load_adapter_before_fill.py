"""`transformers.load-adapter-before-fill`: `load_adapter` of a model of transformers whose weights are on meta."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import model_surgery_patches as patches
from surgery.errors import NotFilledError
from surgery.passes.lifetime import showing_state

__all__ = ["load_adapter"]


@contextmanager
def _set(model: Any, name: str, value: object) -> Iterator[None]:
    before = {key: held for key, held in vars(model).items() if key == name}
    vars(model)[name] = value
    try:
        yield
    finally:
        del vars(model)[name]
        vars(model).update(before)


@patches.register(
    "transformers.load-adapter-before-fill",
    target="transformers.integrations.peft:PeftAdapterMixin.load_adapter",
    reason="transformers looks up names in the model's state to load an adapter; a model on meta refuses it",
    upstream="https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/integrations/peft.py",
    requires={"transformers": ">=4.56"},
)
def load_adapter(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Load it. Whole modules (`modules_to_save`) are refused: they would get the base's values by filling."""
    # Where it loads adapters to; by default that is where the model is.
    with showing_state(instance), _set(instance, "hf_device_map", {"": "cpu"}):
        result = wrapped(*args, **kwargs)
    if any(config.modules_to_save for config in instance.peft_config.values()):
        raise NotFilledError("loading an adapter with modules_to_save")
    return result
