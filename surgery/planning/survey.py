"""The inventory of a checkpoint's model: built on meta, its weights matched, its linear layers replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from surgery.adapters.rehearsal import Trained, rehearse
from surgery.checkpoint import Checkpoint
from surgery.model.skeleton import Skeleton, causal_lm
from surgery.model.tree import tied_parameters
from surgery.model.weights import plan_weights
from surgery.passes.replace import Replace, quantizable, transposed
from surgery.passes.shard import check_dtypes
from surgery.passes.targets import find_targets
from surgery.planning.inventory import Inventory, take_inventory
from surgery.planning.setting import Setting
from surgery.quantizers.bnb import BnbQuantizer
from surgery.sharding import guards

__all__ = ["survey"]


def survey(checkpoint: Checkpoint, setting: Setting, build: Callable[[], nn.Module] | None) -> Inventory:
    """Reads no weight. Raises what `surgery.qlora` raises before it reads one, so that what is planned can be done."""
    build = build or causal_lm(checkpoint, setting.dtype)
    model = Skeleton(build=build, dtype=setting.dtype, device=torch.device("cpu")).build_on_meta()
    weights = plan_weights(model, checkpoint, device=torch.device("cpu"))
    chosen = quantizable(model, setting.quant.skip_modules)
    tied = tied_parameters(model)
    guards.check_ties(setting.shard, tied, setting.world_size)
    trained: tuple[Trained, ...] = ()
    if setting.lora is not None:
        trained = rehearse(
            model,
            setting.lora,
            quantized=[site.module for site in chosen],
            dtype=setting.dtype,
            storage=setting.quant.storage_for(setting.dtype),
            shard=setting.shard,
        )
    quantizer = BnbQuantizer(quant=setting.quant, dtype=setting.dtype, compute_dtype=setting.compute_dtype)
    replaced = Replace(quantizer=quantizer, skip_modules=setting.quant.skip_modules).run(model)
    unsharded = check_dtypes(replaced, setting.shard, setting.dtype)
    targets = find_targets(
        replaced, weights.assignments, checkpoint.index, quantizer, tied=tied, transposed=transposed(chosen)
    )
    inventory = take_inventory(replaced, targets, trained, unsharded=unsharded)
    return replace(inventory, ignored=weights.ignored, initialized=weights.initialized)
