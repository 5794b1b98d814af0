"""Bind, then fill: a model on meta gets its place in a checkpoint first, and its weights in its final shape."""

from __future__ import annotations

import copy
import functools
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import model_surgery_patches as patches
from surgery.adapters.attach import needs_weights, patches_of_experts
from surgery.adapters.derived import is_blank
from surgery.adapters.folder import make_room
from surgery.adapters.load import fill_waiting
from surgery.adapters.metadata import name_base
from surgery.checkpoint import Checkpoint
from surgery.comm.background import return_freed_memory, undisturbed
from surgery.comm.comparison import facts_of, same_on_every_rank
from surgery.comm.environment import Node, compute_device, launched_world_size
from surgery.comm.failures import collective, everyone
from surgery.comm.heartbeat import beating
from surgery.comm.ranks import Ranks, broadcast_from_rank0, current_ranks, rank0_rng_state
from surgery.config import Quant
from surgery.errors import ConfigError, ShadowedPatchesWarning
from surgery.model.consistency import adapter_facts, environment, same_model, source_facts
from surgery.model.fqn import clean
from surgery.model.pretrained import refuse_saving
from surgery.model.skeleton import cast_as_stored, compute_own_buffers, require_meta
from surgery.model.tree import decoder_blocks, tied_parameters
from surgery.origin import remember
from surgery.passes.adapt import Adapt
from surgery.passes.base import Pass, find_passes, placed
from surgery.passes.derive import Await, Derive
from surgery.passes.exchange import Exchange
from surgery.passes.install import Install
from surgery.passes.lifetime import (
    UNDER_WRAPPERS,
    around,
    as_context_manager,
    is_waiting,
    keep,
    make_up_for,
    stop_waiting,
    wait,
    written_on_meta,
)
from surgery.passes.loading import Job, Loading, loading
from surgery.passes.pipeline import Pipeline
from surgery.passes.prepare import Prepared, check_magnitudes, match
from surgery.passes.quantize import Quantize
from surgery.passes.read import Read, ReadAhead
from surgery.passes.record import Record
from surgery.passes.relocate import Relocate
from surgery.passes.setting import Setting
from surgery.passes.shard import Finish, ShardOnMeta
from surgery.planning.inventory import take_inventory
from surgery.planning.plan import make_plan
from surgery.planning.verdict import check_fits, free_memory, predictions
from surgery.quantizers.base import quantized_modules
from surgery.quantizers.experts import has_experts
from surgery.sharding.base import strategy_for
from surgery.step.kernels import chosen_kernels, use_kernels
from surgery.telemetry.measurements import group_names, say
from surgery.telemetry.report import Report

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["Bound", "agree", "bind", "bind_alone", "bound_in", "building", "complete", "fill", "foresee", "set_up"]

logger = logging.getLogger("surgery")

#: Patches of libraries that a filled model may be handed to.
HANDED_ON = (
    "accelerate.adapter-state",
    "accelerate.already-sharded",
    "accelerate.no-second-wrapper",
    UNDER_WRAPPERS,
    "peft.adapters-of-sharded",
)


