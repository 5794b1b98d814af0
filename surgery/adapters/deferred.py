"""Initial values of adapters: what PEFT asks for is written down while it builds, and drawn later, in another thread.

Drawing takes longer than all else that PEFT does (63 million random numbers for an 8B model and adapters of rank 16),
and needs no interpreter. Values come from one generator in the order in which they were asked for, so that they are
those that PEFT alone would have drawn; and a rank keeps of them what it has of the parameter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.comm.ranks import StoppedError

__all__ = ["DeferredValues", "Drawing", "Initial", "Undrawn"]

aten = torch.ops.aten

#: Operators that fill a tensor with random numbers, and with others, whatever was in it.
DRAWS = frozenset({aten.uniform_.default, aten.normal_.default})
FILLS = DRAWS | {aten.zero_.default, aten.fill_.Scalar}

#: Operators that make a tensor -> what fills it at once.
MAKES = {
    aten.empty.memory_format: None,
    aten.rand.default: aten.uniform_.default,
    aten.randn.default: aten.normal_.default,
}

#: Operators whose result is the same memory.
ALIASES = frozenset({aten.detach.default, aten.alias.default})


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """`operator(tensor, *args)`, for the tensor `number`, all of which it fills."""

    number: int
    operator: Any
    args: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Initial:
    """The values of one parameter: those of the tensor `number`, cast to each of `casts` in turn.

    shape: the whole parameter's. places: the modules that hold it, and its name in each.
    """

    number: int
    casts: tuple[torch.dtype, ...]
    shape: torch.Size
    places: tuple[tuple[nn.Module, str], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class DeferredValues:
    """Values to draw, in order, and their parameters; `made` has shape and dtype of every tensor by its number."""

    made: Sequence[tuple[torch.Size, torch.dtype]]
    steps: Sequence[Step]
    parameters: Sequence[Initial]


@dataclass(kw_only=True, eq=False)
class _Stand:
    """Stand-in for the tensor `number` after `casts`: one element, `shown` as often as its shape says."""

    shown: torch.Tensor
    number: int
    casts: tuple[torch.dtype, ...] = ()


class Undrawn(TorchDispatchMode):  # type: ignore[no-untyped-call]  # upstream's `__init_subclass__`
    """A block in which tensors made on the CPU take no memory and get no values: what would fill them is written down.

    They look like any other, on the CPU. They can be filled, cast, and made parameters of; whatever else would read
    them raises NotImplementedError, since there is nothing to be read.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # no annotation upstream
        self._made: list[tuple[torch.Size, torch.dtype]] = []
        self._steps: list[Step] = []
        self._stands: dict[int, _Stand] = {}  # by their storage, which they keep
        self._cast: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing in the block is compiled, so that no operator needs to pass through Dynamo's guard against it."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for every operator in the block."""
        kwargs = kwargs or {}
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        if func in MAKES and _is_on_cpu(kwargs) and dtype.is_floating_point:
            return self._make(torch.Size(args[0]), dtype, MAKES[func])
        stands = [stand for value in args if isinstance(value, torch.Tensor) and (stand := self._stand_for(value))]
        if not stands or func in ALIASES:
            return func(*args, **kwargs)
        if func in FILLS:
            self._steps.append(Step(number=self._filled(stands[0]), operator=func, args=args[1:]))
            return args[0]
        if func is aten._to_copy.default and _is_on_cpu(kwargs):
            stand, cast = stands[0], kwargs.get("dtype") or args[0].dtype
            self._cast.add(stand.number)
            return self._shown(stand.shown.shape, cast, number=stand.number, casts=(*stand.casts, cast))
        raise NotImplementedError(f"{func} wants values of an adapter that are not drawn yet")

    def take(self, model: nn.Module) -> DeferredValues:
        """Values that were asked for by parameters of `model`, which move to meta. To be called after the block."""
        places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and self._stand_for(parameter) is not None:
                    places.setdefault(parameter, []).append((module, name))
        return DeferredValues(
            made=tuple(self._made),
            steps=tuple(self._steps),
            parameters=tuple(self._moved(parameter, held) for parameter, held in places.items()),
        )

    def _moved(self, parameter: nn.Parameter, places: Sequence[tuple[nn.Module, str]]) -> Initial:
        stand = self._stand_for(parameter)
        assert stand is not None
        data = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        new = nn.Parameter(data, requires_grad=parameter.requires_grad)
        for module, name in places:
            module._parameters[name] = new
        return Initial(number=stand.number, casts=stand.casts, shape=parameter.shape, places=tuple(places))

    def _stand_for(self, tensor: torch.Tensor) -> _Stand | None:
        return self._stands.get(tensor.untyped_storage()._cdata) if tensor.device.type == "cpu" else None

    def _make(self, shape: torch.Size, dtype: torch.dtype, fill: Any) -> torch.Tensor:
        number = self._numbered(shape, dtype)
        if fill is not None:
            self._steps.append(Step(number=number, operator=fill))
        return self._shown(shape, dtype, number=number)

    def _numbered(self, shape: torch.Size, dtype: torch.dtype) -> int:
        self._made.append((shape, dtype))
        return len(self._made) - 1

    def _shown(
        self, shape: torch.Size, dtype: torch.dtype, *, number: int, casts: tuple[torch.dtype, ...] = ()
    ) -> torch.Tensor:
        shown = torch.empty_strided(shape, (0,) * len(shape), dtype=dtype)
        self._stands[shown.untyped_storage()._cdata] = _Stand(shown=shown, number=number, casts=casts)
        return shown

    def _filled(self, stand: _Stand) -> int:
        """The number of what `stand` stands for. What was cast before it is filled becomes a tensor of its own."""
        if stand.casts:
            stand.number, stand.casts = self._numbered(stand.shown.shape, stand.shown.dtype), ()
        elif stand.number in self._cast:
            raise NotImplementedError("a value of an adapter is replaced after a copy was made of it")
        return stand.number


