"""`accelerate.fsdp-on-cpu`: accelerate shards a model by FSDP2 on hosts without an accelerator."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ...registry import REGISTRY

__all__ = ["keep_fsdp"]


def fsdp_is_dropped_on_cpu() -> bool:
    """Whether accelerate takes FSDP for DDP where the ranks are on CPUs."""
    import inspect

    from accelerate.state import AcceleratorState

    branches = inspect.getsource(AcceleratorState.__init__).split("DistributedType.MULTI_GPU", 1)[-1]
    return "DistributedType.MULTI_CPU" not in branches


def check_takes_fsdp() -> None:
    """Raise RuntimeError if a state of CPU ranks is not changed to FSDP."""
    from types import SimpleNamespace

    from accelerate.utils import DistributedType

    state = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, _mixed_precision="no")
    if not take_fsdp(state, None) or state.distributed_type != DistributedType.FSDP:
        raise RuntimeError(f"expected a state of CPU ranks to become one of FSDP, found {state}")


@REGISTRY.register(
    "accelerate.fsdp-on-cpu",
    target="accelerate.state:AcceleratorState.__init__",
    reason=(
        "on ranks without an accelerator, accelerate takes FSDP for DDP and says nothing, so that a script cannot be "
        "tried without a GPU"
    ),
    upstream="https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/state.py",
    requires={"accelerate": ">=1.15,<1.16"},
    fingerprint="626c446220556f5c",
    probe=fsdp_is_dropped_on_cpu,
    verify=check_takes_fsdp,
)
def keep_fsdp(wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Make `AcceleratorState(fsdp_plugin=...)` on CPU ranks what it is on GPUs. For FSDP2; FSDP1 needs an accelerator.

    Collectives are gloo's. `accelerate launch --cpu --use_fsdp` refuses before it comes here: launch by torchrun.
    """
    wrapped(*args, **kwargs)
    from accelerate.state import PartialState

    asked = kwargs.get("fsdp_plugin") is not None or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if asked and take_fsdp(instance, kwargs.get("fsdp_plugin")):
        PartialState._shared_state["distributed_type"] = instance.distributed_type


def take_fsdp(state: Any, plugin: Any) -> bool:
    """Set on a `state` of CPU ranks what accelerate sets on one of GPUs; False if it is of others, or of one rank."""
    from accelerate.utils import DistributedType

    if state.distributed_type != DistributedType.MULTI_CPU:
        return False
    state.distributed_type = DistributedType.FSDP
    if state._mixed_precision != "no" and plugin is not None:
        plugin.set_mixed_precision(state._mixed_precision)
    state.fsdp_plugin = plugin
    return True
