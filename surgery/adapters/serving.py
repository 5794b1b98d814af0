"""An adapter as vLLM reads it: factors for each projection of each expert, of one rank and one scale.

PEFT has one pair of factors for all experts of a parameter, A `(E*r, in)` with the expert slowest and B `(out, r*E)`
with the expert fastest. vLLM takes a pair for each projection of each expert, under the names that the checkpoint has
(`experts.7.gate_proj`, `experts.7.w1`), for all projections or none; and the stacked form where the checkpoint has the
experts of a layer in one tensor too. In most of its releases one scale is that of all layers, whatever `rank_pattern`,
`alpha_pattern` and, for experts, `use_rslora` say.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from typing import Any, Self, TypeAlias

import torch
from torch import nn
from torch.nn.functional import pad

from surgery.checkpoint import Checkpoint
from surgery.errors import ConfigError
from surgery.model.fqn import PEFT_PREFIX, join, split
from surgery.model.keys import Assignment, conversions_of
from surgery.model.skeleton import build_on_meta, causal_lm
from surgery.model.weights import plan_weights

__all__ = ["check_served", "serve"]

#: Ends of the names that vLLM has for the factors of a stack, behind its module: as PEFT nests its layers.
_STACKS = {"gate_up_proj": ".base_layer", "down_proj": ""}

Read: TypeAlias = Callable[[str], torch.Tensor]
Pair: TypeAlias = tuple[torch.Tensor, torch.Tensor]


def check_served(config: Any) -> None:
    """Raise `ConfigError` for an adapter that is more than factors of weights, which vLLM does not take."""
    variants = [each.name for each in fields(config) if each.metadata.get("is_lora_variant")]
    names = ("lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication", *variants)
    found = [name for name in names if getattr(config, name, None)] + ["bias"] * (config.bias != "none")
    if found:
        raise ConfigError(
            f"expected an adapter of plain LoRA for vLLM, found one with {', '.join(found)}: merge it into the base "
            "(surgery merge), and serve that"
        )


def serve(config: Any, base: Checkpoint, held: Mapping[str, Any], read: Read) -> tuple[Any, Mapping[str, torch.Tensor]]:
    """The configuration and the tensors that vLLM takes of an adapter of the model in `base`; no value is read yet.

    config: a `LoraConfig` as PEFT saves it. held: PEFT's tensors by key, of which shape and dtype are asked. read:
    gives one of them, on the CPU. A tensor of the result is made when it is asked for, with those of one parameter in
    memory.

    Raises `ConfigError` for an adapter of another model, or one that vLLM does not take.
    """
    check_served(config)
    model = build_on_meta(causal_lm(base, torch.bfloat16), dtype=torch.bfloat16, device=torch.device("cpu"))
    names = _Names.of(model, base)
    adapted = list(_adapted(model, config))
    _check(type(model).__name__, adapted, held)
    rank = max(each.rank for each in adapted)
    scalings = Counter(each.scaling for each in adapted for _ in range(max(each.experts, 1)) if each.keys)
    scaling = scalings.most_common(1)[0][0]
    dtype = next(iter(held.values())).dtype
    factors = lru_cache(1)(lambda each: each.factors(read, dtype, rank, scaling))
    make: dict[str, Callable[[], torch.Tensor]] = {}
    targets: dict[bool, set[str]] = {True: set(), False: set()}
    for each in adapted:
        for module in names.modules(each):
            for end, of in (("A", module.a), ("B", module.b)):
                key = f"lora_embedding_{end}" if each.is_embedding else f"lora_{end}.weight"
                make[f"{PEFT_PREFIX}{module.name}.{key}"] = partial(of, partial(factors, each))
            targets[module.is_stack].add(module.target)
    alpha = scaling * rank
    served = copy.deepcopy(config)
    served.r, served.lora_alpha = rank, int(alpha) if alpha == int(alpha) else alpha
    served.use_rslora, served.rank_pattern, served.alpha_pattern, served.init_lora_weights = False, {}, {}, True
    served.target_modules, served.target_parameters = sorted(targets[False]), sorted(targets[True]) or None
    return served, _Made(make)


class _Made(Mapping[str, torch.Tensor]):
    """Tensors by name, each made when it is asked for."""

    def __init__(self, make: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        self._make = make

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._make[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Adapted:
    """One parameter of the base model and its factors, as PEFT has them.

    fqn: of the parameter. experts: 0 for one that is no stack. shape: `(out, in)`, of one expert. is_turned: whether
    the parameter is `(in, out)`. keys: of A and B in PEFT's file; none for a stack that is not adapted, where another
    one of its module is.
    """

    fqn: str
    experts: int
    shape: tuple[int, ...]
    is_turned: bool = False
    is_embedding: bool = False
    keys: tuple[str, ...] = ()
    rank: int = 0
    scaling: float = 0.0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes in PEFT's file, by key."""
        (out, of), total = self.shape, self.rank * max(self.experts, 1)
        return dict(zip(self.keys, ((total, of), (out, total)), strict=False))

    @property
    def rows(self) -> torch.Tensor:
        """Numbers `expert * out + row`, where the parameter has one column of each."""
        out, number = self.shape[0], max(self.experts, 1)
        numbers = torch.arange(number * out, dtype=torch.int32).view(number, out, 1)
        numbers = numbers.mT if self.is_turned else numbers
        return numbers if self.experts else numbers[0]

    def factors(self, read: Read, dtype: torch.dtype, rank: int, scaling: float) -> Pair:
        """A `(E, rank, in)` and B `(E, out, rank)`; E is 1 of no stack. The change is `scaling` times B times A."""
        number, (out, of) = max(self.experts, 1), self.shape
        if not self.keys:
            return torch.zeros(number, rank, of, dtype=dtype), torch.zeros(number, out, rank, dtype=dtype)
        a, b = map(read, self.keys)
        a, b = a.view(number, self.rank, of), b.view(out, self.rank, number).permute(2, 0, 1)
        b = b if self.scaling == scaling else b * (self.scaling / scaling)
        return pad(a, (0, 0, 0, rank - self.rank)), pad(b, (0, rank - self.rank))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Module:
    """A module as vLLM names it. target: that in `adapter_config.json`. expert, rows: its part of a parameter."""

    name: str
    target: str
    is_stack: bool = False
    expert: int = 0
    rows: torch.Tensor | None = None

    @classmethod
    def whole(cls, source: str, *, is_stack: bool) -> Self:
        """A whole parameter, which is called `source`."""
        path, leaf = split(source)
        if not is_stack:
            return cls(name=path, target=split(path)[1])
        if leaf not in _STACKS:
            raise ConfigError(
                f"{source}: expected stacks of experts called {' and '.join(_STACKS)}, found another, which vLLM does "
                "not take: merge the adapter into the base (surgery merge), and serve that"
            )
        return cls(name=path + _STACKS[leaf], target=join(split(path)[1], leaf), is_stack=True)

    @classmethod
    def part(cls, source: str, numbers: torch.Tensor, out: int) -> Self:
        """The weight `source`, which has the rows of these `_Adapted.rows`."""
        path, (expert, *others) = (
            split(source)[0],
            sorted({*numbers.flatten().div(out, rounding_mode="floor").tolist()}),
        )
        if others:
            raise ConfigError(f"expected {source} to be of one expert, found {1 + len(others)}")
        return cls(name=path, target=split(path)[1], expert=expert, rows=numbers.flatten().long() - expert * out)

    def a(self, factors: Callable[[], Pair]) -> torch.Tensor:
        """`(rank, in)`, or of a stack `(E*rank, in)`."""
        found = factors()[0]
        return found.flatten(0, 1) if self.is_stack else found[self.expert]

    def b(self, factors: Callable[[], Pair]) -> torch.Tensor:
        """`(out, rank)`, or of a stack `(out, rank*E)`."""
        found = factors()[1]
        if self.is_stack:
            return found.permute(1, 2, 0).flatten(1)
        return found[self.expert] if self.rows is None else found[self.expert][self.rows]


