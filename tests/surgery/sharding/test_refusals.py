"""What a strategy refuses, each by itself; nothing is opened, and there are no other ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy

from surgery.config import DDP, FSDP1, FSDP2, Quant
from surgery.errors import ConfigError
from surgery.model.tree import Site
from surgery.quantizers.base import QuantFormat, format_for
from surgery.sharding import base, fsdp2
from surgery.sharding.base import ShardStrategy, register, strategy_for

STORAGES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
CASTS = (None, torch.bfloat16, torch.float16, torch.float32)


def check_format(quant: Quant | None, shard: Any, dtype: torch.dtype, *, adapted: bool = False) -> None:
    strategy_for(shard, world_size=2).check_format(format_for(quant, dtype=dtype), adapted=adapted)


@pytest.mark.parametrize(
    ("shard", "placement"), [(None, "replicated"), (DDP(), "replicated"), (FSDP1(), "rank0-cpu"), (FSDP2(), "sharded")]
)
def test_placement_that_a_sharding_has_by_itself(shard: Any, placement: str) -> None:
    strategy = strategy_for(shard, world_size=2)
    strategy.check()
    assert strategy.placement == placement


def test_options_that_no_strategy_serves() -> None:
    with pytest.raises(ConfigError, match=r"shard: expected None or one of DDP, FSDP1, FSDP2.*; got 'fsdp2'"):
        strategy_for("fsdp2")
    with pytest.raises(ConfigError, match="expected None or one of"):
        strategy_for(FSDP2)  # the class, without its parentheses


def test_placement_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="placement must be one of sharded, rank0-cpu, replicated; got 'everywhere'"):
        strategy_for(FSDP2(), placement="everywhere")


@pytest.mark.parametrize(
    ("shard", "placement", "says"),
    [
        (None, "sharded", "without shard there is none to keep: use shard=FSDP2(), or placement='replicated'"),
        (None, "rank0-cpu", "leaves 1 of 2 ranks on meta, and without shard nothing would bring the weights to them"),
        (FSDP1(), "sharded", "FSDP1 makes its shards itself: use shard=FSDP2(), or placement='rank0-cpu'"),
        (FSDP2(), "rank0-cpu", "which FSDP2 does not do: use placement='sharded', where no rank holds more"),
        (DDP(), "rank0-cpu", "placement rank0-cpu leaves ranks without weights, and DDP runs the whole model on every"),
        (DDP(), "sharded", "use placement='replicated', or shard=FSDP2()"),
        (FSDP2(mesh=(2, 2)), "sharded", "mesh=(2, 2) needs 4 ranks (replicate x shard), but there are 2"),
        (FSDP1(strategy="hybrid-shard", mesh=(2, 2)), "replicated", "mesh=(2, 2) needs 4 ranks"),
        (FSDP1(sync_module_states=False), "rank0-cpu", "the ranks other than 0 would train on uninitialized memory"),
        (FSDP1(cpu_offload=True), "replicated", "here there is only a CPU"),
    ],
)
def test_what_cannot_work_together(shard: Any, placement: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        strategy_for(shard, world_size=2, placement=placement).check()


class Columns:
    """Options of a sharding that somebody else has made."""


class ByColumns(ShardStrategy):
    label = "columns"
    placements = ("sharded",)


@pytest.fixture
def columns() -> Iterator[Columns]:
    register(Columns, ByColumns)
    yield Columns()
    del base._STRATEGIES[Columns]


def test_placement_of_another_strategy(columns: Columns) -> None:
    strategy_for(columns).check()
    with pytest.raises(ConfigError, match="placement must be sharded for columns; got replicated: leave it out"):
        strategy_for(columns, placement="replicated").check()
    with pytest.raises(ConfigError, match=r"shard=Columns\(\) needs a process group: start with torchrun"):
        strategy_for(columns).check_group()


@pytest.mark.parametrize("quant", [Quant(), None], ids=str)
def test_ddp_without_adapters_has_nothing_to_average(quant: Quant | None) -> None:
    check_format(quant, DDP(), torch.bfloat16, adapted=True)
    with pytest.raises(ConfigError, match="DDP averages gradients, but without lora nothing is trained: pass lora="):
        check_format(quant, DDP(), torch.bfloat16)


def test_ddp_trains_whatever_adapters_there_are() -> None:
    for options in ({"use_dora": True}, {"trainable_token_indices": [3]}):
        strategy_for(DDP(), world_size=2).check_adapters(LoraConfig(target_modules=["q_proj"], **options))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("cast", CASTS)
def test_fsdp1_never_casts_packed_weights(storage: torch.dtype, cast: torch.dtype | None) -> None:
    """Of all combinations, those pass in which FSDP1 flattens the storage and leaves its bits alone."""
    shard = FSDP1(mixed_precision=None if cast is None else MixedPrecision(param_dtype=cast))
    quant = Quant(quant_storage=storage)
    if storage.is_floating_point and cast in (None, storage):
        check_format(quant, shard, torch.float32)
        return
    with pytest.raises(ConfigError, match=f"quant_storage={storage}"):
        check_format(quant, shard, torch.float32)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("cast", CASTS)
def test_fsdp2_never_casts_packed_weights(storage: torch.dtype, cast: torch.dtype | None) -> None:
    """Integers it leaves alone."""
    shard = FSDP2(mixed_precision=None if cast is None else MixedPrecisionPolicy(param_dtype=cast))
    quant = Quant(quant_storage=storage)
    if storage == torch.uint8 or cast in (None, storage):
        check_format(quant, shard, torch.float32)
        return
    with pytest.raises(ConfigError, match=f"quant_storage={storage}: FSDP2 would cast packed"):
        check_format(quant, shard, torch.float32)


def test_weights_that_are_not_packed_may_be_cast() -> None:
    cast = torch.bfloat16
    check_format(None, FSDP1(mixed_precision=MixedPrecision(param_dtype=cast)), torch.float32)
    check_format(None, FSDP2(mixed_precision=MixedPrecisionPolicy(param_dtype=cast)), torch.float32)


def test_integers_that_fsdp2_of_an_older_torch_cannot_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """As this torch is to a requirement of a later one."""
    monkeypatch.setattr(fsdp2, "SHARDS_INTEGERS", (99, 1))
    with pytest.raises(ConfigError, match=r"uint8 cannot be sharded by FSDP2 of torch .*use torch 99\.1 or later"):
        check_format(Quant(quant_storage=torch.uint8), FSDP2(), torch.bfloat16)
    check_format(Quant(quant_storage=torch.bfloat16), FSDP2(), torch.bfloat16)


@pytest.mark.parametrize(
    ("shard", "adapted", "says"),
    [
        (FSDP1(units="block", use_orig_params=True), True, "norms and adapters are torch.bfloat16"),
        (FSDP1(units="block"), False, "norms are torch.bfloat16"),
    ],
)
def test_blocks_of_several_dtypes(shard: FSDP1, adapted: bool, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_format(Quant(quant_storage=torch.float32), shard, torch.bfloat16, adapted=adapted)


def test_adapters_in_the_flat_parameter_of_a_block() -> None:
    with pytest.raises(ConfigError, match="which FSDP1 refuses without use_orig_params"):
        check_format(Quant(), FSDP1(units="block"), torch.bfloat16, adapted=True)


@pytest.mark.parametrize(
    ("shard", "placement", "option", "says"),
    [
        (FSDP1(), "replicated", {"use_dora": True}, "use_dora reads the base weight while the adapter runs"),
        (FSDP1(), None, {"use_dora": True}, "use_dora reads the base weight while the adapter runs"),
        (FSDP1(), None, {"trainable_token_indices": [3]}, "trainable_token_indices reads the base weight"),
    ],
)
def test_adapters_that_read_base_weights(shard: Any, placement: str | None, option: dict[str, Any], says: str) -> None:
    strategy = strategy_for(shard, world_size=2, placement=placement)
    strategy.check_adapters(LoraConfig(target_modules=["q_proj"]))
    for other in (FSDP2(), FSDP1(use_orig_params=True)):
        strategy_for(other, world_size=2).check_adapters(LoraConfig(target_modules=["q_proj"], **option))
    with pytest.raises(ConfigError, match=says):
        strategy.check_adapters(LoraConfig(target_modules=["q_proj"], **option))


@pytest.mark.parametrize(("strategy", "world_size"), [("no-shard", 2), ("full-shard", 1)])
def test_ties_that_fsdp1_would_lose(strategy: Any, world_size: int) -> None:
    tied = {"embed.weight": ("head.weight",), "norm.weight": ()}

    def check(shard: Any, tied: dict[str, tuple[str, ...]], ranks: int = world_size) -> None:
        strategy_for(shard, world_size=ranks).check_ties(tied)

    with pytest.raises(ConfigError, match=r"embed\.weight is tied to head\.weight.*use_orig_params=False"):
        check(FSDP1(strategy=strategy, use_orig_params=True), tied)
    check(FSDP1(strategy=strategy), tied)
    check(FSDP1(strategy=strategy, use_orig_params=True), {"norm.weight": ()})
    check(FSDP1(use_orig_params=True), tied, 2)
    check(DDP(), tied)


class Kept(nn.Module):
    """A model on meta with gates that upstream keeps in float32."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.layers = nn.ModuleList(
                nn.ModuleDict({"gate": nn.Linear(4, 4), "up": nn.Linear(4, 4, dtype=torch.bfloat16)}) for _ in range(2)
            )


