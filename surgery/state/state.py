"""Saving and loading the state of a training: a plain loop that is interrupted goes on as if it had not been."""

from __future__ import annotations

import io
import os
import random
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from surgery.adapters.metadata import versions
from surgery.comm.collectives import gather_objects
from surgery.comm.comparison import same_on_every_rank
from surgery.comm.environment import compute_device
from surgery.comm.failures import everyone, together
from surgery.comm.ranks import Ranks, current_ranks
from surgery.errors import ConfigError, StateError
from surgery.sharding.base import Trained, strategy_of
from surgery.state.folder import STAGED, StateFolder, checksum, hold, read_manifest, states, why_not_whole
from surgery.state.optimizer import Kept, check_groups, groups_of, kept_of, merge, restore, room_for
from surgery.state.pieces import SavedPiece, read_pieces, write_pieces
from surgery.telemetry.atomic import sync

__all__ = ["TrainingState", "load_state", "save_state"]

#: Files: what all ranks have in common, and what is of one rank.
SHARED, OF_RANK = "shared.pt", "rank-{:05d}.pt"

#: Options of adapters without which the same parameters are another model.
_MEANING = ("peft_type", "r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora")

#: How many names an error lists.
SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """A training state that was loaded.

    step: as it was saved. position, extra: this rank's, as it was saved, or that of all ranks where there are now more
    or fewer; None, or left out, if they differed among them. positions: those of all ranks that have saved, where there
    are now more or fewer. path: its folder.
    """

    step: int
    path: Path
    world_size: int
    position: Any = None
    positions: tuple[Any, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@together()
def save_state(
    directory: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Optimizer,
    step: int,
    scheduler: Any = None,
    position: Any = None,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Save what a training needs to go on, by torch.distributed.checkpoint; to be called on all ranks alike.

    That is: trainable parameters, never those of the base model; the optimizer; the scheduler; the random numbers of
    Python, NumPy, torch and the accelerator on each rank; and the place in the data. Each rank writes its shard. Call
    it between two steps: gradients are not saved.

    Killed at any moment it leaves the states that were there. This process has the folder from now on until it ends.

    Args:
        directory: of states, each in a folder of its own in it; one that all ranks share, and that no adapter is in.
        model: what `surgery.qlora` or `surgery.fill` has built, or any other model.
        optimizer: of its parameters.
        step: the number of steps that are done.
        scheduler: of the learning rate: what has a `state_dict`.
        position: the place in the data on this rank: plain values, or what has a `state_dict`, as torchdata's
            `StatefulDataLoader`.
        extra: more of it, by name.
        keep: how many states stay, this one among them.

    Returns:
        The folder of this state.

    Raises:
        ConfigError: the folder cannot be written, another process has it, or an argument cannot be saved.
        StateError: writing fails. States that were there are as they were.
        PeerError: another rank has failed.
    """
    ranks, device = current_ranks(), _device(model)
    with everyone(ranks, device=device):
        _check_call(optimizer, step=step, keep=keep)
        trained = strategy_of(model).trained(model)
        groups, kept = groups_of(optimizer, trained), kept_of(optimizer, trained)
        of_rank = _dump(
            {
                "random": _random_state(),
                "position": _state_of(position),
                "extra": {name: _state_of(value) for name, value in (extra or {}).items()},
                "opaque": kept.opaque,
            },
            "position, extra and what the optimizer keeps",
        )
    call = {"step": str(step), "keep": str(keep), "extra": ", ".join(sorted(extra or {}))}
    same_on_every_rank(ranks, "state", {"arguments of save_state": call}, device=device)
    folder = StateFolder(Path(os.path.realpath(directory)))
    with everyone(ranks, device=device):
        if ranks.rank == 0:
            hold(directory).stage()
    try:
        write_pieces(folder.path / STAGED, [*_parameter_pieces(trained), *kept.pieces])
        told = gather_objects((kept.dtypes, kept.scalars))
        shared = {
            "groups": groups,
            "dtypes": merge(dtypes for dtypes, _ in told),
            "scalars": merge(scalars for _, scalars in told),
            "scheduler": _state_of(scheduler),
        }
        with everyone(ranks, device=device):
            files = _write_files(folder.path / STAGED, ranks, of_rank, shared)
        written = {name: each for of_rank in gather_objects(files) for name, each in of_rank.items()}
        manifest = {
            "step": step,
            "world_size": ranks.world_size,
            "sharding": strategy_of(model).label,
            **_facts(model, optimizer, scheduler, trained),
            "versions": versions(),
        }
        with everyone(ranks, device=device):
            done = folder.commit(step, manifest, files=written, keep=keep) if ranks.rank == 0 else None
    except BaseException:
        if ranks.rank == 0:
            folder.discard()
        raise
    saved = gather_objects(done)[0]
    assert saved is not None
    return folder.path / saved.name


@together()
def load_state(
    directory: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any = None,
    position: Any = None,
    extra: Mapping[str, Any] | None = None,
    other_base: bool = False,
) -> TrainingState | None:
    """Load the newest whole state of `save_state` into what was built anew; to be called on all ranks alike.

    Ranks and sharding may be others than those that have saved it. On as many ranks each has its own random numbers and
    place in the data again; on others, random numbers are made from those that were saved.

    Everything is checked, and read, before anything is changed.

    Args:
        directory: of states.
        model: with the trainable parameters that were saved, on the same base model.
        optimizer: of the class, and the groups of parameters, that were saved. Options such as `lr` are the saved ones.
        scheduler: of the class that was saved; None if there was none.
        position: what has a `load_state_dict`, to be given what was saved; None to have it returned only.
        extra: the same, by name.
        other_base: whether the base model may have another name, as the same one in another folder has.

    Returns:
        What else was saved; None if there is no state in `directory`.

    Raises:
        ConfigError: the state is of another model, optimizer or scheduler, or another process has the folder.
        StateError: there are states, and none is whole, or reading fails.
        PeerError: another rank has failed.
    """
    ranks, device = current_ranks(), _device(model)
    path = _choose(Path(os.path.realpath(directory)), ranks, device)
    if path is None:
        return None
    with everyone(ranks, device=device):
        manifest, shared = read_manifest(path), _read(path / SHARED)
        world_size = manifest["world_size"]
        trained = strategy_of(model).trained(model)
        _check_facts(path, manifest, _facts(model, optimizer, scheduler, trained), other_base=other_base)
        check_groups(groups_of(optimizer, trained), shared["groups"])
        same_world = ranks.world_size == world_size
        mine = _read(path / OF_RANK.format(ranks.rank % world_size))
        others = [mine] if same_world else [_read(path / OF_RANK.format(rank)) for rank in range(world_size)]
        kept = Kept(dtypes=shared["dtypes"], scalars=shared["scalars"], opaque=mine["opaque"])
        states_, pieces = room_for(trained, kept)
        found = _found(path, manifest, mine, others)
        restored = _check_stateful(found, {"position": position, **(extra or {})})
        read = [each.memory.clone(memory_format=torch.contiguous_format) for each in trained]
    read_pieces(path, [*_parameter_pieces(trained, read), *pieces])
    with everyone(ranks, device=device), torch.no_grad():
        for target, state in restored:
            target.load_state_dict(state)
        if scheduler is not None:
            scheduler.load_state_dict(shared["scheduler"])
        restore(optimizer, trained, states_, shared["groups"])
        for each, memory in zip(trained, read, strict=True):
            each.memory.copy_(memory)
        _set_random_state(mine["random"], seed=None if ranks.rank < world_size else ranks.rank)
    return found


def _device(model: nn.Module) -> torch.device:
    """A device that the process group speaks: that of the parameters, unless they wait on the CPU without a backend."""
    device, world = next(parameter.device for parameter in model.parameters()), dist.group.WORLD
    spoken = [each.type for each in world._device_types] if world is not None else [device.type]
    return device if device.type in spoken else compute_device()


def _check_call(optimizer: object, *, step: object, keep: object) -> None:
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"optimizer: expected one torch.optim.Optimizer, found {type(optimizer).__name__}")
    for name, value, least in (("step", step, 0), ("keep", keep, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}: expected a whole number from {least} on, found {value!r}")


def _state_of(value: Any) -> Any:
    return value.state_dict() if hasattr(value, "state_dict") else value


def _parameter_pieces(trained: list[Trained], memories: list[torch.Tensor] | None = None) -> list[SavedPiece]:
    """The pieces of the parameters; in `memories` instead of their own, if given."""
    memories = [each.memory for each in trained] if memories is None else memories
    return [
        SavedPiece(path=("model", span.name), span=span, memory=memory.reshape(-1))
        for each, memory in zip(trained, memories, strict=True)
        for span in each.spans
    ]


# What identifies a training. ------------------------------------------------------------------------------------------


def _facts(model: nn.Module, optimizer: Optimizer, scheduler: Any, trained: list[Trained]) -> dict[str, Any]:
    """Facts that have to be the same when a training goes on, as JSON has them."""
    spans = {span.name: (span, each.memory.dtype) for each in trained for span in each.spans}
    base, adapters = _adapters(model)
    return {
        "base": base,
        "adapters": adapters,
        "optimizer": _class(optimizer),
        "scheduler": None if scheduler is None else _class(scheduler),
        "parameters": {
            name: [*span.shape, str(dtype).removeprefix("torch.")] for name, (span, dtype) in sorted(spans.items())
        },
    }


def _class(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _adapters(model: nn.Module) -> tuple[str | None, dict[str, dict[str, str]]]:
    """The base model, with its revision, and the options of adapters; nothing where PEFT was not even imported."""
    peft: Any = sys.modules.get("peft")
    adapted = next((module for module in model.modules() if peft and isinstance(module, peft.PeftModel)), None)
    if adapted is None:
        return None, {}
    configs = adapted.peft_config
    bases = [f"{each.base_model_name_or_path}@{each.revision or 'main'}" for each in configs.values()]
    return bases[0], {
        name: {key: str(getattr(config, key, None)) for key in _MEANING} for name, config in configs.items()
    }


def _check_facts(path: Path, saved: Mapping[str, Any], found: Mapping[str, Any], *, other_base: bool) -> None:
    _check_parameters(path, saved["parameters"], found["parameters"])
    if saved["base"] != found["base"] and not other_base:
        raise ConfigError(
            f"the state {path} is of adapters on {saved['base']}, found a model that is {found['base']}: load the base "
            "model that they were trained on, or pass other_base=True if it is the same one by another name"
        )
    for name in ("adapters", "optimizer", "scheduler"):
        if saved[name] != found[name]:
            raise ConfigError(
                f"{name}: expected {saved[name]}, of which the state {path} is, found {found[name]}; build the same, "
                "or choose another folder"
            )


def _check_parameters(path: Path, saved: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    lines = [f"{name}: expected {saved[name]}, not trained here" for name in saved.keys() - found.keys()]
    lines += [f"{name}: trained here, not in the state" for name in found.keys() - saved.keys()]
    lines += [
        f"{name}: expected {saved[name]}, found {found[name]}"
        for name in saved.keys() & found.keys()
        if saved[name] != found[name]
    ]
    if lines:
        shown = "; ".join(sorted(lines)[:SHOWN]) + (f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else "")
        raise ConfigError(
            f"the state {path} is of other trainable parameters: {shown}. Build the model with the same adapters and "
            "dtype, or choose another folder"
        )


# Files. ---------------------------------------------------------------------------------------------------------------


def _dump(value: Any, what: str) -> bytes:
    """`value` as a file that is read without running code. Raises `ConfigError` if it has anything but plain values."""
    stream = io.BytesIO()
    try:
        torch.save(value, stream)
        _read(io.BytesIO(stream.getvalue()))
    except Exception as error:  # whatever pickle raises
        raise ConfigError(
            f"expected {what} to be plain values, tensors, and arrays of NumPy, so that they are read again without "
            f"running code: {error}"
        ) from error
    return stream.getvalue()


def _read(file: Any) -> Any:
    kinds = {type(np.dtype(kind)) for kind in (*np.typecodes["AllInteger"], *np.typecodes["AllFloat"], "?")}
    # Functions that make an array, and a number, of NumPy, which has moved them.
    makers = (np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0])
    plain: Any = [np.ndarray, np.dtype, *kinds, *makers]
    with torch.serialization.safe_globals(plain):
        return torch.load(file, map_location="cpu", weights_only=True)


def _write_files(folder: Path, ranks: Ranks, of_rank: bytes, shared: Mapping[str, Any]) -> dict[str, list[int]]:
    """Write this rank's own file, and on rank 0 the shared one; size and checksum by name of all it has written."""
    names = [OF_RANK.format(ranks.rank), *(file.name for file in folder.glob(f"__{ranks.rank}_*"))]
    try:
        (folder / names[0]).write_bytes(of_rank)
        sync(folder / names[0])
        if ranks.rank == 0:
            (folder / SHARED).write_bytes(_dump(shared, "the scheduler and options of the optimizer"))
            names += [SHARED, ".metadata"]
        return {name: [(folder / name).stat().st_size, checksum(folder / name)] for name in names}
    except OSError as error:
        raise StateError(
            f"a training state cannot be written to {folder}: {error}. Earlier states are as they were; make room, or "
            "choose another folder",
            path=folder,
        ) from error


def _choose(directory: Path, ranks: Ranks, device: torch.device) -> Path | None:
    """The newest whole state; None if there is none at all. Raises `StateError` if there are, and none is whole."""
    with everyone(ranks, device=device):
        names = [state.name for state in states(hold(directory, create=False).path)] if ranks.rank == 0 else []
    wrong: list[str] = []
    for name in gather_objects(names)[0]:
        with everyone(ranks, device=device):
            reason = why_not_whole(directory / name, part=ranks.rank, parts=ranks.world_size)
        reasons = [each for each in gather_objects(reason) if each]
        if not reasons:
            if wrong and ranks.rank == 0:
                warnings.warn(f"{name} is loaded, since later states are not whole: {'; '.join(wrong)}", stacklevel=4)
            return directory / name
        wrong.append(f"{name}: {reasons[0]}")
    if wrong:
        raise StateError(
            f"none of the {len(wrong)} states in {directory} is whole: {'; '.join(wrong)}. Restore one from a copy, or "
            "choose another folder to begin anew",
            path=directory,
        )
    return None


def _found(path: Path, manifest: Mapping[str, Any], mine: Mapping[str, Any], ranks: list[Any]) -> TrainingState:
    """The state as this rank is given it. ranks: the files of all ranks that have saved, or this one's alone."""
    positions = tuple(each["position"] for each in ranks)
    extra = {
        name: value
        for name, value in mine["extra"].items()
        if all(_equal(each["extra"][name], value) for each in ranks)
    }
    return TrainingState(
        step=manifest["step"],
        path=path,
        world_size=manifest["world_size"],
        position=mine["position"] if all(_equal(each, mine["position"]) for each in positions) else None,
        positions=positions,
        extra=extra,
    )


def _check_stateful(found: TrainingState, targets: Mapping[str, Any]) -> list[tuple[Stateful, Any]]:
    """`(target, its state)` of everything that is to be given what was saved. Raises `ConfigError` if there is none."""
    restored = []
    for name, target in targets.items():
        if target is None:
            continue
        if not isinstance(target, Stateful):
            raise ConfigError(
                f"{name}: expected what has a state_dict and a load_state_dict, found {type(target).__name__}; plain "
                "values are returned, so leave it out"
            )
        state = found.position if name == "position" else found.extra.get(name)
        if state is None:
            raise ConfigError(
                f"{name}: {found.path} has none, or it differs over the {found.world_size} ranks that have saved it, "
                "and there are others now: leave it out, and set it from what is returned"
            )
        restored.append((target, state))
    return restored


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray) else bool(one == other)


# Random numbers. ------------------------------------------------------------------------------------------------------


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,  # type: ignore[no-untyped-call]
    }


def _set_random_state(state: Mapping[str, Any], *, seed: int | None) -> None:
    """Go on with the random numbers of a rank; with others, drawn from these and `seed`, if that is given."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if seed is not None:
        drawn = random.getrandbits(31) ^ seed
        random.seed(drawn)
        np.random.seed(drawn)
        torch.manual_seed(drawn)