def _adapted(model: Any, config: Any) -> Iterator[_Adapted]:
    """All parameters of `model`, on meta, that an adapter of `config` changes, and the stacks beside those.

    PEFT's layers are put on it. Raises `ConfigError` for a kind of layer that vLLM does not take.
    """
    from peft import get_peft_model
    from peft.tuners.lora.layer import Embedding, Linear, LoraLayer, ParamWrapper

    own = copy.deepcopy(config)
    own.init_lora_weights, own.lora_dropout = False, 0.0
    fqns = {module: name for name, module in model.named_modules()}
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, own, autocast_adapter_dtype=False)
    except Exception as error:
        raise ConfigError(
            f"PEFT cannot put this adapter on a {type(model).__name__}: {type(error).__name__}: {error}. Give the base "
            "model that it was trained on"
        ) from error
    wrapped: dict[nn.Module, set[str]] = {}
    layers: list[tuple[str, Any]] = [found for found in adapted.named_modules() if isinstance(found[1], LoraLayer)]
    for name, layer in layers:
        if type(layer) not in (Linear, Embedding, ParamWrapper):
            raise ConfigError(
                f"{name}: expected a linear layer, an embedding or a stack of experts, found one of PEFT's "
                f"{type(layer).__name__}, which vLLM does not take: merge the adapter into the base (surgery merge)"
            )
        module, leaf = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
        shape, is_embedding = getattr(module, leaf).shape, isinstance(layer, Embedding)
        if len(shape) == 3 and not hasattr(module, "is_transposed"):
            raise ConfigError(
                f"{name}: expected experts of which transformers says how they lie in memory, found a "
                f"{type(module).__name__}: merge the adapter into the base (surgery merge), and serve that"
            )
        wrapped.setdefault(module, set()).add(leaf)
        ends = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        yield _Adapted(
            fqn=join(fqns[module], leaf),
            experts=shape[0] if len(shape) == 3 else 0,
            shape=(layer.out_features, layer.in_features),
            is_turned=len(shape) == 3 and module.is_transposed,
            is_embedding=is_embedding,
            keys=tuple(f"{name}.{end}" for end in ends),
            rank=layer.r["default"],
            scaling=layer.scaling["default"],
        )
    for module, leaves in wrapped.items():
        stacks = {leaf: tuple(p.shape) for leaf, p in module.named_parameters(recurse=False) if p.ndim == 3}
        for leaf in stacks.keys() - leaves if leaves & stacks.keys() else ():
            number, *shape = stacks[leaf]
            is_turned = bool(module.is_transposed)
            shape = shape[::-1] if is_turned else shape
            yield _Adapted(fqn=join(fqns[module], leaf), experts=number, shape=tuple(shape), is_turned=is_turned)


