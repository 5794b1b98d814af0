"""Liger's kernels for the modules of one model, as patches that are scoped, audited and undone.

Liger-Kernel (https://github.com/linkedin/Liger-Kernel) has a function for each family of models, which knows what
kernel with which settings each of its modules takes. It writes them onto modules, classes, and the namespaces of
transformers and torch, for the whole process and for good. Here it is run on a copy of the module tree, and sees what
it imports through shadows, which take what is written; nobody else sees any of it. What was written becomes patches of
the `forward` of classes, each limited to the modules of this model that Liger has named.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch
from torch import nn

import model_surgery_patches as patches
from surgery.model.fqn import join
from surgery.model.tree import unwrapped
from surgery.model.twin import twin_of
from surgery.passes.lifetime import keep
from surgery.step.recording import is_recordable

__all__ = ["stock_loss", "use_liger"]

logger = logging.getLogger("surgery")

UPSTREAM = "https://github.com/linkedin/Liger-Kernel/issues/636"

#: What Liger changes on modules beside their forward and its settings: how they are printed.
SHOWN = frozenset({"_get_name", "extra_repr"})

Settings = tuple[tuple[str, Any], ...]


def use_liger(model: nn.Module) -> None:
    """Let the modules of a transformers model in `model` run Liger's kernels, until `surgery.release(model)`.

    In training with labels the loss is computed with the output head at once: it differs from the stock one by
    rounding, and `logits` of the output are None. Everything else has its stock output. A family that Liger does not
    know, or a head whose weight is not all of it (quantized, adapted, with a bias), stays as it is, which is logged.
    """
    inner = _inner(model)[1]
    try:
        seen = None if inner is None else _observe(inner)
    except Exception as error:  # noqa: BLE001  # Liger's own, of a model that is not as it expects
        logger.warning("surgery: %s runs without Liger's kernels: %s", type(inner).__name__, error)
        return
    if inner is None or seen is None:
        logger.warning("surgery: Liger has no kernels for %s, which runs as without", type(inner or model).__name__)
        return
    scoped: dict[patches.Patch, list[nn.Module]] = {}
    for patch, module in _patches_of(inner, seen):
        scoped.setdefault(patch, []).append(module)
    bundle = [patches.on(patch, modules) for patch, modules in scoped.items()]
    with patches.transaction(*bundle, reason=f"Liger's kernels in a {type(inner).__name__}") as transaction:
        keep(model, transaction.receipts)
        transaction.commit()


def stock_loss(model: nn.Module, trained: Iterable[str] = ()) -> str | None:
    """The reason why `use_liger` would leave `model` its own loss, whatever its family; None if there is none.

    trained: FQNs of parameters that adapters will add to `model`, which has none yet.
    """
    name, inner = _inner(model)
    if inner is None:
        return "it is no model of transformers"
    head = join(name, "lm_head") + "."
    return "its lm_head has adapters" if any(each.startswith(head) for each in trained) else _why_no_loss(inner)


def _inner(model: nn.Module) -> tuple[str, nn.Module | None]:
    """The transformers model in `model`, and its FQN."""
    from transformers import PreTrainedModel

    found = (found for found in model.named_modules() if isinstance(found[1], PreTrainedModel))
    return next(found, ("", None))


# What Liger does to a model ------------------------------------------------------------------------------------------


class _Shadow:
    """A module of Python or a class for somebody who may write to it, which changes nothing."""

    def __init__(self, real: Any, made: list[_Shadow]) -> None:
        vars(self).update(_real=real, _made=made)
        made.append(self)

    def __getattr__(self, name: str) -> Any:
        value = getattr(vars(self)["_real"], name)
        return _Shadow(value, vars(self)["_made"]) if isinstance(value, (ModuleType, type)) else value

    @property  # type: ignore[misc]  # isinstance() asks it, of instances and classes alike
    def __class__(self) -> Any:
        return type(vars(self)["_real"])

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, vars(self)["_real"])


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """Writes of Liger's. forwards: of modules, with settings. functions: by name, of modules of Python."""

    forwards: Mapping[nn.Module, tuple[FunctionType, Settings]]
    functions: Mapping[str, Mapping[str, FunctionType]]


def _observe(model: nn.Module) -> _Seen | None:
    """Run Liger's function for the family of `model`, and return what it writes; None if there is none."""
    monkey_patch = import_module("liger_kernel.transformers.monkey_patch")  # which type checkers may not find

    made: list[_Shadow] = []

    def see(name: str, *args: Any, **kwargs: Any) -> Any:
        found = __import__(name, *args, **kwargs)
        return found if name.partition(".")[0] == "liger_kernel" else _Shadow(found, made)

    scope = _scope_of(vars(monkey_patch), __builtins__={**vars(builtins), "__import__": see})
    families = {kind: scope[each.__name__] for kind, each in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.items()}
    scope["MODEL_TYPE_TO_APPLY_LIGER_FN"] = families
    apply = families.get(model.config.model_type)  # type: ignore[union-attr]  # of every model there
    if apply is None:
        return None
    twins = twin_of(model, lambda _, module: {name: p for name, p in module._parameters.items() if p is not None})
    before = {twin: dict(vars(twin)) for twin in twins.values()}
    # That of torch for the whole process, where the loss is not fused with the head.
    options = {"cross_entropy": False} if "cross_entropy" in inspect.signature(apply).parameters else {}
    apply(model=twins[model], **options)
    forwards = {module: found for module, twin in twins.items() if (found := _written(twin, before[twin])) is not None}
    return _Seen(forwards={**dict(_of_classes(twins, made)), **forwards}, functions=_of_modules(made))


