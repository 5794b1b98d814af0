"""FSDP1 around a quantized model: its units, memory for ranks that hold it on meta, and the wrapping."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp._runtime_utils import _lazy_init, _reshard  # private in torch 2.13
from torch.distributed.fsdp.wrap import CustomPolicy

from surgery.comm.ranks import broadcast_from_rank0
from surgery.config import FSDP1, Units
from surgery.errors import ConfigError
from surgery.model.fqn import PEFT_PREFIX, clean, join
from surgery.model.tree import Site, decoder_blocks
from surgery.quantizers.base import QuantFormat, kept_parameters
from surgery.quantizers.digest import Place
from surgery.quantizers.stack import stacks_of
from surgery.sharding.base import READS_WEIGHTS, Devices, Part, Span, Trained, Unit, outermost, register
from surgery.sharding.fsdp import Fsdp, owners_of, shared_parameters
from surgery.sharding.partition import Grid, Partition
from surgery.sharding.unsharded import copies

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["Fsdp1", "materializer", "plan_units", "wrap"]

STRATEGIES = {
    "full-shard": ShardingStrategy.FULL_SHARD,
    "shard-grad-op": ShardingStrategy.SHARD_GRAD_OP,
    "hybrid-shard": ShardingStrategy.HYBRID_SHARD,
    "no-shard": ShardingStrategy.NO_SHARD,
}

#: The name of the flat parameter in its unit.
FLAT = "_flat_param"

#: What has to be the same for all parameters of one flat parameter.
Kind = tuple[torch.dtype, bool | None]

#: Containers are never called, so FSDP would never gather what they hold.
CONTAINERS = (nn.ParameterDict, nn.ParameterList, nn.ModuleDict, nn.ModuleList)


def plan_units(
    model: nn.Module, blocks: Iterable[nn.Module], *, use_orig_params: bool, policy: Units, unsharded: set[nn.Parameter]
) -> set[nn.Module]:
    """The modules below the root that become FSDP units of their own; `unsharded` parameters are in none.

    Every block is one. FSDP1 flattens a unit into one tensor, so its parameters must agree in dtype and, without
    `use_orig_params`, in `requires_grad`. With policy `auto` the kind of what the block itself holds stays in it, or
    else the one that has the most bytes, and each leaf of another kind (adapters, norms of another dtype) becomes a
    unit; with `block` that is an error.

    Raises `ConfigError` naming the module where no division into units can work.
    """
    blocks = set(blocks)
    units = set(blocks)
    for root in (*blocks, model):
        leaves = list(_leaves(root, outside=blocks - {root}, unsharded=unsharded))
        kinds = {leaf: _kind(name, leaf, own, use_orig_params=use_orig_params) for name, leaf, own in leaves}
        sizes: Counter[Kind] = Counter()
        for _, leaf, own in leaves:
            sizes[kinds[leaf]] += sum(parameter.nbytes for parameter in own)
        main = kinds[root] if root in kinds else max(sizes, key=lambda kind: sizes[kind], default=None)
        strangers = [(name, leaf) for name, leaf, _ in leaves if kinds[leaf] != main]
        if strangers and policy == "block":
            raise _not_uniform(strangers, kinds, main)
        units.update(leaf for _, leaf in strangers)
        for _, outer in strangers:  # what they contain of the main kind would not fit in them
            units.update(leaf for leaf in outer.modules() if leaf in kinds and kinds[leaf] != kinds[outer])
    _check_ties(model, units, unsharded)
    return units


def _leaves(
    root: nn.Module, *, outside: set[nn.Module], unsharded: set[nn.Parameter]
) -> Iterator[tuple[str, nn.Module, list[nn.Parameter]]]:
    """`(name, module, its parameters)` of what holds some in the unit of `root`; what containers hold, and the factors
    of adapters of packed experts, count for their owner.
    """
    stack: list[tuple[str, nn.Module]] = [("", root)]
    seen: set[nn.Module] = set()
    while stack:
        name, module = stack.pop()
        if module in outside or module in seen:
            continue
        seen.update((module, *_factors(module)))
        own = [p for p in _own(module) if p not in unsharded] if not isinstance(module, CONTAINERS) else []
        if own:
            yield name or type(root).__name__, module, own
        stack.extend((join(name, child_name), child) for child_name, child in module.named_children())


def _own(module: nn.Module) -> list[nn.Parameter]:
    loose = [child for child in module.children() if isinstance(child, (nn.ParameterDict, nn.ParameterList))]
    inner = (*loose, *_factors(module))
    return [*module.parameters(recurse=False), *(p for child in inner for p in child.parameters())]


def _factors(module: Any) -> list[nn.Module]:
    """The layers of an adapter of packed experts, which hands their weights down and calls none of them."""
    if "parameter_name" not in vars(module) or not stacks_of(module.get_base_layer()):
        return []
    return [*module.lora_A.values(), *module.lora_B.values()]


def _kind(name: str, module: nn.Module, own: list[nn.Parameter], *, use_orig_params: bool) -> Kind:
    kinds = {(p.dtype, None if use_orig_params else p.requires_grad) for p in own}
    if len(kinds) == 1:
        return kinds.pop()
    raise ConfigError(
        f"{name} ({type(module).__name__}) holds parameters that FSDP1 cannot flatten into one: "
        f"{', '.join(sorted(map(_describe, kinds)))}. Use use_orig_params=True if only requires_grad differs; "
        "otherwise quant_storage equal to dtype"
    )


def _describe(kind: Kind) -> str:
    dtype, trainable = kind
    name = str(dtype).removeprefix("torch.")
    return name if trainable is None else f"{'trainable' if trainable else 'frozen'} {name}"


def _not_uniform(
    strangers: list[tuple[str, nn.Module]], kinds: dict[nn.Module, Kind], main: Kind | None
) -> ConfigError:
    name, module = strangers[0]
    return ConfigError(
        f"units='block': FSDP1 flattens a block into one tensor, but {name} is {_describe(kinds[module])} among "
        f"{_describe(main) if main else 'nothing'} ({len(strangers)} modules differ). Use units='auto', which wraps "
        "them on their own, or give all parameters of a block one dtype"
    )


def _check_ties(model: nn.Module, units: set[nn.Module], unsharded: set[nn.Parameter]) -> None:
    for parameter, names, count in shared_parameters(owners_of(model, {unit: unit for unit in units})):
        if parameter not in unsharded:
            raise ConfigError(
                f"{' and '.join(names)} are one tied parameter, but would go to {count} FSDP units: "
                "leave them out of target_modules and modules_to_save, or use strategy no-shard"
            )


def materializer(
    quant: QuantFormat, device: torch.device, made: dict[nn.Parameter, nn.Parameter], shared: set[nn.Parameter]
) -> Callable[[nn.Module], None]:
    """A `param_init_fn`: gives meta parameters of a module uninitialized memory on `device`, for a broadcast to fill.

    Each of the `shared` ones once, so that ties survive: `made` remembers it, and keeps it alive until it is cleared.
    What is not on meta is left alone (FSDP calls this for every module of a unit, also for those with real buffers).
    """

    def materialize(module: nn.Module) -> None:
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            new = made[parameter] if parameter in made else _empty(parameter, quant, device)
            if parameter in shared:
                made[parameter] = new
            module._parameters[name] = new

    return materialize


def _shared(model: nn.Module) -> set[nn.Parameter]:
    places = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    return {parameter for parameter, count in places.items() if count > 1}


def _empty(parameter: nn.Parameter, quant: QuantFormat, device: torch.device) -> nn.Parameter:
    """An uninitialized parameter like `parameter`, of the same kind, with the same state if it has one."""
    return quant.like(parameter, torch.empty(parameter.shape, dtype=parameter.dtype, device=device))


def _bring(
    model: nn.Module, parameters: set[nn.Parameter], config: FSDP1, *, quant: QuantFormat, device: torch.device
) -> list[nn.Parameter]:
    """Replace `parameters` by whole ones on `device`, with rank 0's values if the others have none; returns these."""
    brought: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter not in parameters:
                continue
            if parameter not in brought:
                data = _empty(parameter, quant, device) if parameter.is_meta else parameter.data.to(device)
                brought[parameter] = nn.Parameter(data, requires_grad=False)
            module._parameters[name] = brought[parameter]
    new = list(brought.values())
    if config.sync_module_states:
        broadcast_from_rank0(new, device=device)
    return new


