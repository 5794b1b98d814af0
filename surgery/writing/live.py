"""A model as it is now, sharded or not: which rank holds what of each tensor, and what adapters make of it."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn

from surgery.comm.collectives import gather_objects, gather_to
from surgery.comm.ranks import Ranks
from surgery.errors import ConfigError
from surgery.model.fqn import clean
from surgery.model.twin import twin_of
from surgery.origin import Loaded, Origin
from surgery.quantizers.base import quantized_modules
from surgery.quantizers.digest import Piece, page_count, page_sums
from surgery.sharding.base import Part
from surgery.sharding.partition import chunk, common
from surgery.writing.merge_adapters import check_mergeable
from surgery.writing.merging import MergeSite, find_sites

__all__ = ["Adapted", "Place", "Tensors", "adapted_by"]

Place = tuple[nn.Module, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tensors:
    """All tensors of a model, and the rank that writes, or sends, each element of them.

    writers: number of ranks that write, the first ones; rank 0 alone where each has values of its own. spans: elements
    that each rank holds of a tensor, as it is stored. shares: those of them that are this rank's to write or send, so
    that every element is one rank's.
    """

    held: Mapping[Place, Part]
    ranks: Ranks
    device: torch.device
    writers: int
    spans: Mapping[Part, Sequence[range]] = field(repr=False)
    shares: Mapping[Part, Sequence[range]] = field(repr=False)

    @classmethod
    def of(cls, held: Mapping[Place, Part], ranks: Ranks, device: torch.device, *, writers: int) -> Self:
        """The tensors that `held` has on this rank, the same ones on all; collective."""
        each = list(dict.fromkeys(held.values()))
        by_rank = gather_objects([_span(one) for one in each])
        spans = {one: tuple(of_rank[number] for of_rank in by_rank) for number, one in enumerate(each)}
        shares = {one: _divided(of_ranks, writers, one.shape.numel()) for one, of_ranks in spans.items()}
        return cls(held=held, ranks=ranks, device=device, writers=writers, spans=spans, shares=shares)

    def mine(self, held: Part) -> tuple[int, torch.Tensor]:
        """This rank's share: where it begins, and its elements, 1-D."""
        share, data = self.shares[held][self.ranks.rank], held.data.reshape(-1)
        first = share.start - held.start if share else 0
        return share.start, data[first : first + len(share)]

    def gather(self, held: Part, rank: int, wanted: range | None = None) -> torch.Tensor | None:
        """All elements or the `wanted`, 1-D, on `rank`, in memory that may be changed; else None. Collective."""
        wanted, is_here = range(held.shape.numel()) if wanted is None else wanted, rank == self.ranks.rank
        if len(self.spans[held][rank]) == held.shape.numel():  # it has them already
            whole = held.data.reshape(-1)[wanted.start : wanted.stop]
            return whole.to(self.device, copy=True) if is_here else None
        parts = [common(share, wanted) for share in self.shares[held]]
        start, mine = self.mine(held)
        own = parts[self.ranks.rank]
        mine = mine[own.start - start : own.stop - start].to(self.device) if own else mine[:0].to(self.device)
        out = mine.new_empty(len(wanted)) if is_here else None
        places = [range(part.start - wanted.start, part.stop - wanted.start) for part in parts]
        gather_to(mine, places, out=out, rank=rank)
        return out

    def digest(self, states: Iterable[Mapping[str, torch.Tensor]]) -> str:
        """The digest of all values, however they are sharded; collective. states: on every rank the same."""
        sums: list[torch.Tensor] = []
        for held in self.shares:
            start, data = self.mine(held)
            piece = Piece(data=data.contiguous(), start=start * data.element_size())
            of_all = torch.zeros(page_count(held.shape.numel() * data.element_size()), dtype=torch.int64)
            if data.numel():
                of_all[piece.pages.start : piece.pages.stop] = page_sums([piece])[0].cpu()
            sums.append(of_all)
        whole = torch.cat(sums).to(self.device)
        if dist.is_initialized():
            dist.all_reduce(whole)
        pieces = [Piece(data=tensor.reshape(-1).contiguous()) for state in states for tensor in state.values()]
        digest = hashlib.blake2b(whole.cpu().numpy().tobytes(), digest_size=16)
        for found in page_sums(pieces):
            digest.update(found.cpu().numpy().tobytes())
        return digest.hexdigest()


def _span(held: Part) -> range:
    return range(held.start, held.start + held.data.numel())


def _divided(spans: Sequence[range], writers: int, numel: int) -> tuple[range, ...]:
    """The share of each rank: ranks that hold the same elements divide them."""
    holders: dict[range, list[int]] = defaultdict(list)
    for rank, span in enumerate(spans[:writers]):
        holders[span].append(rank)
    shares = [range(0)] * len(spans)
    for span, of_span in holders.items():
        for number, rank in enumerate(of_span):
            shares[rank] = chunk(span, len(of_span), number)
    reached = 0
    for share in sorted((each for each in shares if each), key=lambda each: each.start):
        assert share.start == reached, "every element is held once, or by ranks that hold the same"
        reached = share.stop
    assert reached == numel, "every element is held"
    return tuple(shares)


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapted:
    """The active adapters of a model, and the places of its base that they change; none by default.

    copies: modules -> trained copies that take their place. sites: layers of PEFT, on meta, by the place that they
    change. inputs: what the model holds for each parameter of these layers, by `id`.
    """

    names: tuple[str, ...] = ()
    configs: tuple[Any, ...] = ()
    copies: Mapping[nn.Module, nn.Module] = field(default_factory=dict)
    sites: Mapping[Place, Sequence[MergeSite]] = field(default_factory=dict)
    inputs: Mapping[int, Part] = field(default_factory=dict)

    def inputs_of(self, site: MergeSite) -> dict[str, Part]:
        """The tensors of the model for those inputs of `site` that its adapters have, by their names in it."""
        return {
            name: self.inputs[id(parameter)]
            for name, parameter in site.inputs.items()
            if not set(site.adapters).isdisjoint(name.split("."))
        }


