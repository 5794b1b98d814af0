"""`torch.fsdp2-alike-parameters`."""

from __future__ import annotations

import gc
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.testing._internal.distributed.fake_pg import FakeStore

import patches
from surgery.integrations.torch import fsdp2_alike_parameters
from tests.patches.builtin.four_bit import unchanged

ID = "torch.fsdp2-alike-parameters"
RANKS = 3  # some of them have less of 5, 7 and 2 rows, or nothing
BLOCKS = 5


class Block(nn.Module):
    """Frozen and trained parameters of several shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 7, bias=False).requires_grad_(requires_grad=False)
        self.trained = nn.Linear(4, 5, dtype=torch.bfloat16)
        self.few = nn.Parameter(torch.empty(2, 3))


def sharded(**options: Any) -> list[Any]:
    """The `FSDPParam`s of a model that is sharded on meta."""
    with torch.device("meta"):
        model = nn.Sequential(*(Block() for _ in range(BLOCKS)))
    for each in (*model, model):
        fully_shard(each, **options)
    groups = [fully_shard.state(block)._fsdp_param_group for block in model]  # type: ignore[attr-defined]
    return [parameter for group in groups for parameter in group.fsdp_params]


def described(parameter: Any) -> dict[str, Any]:
    """All that an `FSDPParam` has, in a form that is equal for two that mean the same."""
    own = {"_orig_param_uid": int, "_post_load_hook_handle": object, "_module_info": object}
    found = {name: own.get(name, value) for name, value in vars(parameter).items()}
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            kept = (value.shape, value.stride(), value.dtype, value.device, value.requires_grad, value.is_leaf)
            found[name] = (*kept, type(value), isinstance(value, nn.Parameter), getattr(value, "_spec", None))
    return found


CAST: dict[str, Any] = {
    "reshard_after_forward": False,
    "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16),
}


@pytest.mark.parametrize(
    ("rank", "options"), [(0, {}), (1, CAST), (2, {}), (2, {"offload_policy": CPUOffloadPolicy(pin_memory=False)})]
)
def test_makes_what_upstream_makes(rank: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()  # models of other tests
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        expected = sharded(mesh=mesh, **options)
        filling = Mock(wraps=fsdp2_alike_parameters._fill)
        with unchanged(_fsdp_param), patches.transaction(ID, reason="test"):
            monkeypatch.setattr(fsdp2_alike_parameters, "_fill", filling)
            made = sharded(mesh=mesh, **options)
        assert list(map(described, made)) == list(map(described, expected))
        assert filling.call_count == (BLOCKS - 2) * 4
        for parameter in made:
            info = parameter._module_info
            assert info.module._parameters[info.param_name] is parameter.sharded_param
        assert len({id(parameter.sharded_param) for parameter in made}) == len(made)
        assert len({id(parameter.all_gather_outputs) for parameter in made}) == len(made)
    finally:
        dist.destroy_process_group()


def test_forgets_a_model_that_is_gone() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    try:
        with patches.transaction(ID, reason="test"):
            made = sharded(mesh=init_device_mesh("cpu", (RANKS,)))
        assert made
        assert fsdp2_alike_parameters._kinds
        del made
        gc.collect()
        assert not fsdp2_alike_parameters._kinds
    finally:
        dist.destroy_process_group()