def wrap(
    model: nn.Module,
    units: set[nn.Module],
    config: FSDP1,
    *,
    quant: QuantFormat,
    device: torch.device,
    unsharded: set[nn.Parameter],
) -> FullyShardedDataParallel:
    """Wrap `model`, and each of `units` in it, as `config` says; to be called on all ranks alike.

    `unsharded` parameters, which are frozen, stay whole on every rank: FSDP1 leaves them alone.
    """
    options: dict[str, Any] = {}
    made: dict[nn.Parameter, nn.Parameter] = {}
    if config.mesh is not None:
        options["device_mesh"] = init_device_mesh(device.type, config.mesh, mesh_dim_names=("replicate", "shard"))
    wrapped = FullyShardedDataParallel(
        model,
        sharding_strategy=STRATEGIES[config.strategy],
        auto_wrap_policy=CustomPolicy(lambda module: module in units),
        cpu_offload=CPUOffload(offload_params=True) if config.cpu_offload else None,
        mixed_precision=config.mixed_precision,
        param_init_fn=materializer(quant, device, made, _shared(model)),
        device_id=device,
        sync_module_states=config.sync_module_states,
        use_orig_params=config.use_orig_params,
        forward_prefetch=config.forward_prefetch,
        limit_all_gathers=config.limit_all_gathers,
        ignored_states=_bring(model, unsharded, config, quant=quant, device=device),
        **options,
    )
    made.clear()  # FSDP keeps the function that fills it, and whole parameters would stay beside their shards
    return wrapped


