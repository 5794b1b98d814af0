"""A changed byte of packed experts, or of statistics that are parameters, is found and named on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import surgery
from surgery.comm.collectives import gather_objects
from surgery.quantizers.digest import Place, records_of
from surgery.sharding.base import strategy_of
from tests.distributed.attesting import forward
from tests.distributed.exactness import lora
from tests.helpers.models import save_tiny
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.distributed

STACK = "model.layers.1.mlp.experts.gate_up_proj"
STATISTICS = "model.layers.1.mlp.experts.down_proj_statistics"
DENSE = "model.layers.0.self_attn.q_proj.weight_statistics"

#: How ranks share the model, how it is quantized, and the parameters of which bytes are changed.
CASES: dict[str, tuple[Any, surgery.Quant, tuple[str, ...]]] = {
    "fsdp2": (surgery.FSDP2(), surgery.Quant(), (STACK, STATISTICS)),
    "fsdp2, all statistics sharded": (surgery.FSDP2(), surgery.Quant(shard_statistics=True), (STATISTICS, DENSE)),
    "fsdp2, in float32": (
        surgery.FSDP2(),
        surgery.Quant(shard_statistics=True, double_quant=False, quant_storage=torch.float32),
        (STATISTICS, DENSE),
    ),
    "fsdp1": (surgery.FSDP1(use_orig_params=True), surgery.Quant(), (STACK, STATISTICS)),
}


class Caught(NamedTuple):
    """What was changed, where, and the lines of the message of this rank that name something."""

    name: str
    rank: int
    in_forward: bool
    lines: tuple[str, ...]


def attest_all(folder: Path) -> dict[str, list[Caught]]:
    return {name: list(attest(folder, *case)) for name, case in CASES.items()}


def attest(folder: Path, shard: Any, quant: surgery.Quant, names: tuple[str, ...]) -> Iterator[Caught]:
    """Change bytes of `names`, on one rank after the other, and change them back; all else is as it was."""
    with surgery.qlora(folder, lora=lora(), quant=quant, shard=shard, report=surgery.Report()) as model:
        assert watched(model) == ()
        places = {record.fqn: place for place, record in records_of(model).items()}
        for name in names:
            for rank in range(dist.get_world_size()):
                piece = strategy_of(model).shards(model, [places[name]])[places[name]].piece
                held = gather_objects(piece.data.numel())[rank]  # of a small one FSDP1 may give a rank nothing
                for byte in (0, -1) if held else ():
                    change(piece.data, byte, on=rank)
                    yield Caught(name, rank, False, at_rest(model))
                    change(piece.data, byte, on=rank)
                hook = in_forward(places[name], on=rank)
                yield Caught(name, rank, True, watched(model))
                hook()
        assert (at_rest(model), watched(model)) == ((), ())


@torch.no_grad()
def change(data: torch.Tensor, byte: int, *, on: int) -> None:
    if dist.get_rank() == on:
        data.detach().view(-1).view(torch.uint8)[byte] ^= 4


def in_forward(place: Place, *, on: int) -> Callable[[], None]:
    """Change a byte of what is gathered, from now on; call what is returned to end it."""
    module, name = place
    return module.register_forward_pre_hook(lambda *_: change(getattr(module, name), 3, on=on)).remove


def at_rest(model: Any) -> tuple[str, ...]:
    try:
        surgery.attest(model)
    except surgery.AttestationError as error:
        return named(error)
    return ()


def watched(model: Any) -> tuple[str, ...]:
    try:
        with surgery.attesting(model) as watch, torch.no_grad():
            forward(model)
    except surgery.AttestationError as error:
        return named(error)
    assert watch.calls == len(records_of(model))
    return ()


def named(error: surgery.AttestationError) -> tuple[str, ...]:
    return tuple(line for line in str(error).splitlines() if line.startswith("  "))


def test_every_changed_byte_is_found_and_named(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    folder = save_tiny(tmp_path, "qwen3_moe", **sizes)
    by_rank = run_ranks(attest_all, 2, folder)
    assert by_rank[0] == by_rank[1]
    for case, found in by_rank[0].items():
        assert {(each.name, each.in_forward) for each in found} == set(product(CASES[case][2], (False, True)))
        assert len(found) == 2 * 2 * 3 or case == "fsdp1"
        for name, rank, in_forward, lines in found:
            where = "in forward" if in_forward else "at rest"
            (line,) = lines
            assert line.startswith(f"  {name}, {where}, rank"), (case, line)
            assert str(rank) in line.partition(", rank")[2].partition(":")[0], (case, line)
