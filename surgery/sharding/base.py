"""The protocol of sharding strategies, and the registry of the strategies that serve each kind of options.

Everything that differs by how ranks share a model is a method of `ShardStrategy`. A new strategy is one file with a
subclass, and one `register` line; nothing else asks which strategy it has to do with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from surgery.comm.environment import compute_device
from surgery.config import Placement, parse_placement
from surgery.errors import ConfigError
from surgery.model.fqn import clean, join
from surgery.model.tree import Site, own_tensors
from surgery.quantizers.base import QuantFormat
from surgery.quantizers.digest import Piece, Place
from surgery.sharding.partition import Grid, Partition, chunk
from surgery.sharding.steps import Steps

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = [
    "READS_WEIGHTS",
    "Devices",
    "Part",
    "ShardStrategy",
    "Span",
    "Trained",
    "Unit",
    "chosen_parameters",
    "device_of",
    "outermost",
    "own_part",
    "register",
    "strategy_for",
    "strategy_of",
]

T = TypeVar("T")

#: Options of LoRA under which adapters read base weights while they run.
READS_WEIGHTS = ("use_dora", "trainable_token_indices")


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The devices of a rank: the one that computes, and the one that keeps what is loaded until the model takes it.

    compute: where weights are quantized, and where every quantization state lives, on every rank.
    data: where weights, packed or not, wait; `meta` on a rank that keeps none.
    """

    compute: torch.device
    data: torch.device

    @property
    def keeps_data(self) -> bool:
        """Whether this rank holds weights at all."""
        return self.data.type != "meta"


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A rank's part of a tensor between uses: `data`, contiguous, from element `start` of the whole of `shape`.

    group: the ranks that hold the whole among them, each element once; None where this rank holds all of it.
    """

    data: torch.Tensor
    start: int = 0
    shape: torch.Size
    group: dist.ProcessGroup | None = None

    @property
    def piece(self) -> Piece:
        """The part as bytes."""
        return Piece(data=self.data, start=self.start * self.data.element_size())


@dataclass(frozen=True, kw_only=True)
class Span:
    """The elements of a parameter that a rank has in its memory, in row-major order.

    name: plain FQN; of a tied one the first. shape: of the whole parameter. start: the first element. numel: how many;
    0 where this rank has none. offset: elements of the memory before them.
    """

    name: str
    shape: torch.Size
    start: int
    numel: int
    offset: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A trainable parameter as an optimizer has it on this rank.

    parameter: what the optimizer is given: the model's, or a flat one of several. memory: this rank's part of it, and
    of all that an optimizer keeps for each element. spans: the parameters, by plain FQN, that it has elements of.
    """

    parameter: nn.Parameter
    memory: torch.Tensor
    spans: tuple[Span, ...]

    def like(self, memory: torch.Tensor) -> torch.Tensor:
        """`memory`, of this rank's shape, as an optimizer keeps it for this parameter."""
        whole = self.parameter
        if not isinstance(whole, DTensor):
            return memory
        found: torch.Tensor = DTensor.from_local(
            memory, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )
        return found