def _is_on_cpu(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is None or torch.device(device).type == "cpu"


@dataclass(kw_only=True, eq=False)
class Drawing:
    """Draws `deferred` from a generator in `rng_state`, and keeps of every parameter what this rank has of it.

    rows: of how many -> those that it keeps. device: where. values: of each of `deferred.parameters`, once `run` has
    returned. stop: set when they are not wanted any more.
    """

    deferred: DeferredValues
    rng_state: torch.Tensor
    rows: Callable[[int], range]
    device: torch.device
    stop: threading.Event
    values: list[torch.Tensor] = field(default_factory=list, init=False)
    _drawn: torch.Tensor = field(init=False)

    def run(self) -> None:
        """Draw the values, holding few whole tensors at a time. Raises `StoppedError` once `stop` is set."""
        generator = torch.Generator()
        generator.set_state(self.rng_state)
        users: dict[int, list[Initial]] = {}
        for initial in self.deferred.parameters:
            users.setdefault(initial.number, []).append(initial)
        last = {step.number: place for place, step in enumerate(self.deferred.steps)}
        whole: dict[int, torch.Tensor] = {}
        found: dict[Initial, torch.Tensor] = {}
        for place, step in enumerate(self.deferred.steps):
            if self.stop.is_set():
                raise StoppedError("stopped while initial values were drawn")
            if step.number not in whole:
                whole[step.number] = self._empty(step.number)
            random = {"generator": generator} if step.operator in DRAWS else {}
            step.operator(whole[step.number], *step.args, **random)
            if last[step.number] == place:
                values = whole.pop(step.number)
                found.update((initial, self._part(initial, values)) for initial in users.get(step.number, ()))
        for initial in self.deferred.parameters:
            if initial not in found:  # nothing fills it
                found[initial] = self._part(initial, self._empty(initial.number))
        self.values = _together([found[initial] for initial in self.deferred.parameters], self.device)
        self._drawn = generator.get_state()

    def go_on(self) -> None:
        """Advance torch's generator as if it had drawn the values, provided that it stands at `rng_state`."""
        if torch.equal(torch.get_rng_state(), self.rng_state):
            torch.set_rng_state(self._drawn)

    def _empty(self, number: int) -> torch.Tensor:
        shape, dtype = self.deferred.made[number]
        return torch.empty(shape, dtype=dtype)

    def _part(self, initial: Initial, whole: torch.Tensor) -> torch.Tensor:
        rows = self.rows(whole.shape[0])
        values = whole[rows.start : rows.stop].clone()
        for dtype in initial.casts:
            values = values.to(dtype)
        return values


def _together(values: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Move `values`, all of one dtype, to memory of their own on `device`, in one transfer.

    Each of many transfers would wait for what else the device does.
    """
    if device.type == "cpu" or not values:
        return list(values)
    moved = torch.cat([each.view(-1) for each in values]).to(device)
    pieces = torch.split(moved, [each.numel() for each in values])
    return [piece.clone().view(each.shape) for piece, each in zip(pieces, values, strict=True)]
