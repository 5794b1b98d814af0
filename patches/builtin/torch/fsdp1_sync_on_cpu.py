"""`torch.fsdp1-sync-on-cpu`: FSDP1's `sync_module_states=True` broadcasts CPU parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...registry import REGISTRY

__all__ = ["accept_cpu_states"]


def cpu_states_are_refused() -> bool:
    """Whether the check before the broadcast refuses a CPU tensor."""
    import torch
    from torch.distributed.fsdp import _init_utils

    try:
        _init_utils._check_module_states_for_sync_module_states([torch.zeros(1)])
    except ValueError:
        return True
    return False


def check_accepts_cpu_states() -> None:
    """Raise RuntimeError if FSDP still refuses CPU tensors on a process group that can carry them."""
    if cpu_states_are_refused() and _cpu_tensors_can_be_sent():
        raise RuntimeError("FSDP still refuses CPU states for sync_module_states=True")


@REGISTRY.register(
    "torch.fsdp1-sync-on-cpu",
    target="torch.distributed.fsdp._init_utils:_check_module_states_for_sync_module_states",
    reason="FSDP1 refuses sync_module_states=True for CPU parameters, even where gloo could broadcast them",
    upstream="https://github.com/pytorch/pytorch/pull/77492",
    requires={"torch": ">=2.1"},
    probe=cpu_states_are_refused,
    verify=check_accepts_cpu_states,
)
def accept_cpu_states(
    wrapped: Callable[..., None], _instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Let CPU tensors pass the check before `sync_module_states=True` broadcasts, if they can be sent.

    FSDP does not tell which process group it will use, so the default group is examined. Without a CPU backend
    (nccl alone) the stock ValueError is raised.
    """
    if not _cpu_tensors_can_be_sent():
        wrapped(*args, **kwargs)


def _cpu_tensors_can_be_sent() -> bool:
    import torch.distributed as dist

    if not dist.is_initialized():  # nothing is broadcast without one, so there is nothing to refuse
        return True
    return any(backend.startswith("cpu:") for backend in dist.get_backend_config().split(","))
