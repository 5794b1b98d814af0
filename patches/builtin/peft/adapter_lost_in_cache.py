"""`peft.adapter-lost-in-cache`: of several adapters of one module, all are applied if parameters are parametrized."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ...registry import REGISTRY
from ._specimen import adapted_parametrized

__all__ = ["apply_afresh"]


def inner_adapter_is_lost() -> bool:
    """Whether a parametrized parameter has its bare values in a forward, since the cache has them."""
    import torch

    outer = adapted_parametrized(names=("a", "b")).model[0]
    experts = outer.get_base_layer()
    bare = experts.a
    with outer._activate_lora(["default"]), outer.base_layer._activate_lora(["default"]):
        return torch.equal(experts.a, bare)


def check_applies_inner_adapter() -> None:
    """Raise RuntimeError if a parameter has its bare values in a forward."""
    import torch

    outer = adapted_parametrized(names=("a", "b")).model[0]
    inner, experts = outer.base_layer, outer.get_base_layer()
    bare = experts.a
    with outer._activate_lora(["default"]), apply_afresh(inner._activate_lora, inner, (["default"],), {}):
        if torch.equal(experts.a, bare):
            raise RuntimeError("expected the adapter of the inner parameter to be applied, found bare values")


@REGISTRY.register(
    "peft.adapter-lost-in-cache",
    target="peft.tuners.lora.layer:ParamWrapper._activate_lora",
    reason=(
        "where two parameters of a module are parametrized and adapted, such as experts in 4 bits, only the adapter of "
        "the last one has an effect and is trained: the values of the other are cached before its adapter is added"
    ),
    upstream="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py",
    requires={"peft": ">=0.19,<=0.21.2"},
    signature="(self, active_adapters)",
    fingerprint=("7cfa0cbcec306710", "66fd9d437d0894f6"),  # until 0.20, since 0.21
    probe=inner_adapter_is_lost,
    verify=check_applies_inner_adapter,
)
def apply_afresh(
    wrapped: Callable[..., AbstractContextManager[None]], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AbstractContextManager[None]:
    """Apply the adapter as upstream does, and have torch forget the values that it has cached before and in it."""
    return _forgetting(wrapped(*args, **kwargs), (id(instance.get_base_layer()), instance.parameter_name))


@contextmanager
def _forgetting(active: AbstractContextManager[None], key: tuple[int, str]) -> Iterator[None]:
    from torch.nn.utils import parametrize

    try:
        with active:
            parametrize._cache.pop(key, None)
            yield
    finally:
        parametrize._cache.pop(key, None)
