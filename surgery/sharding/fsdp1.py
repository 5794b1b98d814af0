"""FSDP1 around a 4-bit model: what becomes a unit, how meta ranks get memory, and the wrapping itself."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import CustomPolicy

from surgery.comm.ranks import broadcast_from_rank0
from surgery.config import FSDP1, Units
from surgery.errors import ConfigError
from surgery.model.fqn import join

__all__ = ["materializer", "plan_units", "wrap"]

STRATEGIES = {
    "full-shard": ShardingStrategy.FULL_SHARD,
    "shard-grad-op": ShardingStrategy.SHARD_GRAD_OP,
    "hybrid-shard": ShardingStrategy.HYBRID_SHARD,
    "no-shard": ShardingStrategy.NO_SHARD,
}

#: What has to be the same for all parameters of one flat parameter.
Kind = tuple[torch.dtype, bool | None]

#: Containers are never called, so FSDP would never gather what they hold.
CONTAINERS = (nn.ParameterDict, nn.ParameterList, nn.ModuleDict, nn.ModuleList)


def plan_units(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    *,
    use_orig_params: bool,
    policy: Units,
    unsharded: set[nn.Parameter],
) -> set[nn.Module]:
    """The modules, the root apart, that become FSDP units of their own; `unsharded` parameters are in none.

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
        held = {leaf: parameters for _, leaf, parameters in leaves}
        kinds = {leaf: _kind(name, leaf, own, use_orig_params=use_orig_params) for name, leaf, own in leaves}
        main = kinds[root] if root in kinds else _main_kind(kinds, held)
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
    """`(name, module, its parameters)` of what holds some in the unit of `root`; what containers hold counts for their
    owner.
    """
    stack: list[tuple[str, nn.Module]] = [("", root)]
    seen: set[nn.Module] = set()
    while stack:
        name, module = stack.pop()
        if module in outside or module in seen:
            continue
        seen.add(module)
        own = [p for p in _own(module) if p not in unsharded] if not isinstance(module, CONTAINERS) else []
        if own:
            yield name or type(root).__name__, module, own
        stack.extend((join(name, child_name), child) for child_name, child in module.named_children())


def _loose(module: nn.Module) -> bool:
    return isinstance(module, (nn.ParameterDict, nn.ParameterList)) and len(module) > 0


def _own(module: nn.Module) -> list[nn.Parameter]:
    loose = [p for child in module.children() if _loose(child) for p in child.parameters()]
    return [*module.parameters(recurse=False), *loose]


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


def _main_kind(kinds: dict[nn.Module, Kind], held: dict[nn.Module, list[nn.Parameter]]) -> Kind | None:
    sizes: Counter[Kind] = Counter()
    for module, kind in kinds.items():
        sizes[kind] += sum(p.numel() * p.element_size() for p in held[module])
    return sizes.most_common(1)[0][0] if sizes else None


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
    """A parameter shared by two units would be sharded twice, apart."""
    owners: dict[nn.Parameter, set[nn.Module]] = defaultdict(set)
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter, unit in _owned_parameters(model, units):
        owners[parameter].add(unit)
        names[parameter].append(name)
    for parameter, found in owners.items():
        if len(found) > 1 and parameter not in unsharded:
            raise ConfigError(
                f"{' and '.join(names[parameter])} are one tied parameter, but would go to {len(found)} FSDP units: "
                "leave them out of target_modules and modules_to_save, or use strategy no-shard"
            )


def _owned_parameters(model: nn.Module, units: set[nn.Module]) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """`(name, parameter, unit)` of every place that holds a parameter, shared ones as often as they are held."""
    stack: list[tuple[str, nn.Module, nn.Module]] = [("", model, model)]
    while stack:
        prefix, module, unit = stack.pop()
        yield from ((join(prefix, name), p, unit) for name, p in module.named_parameters(recurse=False))
        stack.extend(
            (join(prefix, name), child, child if child in units else unit) for name, child in module.named_children()
        )


def materializer(
    device: torch.device, made: dict[nn.Parameter, nn.Parameter], shared: set[nn.Parameter]
) -> Callable[[nn.Module], None]:
    """A `param_init_fn`: gives meta parameters of a module uninitialized memory on `device`, for a broadcast to fill.

    Each of the `shared` ones once, so that ties survive: `made` remembers it, and keeps it alive until it is cleared.
    What is not on meta is left alone (FSDP calls this for every module of a unit, also for those with real buffers).
    """

    def materialize(module: nn.Module) -> None:
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            new = made.get(parameter)
            if new is None:
                new = _empty(parameter, device)
            if parameter in shared:
                made[parameter] = new
            module._parameters[name] = new

    return materialize


def _shared_parameters(model: nn.Module) -> set[nn.Parameter]:
    places = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    return {parameter for parameter, count in places.items() if count > 1}


def _empty(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """An uninitialized parameter like `parameter`, of the same class, with the same `quant_state` if it has one."""
    from surgery.quantizers.bnb import with_data

    data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    if getattr(parameter, "quant_state", None) is not None:
        return with_data(parameter, data)
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def _bring(
    model: nn.Module, parameters: set[nn.Parameter], config: FSDP1, *, device: torch.device
) -> list[nn.Parameter]:
    """What takes the place of `parameters`, whole on `device`, with rank 0's values if the others have none."""
    brought: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter not in parameters:
                continue
            if parameter not in brought:
                data = _empty(parameter, device) if parameter.is_meta else parameter.data.to(device)
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
        param_init_fn=materializer(device, made, _shared_parameters(model)),
        device_id=device,
        sync_module_states=config.sync_module_states,
        use_orig_params=config.use_orig_params,
        forward_prefetch=config.forward_prefetch,
        limit_all_gathers=config.limit_all_gathers,
        ignored_states=_bring(model, unsharded, config, device=device),
        **options,
    )
    made.clear()  # FSDP keeps the function that fills it, and whole parameters would stay beside their shards
    return wrapped
