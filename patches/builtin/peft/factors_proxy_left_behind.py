"""`peft.factors-proxy-left-behind`: an adapter of a parametrized parameter is taken off after each forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...registry import REGISTRY
from ._specimen import adapted_parametrized

__all__ = ["remove_proxy"]


def _left_behind(wrapper: Any) -> int:
    with wrapper._activate_lora(["default"]):
        pass
    return len(wrapper.get_base_layer().parametrizations["a"]) - 1


def proxy_is_left_behind() -> bool:
    """Whether PEFT leaves an adapter of a parametrized parameter in force, and warns that it found none."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _left_behind(adapted_parametrized().model[0]) > 0


def check_removes_proxy() -> None:
    """Raise RuntimeError if an adapter is left in force."""
    from types import MethodType

    wrapper = adapted_parametrized().model[0]
    vars(wrapper)["_remove_parametrizations"] = MethodType(
        lambda instance: remove_proxy(type(instance)._remove_parametrizations, instance, (), {}), wrapper
    )
    if _left_behind(wrapper):
        raise RuntimeError("expected no adapter to be left after a forward, found one")


@REGISTRY.register(
    "peft.factors-proxy-left-behind",
    target="peft.tuners.lora.layer:ParamWrapper._remove_parametrizations",
    reason=(
        "the adapter of a parameter that is parametrized, such as experts in 4 bits, is not taken off after a forward: "
        "each forward adds it once more, disable_adapter() does nothing, and the second step of a training raises"
    ),
    upstream="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py",
    requires={"peft": ">=0.21.0,<=0.21.2"},
    signature="(self)",
    fingerprint="fff25e7318c295ff",
    probe=proxy_is_left_behind,
    verify=check_removes_proxy,
)
def remove_proxy(
    wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Remove the last parametrization that is the adapter's: upstream looks for one of its two classes alone."""
    from peft.tuners.lora import layer

    held = instance.get_base_layer().parametrizations
    each = held[instance.parameter_name] if instance.parameter_name in held else ()
    found = [place for place, proxy in enumerate(each) if isinstance(proxy, layer._LoraFactorsProxy)]
    if len(each) > 1 and found:
        del each[found[-1]]
    else:
        wrapped(*args, **kwargs)