@dataclass(kw_only=True, eq=False)
class Bound:
    """A model on meta, every parameter of which has its place in a checkpoint. Nothing is read yet.

    Until `fill` it may be adapted by PEFT, cast (packed weights apart), tied, and wrapped in activation checkpointing.
    Used too early, it raises `NotFilledError`.
    """

    model: nn.Module
    checkpoint: Checkpoint = field(repr=False)
    report: Report = field(repr=False)
    _prepared: Prepared = field(repr=False)
    _is_compared: bool = field(default=True, repr=False)
    _spent: bool = field(default=False, init=False, repr=False)

    def fill(
        self,
        model: nn.Module | None = None,
        *,
        shard: Any = None,
        placement: str | None = None,
        passes: Sequence[Pass | str] = (),
        device: torch.device | None = None,
        kernels: str | Sequence[str] | None = None,
    ) -> nn.Module:
        """Read, quantize and install what this rank owns; to be called on all ranks alike.

        Returns `model`, or what wraps it under FSDP1 and DDP. Parameters keep the dtype and `requires_grad` that they
        have by then. Resident patches are in force until `surgery.release(model)`, the end of `with bound.fill() as
        model:`, or its collection.

        Args:
            model: the outermost module around the bound one, such as a `PeftModel`; None is the bound one.
            shard: as in `surgery.qlora`, like `placement` and `passes`.
            placement: where weights wait until the model is complete.
            passes: third parties' passes.
            device: on which this rank computes; None is the one that it was bound for.
            kernels: as in `surgery.qlora`; None are those that it was bound with.

        Raises:
            ConfigError: options or adapters that cannot work together, or a model that is filled already.
            PassError: a pass failed; names the pass and the FQN.
            PeerError: it did on another rank.
        """
        outer = self.model if model is None else model
        bound = self._prepared.setting
        device = bound.device if device is None else compute_device(device)
        asked = {each.name: getattr(bound, each.name) for each in fields(bound)} | {"device": device}
        with building(device) as ranks:
            with everyone(ranks, device=device):
                self._check(outer)
                asked |= {"shard": shard, "placement": placement, "lora": _lora_of(outer)}
                asked |= {} if kernels is None else {"kernels": kernels}
            setting, found = agree(ranks, "fill", passes, **asked)
            job = set_up(setting, ranks)
            with everyone(ranks, device=device):
                if not self._is_compared:
                    same_model(ranks, self.model, self.checkpoint)
                setting.strategy.check_ties(tied_parameters(self.model))
                unsharded = setting.strategy.check_model(self.model, setting.format)
                whole = {p for name, p in self.model.named_parameters() if name in unsharded}
                setting.strategy.check_adapted(outer, decoder_blocks(outer), whole)
                trained = {n: p for n, p in outer.named_parameters() if p.requires_grad and not p.is_meta}
                blank = [clean(name) for name, parameter in self.model.named_parameters() if is_blank(parameter)]
                check_magnitudes(self.model, setting, blank)
                facts = {clean(name): f"{p.dtype} {tuple(p.shape)}" for name, p in trained.items()}
                same_on_every_rank(ranks, "trained", {"trained parameters": facts})
                stop_waiting(self.model)
            # Each rank has drawn the values of its adapters by itself.
            if ranks.world_size > 1:
                broadcast_from_rank0(trained.values(), device=device)
            prepared = replace(self._prepared, setting=setting, unsharded=unsharded)
            untouched = [parameter for parameter in self.model.parameters() if parameter.is_meta]
            try:
                model = complete(prepared, outer, self.checkpoint, job, self.report, passes=found)
            except BaseException:
                self._spent = not set(untouched) <= set(self.model.parameters())
                wait(self.model)  # so that nobody computes with half a model
                raise
            fill_waiting(model, ranks)
            if self._is_compared:
                name_base(model, self.checkpoint)
            make_up_for(self.model)
            return model

    def __deepcopy__(self, memo: dict[int, Any]) -> Bound:
        """The `Bound` of a copy of the model: the same places in the same checkpoint."""
        for target in self._prepared.targets:
            memo[id(target.assignment)] = target.assignment
        model = copy.deepcopy(self.model, memo)
        targets = copy.deepcopy(self._prepared.targets, memo)
        report = Report(show_progress=self.report.show_progress, device=self.report.device)
        return replace(
            self, model=model, report=report, _prepared=replace(self._prepared, model=model, targets=targets)
        )

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of the checkpoint that nothing is made of."""
        return self._prepared.ignored

    def _check(self, outer: nn.Module) -> None:
        """Refuse to fill what is filled, what an earlier fill has changed, and what is not around the bound model."""
        if not is_waiting(self.model):
            raise ConfigError("fill: expected a model that waits for its weights, found one that is filled already")
        if self._spent:
            raise ConfigError("fill: an earlier fill() has sharded or filled a part of it: build and bind it anew")
        if all(module is not self.model for module in outer.modules()):
            raise ConfigError(
                f"fill: expected a module around the bound model, found a {type(outer).__name__} without it"
            )
        changed = [*written_on_meta(self.model), *self._replaced()]
        if changed:
            raise ConfigError(
                f"fill: {', '.join(changed[:4])} ({len(changed)} in all) got values before the model had its weights, "
                "which filling would overwrite: change them after it is filled, or load the model outside of "
                "surgery.low_memory()"
            )

    def _replaced(self) -> Iterator[str]:
        """FQNs of parameters in the place of which somebody has put real ones."""
        for target in self._prepared.targets:
            held = [module._parameters.get(leaf) for module, leaf in target.places]
            if any(parameter is not None and not parameter.is_meta for parameter in held):
                yield target.fqn


def bind(
    model: nn.Module,
    checkpoint: Checkpoint | str | os.PathLike[str],
    *,
    quant: Any = Quant(),  # noqa: B008  # frozen
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    report: Report | None = None,
) -> Bound:
    """Give every parameter of `model`, which is on meta, its place in `checkpoint`; to be called on all ranks alike.

    Linear modules are replaced by quantized ones, on meta, in place. Nothing is read.

    Args:
        model: any module with parameters on meta and the checkpoint's names, or a model of transformers, for which
            names are converted by its own tables. Buffers that no checkpoint holds are real, or computed by
            transformers.
        checkpoint: an open checkpoint, a folder, a safetensors file, or a hub id.
        quant: as in `surgery.qlora`; None leaves weights in 16 bits.
        dtype: of the model; None is that of its first floating-point parameter.
        compute_dtype: in which quantized linear layers multiply; None means `dtype`, in which experts always do.
        device: on which this rank computes; None means its accelerator, or the CPU.
        report: filled with seconds and memory peaks per phase; None makes one that shows progress on rank 0.

    Raises:
        ConfigError: a parameter is not on meta, or options that cannot work together.
        CheckpointError: a checkpoint that is broken, or not of this model.
    """
    device = compute_device(device)
    dtype = dtype or _dtype_of(model)
    with building(device) as ranks:
        asked = {"quant": quant, "shard": None, "lora": None, "placement": None, "device": device}
        asked |= {"dtype": dtype, "compute_dtype": compute_dtype or dtype}
        setting, _ = agree(ranks, "bind", (), checkpoint, **asked)
        report = report or Report(show_progress=ranks.rank == 0, device=device)
        with everyone(ranks, device=device), undisturbed(device):
            if is_waiting(model):
                raise ConfigError("bind: this model is bound already: call fill() of what bind() returned")
            require_meta(model)
            if torch.get_default_device().type == "meta":
                raise ConfigError("bind: called in a block of torch.device('meta'): call it behind the block")
            opened = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
            compute_own_buffers(model, device)
            with report.phase("bind"):
                prepared = match(model, opened, setting, ranks=ranks, device=device)
    wait(prepared.model)
    return Bound(model=prepared.model, checkpoint=opened, report=report, _prepared=prepared)


def bind_alone(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    quant: Any,
    dtype: torch.dtype,
    compute_dtype: torch.dtype | None,
    conversions: Sequence[Any],
    kernels: tuple[str, ...] = (),
) -> Bound:
    """Bind a transformers `model` that `from_pretrained` has built on meta, its quantized modules among it.

    Not collective, since there may be no process group yet: ranks compare what they have bound when they fill it.
    Buffers that no checkpoint holds are left to transformers. The model does not `wait` yet, since transformers uses it
    until it is done. conversions: names of `checkpoint` into the model's. kernels: for when it is filled.
    Raises `SurgeryError` for what cannot be bound; the model can then be loaded as transformers does.
    """
    device = compute_device()
    is_marked = bool(quantized_modules(model))  # by upstream, which has made them
    setting = Setting(
        # Some models have linear layers of a class of their own.
        quant=quant if is_marked or (getattr(quant, "experts", False) and has_experts(model)) else None,
        shard=None,
        lora=None,
        placement=None,
        dtype=dtype,
        compute_dtype=compute_dtype or dtype,
        device=device,
        kernels=kernels,
    )
    require_meta(model)
    # Of itself transformers ties only what is loaded, and casts while it loads.
    model.tie_weights(recompute_mapping=False)  # type: ignore[operator]  # a method of every one of its models
    cast_as_stored(model, dtype)
    prepared = match(model, checkpoint, setting, ranks=Ranks(), device=device, conversions=conversions, is_chosen=True)
    if quantized_modules(model) and not is_marked:  # experts, whose bytes a cast would change
        setting.format.mark(model)
    report = Report(show_progress=os.environ.get("RANK", "0") == "0", device=device)
    bound = Bound(model=model, checkpoint=checkpoint, report=report, _prepared=prepared, _is_compared=False)
    vars(model)[BOUND] = bound
    return bound


#: Where a model that was bound while it was loaded has its `Bound` until it is filled; a copy has a copy of it.
BOUND = "_surgery_bound"

#: Where one that could not be bound in `low_memory` has the reason, until ranks have compared how they loaded theirs.
LOADED = "_surgery_loaded"


def bound_in(model: nn.Module) -> Bound | None:
    """The `Bound` of the model in `model`, itself included, that was bound while it was loaded; None once filled."""
    return next((vars(module)[BOUND] for module in model.modules() if BOUND in vars(module)), None)


def fill(
    model: nn.Module, *, shard: Any = None, placement: str | None = None, device: torch.device | None = None
) -> nn.Module:
    """Fill a model that was bound while it was loaded in `surgery.low_memory()`; to be called on all ranks alike.

    What accelerate and trainers that use it do by themselves, for a loop of your own. `model` is the bound model, or
    what is around it, such as a `PeftModel`. Options, result and errors are those of `Bound.fill`.
    """
    bound = bound_in(model)
    why = next((vars(module)[LOADED] for module in model.modules() if LOADED in vars(module)), None)
    if why is not None:
        raise ConfigError(f"fill: this model has its weights already, since it could not be bound: {why}")
    if bound is None:
        raise ConfigError(
            f"fill: expected a model that waits for its weights, found a {type(model).__name__} that does not: load it "
            "by from_pretrained in a block of `with surgery.low_memory():`, and fill it once"
        )
    filled = bound.fill(model, shard=shard, placement=placement, device=device)
    del vars(bound.model)[BOUND]
    return filled


@functools.cache
def _warn_of_other_patches() -> None:
    """Warn, once, if `import patches` in this program leads to something else than the registry."""
    other = getattr(patches, "__shadowed_by__", None)
    if other is not None:
        warnings.warn(
            f"`import patches` leads to {other} here, and not to the registry of patches that surgery uses, which is "
            f"{patches.__file__}: rename the former, or get the latter by `import model_surgery_patches as patches`",
            ShadowedPatchesWarning,
            stacklevel=2,
        )


@contextmanager
def building(device: torch.device) -> Iterator[Ranks]:
    """A block in which the ranks of this job build a model together; where one fails, all do."""
    _warn_of_other_patches()
    ranks = current_ranks(launched_world_size())
    with (
        beating(ranks),
        collective(ranks),
        patches.transaction("torch.meta-param-replacement", reason="a quantized model is built partly on meta"),
        undisturbed(device),
    ):
        yield ranks


def agree(
    ranks: Ranks,
    name: str,
    passes: Sequence[Pass | str],
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    **asked: Any,
) -> tuple[Setting, tuple[Pass, ...]]:
    """The setting of what is `asked`, and the passes, once all ranks are found to ask for the same; collective.

    name: of this comparison. Raises `ConfigError` for what cannot work together, and where ranks differ.
    """
    device, shard = asked["device"], asked["shard"]
    given = passes if isinstance(passes, (list, tuple)) else [passes]  # which is refused below
    with everyone(ranks, device=device):
        placement = strategy_for(shard, placement=asked["placement"]).placement
        asked["kernels"] = chosen_kernels(asked.get("kernels"), device=device)
        topics = {
            "quantization": facts_of(asked["quant"]),
            "adapters": adapter_facts(asked["lora"]),
            "sharding": facts_of({"placement": placement, "shard": shard}),
            "precision": facts_of({each: asked[each] for each in ("dtype", "compute_dtype")}),
            "kernels": facts_of(asked["kernels"]),
            "passes": facts_of([(getattr(each, "name", each), each) for each in given]),
            **({} if checkpoint is None else {"checkpoint": source_facts(checkpoint)}),
            **environment(device),
        }
    same_on_every_rank(ranks, name, topics, device=device)
    with everyone(ranks, device=device):  # what is installed may differ
        setting = Setting(**{**asked, "world_size": ranks.world_size})
        return setting, find_passes(passes, adapted=setting.lora is not None)


def set_up(setting: Setting, ranks: Ranks) -> Job:
    """Check the process group, and set up meshes and groups, before ranks go their own ways; collective."""
    setting.strategy.check_group()
    setting.strategy.meet()
    return Job(ranks=ranks, node=Node.of(ranks.rank, ranks.world_size), rng_state=rank0_rng_state(ranks))


def foresee(prepared: Prepared, checkpoint: Checkpoint, ranks: Ranks, report: Report) -> None:
    """Note what the memory plan expects of loading, and reserve the disk that an adapter will need.

    Raises `ConfigError` for what cannot fit this rank's GPU, or the disk.
    """
    setting, inventory = prepared.setting, take_inventory(prepared)
    make_room(inventory.adapter_elements * setting.dtype.itemsize, base=checkpoint.path)
    plan = make_plan(inventory, setting, training=None)
    host, device = predictions(plan, ranks.rank)["load"]
    report.predict("load", host=host, device=device)
    report.note("ignored", prepared.ignored)
    report.note("initialized", prepared.initialized)
    report.left_out = group_names(prepared.left_out)
    if prepared.left_out and ranks.rank == 0:
        warnings.warn(say("left_out", report.left_out), stacklevel=3)
    report.note("read_once_per_node", plan.read_once_per_node)
    if setting.device.type == "cuda":
        check_fits(plan, free_memory(setting.device))


def complete(
    prepared: Prepared,
    model: nn.Module,
    checkpoint: Checkpoint,
    job: Job,
    report: Report,
    *,
    lora: LoraConfig | None = None,
    passes: Sequence[Pass] = (),
) -> nn.Module:
    """`model`, which holds the prepared one, complete: adapted by `lora`, filled, sharded, its patches resident."""
    setting = prepared.setting
    with loading(checkpoint, prepared.targets, setting, job, report, watchers=passes) as shared:
        model = Pipeline(passes=tuple(_in_order(shared, lora, passes)), loading=shared).run(model)
    remember(prepared, checkpoint)
    return_freed_memory()
    if setting.on_cpu:
        report.note("misread", setting.format.misread(model))
    layers = quantized_modules(model)
    used = [each for each in setting.formats if any(map(each.is_quantized, layers))]
    if not all(each.is_saved_upstream for each in used):
        refuse_saving(model)
    needed = [name for each in used for name in each.resident_patches]
    needed += setting.strategy.resident_patches if layers else ()
    with patches.transaction(*needed, on=layers, reason="a model that is built runs and trains") as resident:
        resident.apply(*(name for each in used for name in each.lookup_patches))
        _hand_on(model, resident)
        keep(model, resident.receipts)
        as_context_manager(model)
        use_kernels(model, setting.kernels)
        # Last: an interrupt before this undoes them with the transaction; after it they are the model's.
        resident.commit()
    return model


def _hand_on(model: nn.Module, resident: patches.Transaction) -> None:
    """Apply `HANDED_ON`, and what adapters of experts need, for `model`.

    It trains without those that do not fit what is installed, which are told.
    """
    left_out, wanted = {}, HANDED_ON + patches_of_experts(model)
    for each in wanted:
        try:
            with resident.savepoint():
                resident.apply(patches.on(each, around(model)))
        except patches.PatchError as error:
            left_out[each] = str(error)
    others = (receipt for receipt in resident.skipped if receipt.id in wanted)
    left_out |= {receipt.id: receipt.verdict.why for receipt in others if str(receipt.verdict) != "obsolete"}
    if left_out:
        why = "; ".join(f"{each} ({reason})" for each, reason in left_out.items())
        logger.warning("surgery: a %s goes without patches for what it may be handed to: %s", type(model).__name__, why)


def _in_order(shared: Loading, lora: LoraConfig | None, passes: Sequence[Pass]) -> Iterator[Pass]:
    """All passes of a fill. Weights are read ahead as soon as no pass can change any more what is to be read."""
    strategy = shared.setting.strategy
    early = lora is not None and not (strategy.holds_whole and needs_weights(lora))
    adapt = [] if lora is None else [Adapt(loading=shared, lora=lora), *placed(passes, "adapt")]
    quantize = Quantize(loading=shared)
    yield from placed(passes, "replace")
    yield from placed(passes, "adapt") if lora is None else ()  # somebody else has adapted it
    if early and len(adapt) > 1:
        yield from adapt
        yield ReadAhead(loading=shared)
    else:
        yield ReadAhead(loading=shared)
        yield from adapt if early else ()
    yield Await(loading=shared)
    if strategy.shards_on_meta:
        yield ShardOnMeta(loading=shared)
    yield Read(loading=shared)
    yield quantize
    yield Exchange(loading=shared, quantize=quantize)
    yield Record(loading=shared)
    yield Derive(loading=shared)
    yield Relocate(loading=shared)
    yield Install(loading=shared)
    yield from adapt if not early else ()
    yield from placed(passes, "install")
    yield Finish(loading=shared)
    yield from placed(passes, "shard")


def _lora_of(model: nn.Module) -> LoraConfig | None:
    """The configuration of the active adapter of `model`, if PEFT has adapted it, to be trained."""
    from peft import PeftModel

    adapted = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    config = None if adapted is None else adapted.active_peft_config
    return None if config is None or config.inference_mode else config


def _dtype_of(model: nn.Module) -> torch.dtype:
    found = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if found is None:
        raise ConfigError(f"bind: {type(model).__name__} has no floating-point parameter: give dtype=")
    return found