class ShardStrategy:
    """The way in which the ranks of a job share a model. The defaults are those of a model that every rank holds whole.

    options: what the user chose, such as `surgery.FSDP2(...)`; None for none. placement: where weights wait until the
    model is complete, one of `placements`. device: the kind that ranks compute on, this rank's where there is a job.
    """

    #: What plans and reports call it.
    label: ClassVar[str] = "unsharded"

    #: The placements that it can work with, its default first.
    placements: ClassVar[tuple[Placement, ...]] = ("replicated", "rank0-cpu")

    def __init__(
        self,
        options: Any,
        *,
        world_size: int = 1,
        device: torch.device | None = None,
        placement: Placement | None = None,
    ) -> None:
        self.options = options
        self.world_size = world_size
        self.device = device or torch.device("cpu")
        self.placement = placement or self.placements[0]

    # What it refuses. Each raises `ConfigError` before a weight is read. ---------------------------------------------

    def check(self) -> None:
        """Refuse options, placement, world size and device that cannot work together; needs no process group."""
        if self.placement not in self.placements:
            raise ConfigError(
                f"placement must be {' or '.join(self.placements)} for {self.label}; got {self.placement}: leave it "
                "out, or use another sharding"
            )

    def check_group(self) -> None:
        """Refuse to begin without a process group if there are options."""
        if self.options is not None and not dist.is_initialized():
            raise ConfigError(
                f"shard={type(self.options).__name__}() needs a process group: start with torchrun and call "
                "torch.distributed.init_process_group() first, or pass shard=None for a single process"
            )

    def check_format(self, quant: QuantFormat, *, adapted: bool) -> None:
        """Refuse packed storage that cannot be sharded so. adapted: whether the model will have adapters."""

    def check_adapters(self, lora: LoraConfig) -> None:
        """Refuse options of adapters that cannot be built or trained in this sharding."""

    def check_added(self, lora: LoraConfig) -> None:
        """Refuse adapters that cannot be added to a model that is sharded so; frozen in `inference_mode`."""

    def check_ties(self, tied: Mapping[str, tuple[str, ...]]) -> None:
        """Refuse tied parameters that cannot be kept tied; `tied` is first FQN -> aliases, of the whole model."""

    def check_model(self, model: nn.Module, quant: QuantFormat) -> frozenset[str]:
        """FQNs of the parameters of `model` that will be whole on every rank though the model is sharded.

        `model` is on meta, its modules are replaced, and it is not adapted yet. Refuses what cannot be sharded.
        """
        return frozenset()

    def check_adapted(self, adapted: nn.Module, blocks: Sequence[Site], unsharded: set[nn.Parameter]) -> None:
        """Refuse adapters that cannot be sharded; `adapted` is a copy on meta, `blocks` its decoder blocks."""

    @property
    def holds_whole(self) -> bool:
        """Whether every rank has whole weights once they are loaded, before the model is sharded."""
        return self.placement == "replicated"

    # Who reads and who keeps what. -----------------------------------------------------------------------------------

    @cached_property
    def partition(self) -> Partition:
        """The rows that each rank reads, and keeps, while the model is loaded."""
        return Partition(grid=Grid(replicas=self.world_size))

    @cached_property
    def at_rest(self) -> Grid:
        """The ranks that parameters are divided over once the model is complete."""
        return Grid(replicas=self.world_size)

    def devices(self, rank: int) -> Devices:
        """The devices of `rank`."""
        return Devices(compute=self.device, data=self.device)

    def adapter_rows(self, rank: int, rows: int) -> range:
        """The rows that `rank` keeps of an adapter's `rows` while values are drawn."""
        return range(rows)

    def adapter_device(self, rank: int) -> torch.device:
        """The device on which `rank` keeps the values drawn for adapters until the model is complete."""
        return torch.device("cpu")

    # Building. -------------------------------------------------------------------------------------------------------

    #: Whether the model is sharded while it is on meta, so that no rank ever holds more than its shard.
    shards_on_meta: bool = False

    def meet(self) -> None:
        """Set up what takes a collective, such as a mesh; called on all ranks alike, before loading begins."""

    @property
    def replicas(self) -> dist.ProcessGroup | None:
        """The ranks that keep the same shards as this one; None where that is all ranks, or this one alone."""
        return None

    def shard_on_meta(self, model: nn.Module, quant: QuantFormat) -> nn.Module:
        """`model`, sharded before it is filled. Not collective. Called if `shards_on_meta`."""
        return model

    def finish(self, model: nn.Module, quant: QuantFormat) -> nn.Module:
        """The filled `model`, sharded if it is not yet, its adapters the same on all ranks; collective."""
        raise NotImplementedError

    #: Patches that `finish` needs, beside those of the format; undone when it returns.
    build_patches: tuple[str, ...] = ()

    #: Patches that a model with packed weights needs in order to run, on its quantized layers.
    resident_patches: tuple[str, ...] = ()

    # A model that exists. --------------------------------------------------------------------------------------------

    @classmethod
    def made(cls, model: nn.Module) -> bool:
        """Whether `model` is sharded by this strategy; the methods from here on serve a model for which it is."""
        return False

    def shards(self, model: nn.Module, places: Iterable[Place]) -> dict[Place, Part]:
        """This rank's parts of the parameters at `places`; not to be called between a forward and its backward."""
        return {(layer, name): own_part(layer.get_parameter(name)) for layer, name in places}

    #: Whether ranks that hold the same part of a parameter hold the same values of it; if not, rank 0's count.
    ranks_agree: bool = True

    def held(self, model: nn.Module) -> dict[tuple[nn.Module, str], Part]:
        """This rank's part of every parameter and persistent buffer, by module and name; of a settled model.

        In the same order on all ranks. What is tied is one object.
        """
        made: dict[int, Part] = {}
        found = {}
        for module in model.modules():
            for leaf, tensor in own_tensors(module):
                if id(tensor) not in made:
                    made[id(tensor)] = own_part(tensor)
                found[module, leaf] = made[id(tensor)]
        return found

    def parameter_names(self, model: nn.Module) -> set[str]:
        """The plain FQNs of all parameters."""
        return {clean(name) for name, _ in model.named_parameters(remove_duplicate=False)}

    def settle(self, model: nn.Module) -> None:
        """Free what is still gathered, as after an evaluation, so that parameters of `model` are those at rest.

        What was written to gathered ones, or set on them, would be lost. Not to be called between a forward and its
        backward.
        """

    def parts(self, model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, Part]:
        """This rank's part, to be written to, of every parameter whose plain FQN is `wanted`; of a settled model.

        One that is tied has each of its names.
        """
        by_module: dict[nn.Module, dict[str, Part]] = defaultdict(dict)
        for (module, leaf), part in self.held(model).items():
            if leaf not in module._buffers:
                by_module[module][leaf] = part
        return {
            name: part
            for prefix, module in model.named_modules(remove_duplicate=False)
            for leaf, part in by_module[module].items()
            if wanted(name := clean(join(prefix, leaf)))
        }

    def trainable_state(self, model: nn.Module, also: frozenset[str] = frozenset()) -> dict[str, torch.Tensor]:
        """Whole trainable parameters by plain FQN, on rank 0's CPU; empty on the others. Collective.

        One that is tied has each of its names. also: plain FQNs of parameters that are not trainable.
        """
        raise NotImplementedError

    def trained(self, model: nn.Module) -> list[Trained]:
        """The trainable parameters as an optimizer has them on this rank, not gathered; each once, also if it is tied.

        Not collective, and not to be called between a forward and its backward. Parameters on all ranks have the same
        names, whether a rank has elements of them or not.
        """
        named = model.named_parameters()
        return [_trained(clean(name), parameter) for name, parameter in named if parameter.requires_grad]

    def steps(self, model: nn.Module) -> Steps:
        """The training steps of `model`, for CUDA graphs."""
        return Steps(model, refused=f"graphs of a step with {self.label} are not known to be right")

    # The memory plan. ------------------------------------------------------------------------------------------------

    #: Whether shards wait on the CPU between uses.
    cpu_offload: bool = False

    #: Whether steps can be recorded as CUDA graphs.
    records_steps: ClassVar[bool] = False

    def gathered_at_loss(self, units: Sequence[Unit]) -> int:
        """Bytes that are unsharded on a rank when the loss is computed."""
        return 0

    def gathered_in_backward(self, units: Sequence[Unit]) -> int:
        """Bytes of weights that are unsharded on a rank in backward through the largest block."""
        return 0

    def finishing_peaks(self, units: Sequence[Unit], *, unsharded: int, rank: int) -> Iterable[tuple[int, int]]:
        """`(host, device)`: bytes of weights at each moment of `finish` on `rank`; device where ranks compute.

        units: in the order in which they are sharded. unsharded: bytes of parameters that stay whole.
        """
        return ()


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Parameters that a strategy gathers together: bytes when whole, of frozen weights and of adapters.

    kind: `block`, `embedding`, `tail` (the last norm and the head) or `root` (the rest).
    """

    kind: str
    weights: int
    adapters: int

    @property
    def whole(self) -> int:
        """Bytes of both."""
        return self.weights + self.adapters


def outermost(model: nn.Module, kind: type[T]) -> T | None:
    """The first module of `model`, itself included, that is of the class `kind`; None if there is none."""
    return next((module for module in model.modules() if isinstance(module, kind)), None)


def chosen_parameters(model: nn.Module, also: frozenset[str]) -> dict[str, nn.Parameter]:
    """Trainable parameters of `model` by each of their plain FQNs, and those of the plain FQNs `also`."""
    named = ((clean(name), parameter) for name, parameter in model.named_parameters(remove_duplicate=False))
    return {name: parameter for name, parameter in named if parameter.requires_grad or name in also}


def own_part(whole: torch.Tensor) -> Part:
    """This rank's part of a tensor that is whole, or a `DTensor`."""
    if not isinstance(whole, DTensor):
        return Part(data=whole.detach(), shape=whole.shape)
    mesh, local = whole.device_mesh, whole.to_local().detach()
    sharded = [number for number, placement in enumerate(whole.placements) if not placement.is_replicate()]
    if not sharded:
        return Part(data=local, shape=whole.shape)
    if len(sharded) > 1 or not whole.placements[sharded[0]].is_shard(0):
        raise ConfigError(
            f"expected parameters to be sharded along dimension 0, over one dimension of a mesh, found "
            f"{whole.placements}: shard the model with surgery.FSDP1 or surgery.FSDP2"
        )
    rows = chunk(range(whole.shape[0]), mesh.size(sharded[0]), mesh.get_local_rank(sharded[0]))
    start = rows.start * whole.shape[1:].numel()
    return Part(data=local, start=start, shape=whole.shape, group=mesh.get_group(sharded[0]))


