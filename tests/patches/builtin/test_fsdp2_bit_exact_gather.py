"""`torch.fsdp2-bit-exact-gather`: the probe, the verification, and what the wrapper does with each kind of group."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group
from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState
from torch.multiprocessing.reductions import StorageWeakRef

import patches
from patches.builtin.torch import fsdp2_bit_exact_gather as patch_module
from patches.builtin.torch.fsdp2_bit_exact_gather import (
    _copy_in,
    check_gathers_exactly,
    copying_changes_bits,
    gather_as_integers,
)
from tests.helpers.rewritten_nans import HALF, nan_words, rewritten_nans

from .four_bit import unchanged

ID = "torch.fsdp2-bit-exact-gather"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Layer:
    """A 4-bit layer, so far as it is asked. Unlike a SimpleNamespace it can be referenced weakly."""

    def __init__(self) -> None:
        self.quant_state = "there"


FOUR_BIT, PLAIN = Layer(), SimpleNamespace()


def parameter(*inputs: torch.Tensor, module: Any = PLAIN, declared: torch.dtype | None = None, **differs: Any) -> Any:
    """As much of an FSDPParam as is asked for; `inputs` is what this rank contributes."""
    plain = {
        "param_dtype": None,
        "orig_dtype": declared or inputs[0].dtype,
        "offload_to_cpu": False,
        "sharded_state": ShardedState.SHARDED,
        "_sharded_param_data": inputs[0],
        "all_gather_inputs": list(inputs),
        "_module_info": SimpleNamespace(module=module),
    }
    return SimpleNamespace(**plain | differs)


def packed(dtype: torch.dtype = BF16, count: int = 300) -> Any:
    return parameter(nan_words(dtype, count), module=FOUR_BIT)


def other(dtype: torch.dtype = BF16, count: int = 7) -> Any:
    return parameter(torch.arange(count).to(dtype))


def gathered(*group: Any) -> Any:
    with rewritten_nans():
        return gather_as_integers(_copy_in, None, (list(group),), {})


def bits(*group: Any) -> torch.Tensor:
    tensors = [tensor for member in group for tensor in member.all_gather_inputs]
    return torch.cat([tensor.contiguous().view(torch.uint8) for tensor in tensors])


@pytest.fixture
def nothing_known() -> Iterator[dict[int, Any]]:
    gc.collect()
    known = patch_module._KNOWN
    known.clear()
    yield known
    known.clear()


def not_probed_yet() -> patches.Patch:
    """The patch once more: a probe runs once in the life of a process."""
    return dataclasses.replace(patches.get(ID), id="test.bit-exact-gather")


def test_the_probe_sees_nothing_on_a_cpu_and_the_patch_is_skipped_with_a_line_in_the_ledger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert not copying_changes_bits()
    with patches.transaction(not_probed_yet(), reason="a test") as tx:
        assert tx.receipts == []
        (line,) = tx.skipped
    assert (line.state, str(line.verdict)) == (patches.State.SKIPPED, "obsolete")
    assert "does not see the defect" in line.verdict.why


@pytest.mark.parametrize("dtype", HALF)
def test_the_probe_sees_either_type_rewritten(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch._foreach_copy_

    def rewrite_one_type(targets: Any, sources: Any) -> None:
        exact(targets, sources)
        for target in targets:
            if target.dtype == dtype:
                target.masked_fill_(target.isnan(), torch.nan)

    monkeypatch.setattr(torch, "_foreach_copy_", rewrite_one_type)
    assert copying_changes_bits()


def test_where_copies_rewrite_nans_the_patch_is_needed_applied_verified_and_undone() -> None:
    patch = not_probed_yet()
    with rewritten_nans(), unchanged(_fsdp_param_group, _fsdp_collectives):
        with patches.transaction(patch, reason="a test") as tx:
            assert str(tx.verdicts[patch.id]) == "needed"
            assert _fsdp_param_group.foreach_all_gather is not _fsdp_collectives.foreach_all_gather
        assert _fsdp_param_group.foreach_all_gather is _fsdp_collectives.foreach_all_gather


def test_the_verification_fails_where_integers_are_not_copied_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    with rewritten_nans():
        check_gathers_exactly()
        as_on_cuda = torch._foreach_copy_

        def flip_a_bit(targets: Any, sources: Any) -> None:
            as_on_cuda(targets, sources)
            targets[-1].view(torch.uint8)[-1] ^= 1

        monkeypatch.setattr(torch, "_foreach_copy_", flip_a_bit)
        with pytest.raises(RuntimeError, match=r"stored as torch\.bfloat16 are still changed"):
            check_gathers_exactly()


def test_the_verification_is_also_of_what_is_known_already(
    monkeypatch: pytest.MonkeyPatch, nothing_known: dict[int, Any]
) -> None:
    answers = []

    def ask(known: Any, group: list[Any]) -> bool:
        answers.append(is_of(known, group))
        return answers[-1]

    is_of = patch_module._Known.is_of
    monkeypatch.setattr(patch_module._Known, "is_of", ask)
    check_gathers_exactly()
    assert answers == [True, True]
    assert not nothing_known


def test_probe_and_verification_take_no_random_numbers() -> None:
    before = torch.random.get_rng_state()
    copying_changes_bits()
    check_gathers_exactly()
    assert torch.equal(torch.random.get_rng_state(), before)


def assert_as_stock(*group: Any) -> None:
    """What is returned has the fields and dtypes of stock, and the bytes that went in."""
    found, stock = gathered(*group), _copy_in(list(group))
    assert found._replace(all_gather_output=None) == stock._replace(all_gather_output=None)
    assert found.all_gather_output.dtype == stock.all_gather_output.dtype
    assert torch.equal(found.all_gather_output.view(torch.uint8), bits(*group))


@pytest.mark.parametrize("dtype", HALF)
def test_every_pattern_comes_back_and_the_result_is_as_stock(dtype: torch.dtype) -> None:
    assert_as_stock(other(dtype, 8), packed(dtype), packed(dtype, 2), other(dtype, 0))
    assert gathered(packed(dtype)).all_gather_output.dtype == dtype


def test_shards_that_are_no_whole_number_of_words_or_begin_within_one() -> None:
    assert_as_stock(packed(count=301), other())
    assert_as_stock(packed(), parameter(torch.arange(9).to(BF16)[1:]))


def test_without_the_patch_the_stand_in_changes_words() -> None:
    group = [packed(), other()]
    with rewritten_nans():
        found = _copy_in(group).all_gather_output
    assert not torch.equal(found.view(torch.uint8), bits(*group))


def test_a_group_of_several_dtypes_stays_one_of_bytes() -> None:
    assert_as_stock(packed(), other(FP32), packed(FP16))
    assert_as_stock(packed(), other(FP32), packed(FP16, 3))
    assert gathered(packed(), other(FP32)).all_gather_output.dtype == torch.uint8


def test_what_counts_is_what_an_extension_gathers_and_not_the_dtype_that_it_declares() -> None:
    """`fsdp_pre_all_gather` of a tensor subclass may give several tensors, of other dtypes than the parameter's."""
    in_bytes = (torch.arange(6, dtype=torch.uint8), torch.ones(3))
    of_one_type = (torch.ones(4, dtype=BF16), torch.ones(5, dtype=BF16))
    assert_as_stock(packed(), parameter(*in_bytes, declared=BF16, _extensions_data="there"))
    assert_as_stock(packed(), parameter(*of_one_type, declared=FP32, _extensions_data="there"))


