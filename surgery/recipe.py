"""QLoRA as data: which passes, which patches, in which order; opens the transaction."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

import patches
from surgery.adapters.base_model import name_base
from surgery.adapters.deferred import DeferredValues
from surgery.adapters.folder import make_room
from surgery.adapters.options import check_adapter
from surgery.adapters.rehearsal import Trained, rehearse
from surgery.checkpoint import Checkpoint
from surgery.comm.background import Staging, return_freed_memory, undisturbed
from surgery.comm.comparison import Facts, facts_of, same_on_every_rank
from surgery.comm.failures import collective, everyone
from surgery.comm.heartbeat import beating
from surgery.comm.nodes import Node
from surgery.comm.ranks import Ranks, broadcast_from_rank0, current_ranks, rank0_rng_state
from surgery.config import FSDP1, FSDP2, Placement, Quant, default_placement, parse_placement
from surgery.errors import ConfigError
from surgery.model.consistency import adapter_facts, environment, same_model, source_facts
from surgery.model.pretrained import is_pretrained, mark_quantized
from surgery.model.skeleton import Skeleton, causal_lm
from surgery.model.tree import Site, tied_parameters
from surgery.model.weights import plan_weights
from surgery.passes.adapt import Adapt, convert, draws_later, needs_weights
from surgery.passes.base import Pass, group_into_batches
from surgery.passes.buffers import ShardBuffers
from surgery.passes.filling import Filling, Meeting, Source, filling
from surgery.passes.lifetime import as_context_manager, keep
from surgery.passes.pipeline import Pipeline
from surgery.passes.replace import Replace, precisions, quantizable, transposed
from surgery.passes.shard import FullyShard, Wrap, check_dtypes
from surgery.passes.targets import find_targets
from surgery.planning.fitting import check_fits, free_memory, predictions
from surgery.planning.inventory import Inventory, take_inventory
from surgery.planning.plan import make_plan
from surgery.planning.setting import Setting
from surgery.quantizers.bnb import BnbQuantizer, linear4bits
from surgery.quantizers.misread import misread_weights
from surgery.sharding import fsdp2, guards
from surgery.sharding.devices import Devices
from surgery.sharding.partition import Partition
from surgery.telemetry.numbers import whole_number
from surgery.telemetry.report import Report

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = [
    "BUILD_PATCHES",
    "FSDP2_PATCHES",
    "RESIDENT_PATCHES",
    "QLoRA",
    "default_device",
    "launched_world_size",
    "qlora",
]

#: Needed while PEFT and FSDP rebuild the model; undone when `qlora` returns.
BUILD_PATCHES = ("torch.meta-param-replacement",)

#: Needed for the model to run; in force for its layers alone until it is released.
RESIDENT_PATCHES = (
    "bitsandbytes.linear4bit-shape",
    "bitsandbytes.linear4bit-apply",
    "bitsandbytes.no-rewrap",
    "bitsandbytes.keep-packing",
)

#: Needed, beside those, where FSDP2 gathers packed weights.
FSDP2_PATCHES = ("torch.fsdp2-bit-exact-gather",)


def default_device() -> torch.device:
    """This rank's accelerator (`LOCAL_RANK`), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))


def _with_index(device: torch.device) -> torch.device:
    """`cuda` as the GPU that is current in this thread: another thread may have another one."""
    index: int | None = device.index  # which upstream declares to be there always
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and index is None else device


