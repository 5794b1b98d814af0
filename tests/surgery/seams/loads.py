"""Models in a format or a sharding of their own, on one rank or several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig

import surgery
from surgery.quantizers.base import register
from tests.surgery.seams.everywhere import Everywhere
from tests.surgery.seams.one_byte import OneByte, OneByteFormat

IDS = torch.arange(24).view(2, 12)

SHARDINGS: dict[str, Any] = {
    "one process": None,
    "FSDP1": surgery.FSDP1(),
    "FSDP1 with original parameters": surgery.FSDP1(use_orig_params=True),
    "FSDP2": surgery.FSDP2(),
    "DDP": surgery.DDP(),
    "everywhere": Everywhere(),
}


def norms(checkpoint: Path, quant: Any, shardings: list[str]) -> dict[str, tuple[float, int, str]]:
    """By sharding and adapters: the norm of the logits, layers attested, and their digest."""
    found = {}
    for name in shardings:
        for lora in (None, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)):
            if lora is None and name == "DDP":
                continue
            torch.manual_seed(0)
            with surgery.qlora(
                checkpoint, quant=quant, lora=lora, shard=SHARDINGS[name], report=surgery.Report()
            ) as model:
                attested = surgery.attest(model)
                with surgery.attesting(model), torch.no_grad():
                    norm = model(input_ids=IDS).logits.float().norm().item()
            found[f"{name}, {'adapted' if lora else 'plain'}"] = norm, len(attested.layers), attested.digest
    return found


def trained(checkpoint: Path, shard: Any, quant: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of four steps by SGD on all of `IDS`, over the ranks there are, and the adapters after them."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear")
    with surgery.qlora(
        checkpoint, quant=quant, lora=lora, shard=shard, dtype=torch.float32, report=surgery.Report()
    ) as model:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        mine = IDS[rank::world]
        losses = []
        for _ in range(4):
            loss = model(input_ids=mine, labels=mine).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(_mean(loss.detach(), world))
        return losses, surgery.adapter_state(model)


def _mean(value: torch.Tensor, world_size: int) -> float:
    if world_size > 1:
        dist.all_reduce(value)
    return value.item() / world_size


def trained_each(cases: dict[str, tuple[Path, Any, Any]]) -> dict[str, Any]:
    """`trained` for every case."""
    return {name: trained(*case) for name, case in cases.items()}


class StatelessOnRank1(OneByteFormat):
    """Cannot make its states on rank 1."""

    def states(self, statistics: Any, shapes: Any, dtypes: Any) -> list[Any]:
        if dist.get_rank() == 1:
            raise ValueError("on purpose")
        return super().states(statistics, shapes, dtypes)


def failing_states(checkpoint: Path, shardings: list[str]) -> list[str]:
    """By sharding: what `qlora` raised on this rank."""
    register(OneByte, StatelessOnRank1)
    found = []
    for name in shardings:
        try:
            surgery.qlora(checkpoint, quant=OneByte(), shard=SHARDINGS[name], report=surgery.Report())
        except surgery.SurgeryError as error:
            found.append(str(error))
        dist.barrier()
    return found