def _written(twin: nn.Module, before: Mapping[str, Any]) -> tuple[FunctionType, Settings] | None:
    """The forward that `twin` has got, and its settings; None if it has got none."""
    new = {name: value for name, value in vars(twin).items() if name not in before or value is not before[name]}
    forward = new.pop("forward", None)
    if not isinstance(forward, MethodType):
        return None
    settings = sorted((name, value) for name, value in new.items() if name not in SHOWN)
    return cast("FunctionType", forward.__func__), tuple(settings)


def _of_classes(
    twins: Mapping[nn.Module, nn.Module], made: Iterable[_Shadow]
) -> Iterator[tuple[nn.Module, tuple[FunctionType, Settings]]]:
    """Modules whose class has got a forward, and that."""
    for shadow in made:
        real, forward = vars(shadow)["_real"], vars(shadow).get("forward")
        if isinstance(real, type) and isinstance(forward, FunctionType):
            yield from ((module, (forward, ())) for module in twins if isinstance(module, real))


def _of_modules(made: Iterable[_Shadow]) -> dict[str, dict[str, FunctionType]]:
    """Name of a module of Python -> what its functions have become."""
    found: dict[str, dict[str, FunctionType]] = {}
    for shadow in made:
        real = vars(shadow)["_real"]
        functions = {
            name: value
            for name, value in vars(shadow).items()
            if isinstance(value, FunctionType) and callable(getattr(real, name, None))
        }
        if isinstance(real, ModuleType) and functions:
            found.setdefault(real.__name__, {}).update(functions)
    return found


# Patches -------------------------------------------------------------------------------------------------------------


def _patches_of(model: nn.Module, seen: _Seen) -> Iterator[tuple[patches.Patch, nn.Module]]:
    """Every patch, and a module that it is for; logs what is left out."""
    functions = {name: tuple(sorted(named.items())) for name, named in seen.functions.items()}
    stock: set[str] = set()
    for module in model.modules():
        owner = _owner(type(module))
        if module in seen.forwards:
            forward, settings = seen.forwards[module]
            patch = _loss_of(model, forward) if module is model else _layer(module, forward, settings)
            stock |= {type(module).__name__} if patch is None and module is not model else set()
        else:
            patch = _with_functions(owner, functions.get(owner.__module__, ()))
        if patch is not None:
            yield patch, module
    if stock:
        logger.warning("surgery: without Liger's kernels run: %s", ", ".join(sorted(stock)))


def _layer(module: nn.Module, forward: FunctionType, settings: Settings) -> patches.Patch | None:
    """The patch for a layer; None where the kernel multiplies by weights of the module itself, as that of fused experts
    does, which may be packed, adapted or sharded.
    """
    if "Experts" in forward.__qualname__ or any(p.ndim > 1 for p in module.parameters(recurse=False)):
        return None  # by its name too, since FSDP1 hides parameters
    return _kernel(_owner(type(module)), forward, settings)


def _owner(kind: type) -> type:
    """The class that the forward of `kind` is in; FSDP2 and this project make classes that inherit it."""
    return next(base for base in kind.__mro__ if "forward" in vars(base))


def _patch(owner: type, settings: object = "", **deed: Any) -> patches.Patch:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", owner.__name__).lower().strip("_")
    mark = f"-{zlib.crc32(repr(settings).encode()):08x}" if settings else ""
    return patches.Patch(
        id=f"liger.{owner.__module__.rpartition('.')[2].lower()}.{words}{mark}",
        target=f"{owner.__module__}:{owner.__qualname__}.forward",
        reason="a kernel of Liger takes less time or memory, and Liger would apply it to every model of the process",
        upstream=UPSTREAM,
        **deed,
    )