def qlora(
    checkpoint: Checkpoint | str | os.PathLike[str],
    *,
    quant: Quant = Quant(),  # noqa: B008  # frozen
    lora: LoraConfig | None = None,
    placement: Placement | None = None,
    shard: FSDP1 | FSDP2 | None = None,
    dtype: torch.dtype = torch.bfloat16,
    compute_dtype: torch.dtype | None = None,
    model: Callable[[], nn.Module] | None = None,
    device: torch.device | None = None,
    report: Report | None = None,
) -> nn.Module:
    """Build a 4-bit model with LoRA adapters from `checkpoint`, sharded; to be called on all ranks alike.

    Each rank reads a part of every weight, and quantizes it; no other rank reads that part. Under FSDP2 it is the part
    that the rank keeps, and no rank ever holds the whole packed model.

    Nothing of bitsandbytes, PEFT or torch is changed but by patches: those that are needed to build are undone on
    return, those that the model needs to run act on its layers alone, until `surgery.release(model)`, the end of
    `with surgery.qlora(...) as model:`, or its collection.

    Args:
        checkpoint: an open checkpoint, a folder, a safetensors file, or a hub id.
        quant: how linear weights are quantized (https://arxiv.org/abs/2305.14314).
        lora: the adapters; None adds none.
        placement: `sharded` (FSDP2's default) keeps on every rank its shard and nothing else; `rank0-cpu` (FSDP1's)
            keeps weights on rank 0's CPU, and on meta elsewhere, until FSDP1 broadcasts them; `replicated` keeps all of
            them on every rank's device, and is what a model without `shard` has.
        shard: None leaves the model whole.
        dtype: of everything unquantized, adapters too, and of packed storage unless `quant.quant_storage` says other.
            What transformers keeps in float32 in such a model (router gates, say) is in float32.
        compute_dtype: in which 4-bit layers multiply; None means `dtype`.
        model: builds the module whose parameter names match the checkpoint's; None builds the transformers model that
            the checkpoint's config.json describes.
        device: on which this rank computes; None means its accelerator, or the CPU.
        report: filled with seconds and memory peaks per phase; None makes one that shows progress on rank 0.

    Raises:
        ConfigError: options that cannot work together, before anything is read.
        CheckpointError: a checkpoint that is broken, or not of this model, before any weight is read.
        PassError: a pass failed; names the pass and the FQN.
        PeerError: it did on another rank.
    """
    device = _with_index(device or default_device())
    ranks = current_ranks(launched_world_size())
    recipe = QLoRA(
        quant=quant,
        lora=lora,
        placement=parse_placement(placement) if placement is not None else default_placement(shard),
        shard=shard,
        dtype=dtype,
        compute_dtype=compute_dtype or dtype,
        build=model,
        device=device,
        ranks=ranks,
        report=report or Report(show_progress=ranks.rank == 0, device=device),
    )
    return recipe.run(checkpoint)


def launched_world_size() -> int | None:
    """What the launcher promised, if there is one. Raises `ConfigError` for something else than a number."""
    value = os.environ.get("WORLD_SIZE")
    if not value:
        return None
    number = whole_number(value)
    if number is None:
        raise ConfigError(f"expected WORLD_SIZE to be a number, found {value!r:.80}: correct or unset it")
    return number