def _trained(name: str, parameter: nn.Parameter) -> Trained:
    part = own_part(parameter)
    span = Span(name=name, shape=part.shape, start=part.start, numel=part.data.numel())
    return Trained(parameter=parameter, memory=part.data, spans=(span,))


_STRATEGIES: dict[type, type[ShardStrategy]] = {}


def register(options: type, strategy: type[ShardStrategy]) -> None:
    """Have `strategy` serve every `shard=` of the class `options`."""
    _STRATEGIES[options] = strategy


def strategy_for(
    options: Any, *, world_size: int = 1, device: torch.device | None = None, placement: str | None = None
) -> ShardStrategy:
    """The strategy that serves `options`; raises `ConfigError` if none does, or a placement that there is not."""
    kind = _STRATEGIES.get(type(options))
    if kind is None:
        known = ", ".join(each.__name__ for each in _STRATEGIES if each is not type(None))
        raise ConfigError(
            f"shard: expected None or one of {known}; got {options!r:.80}. A strategy of your own is known once a "
            "module is imported that calls surgery.sharding.base.register for it"
        )
    wanted = None if placement is None else parse_placement(placement)
    return kind(options, world_size=world_size, device=device, placement=wanted)


def strategy_of(model: nn.Module) -> ShardStrategy:
    """The strategy by which `model` is sharded, as found in its modules; it has no options."""
    kind = next((kind for kind in _STRATEGIES.values() if kind.made(model)), _STRATEGIES[type(None)])
    return kind(None, device=device_of(model))


def device_of(model: nn.Module) -> torch.device:
    """The device that ranks compute on, and meet on, with `model`; its shards may wait on the CPU."""
    first: Any = next(model.parameters(), None)
    if isinstance(first, DTensor):
        return compute_device(torch.device(first.device_mesh.device_type))
    if first is None or first.is_meta:
        return compute_device()
    named = (getattr(module, "compute_device", None) for module in model.modules())  # of FSDP1's
    return next((found for found in named if isinstance(found, torch.device)), first.device)