@pytest.mark.parametrize(
    "differs",
    [{"offload_to_cpu": True}, {"sharded_state": ShardedState.SHARDED_POST_FORWARD}],
    ids=lambda d: next(iter(d)),
)
def test_what_is_not_gathered_as_it_is_held_is_taken_from_fsdp2(differs: dict[str, Any]) -> None:
    held_elsewhere = parameter(nan_words(BF16, 300), module=FOUR_BIT, _sharded_param_data=None, **differs)
    assert_as_stock(held_elsewhere, parameter(torch.ones(4, dtype=BF16), _sharded_param_data=None, **differs))


def assert_not_found_out_again(*group: Any) -> None:
    """What is gathered is as stock, and no shard had to be viewed for it."""
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(patch_module, "_as_integers", lambda _: pytest.fail("the shards were viewed again"))
        assert_as_stock(*group)


@pytest.mark.parametrize(
    "group", [[packed(), other(count=8)], [packed(count=301), other(FP32)]], ids=["words", "bytes"]
)
def test_a_group_is_viewed_once_and_follows_what_is_written_into_its_shards(group: list[Any]) -> None:
    assert_as_stock(*group)
    assert_not_found_out_again(*group)
    group[0]._sharded_param_data.copy_(group[0]._sharded_param_data.flip(0))
    assert_not_found_out_again(*group)


def words(count: int = 300) -> torch.Tensor:
    """Not those of `packed`."""
    return nan_words(BF16, count).flip(0)


def replace(member: Any) -> None:
    member._sharded_param_data = words()