@functools.cache  # so that two models of a class have one patch
def _kernel(owner: type, forward: FunctionType, settings: Settings) -> patches.Patch | None:
    """Liger's `forward` of a layer, which reads `settings` from the module; None if it takes other arguments."""
    stock, values = inspect.signature(vars(owner)["forward"]), dict(settings)
    if len(stock.parameters) != len(inspect.signature(forward).parameters):
        return None

    def compute(instance: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Liger has other names for the same arguments.
        return forward(_View(instance, values) if values else instance, *args, *kwargs.values())

    return _patch(owner, settings, wrapper=_unless_compiled(compute))


@functools.cache
def _with_functions(owner: type, named: tuple[tuple[str, FunctionType], ...]) -> patches.Patch | None:
    """The forward of `owner`, by the name of whose functions it finds those that are `named`; None if it uses none."""
    forward = inspect.unwrap(vars(owner)["forward"])
    used = {name: value for name, value in named if name in forward.__code__.co_names}
    if not used:
        return None
    return _patch(owner, wrapper=_unless_compiled(_copied(forward, {**forward.__globals__, **used})))


def _unless_compiled(compute: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper of a forward that computes with Liger's kernels, but not in code that `torch.compile` traces.

    That fuses the same operations itself; around a kernel that it cannot see through it copies every argument back,
    also into the input of a block, of which a checkpoint is made.
    """

    def wrapper(wrapped: Callable[..., Any], instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return wrapped(*args, **kwargs) if torch.compiler.is_compiling() else compute(instance, *args, **kwargs)

    return wrapper


class _View:
    """A module, some attributes of which have other values for who looks at it through this."""

    def __init__(self, module: nn.Module, values: Mapping[str, Any]) -> None:
        self._module = module
        self._values = values

    def __getattr__(self, name: str) -> Any:
        if name in ("_module", "_values"):  # torch.compile looks at one that is not made yet
            raise AttributeError(name)
        values = self._values
        return values[name] if name in values else getattr(self._module, name)


# Functions of Python -------------------------------------------------------------------------------------------------


def _scope_of(known: dict[str, Any], **others: Any) -> dict[str, Any]:
    """The names of a module of Python, its functions copied to look up each other, and `others`, there."""
    scope = {**known, **others}
    for name, value in known.items():
        if name not in others and isinstance(value, FunctionType) and value.__globals__ is known:
            scope[name] = _copied(value, scope)
    return scope


def _copied(function: FunctionType, scope: dict[str, Any]) -> FunctionType:
    """`function`, looking up names in `scope`."""
    made = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return cast("FunctionType", functools.update_wrapper(made, function))


# The loss ------------------------------------------------------------------------------------------------------------

#: Name of the function of Liger's that computes a loss from hidden states and the weight of the output head.
LOSS = "LigerForCausalLMLoss"


def _loss_of(model: nn.Module, forward: FunctionType) -> patches.Patch | None:
    """The patch for the loss of `model`; None, once the reason is logged, if it stays the stock one."""
    why = _why_no_loss(model)
    if why is None and LOSS not in forward.__globals__:
        why = f"{forward.__module__}.{forward.__name__} is not known here"
    if why is None:
        return _loss(_owner(type(model)), forward)
    logger.warning("surgery: %s computes its loss without Liger's kernel: %s", type(model).__name__, why)
    return None


def _why_no_loss(model: nn.Module) -> str | None:
    """The reason why the loss cannot be fused with the output head; None if it can be."""
    config: Any = model.config
    if config.get_text_config() is not config:  # Liger's forwards of those fit few releases of transformers
        return "it takes more than text"
    head = getattr(model, "lm_head", None)
    plain = None if head is None else unwrapped(head)
    if not isinstance(plain, nn.Linear) or type(plain).forward is not nn.Linear.forward or "forward" in vars(plain):
        return f"its lm_head is {'missing' if plain is None else 'of class ' + type(plain).__name__}"
    return "its lm_head has a bias" if getattr(plain, "bias", None) is not None else None


@functools.cache
def _loss(owner: type, forward: FunctionType) -> patches.Patch:
    """Liger's `forward` of a whole model where it computes a loss in training, and the stock one elsewhere."""
    compute = forward.__globals__[LOSS]

    def loss_of(hidden_states: torch.Tensor, lm_head_weight: _Head, *args: Any, **kwargs: Any) -> Any:
        return lm_head_weight.call(hidden_states, lambda *given: compute(*given, *args, **kwargs))

    fused = _scope_of(forward.__globals__, **{LOSS: loss_of})[forward.__name__]

    def compute_loss(
        wrapped: Callable[..., Any], instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        given = kwargs.get("labels", kwargs.get("shift_labels"))
        # Labels by position are rare, and the stock loss knows them. Liger's has the host wait for their number, as no
        # CUDA graph can.
        if not instance.training or given is None or is_recordable():
            return wrapped(*args, **kwargs)
        return fused(_View(instance, {"lm_head": _Head(instance.lm_head)}), *args, **kwargs)  # type: ignore[arg-type]

    return _patch(owner, wrapper=compute_loss)


class _Head:
    """An output head whose weight may be sharded, in the place of its weight."""

    def __init__(self, head: nn.Module) -> None:
        self._head = head

    @property
    def weight(self) -> _Head:
        """This, in the place of the weight until `call`."""
        return self

    def call(self, hidden: torch.Tensor, compute: Callable[[torch.Tensor, torch.Tensor], Any]) -> Any:
        """`compute(hidden, weight)`, as the forward of the head, around which hooks of FSDP gather the weight.

        Without it, FSDP2 would count the head as not run yet, and FSDP1 have a part of the weight in its place.
        """
        plain: Any = unwrapped(self._head)
        vars(plain)["forward"] = lambda hidden: compute(hidden, plain.weight)
        try:
            return self._head(hidden)
        finally:
            del vars(plain)["forward"]
