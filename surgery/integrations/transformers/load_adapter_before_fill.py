"""`transformers.load-adapter-before-fill`: `load_adapter` of a model of transformers whose weights are on meta."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
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


def state_is_looked_at() -> bool:
    """Whether transformers asks a model for its state to load an adapter into it, by its source."""
    import inspect

    from transformers.integrations.peft import PeftAdapterMixin

    return "_load_pretrained_model" in inspect.getsource(PeftAdapterMixin)


def check_puts_back() -> None:
    """Raise RuntimeError if what is set while an adapter is loaded stays."""
    model = SimpleNamespace(hf_device_map="before")
    with _set(model, "hf_device_map", {"": "cpu"}):
        during = model.hf_device_map
    if (during, model.hf_device_map) != ({"": "cpu"}, "before"):
        raise RuntimeError(f"expected the device map to be set and put back, found {during}, then {vars(model)}")


@patches.register(
    "transformers.load-adapter-before-fill",
    target="transformers.integrations.peft:PeftAdapterMixin.load_adapter",
    reason="transformers looks up names in the model's state to load an adapter; a model on meta refuses it",
    upstream="https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/integrations/peft.py",
    requires={"transformers": ">=5.17,<5.25"},
    signature="(self, peft_model_id=None, adapter_name=None, peft_config=None, adapter_state_dict=None, "
    "low_cpu_mem_usage=False, is_trainable=False, hotswap='auto', local_files_only=False, adapter_kwargs=None, "
    "load_config=None, **kwargs)",
    fingerprint=("b3187ae4ae30cc46", "975154c7f4ac700e"),  # 5.17, and from 5.18 on
    probe=state_is_looked_at,
    verify=check_puts_back,
)
def load_adapter(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Load it. Whole modules (`modules_to_save`) are refused: they would get the base's values by filling."""
    # Where it loads adapters to; by default that is where the model is.
    with showing_state(instance), _set(instance, "hf_device_map", {"": "cpu"}):
        result = wrapped(*args, **kwargs)
    if any(config.modules_to_save for config in instance.peft_config.values()):
        raise NotFilledError("loading an adapter with modules_to_save")
    return result