def set_data(member: Any) -> None:
    member._sharded_param_data.data = words()


def set_memory(member: Any) -> None:
    member._sharded_param_data.set_(words())


def set_another_part(member: Any) -> None:
    shard = member._sharded_param_data
    shard.data = words(600)
    gathered(member)
    shard.set_(shard.untyped_storage(), 300, (300,))


def shorten(member: Any) -> None:
    member._sharded_param_data.data = member._sharded_param_data[:200]


def lengthen(member: Any) -> None:
    shard = member._sharded_param_data
    shard.data = words(600)[:300]
    gathered(member)
    shard.set_(shard.untyped_storage(), 0, (600,))


def move_memory(member: Any) -> None:
    """Away and back, as those do who free the memory of weights for a while."""
    storage = member._sharded_param_data.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    in_between = torch.empty(size, dtype=torch.uint8)
    storage.resize_(size)
    member._sharded_param_data.copy_(words())
    del in_between


def free_and_use_the_address_again(member: Any) -> None:
    """The memory of what is known is gone, and where it was is now that of the shard."""
    shard = member._sharded_param_data
    address, old = shard.data_ptr(), shard.untyped_storage()
    old.resize_(0)
    tried = []
    for _ in range(100):
        tried.append(words())
        if tried[-1].data_ptr() == address:
            break
    shard.data = tried[-1]


STALE: list[Callable[[Any], None]] = [
    replace,
    set_data,
    set_memory,
    set_another_part,
    shorten,
    lengthen,
    move_memory,
    free_and_use_the_address_again,
]


@pytest.mark.parametrize("position", [0, 1], ids=["first", "another"])
@pytest.mark.parametrize("change", STALE, ids=lambda change: change.__name__)
def test_what_is_known_is_not_used_where_a_shard_is_elsewhere(change: Callable[[Any], None], position: int) -> None:
    group = [packed(), packed(), other(count=8)]
    assert_as_stock(*group)
    # One that somebody else keeps is not gone, though the parameter does not have it any more.
    kept = group[position]._sharded_param_data
    change(group[position])
    group[position].all_gather_inputs = [group[position]._sharded_param_data]
    assert_as_stock(*group)
    assert_as_stock(*group)
    del kept


def test_a_shard_with_gaps_is_refused_as_if_nothing_were_known() -> None:
    """As many bytes, from the same address, but others."""
    group = [packed(), packed()]
    shard = group[1]._sharded_param_data
    shard.data = words(600)[:300]
    assert_as_stock(*group)
    shard.set_(shard.untyped_storage(), 0, (300,), (2,))
    with pytest.raises(RuntimeError, match="stride"):
        gathered(*group)


@pytest.mark.parametrize(
    "differs",
    [
        {"offload_to_cpu": True},
        {"sharded_state": ShardedState.SHARDED_POST_FORWARD},
        {"_extensions_data": "there"},
    ],
    ids=lambda d: next(iter(d)),
)
def test_what_is_known_is_not_used_where_a_parameter_contributes_something_else(differs: dict[str, Any]) -> None:
    group = [packed(), other(count=8)]
    assert_as_stock(*group)
    before = dict(vars(group[0]))
    vars(group[0]).update(differs, all_gather_inputs=[words()])
    assert_as_stock(*group)
    vars(group[0]).clear()
    vars(group[0]).update(before)
    assert_not_found_out_again(*group)


def test_what_is_known_is_not_used_where_a_parameter_is_cast() -> None:
    numbers = torch.arange(8.0)
    group = [packed(), parameter(numbers)]
    assert_as_stock(*group)
    # FSDP2 casts such parameters itself, all at once.
    cast = {"param_dtype": BF16, "_sharded_local_tensor": numbers, "device": numbers.device}
    vars(group[1]).update(cast, all_gather_inputs=[numbers.to(BF16)])
    assert_as_stock(*group)


def test_what_is_known_is_not_used_for_another_tensor_over_the_same_memory(nothing_known: dict[int, Any]) -> None:
    group = [packed(), packed()]
    assert_as_stock(*group)
    (before,) = nothing_known.values()
    kept = group[1]._sharded_param_data
    group[1]._sharded_param_data = kept.view(-1)
    assert_as_stock(*group)
    (after,) = nothing_known.values()
    assert after is not before


def test_groups_of_other_sizes_that_begin_with_the_same_parameter() -> None:
    first, second = packed(), packed(count=40)
    for group in ([first, second], [first], [first, second], [first, other(), second]):
        assert_as_stock(*group)


