"""Patches that a sharded model needs in order to run: from when it is built until it is released or collected."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
from torch import nn

import model_surgery_patches as patches
from surgery.adapters.attach import patches_of_experts
from surgery.errors import NotFilledError
from surgery.model.tree import modules_of
from surgery.quantizers.base import QuantFormat, format_of, packed_names, quantized_modules

__all__ = [
    "Extension",
    "around",
    "as_context_manager",
    "at_release",
    "is_waiting",
    "keep",
    "make_up_for",
    "postponed",
    "release",
    "showing_state",
    "stop_waiting",
    "wait",
    "waiting_in",
    "written_on_meta",
]

#: Patches that a bound model has until it is filled.
WAITING = (
    "peft.adapters-of-meta",
    "peft.load-before-fill",
    "peft.no-merge-before-fill",
    "peft.no-unload-before-fill",
    "transformers.load-adapter-before-fill",
)

#: With which an adapter is read into a bound model whose blocks are wrapped in checkpoints: PEFT would pass over it.
UNDER_WRAPPERS = "peft.adapter-keys-under-wrappers"

_resident: weakref.WeakKeyDictionary[nn.Module, list[Callable[[], object]]] = weakref.WeakKeyDictionary()


def keep(model: nn.Module, receipts: Iterable[patches.Receipt]) -> None:
    """Hold `receipts` for `model`: they are reverted by `release`, or when `model` is garbage-collected."""
    at_release(model, patches.keep(receipts, model))


def at_release(model: nn.Module, undo: Callable[[], object]) -> None:
    """Have `release` call `undo`, which must not keep `model` alive."""
    _resident.setdefault(model, []).append(undo)


def around(model: nn.Module) -> Callable[[object], bool]:
    """A predicate for modules that are `model`, hold it, or are held by it; it does not keep `model` alive."""
    reference = weakref.ref(model)

    def is_around(given: object) -> bool:
        model = reference()
        if model is None or not isinstance(given, nn.Module):
            return False
        return given is model or model in modules_of(given) or given in modules_of(model)

    is_around.__qualname__ = f"around a {type(model).__name__}"  # what the audit says of the scope
    return is_around


def release(model: nn.Module) -> None:
    """Undo the resident patches of `model` and of models inside of it, such as that to which PEFT has added adapters.

    It cannot be filled, or run sharded 4-bit layers, after that. Twice is harmless.
    """
    for module in model.modules():
        for undo in _resident.pop(module, []):
            undo()  # of several threads, one does it


class Extension:
    """A mixin for the class of one module, as FSDP2 extends the class of a module."""

    @staticmethod
    def of(kind: Any, extension: type[Extension], **members: Any) -> Any:
        """The class `kind` with the extension, and by the same name."""
        shown = {"__module__": kind.__module__, "__doc__": kind.__doc__}
        return type(kind.__name__, (extension, kind), {**shown, **members})

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy or a pickle is of the class as upstream has it: the patches belong to this very model. In the form of
        # protocol 1, since pickle wants what later ones make to be of the class that it was asked to pickle.
        constructor, arguments, *state = cast("tuple[Any, ...]", super().__reduce_ex__(1))
        kind = type(self)
        plain = tuple(kind.__bases__[-1] if argument is kind else argument for argument in arguments)
        return (constructor, plain, *state)


class _Releasing(Extension):
    """`with model:` releases at the end of the block."""

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        release(self)  # type: ignore[arg-type]  # always mixed into an nn.Module


@functools.cache
def _releasing(kind: Any) -> Any:
    return Extension.of(kind, _Releasing)


def as_context_manager(model: nn.Module) -> nn.Module:
    """`model` itself, its class extended so that `with model:` releases it."""
    kind: Any = type(model)
    model.__class__ = _releasing(kind)
    return model


class _Wait(NamedTuple):
    undo: Callable[[], object]
    versions: dict[nn.Parameter, int]  # as torch counts operations in place


_waiting: weakref.WeakKeyDictionary[nn.Module, _Wait] = weakref.WeakKeyDictionary()
_postponed: weakref.WeakKeyDictionary[nn.Module, list[tuple[weakref.ref[nn.Module], Callable[[nn.Module], object]]]]
_postponed = weakref.WeakKeyDictionary()


def wait(model: nn.Module) -> None:
    """Have `model`, which is on meta, refuse to be used until `stop_waiting`; adapters of PEFT keep their values."""
    bundle = [patches.on(name, [model]) for name in WAITING]
    bundle += [patches.on(name, around(model)) for name in patches_of_experts(model)]
    with patches.transaction(*bundle, reason="a bound model waits for its weights") as transaction:
        # Once it is filled it has that too, and what does not fit is told then.
        with suppress(patches.PatchError), transaction.savepoint():
            transaction.apply(patches.on(UNDER_WRAPPERS, around(model)))
        versions = {parameter: parameter._version for parameter in model.parameters()}
        _waiting[model] = _Wait(patches.keep(transaction.receipts, model), versions)
        transaction.commit()
    kind: Any = type(model)
    model.__class__ = _refusing(kind)


def is_waiting(model: nn.Module) -> bool:
    """Whether `model` was bound, and is not filled yet."""
    return model in _waiting


def postponed(model: nn.Module, change: Callable[[nn.Module], object]) -> bool:
    """Whether `model` waits for its weights; then `change(model)` is called as soon as it has them."""
    bound = waiting_in(model)
    if bound is not None:
        _postponed.setdefault(bound, []).append((weakref.ref(model), change))
    return bound is not None


def make_up_for(bound: nn.Module) -> None:
    """Make the changes that were postponed until `bound` is filled."""
    for reference, change in _postponed.pop(bound, []):
        model = reference()
        if model is not None:
            change(model)


def written_on_meta(model: nn.Module) -> list[str]:
    """FQNs of parameters of a bound `model` that have been written to in place, which meta does not keep."""
    versions = _waiting[model].versions
    named = model.named_parameters()
    return [name for name, parameter in named if versions.get(parameter, parameter._version) != parameter._version]


def waiting_in(model: nn.Module) -> nn.Module | None:
    """The bound model in `model`, itself included, that is not filled yet."""
    return next((module for module in model.modules() if is_waiting(module)), None)


@contextmanager
def showing_state(model: nn.Module) -> Iterator[None]:
    """A block in which `state_dict()` of a bound `model` is not refused, for somebody who looks up names in it."""
    vars(model)["state_dict"] = super(_Refusing, cast("Any", model)).state_dict
    try:
        yield
    finally:
        del vars(model)["state_dict"]


def stop_waiting(model: nn.Module) -> None:
    """Make `model` again what it was before `wait`."""
    _waiting.pop(model).undo()
    model.__class__ = type(model).__mro__[2]


def _refused(name: str, use: str | None = None) -> Any:
    def refuse(self: object, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, _Refusing):
            raise NotFilledError(use or f"{name}()")
        # Somebody took the bound method before the model was filled, as TRL's trainers take `forward`.
        return getattr(type(self), name)(self, *args, **kwargs)

    return refuse


def _packed(model: nn.Module) -> dict[tuple[nn.Module, str], Any]:
    places = ((module, name) for module in quantized_modules(model) for name in packed_names(module))
    return {(module, name): module._parameters[name] for module, name in places}


class _Refusing:
    """A bound model until it is filled: what would need its weights raises `NotFilledError`."""

    state_dict = _refused("state_dict")
    load_state_dict = _refused("load_state_dict")
    __reduce_ex__ = _refused("__reduce_ex__", "pickling or copy.copy()")
    resize_token_embeddings = _refused("resize_token_embeddings")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: FBT001, FBT002  # upstream's signature
        """Casts, of all but packed weights; a move from meta is refused."""
        model: Any = self
        try:
            # Buffers are real: on meta they would be lost.
            stays = fn(torch.empty(1, device="meta")).is_meta and not fn(torch.empty(1, device="cpu")).is_meta
        except NotImplementedError:  # of torch, for a copy from meta
            stays = False
        if not stays:
            raise NotFilledError("a move to a device")
        packed = _packed(model)
        for module, name in packed:
            module._parameters[name] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[misc]  # always mixed into an nn.Module
        finally:
            for (module, name), weight in packed.items():
                module._parameters[name] = weight
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy that waits too. Packed weights, which cannot be copied on meta, are made anew."""
        model: Any = self
        packed = _packed(model)
        for module, name in packed:
            module._parameters[name] = None
        plain: Any = type(self).__mro__[2]
        try:
            new = memo[id(self)] = plain.__new__(plain)
            new.__dict__.update(copy.deepcopy(vars(self), memo))
        finally:
            for (module, name), weight in packed.items():
                module._parameters[name] = weight
        for (module, name), weight in packed.items():
            data = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            memo[id(module)]._parameters[name] = (format_of(module) or QuantFormat).like(weight, data)
        wait(new)
        return new


@functools.cache
def _refusing(kind: Any) -> Any:
    forward = functools.wraps(kind.forward)(_refused("forward", "forward"))
    members = {"__module__": kind.__module__, "__doc__": kind.__doc__, "forward": forward}
    return type(kind.__name__, (_Refusing, kind), members)