def adapted_by(model: nn.Module, origin: Origin, held: Mapping[Place, Part]) -> Adapted:
    """The active adapters of `model`. Raises `ConfigError` for what cannot be merged."""
    from peft import PeftModel

    peft = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    if peft is None:
        return Adapted()
    names = tuple(peft.active_adapters)
    configs = tuple(peft.peft_config[name] for name in names)
    for name, config in zip(names, configs, strict=True):
        _check_mergeable(name, config)
    lent = {one: _meta(shape) for one, shape in _shapes(origin, held).items()}
    twins = _twins(peft, {place: lent[one] for place, one in held.items()})
    fqns = {module: name.rpartition(".")[0] for each in origin.tensors for name, module in _places(each)}
    bases = {twins[module]: fqn for module, fqn in fqns.items() if module in twins}
    originals = {twin: module for module, twin in twins.items()}
    adapted: Any = twins[peft]
    sites: dict[Place, list[MergeSite]] = defaultdict(list)
    for site in find_sites(adapted, bases, names):
        if site.layer.merged:
            raise ConfigError(f"{site.fqn}: an adapter is merged already: call unmerge_adapter() of the model first")
        for leaf in site.changes if site.adapters else ():
            sites[originals[site.layer.get_base_layer()], leaf].append(site)
    return Adapted(
        names=names,
        configs=configs,
        copies=dict(_copies(peft, names)),
        sites=sites,
        inputs={id(parameter): one for one, parameter in lent.items()},
    )


def _check_mergeable(name: str, config: Any) -> None:
    kind = str(config.peft_type).removeprefix("PeftType.")
    if kind != "LORA":
        raise ConfigError(f"adapter {name}: expected one of LoRA, found {kind}: it cannot be merged here")
    check_mergeable(f"adapter {name}", config)


def _shapes(origin: Origin, held: Mapping[Place, Part]) -> dict[Part, torch.Size]:
    """The shapes of all tensors, unpacked."""
    found = {one: one.shape for one in held.values()}
    for quant in origin.setting.formats:
        for (module, leaf), one in held.items():
            if quant.is_quantized(module) and leaf in quant.weight_names(module):
                found[one] = quant.logical(module, leaf)
    return found


def _twins(model: nn.Module, parameters: Mapping[Place, nn.Parameter]) -> dict[nn.Module, nn.Module]:
    """Modules of `model` and their twins, unsharded and not packed, with these parameters."""
    by_module: dict[nn.Module, dict[str, nn.Parameter]] = defaultdict(dict)
    for (module, leaf), parameter in parameters.items():
        if leaf not in module._buffers:
            by_module[module][leaf] = parameter
    quantized = quantized_modules(model)
    twins = twin_of(model, lambda _fqn, module: by_module[module], hollow=quantized)
    unpacked = {twins[module] for module in quantized}
    for module, twin in twins.items():
        _make_plain(twin, by_module[module], unpacked)
    return twins


def _meta(shape: torch.Size) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


def _make_plain(twin: Any, parameters: Mapping[str, nn.Parameter], unpacked: Collection[nn.Module]) -> None:
    """Give the twin of a module the class and the parameters that it has unsharded, above a base that is not packed."""
    from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    for leaf in parameters:
        vars(twin).pop(leaf, None)  # FSDP1 leaves views here, which would hide the parameter
    if twin in unpacked:
        twin._parameters.update(parameters)
        return
    if not isinstance(twin, BaseTunerLayer):
        return
    if isinstance(twin, ParamWrapper):
        twin.__class__ = ParamWrapper
        return
    if isinstance(twin, LoraLayer) and twin.get_base_layer() in unpacked:
        # PEFT's layers for packed bases differ in that they pack what they have merged.
        twin.__class__ = Linear
        vars(twin)["is_target_conv_1d_layer"] = False
        return
    # FSDP2 has extended the class of what it was called for, such as an adapted embedding.
    kinds = type(twin).__mro__
    behind = [number + 1 for number, kind in enumerate(kinds) if kind.__module__.startswith("torch.distributed")]
    twin.__class__ = kinds[max(behind, default=0)]


def _places(loaded: Loaded) -> Iterator[tuple[str, nn.Module]]:
    """`(FQN, module)` of each place, that of the first name last."""
    found = [(name, module()) for name, (module, _) in zip(loaded.names, loaded.places, strict=True)]
    yield from ((name, module) for name, module in reversed(found) if module is not None)


def _copies(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Modules, and the copies that PEFT trains in their place (`modules_to_save`), of the first of `names` that has."""
    for wrapper in model.modules():
        original, saved = getattr(wrapper, "original_module", None), getattr(wrapper, "modules_to_save", None)
        active = [name for name in names if isinstance(saved, nn.ModuleDict) and name in saved]
        if not isinstance(original, nn.Module) or not active:
            continue
        if len(active) > 1:
            raise ConfigError(
                f"adapters {' and '.join(active)} have both saved a {type(original).__name__} whole: choose one with "
                "set_adapter()"
            )
        twins = {clean(name): module for name, module in saved[active[0]].named_modules()}  # type: ignore[index]
        inner = {clean(name): module for name, module in original.named_modules()}
        yield from ((module, twins[name]) for name, module in inner.items() if name in twins)
