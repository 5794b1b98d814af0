"""Adapters of many blocks by one: PEFT adapts the first of those that are alike, and the others get copies of it.

PEFT takes a millisecond for a layer, a copy takes a twentieth of that. What comes out is what PEFT would have made of
the whole model: modules, names, what is trained, and initial values, which are drawn later in PEFT's order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.adapters.alike import alike_blocks, is_uniform
from surgery.adapters.attach import adapted_by_peft, appearing_real
from surgery.adapters.deferred import DeferredValues, Undrawn
from surgery.model.fqn import join, split
from surgery.model.tree import Site, decoder_blocks, modules_of
from surgery.model.twin import bare_copy

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

__all__ = ["adapted_undrawn"]

#: When PEFT makes an adapter: (whether of a parameter, number of the module). It goes through modules first.
Turn = tuple[bool, int]


def adapted_undrawn(model: nn.Module, lora: LoraConfig, dtype: torch.dtype) -> tuple[PeftModel, DeferredValues]:
    """`model`, which is on meta, adapted as by `adapted_by_peft`; and its initial values, which are to be drawn."""
    names = [name for name, _ in model.named_modules()]
    blocks = [site for site in decoder_blocks(model) if site.module._modules]
    stamps = [_Stamp(site, first) for site, first in (alike_blocks(blocks) if is_uniform(lora) else {}).items()]
    with _without(model, [stamp.site for stamp in stamps]):
        with appearing_real(model), Undrawn() as undrawn:
            adapted = adapted_by_peft(model, lora, dtype)
        values = undrawn.take(adapted)
        turns = _turns(adapted, names, values) if stamps else []
    for stamp in stamps:
        stamp.run()
    if stamps:
        _name_all(adapted, stamps, names)
        values = _repeated(values, stamps, turns, names)
    return adapted, values


@contextlib.contextmanager
def _without(model: nn.Module, blocks: Iterable[Site]) -> Iterator[None]:
    """A block in which an empty module is in the place of each of `blocks`."""
    places = [(model.get_submodule(parent), name, site) for site in blocks for parent, name in [split(site.fqn)]]
    for parent, name, _ in places:
        parent._modules[name] = nn.Module()
    try:
        yield
    finally:
        for parent, name, site in places:
            parent._modules[name] = site.module


class _Stamp:
    """The adapters that PEFT gives the block `first`, for the block `site`, which was like that one before.

    modules: those of `first` -> those of `site`. parameters: likewise.
    """

    def __init__(self, site: Site, first: Site) -> None:
        self.site, self.first = site, first
        self.modules = dict(zip(modules_of(first.module), modules_of(site.module), strict=True))
        self.parameters: dict[nn.Parameter, Any] = {
            parameter: other._parameters[name]
            for module, other in self.modules.items()
            for name, parameter in module._parameters.items()
            if parameter is not None
        }

    def run(self) -> None:
        """Put copies of the adapters of `first` into `site`, and train there what is trained in `first`."""
        for parameter, own in self.parameters.items():
            own.requires_grad = parameter.requires_grad
        self._follow(self.first.module)

    def named(self, name: str) -> str | None:
        """The name in `site` of what is called `name` in `first`; None if it is not in `first`."""
        inside = name.removeprefix(f"{self.first.fqn}.")
        return None if inside == name else join(self.site.fqn, inside)

    def _follow(self, module: nn.Module) -> nn.Module:
        own = self.modules.get(module)
        if own is None:
            own = self.modules[module] = self._copy(module)
        for name, child in module._modules.items():
            own._modules[name] = None if child is None else self._follow(child)
        return own

    def _copy(self, module: nn.Module) -> nn.Module:
        new = bare_copy(module)
        noted = vars(new).get("kwargs", {})  # where an adapter of PEFT notes, among others, which module it is for
        noted.update({key: self.named(held) or held for key, held in noted.items() if isinstance(held, str)})
        new._parameters.update({name: self._parameter(held) for name, held in module._parameters.items()})
        new._buffers.update({name: held if held is None else held.clone() for name, held in module._buffers.items()})
        return new

    def _parameter(self, held: nn.Parameter | None) -> Any:
        if held is None:
            return None
        if held not in self.parameters:
            data = torch.empty(held.shape, dtype=held.dtype, device=held.device).copy_(held.detach())
            self.parameters[held] = nn.Parameter(data, held.requires_grad)
        return self.parameters[held]


def _turns(adapted: Any, names: Sequence[str], values: DeferredValues) -> list[Turn]:
    """The turn of each tensor of `values`; one that no parameter holds came with the one before it."""
    numbers = {name: number for number, name in enumerate(names)}
    of_parameters = {split(name)[0] for name in adapted.base_model.targeted_parameter_names}
    at: dict[nn.Module, Turn] = {}
    stack: list[tuple[str, nn.Module, Turn]] = [("", adapted.base_model.model, (False, 0))]
    while stack:
        fqn, module, turn = stack.pop()
        at[module] = (fqn in of_parameters, numbers[fqn]) if fqn in numbers else turn
        stack += [(join(fqn, name), child, at[module]) for name, child in module._modules.items() if child is not None]
    held = {initial.number: at[initial.places[0][0]] for initial in values.parameters}
    turns: list[Turn] = []
    for number in range(len(values.made)):
        turns.append(held.get(number, turns[-1] if turns else (False, 0)))
    return turns


def _repeated(
    values: DeferredValues, stamps: Sequence[_Stamp], turns: Sequence[Turn], names: Sequence[str]
) -> DeferredValues:
    """`values`, and those of all `stamps`, in the order in which PEFT would have asked for them."""
    numbers = {name: number for number, name in enumerate(names)}
    made, turns, steps, parameters = list(values.made), list(turns), list(values.steps), list(values.parameters)
    for stamp in stamps:
        moved: dict[int, int] = {}
        for number, (is_of_parameter, at) in enumerate(turns[: len(values.made)]):
            name = stamp.named(names[at])
            if name is not None:
                moved[number] = len(made)
                made.append(made[number])
                turns.append((is_of_parameter, numbers[name]))
        steps += [replace(step, number=moved[step.number]) for step in values.steps if step.number in moved]
        for initial in values.parameters:
            if initial.number in moved:
                places = tuple((stamp.modules[module], leaf) for module, leaf in initial.places)
                parameters.append(replace(initial, number=moved[initial.number], places=places))
    steps.sort(key=lambda step: turns[step.number])  # those of one turn stay in their order
    return DeferredValues(made=made, steps=steps, parameters=parameters)


def _name_all(adapted: Any, stamps: Sequence[_Stamp], names: Sequence[str]) -> None:
    """Have PEFT's lists and sets of what is adapted name what was stamped too, in the order of the model."""
    numbers = {name: number for number, name in enumerate(names)}
    tuner, config = adapted.base_model, adapted.active_peft_config

    def number(name: str) -> int:
        return numbers[name if name in numbers else split(name)[0]]

    tuner.targeted_module_names = sorted(_all_named(tuner.targeted_module_names, stamps), key=number)
    tuner.targeted_parameter_names = sorted(_all_named(tuner.targeted_parameter_names, stamps), key=number)
    for option in ("target_modules", "target_parameters"):
        found = getattr(config, option)
        if found and not isinstance(found, str) and len(every := _all_named(found, stamps)) > len(found):
            setattr(config, option, _shortened(set(every), names) if option == "target_modules" else type(found)(every))


def _all_named(found: Iterable[str], stamps: Sequence[_Stamp]) -> list[str]:
    own = list(found)
    return own + [name for stamp in stamps for each in own if (name := stamp.named(each)) is not None]


def _shortened(targets: set[str], names: Sequence[str]) -> set[str]:
    """The endings of `targets` that no other module has, as PEFT writes many names down."""
    from peft.tuners.tuners_utils import _find_minimal_target_modules
    from peft.utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION

    if len(targets) < MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        return targets
    endings = tuple(f".{name}" for name in targets)
    others = [name for name in names if name not in targets and not name.endswith(endings)]
    found: set[str] = _find_minimal_target_modules(targets, others)
    return min(targets, found, key=len)