def test_groups_that_come_and_go() -> None:
    """Python gives new tensors the ids of old ones, and memory the addresses."""
    for number in range(300):
        shards = [words(40).roll(number), words(8).roll(number)]
        assert_as_stock(*(parameter(shard, module=FOUR_BIT) for shard in shards))


@pytest.mark.parametrize("position", [0, 1], ids=["first", "another"])
def test_memory_is_free_as_soon_as_a_shard_is_replaced(position: int, nothing_known: dict[int, Any]) -> None:
    group = [packed(), packed()]
    assert_as_stock(*group)
    assert len(nothing_known) == 1
    memory = StorageWeakRef(group[position]._sharded_param_data.untyped_storage())
    assert not memory.expired()
    group[position].all_gather_inputs = [words()]
    replace(group[position])
    assert memory.expired()
    assert not nothing_known
    assert_as_stock(*group)


def test_a_model_is_free_though_its_shards_lead_to_it(nothing_known: dict[int, Any]) -> None:
    """Any tensor may have attributes, as those of bitsandbytes have their module."""
    shard: Any = words().clone()  # a view would refer to something else
    member = shard.parameter = parameter(shard, module=FOUR_BIT)
    assert_as_stock(member)
    assert len(nothing_known) == 1
    memory = StorageWeakRef(shard.untyped_storage())
    del shard, member
    gc.collect()
    assert memory.expired()
    assert not nothing_known


@pytest.mark.parametrize("inference_first", [True, False])
def test_inference_mode_makes_no_difference(inference_first: bool) -> None:
    group = [packed(), other(count=8)]
    for inference in (inference_first, not inference_first, inference_first):
        with torch.inference_mode(inference):
            assert_as_stock(*group)


def test_what_is_no_plain_memory_is_not_remembered(nothing_known: dict[int, Any]) -> None:
    class Special(torch.Tensor):
        pass

    special = nan_words(BF16, 300).as_subclass(Special)
    assert_as_stock(parameter(special, module=FOUR_BIT), other())
    on_meta = [parameter(torch.empty(4, dtype=BF16, device="meta"), module=FOUR_BIT)]
    for _ in range(2):
        assert gather_as_integers(_copy_in, None, (on_meta,), {}).all_gather_output.is_meta
    assert not nothing_known


def test_in_a_compiled_region_nothing_is_remembered_and_nothing_known_is_used(nothing_known: dict[int, Any]) -> None:
    group = [packed(), other(count=8)]

    def gather(x: torch.Tensor) -> torch.Tensor:
        return gather_as_integers(_copy_in, None, (group,), {}).all_gather_output.view(torch.int16) + x

    zero = torch.zeros((), dtype=torch.int16)
    torch.compiler.reset()
    compiled: Any = torch.compile(gather, backend="eager", fullgraph=True)
    expected = bits(*group).view(torch.int16)
    assert torch.equal(compiled(zero), expected)
    assert not nothing_known
    assert torch.equal(gather(zero), expected)
    assert len(nothing_known) == 1
    torch.compiler.reset()
    assert torch.equal(compiled(zero), expected)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "group",
    [
        pytest.param([other(), other()], id="no 4-bit layer"),
        pytest.param([parameter(torch.ones(3), module=FOUR_BIT), other(FP32)], id="storage that is copied exactly"),
    ],
)
def test_other_groups_are_left_to_stock(group: list[Any]) -> None:
    calls: list[Any] = []

    def stock(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))

    gather_as_integers(stock, None, (group, "more"), {"by": "name"})
    assert calls == [((group, "more"), {"by": "name"})]
    assert calls[0][0][0] is group


def test_the_group_may_be_given_by_name() -> None:
    group = [packed(), other()]
    with rewritten_nans():
        found = gather_as_integers(_copy_in, None, (), {"fsdp_params": group})
    assert torch.equal(found.all_gather_output.view(torch.uint8), bits(*group))


def test_of_two_models_only_the_layers_given_are_in_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fsdp_param_group, "foreach_all_gather", _copy_in)
    ours, theirs = Layer(), Layer()
    groups = [[parameter(nan_words(BF16, 300), module=module), other()] for module in (ours, theirs)]
    with rewritten_nans(), patches.transaction(ID, on=[ours], reason="a test", force=True, count_calls=True) as tx:
        gather: Any = _fsdp_param_group.foreach_all_gather
        found = [gather(group).all_gather_output for group in groups]
    same = [torch.equal(buffer.view(torch.uint8), bits(*group)) for buffer, group in zip(found, groups, strict=True)]
    assert same == [True, False]
    assert tx.receipts[0].calls == 1
