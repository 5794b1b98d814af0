"""`torch.fsdp2-bit-exact-gather`: the probe, the verification, and what the wrapper does with each kind of group."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group
from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState

import patches
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
    return torch.cat([tensor.view(torch.uint8) for member in group for tensor in member.all_gather_inputs])


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