class Fsdp1(Fsdp):
    """The strategy of `surgery.FSDP1`: each unit of the model is one flat parameter, of which a rank keeps a range.

    What upstream keeps in another dtype than the model's stays whole on every rank: router gates and the like are
    small, are read from outside of the module that holds them, and would not fit in the flat parameter of a block.
    """

    label = "FSDP1"
    placements = ("rank0-cpu", "replicated")
    options: FSDP1 | None
    resident_patches = ("fsdp-resident",)

    def __init__(self, options: Any, **setting: Any) -> None:
        super().__init__(options, **setting)
        self.waits_on_rank0 = self.placement == "rank0-cpu"
        self.build_patches = ("torch.fsdp1-sync-on-cpu",) if self.device.type == "cpu" else ()
        self.keeps_gathered = options is not None and options.strategy == "shard-grad-op"

    @property
    def chosen(self) -> FSDP1:
        """The options; a model that was found sharded has none."""
        assert self.options is not None
        return self.options

    def check(self) -> None:
        """Refuse placements and devices that FSDP1 cannot work with."""
        if self.placement == "sharded":
            raise ConfigError(
                "placement sharded keeps each rank's shard alone, but FSDP1 makes its shards itself: use "
                "shard=FSDP2(), or placement='rank0-cpu'"
            )
        super().check()
        if self.waits_on_rank0 and not self.chosen.sync_module_states and self.world_size > 1:
            raise ConfigError(
                "placement rank0-cpu with sync_module_states=False: the ranks other than 0 would train on "
                "uninitialized memory, and FSDP says nothing. Leave sync_module_states=True, or use "
                "placement='replicated'"
            )
        if self.cpu_offload and self.device.type == "cpu":
            raise ConfigError(
                "cpu_offload moves parameters between an accelerator and the CPU; here there is only a CPU"
            )

    def check_format(self, quant: QuantFormat, *, adapted: bool) -> None:
        """Refuse integers, casts, and blocks that would not fit one flat parameter where `units="block"` asks so."""
        if not quant.storage.is_floating_point:
            raise ConfigError(
                f"quant_storage={quant.storage} cannot be sharded by FSDP1, which flattens floating-point tensors "
                f"only: use quant_storage={quant.dtype} (the same bytes under another name), or leave it None"
            )
        super().check_format(quant, adapted=adapted)
        if self.chosen.units == "block":
            self._check_blocks(quant, adapted=adapted)

    def _check_blocks(self, quant: QuantFormat, *, adapted: bool) -> None:
        if quant.storage != quant.dtype:
            raise ConfigError(
                f"units='block' with quant_storage={quant.storage}: norms{' and adapters' if adapted else ''} are "
                f"{quant.dtype}, and FSDP1 flattens one dtype only. Use units='auto', which wraps them on their own, "
                "or quant_storage=None"
            )
        if adapted and not self.chosen.use_orig_params:
            raise ConfigError(
                "units='block' puts trainable adapters and frozen weights into one flat parameter, which FSDP1 refuses "
                "without use_orig_params: use use_orig_params=True, or units='auto', which wraps adapters on their own"
            )

    def check_adapters(self, lora: LoraConfig) -> None:
        """Refuse adapters that read base weights while they run if these are freed by then.

        Without `use_orig_params` adapters are units of their own.
        """
        for name in () if self.chosen.use_orig_params else READS_WEIGHTS:
            if getattr(lora, name, None):
                raise ConfigError(
                    f"{name} reads the base weight while the adapter runs, but without use_orig_params adapters are "
                    "FSDP1 units of their own, and the weight is freed by then: use use_orig_params=True, or leave "
                    f"{name} out"
                )

    def check_added(self, lora: LoraConfig) -> None:
        """Refuse all: parameters are flattened once."""
        raise ConfigError(
            "FSDP1 flattens the parameters of a model when it is wrapped: an adapter that is added later is in no flat "
            "parameter, and neither sharded nor trained. Begin from it (surgery.qlora(adapter=...)), load it in the "
            "place of an adapter that the model has, by its name, or use shard=FSDP2()"
        )

    def check_ties(self, tied: Mapping[str, tuple[str, ...]]) -> None:
        """Refuse ties where FSDP1 keeps parameters and shards nothing: it loses them from the second forward on.

        One rank is as unsharded as strategy no-shard.
        """
        names = [name for name, aliases in tied.items() if aliases]
        if not self.chosen.use_orig_params or not names:
            return
        if self.chosen.strategy == "no-shard" or self.world_size == 1:
            raise ConfigError(
                f"{names[0]} is tied to {tied[names[0]][0]}, which FSDP1 cannot handle with use_orig_params=True while "
                f"it shards nothing ({'strategy no-shard' if self.world_size > 1 else 'one rank'}): its second forward "
                "fails. Use use_orig_params=False, or a sharding strategy on two ranks or more"
            )

    def check_model(self, model: nn.Module, quant: QuantFormat) -> frozenset[str]:
        """FQNs of what upstream keeps in another dtype. Refuses what cannot be divided into units."""
        # Adapters that somebody else has made have values already.
        unsharded = {n: p for n, p in kept_parameters(model, quant.dtype, ends=False).items() if p.is_meta}
        self._units(model, set(unsharded.values()), use_orig_params=True)  # what is trained is not known yet
        kept = [n for n, p in kept_parameters(model, quant.dtype).items() if p.is_meta and n not in unsharded]
        self._check_kept(model, kept, quant.dtype)
        return frozenset(unsharded)

    def check_adapted(self, adapted: nn.Module, blocks: Sequence[Site], unsharded: set[nn.Parameter]) -> None:
        """Refuse views, adapters of parameters that are not packed, and what cannot be divided into units."""
        super().check_adapted(adapted, blocks, unsharded)
        wrapped = [
            f"{name.removeprefix(PEFT_PREFIX).replace('.base_layer', '')}.{module.parameter_name}"
            for name, module in adapted.named_modules()
            if "parameter_name" in vars(module) and not _factors(module)
        ]
        if wrapped:
            raise ConfigError(
                f"lora: PEFT adapts {', '.join(wrapped[:3])}{', ...' if len(wrapped) > 3 else ''} as parameters, which "
                "it replaces while a module runs, and FSDP1 does not let it: use shard=FSDP2() (--fsdp 2), or name in "
                "target_modules linear layers alone, such as q_proj and v_proj"
            )
        self._units(adapted, unsharded, use_orig_params=self.chosen.use_orig_params, blocks=blocks)

    def _units(
        self,
        model: nn.Module,
        unsharded: set[nn.Parameter],
        *,
        use_orig_params: bool,
        blocks: Sequence[Site] | None = None,
    ) -> set[nn.Module]:
        modules = [site.module for site in (decoder_blocks(model) if blocks is None else blocks)]
        return plan_units(
            model, modules, use_orig_params=use_orig_params, policy=self.chosen.units, unsharded=unsharded
        )

    @cached_property
    def partition(self) -> Partition:
        """The partition: all ranks quantize a part each for rank 0, or each has everything."""
        if self.waits_on_rank0 and self.world_size > 1:
            return Partition(grid=Grid(shards=self.world_size), rank0_only=True)
        return super().partition

    @cached_property
    def at_rest(self) -> Grid:
        """The mesh; strategy no-shard divides nothing."""
        if self.options is not None and self.options.strategy == "no-shard":
            return Grid(replicas=self.world_size)
        return super().at_rest

    def devices(self, rank: int) -> Devices:
        """Rank 0 keeps all weights on its CPU, the others none; or each has them on its device."""
        if not self.waits_on_rank0:
            return super().devices(rank)
        return Devices(compute=self.device, data=torch.device("cpu" if rank == 0 else "meta"))

    def finish(self, model: nn.Module, quant: QuantFormat) -> FullyShardedDataParallel:
        """The `FullyShardedDataParallel` around `model`: every rank holds its shard, with rank 0's values."""
        if self.world_size > 1 and not self.chosen.sync_module_states:
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            broadcast_from_rank0(trainable, device=self.device)
        kept = kept_parameters(model, quant.dtype, ends=False).values()
        unsharded = {parameter for parameter in kept if not parameter.requires_grad}
        units = self._units(model, unsharded, use_orig_params=self.chosen.use_orig_params)
        return wrap(model, units, self.chosen, quant=quant, device=self.device, unsharded=unsharded)

    @classmethod
    def made(cls, model: nn.Module) -> bool:
        """Whether `model` is, or has in it, a `FullyShardedDataParallel`."""
        return outermost(model, FullyShardedDataParallel) is not None

    def shards(self, model: nn.Module, places: Iterable[Place]) -> dict[Place, Part]:
        """Ranges of flat parameters, and whole weights that are in none."""
        held = self.held(model)
        return {place: held[place] for place in places}

    def held(self, model: nn.Module) -> dict[tuple[nn.Module, str], Part]:
        """Ranges of flat parameters, and whole tensors that are in none."""
        found = {place: part for place, part in super().held(model).items() if place[1] != FLAT}
        units: list[Any] = [*FullyShardedDataParallel.fsdp_modules(model)]
        for handle in (unit._handle for unit in units if unit._handle is not None):
            flat = handle.flat_param
            for where, part in zip(flat._param_infos, _parts(handle), strict=True):
                found[where.module, where.param_name] = part
            for alias in flat._shared_param_infos:
                found[alias.module, alias.param_name] = found[alias.prim_module, alias.prim_param_name]
        return found

    def parameter_names(self, model: nn.Module) -> set[str]:
        """The plain FQNs of all parameters, those in flat parameters too."""
        units = ((prefix, unit) for prefix, unit in model.named_modules() if isinstance(unit, FullyShardedDataParallel))
        return super().parameter_names(model).union(*(_names_in(unit, prefix) for prefix, unit in units))

    def settle(self, model: nn.Module) -> None:
        """Shard every unit again; it is gathered anew by the next that needs it."""
        for unit in FullyShardedDataParallel.fsdp_modules(model):
            _settle(unit)

    def trainable_state(self, model: nn.Module, also: frozenset[str] = frozenset()) -> dict[str, torch.Tensor]:
        """Gather the parameters, one unit at a time whole on the device."""
        state: dict[str, torch.Tensor] = {}
        root: Any = outermost(model, FullyShardedDataParallel)
        _lazy_init(root, root)  # or before the first forward each unit would take itself for the root
        for prefix, unit in list(model.named_modules()):
            if not isinstance(unit, FullyShardedDataParallel):
                continue
            is_trained = any(parameter.requires_grad for _, parameter in _own_parameters(unit))
            if not is_trained and also.isdisjoint(_names_in(unit, prefix)):
                continue
            with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
                state |= copies(_chosen(unit, prefix, also)) if dist.get_rank() == 0 else {}
        return state

    def trained(self, model: nn.Module) -> list[Trained]:
        """Shards of flat parameters, or the ranges in them of the original ones, once what is gathered is freed."""
        found, flat = [], set[nn.Parameter]()
        for prefix, unit in list(model.named_modules()):
            if isinstance(unit, FullyShardedDataParallel) and unit._handle is not None:
                found += _trained(unit, prefix)
                flat.update((unit._handle.flat_param, *(unit._handle.flat_param._params or ())))
        return found + [each for each in super().trained(model) if each.parameter not in flat]

    def _at_end(self, units: Sequence[Unit]) -> int:
        """The root unit, which has all but the blocks."""
        return sum(unit.whole for unit in units if unit.kind != "block")

    def _in_block(self, blocks: Sequence[int], units: Sequence[Unit]) -> int:
        """The block itself and the next one, beside the root unit."""
        return sum(blocks[:2]) + self._at_end(units)

    def finishing_peaks(self, units: Sequence[Unit], *, unsharded: int, rank: int) -> Iterable[tuple[int, int]]:
        """A moment for each unit: memory for its parameters, where there is none yet; a flat copy; and its shard."""
        in_blocks = [unit.weights for unit in units if unit.kind == "block"]
        sizes = [*in_blocks, sum(unit.weights for unit in units) - sum(in_blocks)]
        has_weights = rank == 0 or not self.waits_on_rank0
        is_here = has_weights and (self.device.type == "cpu" or not self.waits_on_rank0)
        left, held = sum(sizes) if has_weights else 0, unsharded
        for size in sizes:
            shard = -(-size // self.at_rest.shards)
            work = held + (1 if is_here else 2) * size + shard
            yield (left, work) if self.waits_on_rank0 else (0, work + left)
            held += shard
            left -= size if has_weights else 0


def _names_in(unit: Any, prefix: str) -> set[str]:
    """Plain FQNs of what `unit`, whose own is `prefix`, has in its flat parameter."""
    names = () if unit._handle is None else unit._handle.flat_param._fqns
    return {clean(join(prefix, name)) for name in names}


def _chosen(unit: nn.Module, prefix: str, also: frozenset[str]) -> dict[str, nn.Parameter]:
    """The unit's own parameters, by plain FQN, that are trainable or in `also`."""
    named = ((clean(join(prefix, name)), parameter) for name, parameter in _own_parameters(unit))
    return {name: parameter for name, parameter in named if parameter.requires_grad or name in also}


def _own_parameters(unit: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters below `unit` that no other unit inside of it holds."""
    yield from ((join(prefix, name), p) for name, p in unit._parameters.items() if p is not None)
    for name, child in unit.named_children():
        if not isinstance(child, FullyShardedDataParallel):
            yield from _own_parameters(child, join(prefix, name))


def _trained(unit: Any, prefix: str) -> list[Trained]:
    """The parameters that an optimizer is given of `unit`, whose own FQN is `prefix`."""
    handle = unit._handle
    flat, is_sharded = handle.flat_param, handle.uses_sharded_strategy
    _settle(unit)
    memory, parts = _local_flat(handle), [*_parts(handle)]
    spans = [
        Span(
            name=clean(join(prefix, name)),
            shape=part.shape,
            start=part.start,
            numel=part.data.numel(),
            offset=int(part.data.storage_offset() - memory.storage_offset()),
        )
        for name, part in zip(flat._fqns, parts, strict=True)
    ]
    if flat._params is None:
        return [Trained(parameter=flat, memory=memory, spans=tuple(spans))] if flat.requires_grad else []
    return [
        Trained(
            parameter=parameter,
            memory=part.data if is_sharded else part.data.view(part.shape),
            spans=(replace(span, offset=0),),
        )
        for parameter, part, span in zip(flat._params, parts, spans, strict=True)
        if parameter.requires_grad
    ]


def _settle(unit: Any) -> None:
    """Free what is gathered. A forward without a backward leaves the root so; before the first one nothing is."""
    handle = unit._handle
    if handle is not None and handle.uses_sharded_strategy and hasattr(handle.flat_param, "_local_shard"):
        _reshard(unit, handle, free_unsharded_flat_param=True)


def _local_flat(handle: Any) -> torch.Tensor:
    """This rank's shard of a flat parameter."""
    flat = handle.flat_param
    # Before the first forward, and where nothing is sharded, there is one tensor only.
    local: torch.Tensor = getattr(flat, "_local_shard", flat.data) if handle.uses_sharded_strategy else flat.data
    return local.detach()


def _parts(handle: Any) -> Iterator[Part]:
    """This rank's range of each parameter in a flat one; empty where it has none."""
    local, flat = _local_flat(handle), handle.flat_param
    group = handle.process_group if handle.uses_sharded_strategy else None
    for shape, info in zip(flat._shapes, flat._shard_param_infos, strict=True):
        # Where this rank has nothing of it there is None.
        start, numel, offset = info.intra_param_start_idx or 0, info.numel_in_shard or 0, info.offset_in_shard or 0
        yield Part(data=local[offset : offset + numel], start=start, shape=shape, group=group)


register(FSDP1, Fsdp1)
