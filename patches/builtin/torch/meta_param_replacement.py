"""`torch.meta-param-replacement`: `module.to("meta")` keeps the class of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ...registry import REGISTRY

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["keep_parameter_class"]


def to_meta_fails_for_subclass() -> bool:
    """Whether `to("meta")` of a module with a parameter of a subclass raises or loses the class."""
    module = _module_with_subclass()
    try:
        module.to("meta")
    except RuntimeError:
        return True
    return not _is_subclass(module.weight)


def check_keeps_parameter_class() -> None:
    """Raise RuntimeError if `to("meta")` through the wrapper loses the class or an attribute."""
    module = _module_with_subclass()
    stock = type(module)._apply.__get__(module)
    keep_parameter_class(stock, module, (lambda tensor: tensor.to("meta"),), {})
    if not (module.weight.is_meta and _is_subclass(module.weight) and module.weight.note == "kept"):
        raise RuntimeError(f"moving to meta gave {module.weight!r}, without the class or the attributes it had")


@REGISTRY.register(
    "torch.meta-param-replacement",
    target="torch.nn.modules.module:Module._apply",
    reason=(
        "module.to('meta') wraps what a parameter's own `to` returns in a plain Parameter: it raises for a "
        "bitsandbytes Params4bit, after that has dragged its quant_state to meta"
    ),
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/nn/modules/module.py",
    requires={"torch": ">=2.1"},
    signature="(self, fn, recurse=True)",
    probe=to_meta_fails_for_subclass,
    verify=check_keeps_parameter_class,
)
def keep_parameter_class(
    wrapped: Callable[..., nn.Module], instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> nn.Module:
    """Keep the class of subclass parameters in `Module._apply(fn, recurse=True)` if `fn` moves to meta.

    The new parameter has the class of the old one and shares its attributes. The old one is not touched, and
    its own `to` is not called, so a quant_state stays on its device. A subclass parameter that several modules
    of the call share is still shared afterwards. Stock behaviour for plain and lazy parameters, tensor
    subclasses that wrap tensors (DTensor), buffers, and any other `fn`.

    Limited to a module, it acts on that module's submodules too, if the call starts at the module.
    """
    fn, *rest = (kwargs.pop("fn"), *args) if "fn" in kwargs else args
    if isinstance(fn, _SparingSubclasses):  # a submodule: the call on its parent handles it
        return wrapped(fn, *rest, **kwargs)
    before = list(_subclass_parameters(instance))
    if not before:
        return wrapped(fn, *rest, **kwargs)
    result = wrapped(_SparingSubclasses(fn), *rest, **kwargs)
    _restore_classes(before)
    return result


class _SparingSubclasses:
    """`fn`, but if it moves to meta, called on a plain alias instead of a subclass parameter."""

    def __init__(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._fn = fn

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if _is_subclass(tensor) and self._moves_to_meta(tensor):
            return self._fn(tensor.data)
        return self._fn(tensor)

    def _moves_to_meta(self, tensor: torch.Tensor) -> bool:
        """Whether `fn` moves to meta. Tried on an empty tensor: on the real one, the call may already do the damage."""
        import torch

        return self._fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).is_meta


def _subclass_parameters(root: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and _is_subclass(parameter):
                yield module, name, parameter


def _is_subclass(tensor: torch.Tensor) -> bool:
    from torch import nn
    from torch.nn.parameter import is_lazy

    # By `type`: `isinstance` is true for any tensor marked as a parameter, such as a DTensor.
    return issubclass(type(tensor), nn.Parameter) and type(tensor) is not nn.Parameter and not is_lazy(tensor)


def _restore_classes(before: list[tuple[nn.Module, str, torch.Tensor]]) -> None:
    replacements: dict[int, torch.Tensor] = {}
    for module, name, original in before:
        stored = module._parameters[name]
        if stored is None or stored is original or not stored.is_meta or _is_subclass(stored):
            continue
        if id(original) not in replacements:
            replacements[id(original)] = _like(original, stored)
        module._parameters[name] = replacements[id(original)]  # type: ignore[assignment]  # a subclass of Parameter


def _like(original: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    import torch

    replacement = torch.Tensor._make_subclass(type(original), stored.data, original.requires_grad)
    vars(replacement).update(vars(original))
    replacement.grad = stored.grad
    return replacement


def _module_with_subclass() -> Any:
    import torch
    from torch import nn

    class Noted(nn.Parameter):
        """A parameter with an attribute, whose `to` keeps the class, as bitsandbytes' does."""

        def to(self, *args: Any, **kwargs: Any) -> Any:
            return torch.Tensor._make_subclass(Noted, self.data.to(*args, **kwargs))

    module: Any = nn.Module()
    module.weight = Noted(torch.zeros(1))
    module.weight.note = "kept"
    return module