def _check(model: str, adapted: Sequence[_Adapted], held: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless PEFT's file has just the tensors that these have."""
    expected = {item for each in adapted for item in each.shapes.items()}
    other = sorted(expected ^ {(key, tuple(tensor.shape)) for key, tensor in held.items()})
    if other:
        raise ConfigError(
            f"expected the tensors of an adapter of this {model} in PEFT's format, found missing, unknown or of other "
            f"shapes: {', '.join(dict.fromkeys(key for key, _ in other[:4]))}. Give the model that it was trained on"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Names:
    """Names that the parameters of a model have in its checkpoint, by FQN: `assignments`.

    conversions: of transformers, of names and shapes. is_packed: whether the checkpoint is quantized, and so may have
    experts in one tensor that the one it was made of has apart.
    """

    config: Any
    assignments: Mapping[str, Assignment]
    conversions: Sequence[Any]
    is_packed: bool

    @classmethod
    def of(cls, model: Any, base: Checkpoint) -> Self:
        """Those of `model`, on meta, which is to be adapted in place."""
        plan = plan_weights(model, base, device=torch.device("cpu"))
        return cls(
            config=model.config,
            assignments={fqn: each for each in plan.assignments for fqn in each.targets if len(each.targets) == 1},
            conversions=conversions_of(model, base.index.keys()),
            is_packed=base.packing is not None,
        )

    def modules(self, adapted: _Adapted) -> list[_Module]:
        """One parameter as it is, or each projection of each expert that a checkpoint has of it.

        Raises `ConfigError` where transformers makes it of several tensors, and cannot make those of it.
        """
        assignment = self.assignments.get(adapted.fqn)
        sources, is_stack = (adapted.fqn,) if assignment is None else assignment.sources, adapted.experts > 0
        if assignment is None or (assignment.converter is None and not (self.is_packed and is_stack)):
            return [_Module.whole(sources[0], is_stack=is_stack)]
        found = self._apart(assignment, adapted)
        # transformers 5.17 drops the dimension of one column too.
        if found and all(numbers.ndim < 3 for numbers in found.values()):
            return [_Module.part(source, numbers, adapted.shape[0]) for source, numbers in found.items()]
        if len(sources) == 1:
            return [_Module.whole(sources[0], is_stack=is_stack)]
        raise ConfigError(
            f"{adapted.fqn}: transformers makes it of {len(sources)} tensors of this base ({sources[0]}, ...), and "
            "cannot make those of it again: merge the adapter into the base (surgery merge), and serve that"
        )

    def _apart(self, assignment: Assignment, adapted: _Adapted) -> Mapping[str, torch.Tensor]:
        """`_Adapted.rows` of each tensor of the checkpoint; none if it does not come out."""
        try:
            found = assignment.revert({adapted.fqn: adapted.rows}, self.config, self.conversions)
        except Exception:  # noqa: BLE001  # whatever an operation that cannot be turned around raises
            return {}
        return found if len(assignment.sources) == 1 or found.keys() == set(assignment.sources) else {}
