"""Parameters and groups of FSDP2 on which probes try what it does; made without a process group."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

__all__ = ["gathered_group", "gathered_param", "outcome"]


def gathered_param(module: Any, gathered: Any) -> Any:
    """An FSDPParam of the `weight` of a module, which holds its shard.

    gathered: the tensor that the whole weight is gathered into, 1-D; None makes one when it is known how large.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ShardedState
    from torch.distributed.tensor import Shard

    shard = module._parameters["weight"]
    parameter: Any = FSDPParam.__new__(FSDPParam)
    size = shard.size() if gathered is not None else (2 * shard.shape[0], *shard.shape[1:])
    parameter._module_info = SimpleNamespace(
        module=module, param_name="weight", shared_modules=[], shared_param_names=[]
    )
    parameter._orig_size, parameter._contiguous_orig_stride = size, shard.stride()
    parameter.all_gather_outputs = [] if gathered is None else [gathered]
    parameter._unsharded_inner_tensors = []
    shard._local_tensor = shard.data
    parameter.sharded_param, parameter.sharded_state = shard, ShardedState.SHARDED
    parameter.is_dtensor, parameter._unsharded_dtensor_spec, parameter._tp_spec = False, None, None
    parameter.orig_dtype, parameter.param_dtype = shard.dtype, None
    parameter.fsdp_placement = Shard(0)
    return parameter


def gathered_group() -> Any:
    """An FSDPParamGroup of two ranks, of two layers of two rows each, of which this rank holds one."""
    from torch import nn
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, TrainingState
    from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    group: Any = FSDPParamGroup.__new__(FSDPParamGroup)
    modules = [nn.Linear(columns, 1, bias=False) for columns in (2, 3)]
    group.fsdp_params = [gathered_param(module, None) for module in modules]
    mesh: Any = FSDPMeshInfo.__new__(FSDPMeshInfo)
    mesh.shard_mesh_size, mesh.shard_process_group = 2, SimpleNamespace(size=lambda: 2)
    group.mesh_info = group.post_forward_mesh_info = mesh
    group.comm_ctx, group.device_handle = SimpleNamespace(), SimpleNamespace(Event=_Event)
    group._sharded_state, group._training_state = ShardedState.SHARDED, TrainingState.PRE_BACKWARD
    group._module_fqn, group._num_param_groups = "specimen", 1
    return group


def outcome(wait: Any, to_sharded: Any, group: Any) -> list[Any]:
    """What a group is like once it has been gathered, and once it is sharded again; twice.

    wait, to_sharded: FSDP2's own methods, or what is to be put around them, called with the group.
    """
    found: list[Any] = []
    for start in (0.0, 100.0):
        group._all_gather_result = _result(start)
        wait(group)
        found.append([(*_state_of(each), each._unsharded_param.tolist()) for each in group.fsdp_params])
        to_sharded(group)
        found.append([_state_of(each) for each in group.fsdp_params])
    return found


def _result(start: float) -> Any:
    """An all-gather, that is done, of ten numbers from `start` on: five of either rank, two of them of the first layer."""
    import torch
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import AllGatherResult

    dtype = torch.float32
    return AllGatherResult(torch.arange(start, start + 10, dtype=dtype), None, None, [[dtype]] * 2, [[2], [3]], [2, 3])


def _state_of(parameter: Any) -> tuple[Any, ...]:
    held = parameter._module_info.module._parameters["weight"]
    tensor = parameter.all_gather_outputs[0]
    kept = "gathered" if held is parameter._unsharded_param else "shard" if held is parameter.sharded_param else "other"
    return kept, parameter.sharded_state, tensor.untyped_storage().nbytes(), tensor._version, held.requires_grad


class _Event:
    """An event that has been recorded, as those on a CPU are."""

    def record(self) -> None:
        pass