GATES = {f"layers.{block}.gate.{name}" for block in range(2) for name in ("weight", "bias")}


@pytest.mark.parametrize(("shard", "whole"), [(FSDP1(), GATES), (FSDP2(), set()), (DDP(), set()), (None, set())])
def test_what_is_kept_in_another_dtype(shard: Any, whole: set[str]) -> None:
    quant: QuantFormat = format_for(None, dtype=torch.bfloat16)
    assert strategy_for(shard, world_size=2).check_model(Kept(), quant) == whole


def test_casting_what_is_kept_in_another_dtype() -> None:
    shard = FSDP2(mixed_precision=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match=r"would cast what transformers keeps in another dtype: layers\.0\.gate"):
        strategy_for(shard, world_size=2).check_model(Kept(), format_for(None, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("groups", "float32", "refused"),
    [
        (("0", "1"), (), None),
        (("0", "1"), ("0.0", "0.1"), None),
        (("0", "1"), ("0.0",), r"0\.0\.weight is float32"),
        (("0.0", "0", "1"), ("0.0",), None),
        (("0",), ("1.0",), r"1\.0\.weight is float32"),
    ],
)
def test_dtypes_that_groups_of_fsdp2_train(
    groups: tuple[str, ...], float32: tuple[str, ...], refused: str | None
) -> None:
    """Each parameter is of the innermost group that it is in; what is in none is the root's."""
    with torch.device("meta"):
        blocks = [nn.Sequential(*(nn.Linear(4, 4, bias=False, dtype=torch.bfloat16) for _ in range(2))) for _ in "01"]
        model = nn.Sequential(*blocks, nn.LayerNorm(4))
    for fqn in float32:
        model.get_submodule(fqn).to(torch.float32)
    model[2].requires_grad_(requires_grad=False)  # which is in float32, and not trained
    with nullcontext() if refused is None else pytest.raises(ConfigError, match=refused):
        fsdp2.check_groups(model, [Site(fqn=fqn, module=model.get_submodule(fqn)) for fqn in groups])


def test_a_parameter_in_two_groups_of_fsdp2() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)))
    model.get_submodule("0.1").weight = model.get_submodule("0.0").weight
    blocks = [Site(fqn=fqn, module=model.get_submodule(fqn)) for fqn in "01"]
    fsdp2.check_groups(model, blocks)
    model.get_submodule("1.1").weight = model.get_submodule("0.0").weight
    with pytest.raises(ConfigError, match=r"are one parameter, but are used in two groups of FSDP2"):
        fsdp2.check_groups(model, blocks)