@dataclass(frozen=True, kw_only=True)
class QLoRA:
    """What `qlora` was asked for, on this rank, with every default filled in."""

    quant: Quant
    lora: LoraConfig | None
    placement: Placement
    shard: FSDP1 | FSDP2 | None
    dtype: torch.dtype
    compute_dtype: torch.dtype
    build: Callable[[], nn.Module] | None
    device: torch.device
    ranks: Ranks
    report: Report

    def check(self) -> None:
        """Refuse what cannot work, as `ConfigError`, before anything is opened."""
        guards.check_world(self.shard, self.placement, self.ranks.world_size)
        guards.check_sharding(self.shard, self.placement, self.ranks.world_size, self.device)
        guards.check_precision(self.quant, self.shard, self.dtype)
        guards.check_units(self.quant, self.lora, self.shard, self.dtype)
        check_adapter(self.lora, self.placement, self.shard, self.ranks.world_size)

    def run(self, checkpoint: Checkpoint | str | os.PathLike[str]) -> nn.Module:
        """The model, built from `checkpoint`, with its resident patches in force."""
        with beating(self.ranks), collective(self.ranks):
            same_on_every_rank(self.ranks, "choices", self._facts(checkpoint), device=self.device)
            self.check()
            meeting = self._meet()
            with everyone(self.ranks, device=self.device):
                model = self._open_and_load(checkpoint, meeting)
            model = self._finish(model, meeting)
        return_freed_memory()
        if self.device.type == "cpu":
            self.report.note_misread(misread_weights(model))
        layers, fsdp2_only = linear4bits(model), FSDP2_PATCHES if isinstance(self.shard, FSDP2) else ()
        with patches.transaction(
            *RESIDENT_PATCHES, *fsdp2_only, on=layers, reason="a 4-bit model runs on these layers"
        ) as resident:
            keep(model, resident.receipts)
            as_context_manager(model)
            # Last: an interrupt before this undoes them with the transaction; after it they are the model's.
            resident.commit()
        return model

    def _facts(self, checkpoint: Checkpoint | str | os.PathLike[str]) -> dict[str, Facts]:
        """What all ranks must have been asked for alike, before they do anything together."""
        return {
            "quantization": facts_of(self.quant),
            "adapters": adapter_facts(self.lora),
            "sharding": facts_of({"placement": self.placement, "shard": self.shard}),
            "precision": facts_of({"dtype": self.dtype, "compute_dtype": self.compute_dtype}),
            "checkpoint": source_facts(checkpoint),
            **environment(self.device),
        }

    def _meet(self) -> Meeting:
        """What takes a collective to set up, before ranks go their own ways."""
        return Meeting(
            ranks=self.ranks,
            node=Node.of(self.ranks.rank, self.ranks.world_size),
            mesh=fsdp2.make_mesh(self.shard, device=self.device) if isinstance(self.shard, FSDP2) else None,
            rng_state=rank0_rng_state(self.ranks),
        )

    def _open_and_load(self, checkpoint: Checkpoint | str | os.PathLike[str], meeting: Meeting) -> nn.Module:
        with self._build_patches(), undisturbed(self.device):
            if not isinstance(checkpoint, Checkpoint):
                # Collective for a hub id, but then it fails on all ranks or on none, so that they meet all the same.
                checkpoint = Checkpoint.open(checkpoint)
            return self._load(checkpoint, meeting)

    def _load(self, checkpoint: Checkpoint, meeting: Meeting) -> nn.Module:
        """The model with all its weights, adapted; with placement `sharded` it is sharded before it is filled."""
        quantizer = BnbQuantizer(quant=self.quant, dtype=self.dtype, compute_dtype=self.compute_dtype)
        model, source = self._prepare(checkpoint, quantizer)
        parts = ShardBuffers(
            quantizer=quantizer, division=self._division, residence=self._residence, rank=self.ranks.rank
        )
        with filling(model, source, parts, meeting, self.report) as fill:
            before, after = self._around_filling(meeting, fill)
            model = self._pipeline(before, Replace.ensures).run(model)
            return_freed_memory()  # of adapters, which are shards now
            fill.into(model)
        model = self._pipeline(after, frozenset({"quantized-modules", "filled"})).run(model)
        name_base(model, checkpoint)
        return model

    def _prepare(self, checkpoint: Checkpoint, quantizer: BnbQuantizer) -> tuple[nn.Module, Source]:
        """The model on meta, with quantized modules, and all that is to be loaded for it.

        Every check that needs no weight is here, before the first is read.
        """
        build = self.build or causal_lm(checkpoint, self.dtype)
        with self.report.phase(Skeleton.name):
            model = Skeleton(build=build, dtype=self.dtype, device=self.device).build_on_meta()
            same_model(self.ranks, model, checkpoint)
            weights = plan_weights(model, checkpoint, device=self.device)
            self.report.note_ignored(weights.ignored)
            self.report.note_initialized(weights.initialized)
            chosen = quantizable(model, self.quant.skip_modules)
            tied = tied_parameters(model)
            guards.check_ties(self.shard, tied, self.ranks.world_size)
            trained = self._rehearse(model, chosen)
        replace = Replace(quantizer=quantizer, skip_modules=self.quant.skip_modules)
        model = self._pipeline((replace,), Skeleton.ensures).run(model)
        if is_pretrained(model):
            mark_quantized(model, self.quant, dtype=self.dtype, compute_dtype=self.compute_dtype)
        unsharded = check_dtypes(model, self.shard, self.dtype)
        targets = find_targets(
            model,
            weights.assignments,
            checkpoint.index,
            quantizer,
            tied=tied,
            transposed=transposed(chosen),
            precisions=precisions(model, chosen, self.dtype),
        )
        inventory = take_inventory(model, targets, trained, unsharded=unsharded)
        make_room(inventory.adapter_elements * self.dtype.itemsize, base=checkpoint.path)
        self._foresee(inventory)
        staging = Staging.on(self.device, run_elements=quantizer.run_elements(self.device))
        layers = group_into_batches(targets, elements=staging.layer_limit(self.ranks.world_size))
        return model, Source(checkpoint=checkpoint, layers=layers, staging=staging)

    def _rehearse(self, model: nn.Module, chosen: list[Site]) -> tuple[Trained, ...]:
        if self.lora is None:
            return ()
        return rehearse(
            model,
            self.lora,
            quantized=[site.module for site in chosen],
            dtype=self.dtype,
            storage=self.quant.storage_for(self.dtype),
            shard=self.shard,
        )

    def _foresee(self, inventory: Inventory) -> None:
        """Note what the memory plan expects of loading; refuse, as `ConfigError`, what cannot fit this rank's GPU."""
        setting = Setting(
            world_size=self.ranks.world_size,
            placement=self.placement,
            shard=self.shard,
            quant=self.quant,
            lora=self.lora,
            dtype=self.dtype,
            compute_dtype=self.compute_dtype,
            device=self.device,
        )
        plan = make_plan(inventory, setting, training=None)
        host, device = predictions(plan, self.ranks.rank)["load"]
        self.report.predict("load", host=host, device=device)
        self.report.note_read_once_per_node(plan.read_once_per_node)
        if self.device.type == "cuda":
            check_fits(plan, free_memory(self.device))

    def _around_filling(self, meeting: Meeting, fill: Filling) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
        """The passes that need no weights, to run while the first are read, and those that do."""
        adapt: tuple[Pass, ...] = ()
        if self.lora is not None:
            later = partial(self._draw, fill) if draws_later(self.lora) else None
            adapt = (Adapt(lora=self.lora, dtype=self.dtype, rng_state=meeting.rng_state, later=later),)
        if self.placement == "sharded":
            assert isinstance(self.shard, FSDP2)
            assert meeting.mesh is not None
            return (*adapt, FullyShard(config=self.shard, mesh=meeting.mesh)), ()
        if self.lora is not None and needs_weights(self.lora):
            return (), adapt
        return adapt, ()

    def _draw(self, fill: Filling, initials: DeferredValues) -> None:
        """Draw what this rank will have of adapters: its shards, or all of them, on the CPU until FSDP takes them."""
        if self.placement != "sharded":
            fill.draw(initials, rows=range, device=torch.device("cpu"))
            return
        rows = partial(self._division.rows_of, self.ranks.rank)
        fill.draw(initials, rows=rows, device=self._residence.data_device)

    def _finish(self, model: nn.Module, meeting: Meeting) -> nn.Module:
        """Shard what is not sharded yet, and make adapters the same on all ranks that have them whole or twice."""
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.shard is None:
            convert(trainable, device=self.device)  # FSDP moves them itself
        passes: tuple[Pass, ...] = ()
        if isinstance(self.shard, FSDP1):
            passes = (Wrap(config=self.shard, device=self.device, dtype=self.dtype),)
        if isinstance(self.shard, FSDP2) and self.placement != "sharded":
            assert meeting.mesh is not None
            passes = (FullyShard(config=self.shard, mesh=meeting.mesh),)
        synced = isinstance(self.shard, FSDP1) and self.shard.sync_module_states
        if self.ranks.world_size > 1 and not synced and self.placement != "sharded":
            broadcast_from_rank0(trainable, device=self.device)
        with self._rebuild_patches(model):
            model = self._pipeline(passes, frozenset({"quantized-modules", "filled", "adapted"})).run(model)
        if self.placement == "sharded" and meeting.mesh is not None:
            fsdp2.share_among_replicas(trainable, meeting.mesh, device=self.device)
        return model

    def _pipeline(self, passes: tuple[Pass, ...], given: frozenset[str]) -> Pipeline:
        return Pipeline(passes=passes, given=given, report=self.report)  # type: ignore[arg-type]

    @property
    def _division(self) -> Partition:
        mesh = self.shard.mesh if isinstance(self.shard, FSDP2) else None
        return Partition.of(self.placement, world_size=self.ranks.world_size, mesh=mesh)

    @property
    def _residence(self) -> Devices:
        # Unsharded, nothing would move the weights from a CPU to the device later.
        placement = self.placement if self.shard is not None else "replicated"
        offload = self.shard is not None and self.shard.cpu_offload
        return Devices.of(placement, rank=self.ranks.rank, compute_device=self.device, cpu_offload=offload)

    def _build_patches(self) -> patches.Transaction:
        return patches.transaction(*BUILD_PATCHES, reason="PEFT and FSDP rebuild a 4-bit model that is partly on meta")

    def _rebuild_patches(self, model: nn.Module) -> patches.Transaction:
        fsdp1_on_cpu = isinstance(self.shard, FSDP1) and self.device.type == "cpu"
        return patches.transaction(
            patches.on("bitsandbytes.quant-state-to-noop", [module.quant_state for module in linear4bits(model)]),
            *BUILD_PATCHES,
            *(("torch.fsdp1-sync-on-cpu",) if fsdp1_on_cpu else ()),
            reason="FSDP rebuilds a 4-bit model that is partly on meta",
        )
